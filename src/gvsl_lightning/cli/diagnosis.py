"""Sentences about wrong words and files of a command line: key, place and nearest spelling.

The message of jsonargparse names the key, the class and the expected types, but neither the file
nor the nearest spelling. :func:`diagnose` reads the message, and finds the key in the files and
words.
"""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pydoc import ErrorDuringImport, locate
from typing import Any, NamedTuple, NoReturn

import pytorch_lightning as pl
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

from gvsl_lightning.cli.sources import Setting, settings, shorten
from gvsl_lightning.errors import InputError, nearest, unknown_option


def parse(
    parser: ArgumentParser,
    words: Sequence[str],
    taken: Collection[str] | None = None,
    commands: Mapping[str, ArgumentParser] | None = None,
) -> Namespace:
    """Parse the words of a command line.

    A ``class_path`` is taken where an option's type is a class, and names one derived from that;
    elsewhere it is a text like any other, and nothing that runs commands is imported for one.

    Args:
        parser: made with ``exit_on_error=False``, like those of its subcommands.
        words: without the program's name.
        taken: the keys that are taken from configuration files; all of them if None.
        commands: name -> parser of each subcommand.

    Raises:
        InputError: about the first fault: its key, the file, the nearest spelling.
    """
    # a denylist of our own, though empty, is what makes jsonargparse's refuse instead of warn
    set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
    commands = commands or {}
    command = next((word for word in words if word in commands), "")
    given = settings(words, command, taken)  # raises if a file cannot be read
    own_parser = commands.get(command, parser)
    try:
        parsed = parser.parse_args(list(words))
        own = parsed[command] if command else parsed
        for group in {key.partition(".")[0] for key in _keys(own_parser) if "." in key}:
            if not isinstance(own.get(group), Namespace):  # which jsonargparse accepts
                raise argparse.ArgumentError(None, f'Parser key "{group}": no options')
        return parsed
    except (argparse.ArgumentError, OmegaConfBaseException, UnicodeDecodeError) as error:
        program = f"{parser.prog} {command}".strip()
        if commands and not command:
            raise InputError(f"A command is missing; see {program} --help.") from error
        raise diagnose(error, own_parser, program, given) from error


def diagnose(
    error: Exception, parser: ArgumentParser, program: str, given: Sequence[Setting]
) -> InputError:
    """Make a sentence about a parser's error.

    Args:
        error: raised by jsonargparse or OmegaConf.
        parser: of the command.
        program: the words before the options.
        given: the settings of files and words, in their order.
    """
    diagnosis = _Diagnosis(str(error), _keys(parser), program, given[::-1])
    if isinstance(error, OmegaConfBaseException):
        return diagnosis.interpolation(error.full_key or "")
    found = diagnosis.unknown_option() or diagnosis.wrong_class() or diagnosis.wrong_value()
    return found or InputError(f"{reason(error)}; see {program} --help.")


def call(function: Callable[..., Any], program: str, words: Sequence[str]) -> None:
    """Call a function with the options of a command line, or of a ``--config`` file.

    Args:
        function: whose parameters are the options.
        program: the words before them.
        words: the options.

    Raises:
        InputError: as in :func:`parse`.
    """
    parser = ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_function_arguments(function, as_positional=False)
    options = parse(parser, words).as_dict()
    del options["config"]
    function(**options)


class WordsParser(argparse.ArgumentParser):
    """Parser of a tool that passes on the words that it does not know."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as an InputError, without the usage."""
        raise InputError(f"{message}; see {self.prog} --help.")


def reason(error: BaseException) -> str:
    """Return the innermost line of a parser's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = max(lines, key=lambda line: len(line) - len(line.lstrip())).strip(" -.:")
    if missing := line.partition("the following arguments are required: ")[2]:
        names = " and ".join(f"--{name.rpartition('.')[2]}" for name in missing.split(", "))
        return f"{names} must be given{', here or in a --config file' * ('.' in missing)}"
    return line


def with_place(sentence: str, key: str, words: Sequence[str]) -> str:
    """Add the whole key and its place to a sentence about a key of nested options.

    Args:
        sentence: begins with the key.
        key: the last parts of the dotted key.
        words: of the command line.
    """
    for setting in reversed(settings(words)):
        if f".{setting.key}".endswith(f".{key}"):
            group, dot, _ = key.rpartition(".")
            above = setting.name.removesuffix(key)
            if not dot:
                return sentence.replace(key, f"{above}{key} {setting.place}", 1)
            full = sentence.replace(f"{group}.", f"{above}{group}.")
            return full.replace(key, f"{key} {setting.place}", 1)
    return sentence


def find_class(path: str, *bases: type) -> type | None:
    """Return the class with a name or import path, if it is derived from one of the bases."""
    try:
        named = (kind for kind in _derived(bases) if kind.__name__ == path)
        found = locate(path) if "." in path else next(named, None)
    except ErrorDuringImport:
        return None
    return found if isinstance(found, type) and issubclass(found, bases) else None


class _Diagnosis(NamedTuple):
    """Finds the sentence about a message of jsonargparse.

    Attributes:
        message: of the error.
        keys: of the command.
        program: the words before the options.
        given: the settings of files and words, the last one first.
    """

    message: str
    keys: Sequence[str]
    program: str
    given: Sequence[Setting]

    def unknown_option(self) -> InputError | None:
        """Sentence about an option that does not exist."""
        if not (match := _UNKNOWN_OPTION.search(self.message)):
            return None
        name = next(filter(None, match.groups()))
        before = self.message[: match.start()]
        if classes := _CLASS_PATH.findall(before):
            slot = ".".join(_PARSER_KEY.findall(before))
            setting = self._find(f"{slot}.{name}")
            valid = _options(find_class(classes[-1], object))
            if not valid:
                return InputError(f"{self._find(slot)} has no class_path; add it.")
            if not setting.key.endswith(f".init_args.{name}"):
                valid += ["class_path", "init_args"]
            owner = classes[-1].rpartition(".")[2]
            listed = f"{self.program} --{slot}.help={owner} lists all."
        else:
            group = ""
            while (part := name.removeprefix(group).partition(".")[0]) in self._parts(group):
                group = f"{group}{part}."
            setting, valid = self._find(f"{group}{part}"), self._parts(group)
            owner = group.strip(".") or self.program.split()[-1]
            listed = f"{self.program} --help lists all."
        wrong = setting.name.rpartition(".")[2].removeprefix("--")
        if not nearest(wrong, valid, listed=""):
            dashes = "--" * setting.name.startswith("--")
            for key in self._all_keys():
                if key.rpartition(".")[2] == wrong:
                    advice = f"did you mean {dashes}{key}?"
                    return InputError(f"{setting} is no option of {owner}; {advice}")
        return unknown_option(setting.name, owner, valid, setting.place, listed)

    def wrong_class(self) -> InputError | None:
        """Sentence about a ``class_path`` that names no class of the right kind."""
        if not (match := _WRONG_CLASS.search(self.message)):
            return None
        name = next(filter(None, match.groups()))
        before = self.message[: match.start()]
        types = before.rpartition("Subtypes: ")[2].partition("\n")[0]
        paths = dict.fromkeys(re.findall(r"[\w.]+\.[A-Z]\w+", types))
        found = [locate(path) for path in paths if not path.startswith("collections.")]
        setting = self._find(".".join(_PARSER_KEY.findall(before)), name)
        known = _BASES.get(setting.name.removeprefix("--"), [])
        bases = [kind for kind in found if isinstance(kind, type)] or known
        valid = {kind.__name__ for kind in _derived(bases) if kind.__name__[0] != "_"}
        owner = " or ".join(kind.__name__ for kind in bases) or "class of the right kind"
        otherwise = "give the path of one that can be imported."
        advice = nearest(name.rpartition(".")[2], valid, listed=otherwise)
        return InputError(f"{setting} is {name}, which is no {owner}; {advice}")

    def wrong_value(self) -> InputError | None:
        """Sentence about a value of the wrong type."""
        parts, end, indent = list[str](), 0, -1
        for match in re.finditer(r'^( *)(?:- )?Parser key "([\w.]+)"', self.message, re.MULTILINE):
            if len(match[1]) > indent and match[2] not in parts[-1:]:
                indent, end = len(match[1]), match.end()
                parts.append(match[2])
        if not parts:
            return None
        key = ".".join(parts)
        if "has no attribute 'keys'" in self.message:
            key = f"{key}.init_args"
        setting = self._find(key)
        inner = next((known for known in self.keys if known.startswith(f"{key}.")), None)
        tail = re.split(rf"\n {{0,{indent}}}\S|Given value type", self.message[end:])[0]
        expected = list(filter(None, chain(*_EXPECTED.findall(tail))))
        names = [one for one in expected if one[0] != "'"]
        choices = [c for one in expected if one[0] == "'" for c in re.findall("'([^']+)'", one)]
        wanted = dict.fromkeys([*(_IN_WORDS.get(one, f"a {one}") for one in names), *choices])
        if inner or key.endswith(".init_args"):
            advice = f"give options{f' such as {setting.dashes}{inner}' * bool(inner)}."
        elif wanted.keys() - {"null"}:
            advice = f"give {' or '.join(wanted)}."
        else:
            advice = f"{reason(ValueError(tail))}."
        advice = nearest(str(setting.value), choices, listed=advice) if choices else advice
        return InputError(f"{setting} is {shorten(setting.value)}; {advice}")

    def interpolation(self, key: str) -> InputError:
        """Sentence about a ``${...}`` that stands for nothing, in the value of a key."""
        known = {*self.keys, *(setting.key for setting in self.given)}
        cause = self.message.splitlines()[0].rpartition("while resolving interpolation: ")[2]
        for setting in self.given:
            if not f".{key}".endswith(f".{setting.key}") or "${" not in str(setting.value):
                continue
            for name in re.findall(r"\$\{([\w.]+)\}", str(setting.value)):
                if not name.startswith(".") and name not in known:
                    advice = nearest(name, known, listed="correct it.")
                    fault = f"is {setting.value}, but there is no {name}; {advice}"
                    return InputError(f"{setting} {fault}")
            key = f"{setting} is {setting.value}"
            break
        return InputError(f"{key}: {cause.strip(chr(34))}.")

    def _find(self, key: str, value: Any = None) -> Setting:
        """The setting with a key, without counting ``init_args`` and indices.

        Args:
            key: dotted.
            value: of the setting, whose key then begins with the other; None: the value that is in
                the message, or else the last one.
        """
        found = []
        for setting in self.given:
            short = re.sub(r"\.init_args(?=\.)|\[\d+\]", "", setting.key)
            if value is not None and setting.value == value and short.startswith(key):
                return setting
            if value is None and key in (short, setting.key):
                found.append(setting)
        named = (setting for setting in found if str(setting.value) in self.message)
        return next(named, found[0] if found else Setting(key, value, ""))

    def _parts(self, group: str) -> list[str]:
        """The next parts of all keys that begin with a group and its dot."""
        keys = (key.removeprefix(group) for key in self.keys if key.startswith(group))
        return list(dict.fromkeys(key.partition(".")[0] for key in keys))

    def _all_keys(self) -> Iterator[str]:
        """The keys of the command, and those of the model and the data."""
        yield from self.keys
        for setting in self.given:
            slot = setting.key.removesuffix(".class_path")
            if slot in ("model", "data") and isinstance(setting.value, str):
                kind = find_class(setting.value, pl.LightningModule, pl.LightningDataModule)
                for option in _options(kind):
                    yield f"{slot}.init_args.{option}"


_PARSER_KEY = re.compile(r'Parser key "([\w.]+)"')
_CLASS_PATH = re.compile(r"given class_path '([^']+)'")
_UNKNOWN_OPTION = re.compile(
    r"Option '([\w.]+)' is not accepted|not accept option '([\w.]+)'"
    r"|unrecognized arguments: --([\w.]+)"
)
_WRONG_CLASS = re.compile(
    r"Expected a dot import path string: (\S+)|Import path (\S+) does not correspond"
    r"|given class_path '([^']+)':\s+(?:module|No module)"
)
_EXPECTED = re.compile(
    r"Expected a <class '(?:\w+\.)*(\w+)'>|Expected a typing\.Literal\[(.*)\]"
    r"|Not of type (\w+)|Not a valid subclass of (\w+)"
)
_IN_WORDS = {
    "int": "a whole number",
    "PositiveInt": "a whole number above 0",
    "float": "a number",
    "bool": "true or false",
    "str": "text in quotes",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "Iterable": "a list",
    "Sequence": "a list",
    "dict": "options, key: value",
}


_BASES: dict[str, list[type]] = {
    "data": [pl.LightningDataModule],
    "model": [pl.LightningModule],
}
"""Key -> base of the classes that it takes, for messages of the parser that do not list them."""


def _keys(parser: ArgumentParser) -> list[str]:
    """Dotted keys of all options of a parser; none if a default of its own is wrong."""
    try:
        keys = vars(parser.get_defaults().as_flat())
    except (TypeError, ValueError):
        return []
    return list(dict.fromkeys(re.sub(r"\.(class_path|init_args.*)$", "", key) for key in keys))


def _options(kind: type | None) -> list[str]:
    """Names of the options of a class; none where its signature cannot be read."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        return parser.add_class_arguments(kind, fail_untyped=False) if kind else []
    except (TypeError, ValueError):
        return []


def _derived(bases: Iterable[type]) -> Iterator[type]:
    for base in bases:
        yield base
        yield from _derived(base.__subclasses__())
