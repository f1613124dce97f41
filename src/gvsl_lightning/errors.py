"""The one exception that a user is meant to read, and the sentence about a misspelt name."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """Bad input: one sentence that names the file or setting, what is wrong and what to do.

    The command line prints the sentence alone, without a traceback, and exits with status 2.

    Attributes:
        key: with which the sentence begins if it is about a setting, such as ``backbone`` or
            ``corruption.shufling_rate``; the command line adds where it is given.
    """

    key: str | None = None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def unknown_option(
    key: str, owner: str, valid: Iterable[str], place: str = "", listed: str | None = None
) -> InputError:
    """Error of a key that does not exist.

    Args:
        key: dotted.
        owner: what has no such option.
        valid: the last parts of the keys that exist.
        place: where the key is given, such as ``in FILE``.
        listed: where many valid ones can be read, a sentence's end.
    """
    prefix, dot, name = key.rpartition(".")
    dashes = "--" if not dot and name.startswith("--") else ""
    advice = nearest(name.removeprefix("--"), valid, f"{prefix}{dot}{dashes}", listed)
    error = InputError(f"{f'{key} {place}'.strip()} is no option of {owner}; {advice}")
    error.key = None if place else key
    return error


def unknown_name(key: str, name: str, valid: Iterable[str]) -> InputError:
    """Error of a setting whose value is none of the names that exist.

    Args:
        key: of the setting.
        name: its value.
        valid: the names.
    """
    error = InputError(f"{key} is {name!r}, which does not exist; {nearest(name, valid)}")
    error.key = key
    return error


def nearest(name: str, valid: Iterable[str], prefix: str = "", listed: str | None = None) -> str:
    """End of a sentence about a misspelt name: the nearest valid one, or else all if they are few.

    Args:
        name: as it is given.
        valid: names that exist.
        prefix: what stands before the nearest one.
        listed: the end where none is near and there are many; None: all of them, too.
    """
    names = sorted(set(valid))
    if close := get_close_matches(name, names, n=1):
        return f"did you mean {prefix}{close[0]}?"
    if listed is not None and (len(names) > _FEW or not listed):
        return listed
    return f"choose one of {', '.join(names)}." if names else "it takes none."


_FEW = 12


def check_options(
    key: str, owner: str, options: Mapping[str, Any], *takers: Callable[..., Any]
) -> None:
    """Compare the keys of a dictionary of options with the parameters of what takes them.

    Nothing is known of the options of what passes them on (``**options``) to no further taker.

    Args:
        key: of the dictionary.
        owner: name of what takes the options, for the sentence.
        options: name -> value.
        takers: class or function whose parameters they are, and that which it passes others on to.

    Raises:
        InputError: if one is no parameter of any.
    """
    signatures = [inspect.signature(taker).parameters for taker in takers]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signatures[-1].values()):
        return
    parameters = [parameter for signature in signatures for parameter in signature.values()]
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    for name in options:
        if name not in known:
            raise unknown_option(f"{key}.{name}", owner, known)
