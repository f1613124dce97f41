"""Errors of bad input: one sentence that names the setting or file, the fault and the remedy."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any


class InputError(ValueError):
    """Bad input: one sentence that names the file or setting, what is wrong and what to do.

    The command line prints the sentence without a traceback and exits with status 2.

    Attributes:
        key: the setting that the sentence begins with, such as ``backbone`` or
            ``corruption.shuffling_rate``; None if the sentence is not about a setting. The command
            line adds the file or the words that give this setting.
    """

    key: str | None = None

    @classmethod
    def about(cls, key: str, sentence: str) -> "InputError":
        """Make an error about a setting.

        Args:
            key: of the setting.
            sentence: the rest of the sentence, which follows the key.
        """
        error = cls(f"{key} {sentence}")
        error.key = key
        return error


def check_range(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Compare a number with its bounds.

    Args:
        name: of the setting.
        value: given.
        low: smallest allowed value.
        high: largest allowed value.
        above: the value must be larger than this one.
        below: the value must be smaller than this one.

    Raises:
        InputError: if the value is out of range or not finite.
    """
    inside = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if inside:
        return
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (
            ("at least", low),
            ("above", above),
            ("at most", high),
            ("below", below),
        )
        if bound is not None
    ]
    wanted = f"a number {' and '.join(bounds)}" if bounds else "a finite number"
    raise InputError.about(name, f"is {value}; give {wanted}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Look a value up among the allowed ones, such as the keys of a registry.

    Args:
        name: of the setting.
        value: given.
        choices: allowed values.

    Raises:
        InputError: if the value is not among them; the sentence names the nearest one.
    """
    names = list(choices)
    if value not in names:
        raise InputError.about(name, f"is {value!r}; {nearest(str(value), names)}")


def check_options(
    key: str, owner: str, options: Mapping[str, Any], *takers: Callable[..., Any]
) -> None:
    """Compare the keys of a dictionary of options with the parameters of the callables it is for.

    If the last callable takes ``**kwargs``, nothing is checked.

    Args:
        key: of the dictionary.
        owner: name of the class or function, for the sentence.
        options: name -> value.
        takers: the callable, and further ones that it passes options on to.

    Raises:
        InputError: if an option is a parameter of none of them.
    """
    signatures = [inspect.signature(taker).parameters for taker in takers]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signatures[-1].values()):
        return
    parameters = [parameter for signature in signatures for parameter in signature.values()]
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    for name in options:
        if name not in known:
            raise unknown_option(f"{key}.{name}", owner, known)


def unknown_option(
    key: str, owner: str, valid: Iterable[str], place: str = "", listed: str | None = None
) -> InputError:
    """Make the error of a key that does not exist.

    Args:
        key: dotted.
        owner: the class or file that has no such option.
        valid: the last parts of the keys that exist.
        place: where the key is given, such as ``in FILE``.
        listed: end of the sentence that names a page with all keys, for long lists.
    """
    prefix, dot, name = key.rpartition(".")
    dashes = "--" if not dot and name.startswith("--") else ""
    advice = nearest(name.removeprefix("--"), valid, f"{prefix}{dot}{dashes}", listed)
    error = InputError(f"{f'{key} {place}'.strip()} is no option of {owner}; {advice}")
    error.key = None if place else key
    return error


def nearest(name: str, valid: Iterable[str], prefix: str = "", listed: str | None = None) -> str:
    """End of a sentence about a misspelt name: the nearest valid name, or else a list of all.

    Args:
        name: as it is given.
        valid: names that exist.
        prefix: stands before the nearest name.
        listed: the end for a long list without a near name; None: list all names.
    """
    names = sorted(set(valid))
    if close := get_close_matches(name, names, n=1):
        return f"did you mean {prefix}{close[0]}?"
    if listed is not None and (len(names) > _FEW or not listed):
        return listed
    return f"choose one of {', '.join(names)}." if names else "it takes none."


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, its ``__cause__``, the cause of that, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def cause_of(error: BaseException) -> str:
    """First line of the innermost cause of an exception; SimpleITK's has other lines above it."""
    *_, error = causes(error)
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if lines[0].startswith("Exception thrown in SimpleITK"):
        line = next((line for line in lines if "ERROR: " in line), lines[-1])
        return re.sub(r"\w+\(0x\w+\): ", "", line.rpartition("ERROR: ")[-1])
    return lines[0]


_FEW = 12
