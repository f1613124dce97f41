"""Sentences about wrong words and files of a command line: key, place and nearest spelling.

jsonargparse stops at the first wrong key or value, but its message names no file and no other
spelling. After a failure the files and words are therefore checked once more, in their order, with
the parsers of the classes that they name; the first error found is reported.
"""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from functools import cache
from os import PathLike
from os.path import isfile
from pydoc import ErrorDuringImport, locate
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from omegaconf.errors import OmegaConfBaseException

from gvsl_lightning.cli.sources import COMMAND_LINE, Source, load, read_yaml, shorten, sources
from gvsl_lightning.errors import InputError, nearest, unknown_option


def parse(
    parser: ArgumentParser, words: Sequence[str], taken: Collection[str] | None = None
) -> Namespace:
    """Parse the words of a command line.

    A ``class_path`` is taken where an option's type is a class, and names one derived from that;
    elsewhere it is a text like any other, and nothing that runs commands is imported for one.

    Args:
        parser: made with ``exit_on_error=False``, like those of its subcommands.
        words: without the program's name.
        taken: the keys that are taken from configuration files; all of them if None.

    Raises:
        InputError: about the first thing that is wrong: its key, the file, the nearest spelling.
    """
    # a denylist of our own, though empty, is what makes jsonargparse's refuse instead of warn
    set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])
    commands = _subcommands(parser)
    command = next((word for word in words if word in commands), "")
    given = list(sources(words, command, taken))  # a key that a file has twice, among others
    try:
        parsed = parser.parse_args(list(words))
        own = parsed[command] if command else parsed
        for key in _options(commands.get(command, parser)):
            group, dot, _ = key.partition(".")
            if dot and not isinstance(own.get(group), Namespace):  # which jsonargparse accepts
                raise argparse.ArgumentError(None, f"{group} takes options")
        return parsed
    except (argparse.ArgumentError, OmegaConfBaseException, UnicodeDecodeError) as error:
        program = f"{parser.prog} {command}".strip()
        if commands and not command:
            raise InputError(f"A command is missing; see {program} --help.") from error
        walk = _Walk(commands.get(command, parser), program)
        for source in given:
            walk.check(source)
        if isinstance(error, OmegaConfBaseException):
            raise InputError(walk.interpolation(error, given)) from error
        raise InputError(f"{reason(error, command)}; see {program} --help.") from error


def check(parser: ArgumentParser, words: Sequence[str], taken: Collection[str]) -> None:
    """Look at files and words without parsing them; see :func:`parse` for the arguments.

    Raises:
        InputError: about the first thing that is wrong.
    """
    walk = _Walk(parser, parser.prog)
    for source in sources(words, "", taken):
        walk.check(source)


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
        """Raise the message as an error of the input, without the usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help.")


def reason(error: BaseException, command: str = "") -> str:
    """Return the innermost line of a parser's message.

    Args:
        error: raised by jsonargparse.
        command: name of the subcommand, which its keys begin with.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = max(lines, key=lambda line: len(line) - len(line.lstrip())).strip(" -.:")
    if missing := text.partition("the following arguments are required: ")[2]:
        names = [f"--{name.removeprefix(f'{command}.')}" for name in missing.split(", ")]
        place = ", here or in a --config file" if command else ""
        return f"{' and '.join(names)} must be given{place}"
    return text


def with_place(sentence: str, key: str, words: Sequence[str]) -> str:
    """Add the whole key and its place to a sentence about a key of nested options.

    Args:
        sentence: begins with the key.
        key: the last parts of the dotted key.
        words: of the command line.
    """
    for source in reversed(list(sources(words))):
        for path in source.flat():
            if f".{path}".endswith(f".{key}"):
                group, dot, _ = key.rpartition(".")
                above = _shown(path, source.place).removesuffix(key)
                if not dot:
                    return sentence.replace(key, f"{above}{key} {source.place}", 1)
                full = sentence.replace(f"{group}.", f"{above}{group}.")
                return full.replace(key, f"{key} {source.place}", 1)
    return sentence


class _Walk:
    """Goes through sources, and remembers which class stands where.

    Args:
        parser: of the command.
        program: words before its options.
    """

    def __init__(self, parser: ArgumentParser, program: str) -> None:
        self.parser = parser
        self.program = program
        self.classes: dict[str, type] = {}
        for key, option in _options(parser).items():
            given = getattr(option.default, "class_path", None)
            if given and (found := find_class(given, _classes(_type(option)))):
                self.classes[key] = found

    def check(self, source: Source) -> None:
        """Raise an InputError about the first thing that is wrong."""
        owner, listed = self.program.split()[-1], f"{self.program} --help lists all."
        self._group(self.parser, owner, source.tree, source.place, listed)

    def interpolation(self, error: OmegaConfBaseException, sources: Sequence[Source]) -> str:
        """Sentence about a ``${...}`` that stands for nothing."""
        trees = [(source.place, source.flat()) for source in sources]
        known = {*_options(self.parser), *(key for _, tree in trees for key in tree)}
        where = error.full_key or ""
        said = str(error).splitlines()[0]
        said = said.rpartition("while resolving interpolation: ")[2].strip('"')
        for place, tree in reversed(trees):
            for key, value in tree.items():
                if not f".{where}".endswith(f".{key}") or "${" not in str(value):
                    continue
                start = f"{_shown(key, place)} {place} is {value}"
                for name in re.findall(r"\$\{([\w.]+)\}", str(value)):
                    if not name.startswith(".") and name not in known:
                        advice = nearest(name, known, listed="correct it.")
                        return f"{start}, but there is no {name}; {advice}"
                return f"{start}: {said}."
        return f"{where}: {said}."

    def _group(
        self,
        parser: ArgumentParser,
        owner: str,
        tree: dict[str, Any],
        place: str,
        listed: str,
        above: str = "",
        within: str = "",
    ) -> None:
        """Check keys and their values.

        Args:
            parser: of the owner.
            owner: name of the command or class whose options they are.
            tree: key -> value.
            place: where they are given.
            listed: says where all options of the owner can be read.
            above: the keys above the owner's options, with a dot behind them.
            within: the keys above these in the parser, with a dot behind them.
        """
        options = _options(parser)
        for key, value in tree.items():
            name = f"{within}{key}"
            path = f"{above}{name}"
            inner = [known for known in options if known.startswith(f"{name}.")]
            is_structure = inner or _classes(_type(options.get(name)))
            if place == COMMAND_LINE and isinstance(value, str) and is_structure:
                value = load(value)
            if name in options:
                self._option(parser, options[name], value, path, place)
            elif inner and isinstance(value, str) and isfile(value):
                content, file = read_yaml(value), f"in {value}"
                self._group(parser, owner, content, file, listed, above, f"{name}.")
            elif inner and isinstance(value, dict):
                self._group(parser, owner, value, place, listed, above, f"{name}.")
            elif inner:
                raise _wrong(path, place, value, f"options such as {above}{inner[0]}")
            else:
                beside = [known for known in options if known.startswith(within)]
                valid = {known.removeprefix(within).split(".")[0] for known in beside}
                raise self._unknown(path, within.strip(".") or owner, valid, place, listed)

    def _option(
        self, parser: ArgumentParser, option: argparse.Action, value: Any, path: str, place: str
    ) -> None:
        kind = _type(option)
        if option.nargs == "+" and not isinstance(value, list):
            value = [value]
        if bases := _classes(kind):
            items = {path: value}
            if isinstance(value, list):
                items = {f"{path}[{index}]": item for index, item in enumerate(value)}
            is_text = str in _parts(kind)
            checked = [self._object(bases, is_text, *item, path, place) for item in items.items()]
            if all(checked):
                return
        if "${" in str(value):  # what it stands for is not known here
            return
        namespace = Namespace()  # type: ignore[no-untyped-call]
        namespace[option.dest] = value
        try:
            parser.validate(namespace, skip_required=True)
        except (TypeError, KeyError, ValueError) as error:
            is_choice = not set(_parts(kind)) - {None, type(None)}
            choices = option.choices or (_choices(kind) if is_choice else ())
            if not choices:
                raise _wrong(path, place, value, _in_words(kind)) from error
            advice = nearest(str(value), map(str, choices))
            raise InputError(
                f"{_shown(path, place)} {place} is {shorten(value)}; {advice}"
            ) from error

    def _object(
        self, bases: Sequence[type], is_text: bool, path: str, item: Any, slot: str, place: str
    ) -> bool:
        """Check a class and its options.

        Args:
            bases: what it is derived from.
            is_text: whether a text that names no class may be right, too.
            path: its key.
            item: name of the class, or mapping with ``class_path`` and ``init_args`` or of options.
            slot: its key without the index in a list.
            place: where it is given.

        Returns:
            Whether this was all there is to check.
        """
        if isinstance(item, str) and item.endswith((".yaml", ".yml")) and isfile(item):
            item, place = read_yaml(item), f"in {item}"
        is_named = isinstance(item, str)
        spec = {"class_path": item} if is_named else item
        if not isinstance(spec, dict):
            return False
        known = _options(_class_parser(self.classes.get(slot, bases[0])))
        is_spelled = any(
            key not in known and nearest(str(key), _SPECIFICATION, listed="") for key in spec
        )
        for key in spec if is_spelled else ():
            if key not in _SPECIFICATION:
                raise self._unknown(f"{path}.{key}", path, _SPECIFICATION, place, "")
        given = spec.get("class_path")
        if "${" in str(given):
            return True
        if given is not None:
            found = find_class(str(given), bases)
            if found is None and is_text:
                return False
            if found is None:
                key = path if is_named else f"{path}.class_path"
                names = {n for kind in _derived(bases) if not (n := kind.__name__).startswith("_")}
                ancestors = " or ".join(base.__name__ for base in bases)
                name, otherwise = (
                    str(given).rpartition(".")[2],
                    "give the path of one that can be imported.",
                )
                advice = nearest(name, names, listed=otherwise)
                raise InputError(
                    f"{_shown(key, place)} {place} is {given}, which is no {ancestors}; {advice}"
                )
            self.classes[slot] = found
        kind = self.classes.get(slot, bases[0])
        parser = _class_parser(kind)
        if parser is None:
            return True
        options = spec.get("init_args", {}) if is_spelled else spec
        above = f"{path}.init_args" if is_spelled else path
        if not isinstance(options, dict):
            raise _wrong(above, place, options, f"the options of {kind.__name__}")
        if options and slot not in self.classes and not _options(parser):
            raise InputError(f"{_shown(path, place)} {place} has no class_path; add it.")
        listed = f"{self.program} --{slot}.help={kind.__name__} lists all."
        self._group(parser, kind.__name__, options, place, listed, f"{above}.")
        return True

    def _unknown(
        self, path: str, owner: str, valid: Iterable[str], place: str, listed: str
    ) -> InputError:
        name = path.rpartition(".")[2]
        shown = _shown(path, place)
        if not nearest(name, valid, listed=""):
            everywhere = [*_options(self.parser)]
            for slot, kind in self.classes.items():
                everywhere += [f"{slot}.init_args.{key}" for key in _options(_class_parser(kind))]
            for other in everywhere:
                if other.rpartition(".")[2] == name:
                    listed = f"did you mean {_shown(other, place)}?"
                    return InputError(f"{shown} {place} is no option of {owner}; {listed}")
        return unknown_option(shown, owner, valid, place, listed)


_SPECIFICATION = ("class_path", "init_args", "dict_kwargs")
"""Keys of jsonargparse that name a class and its options."""


def _subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: ArgumentParser | None) -> dict[str, argparse.Action]:
    """Dotted name -> option of a parser that takes a value."""
    actions = parser._actions if parser is not None else []
    return {a.dest: a for a in actions if a.default is not argparse.SUPPRESS}


def _type(option: argparse.Action | None) -> Any:
    """An option's type; without jsonargparse's own attribute, messages would only say less."""
    return getattr(option, "_typehint", option and option.type)


@cache
def _class_parser(kind: type) -> ArgumentParser | None:
    """Parser of a class's options; None where its signature cannot be read."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(kind, fail_untyped=False)
    except (TypeError, ValueError):
        return None
    return parser


def find_class(path: str, bases: Sequence[type]) -> type | None:
    """Return the class with a name or import path, if it is derived from one of the bases."""
    try:
        found = locate(path) if "." in path else _named(path, bases)
    except ErrorDuringImport:
        return None
    return found if isinstance(found, type) and issubclass(found, tuple(bases)) else None


def _named(name: str, bases: Sequence[type]) -> type | None:
    return next((kind for kind in _derived(bases) if kind.__name__ == name), None)


def _derived(bases: Iterable[type]) -> Iterator[type]:
    for base in bases:
        yield base
        yield from _derived(base.__subclasses__())


def _parts(kind: Any) -> list[Any]:
    """All types that a type is made of."""
    if get_origin(kind) is Literal or isinstance(kind, list):  # a list: of what a callable takes
        return []
    arguments = get_args(kind)
    return [part for argument in arguments for part in _parts(argument)] if arguments else [kind]


def _choices(kind: Any) -> list[Any]:
    """Values of the literals that a type is made of."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for argument in get_args(kind) for choice in _choices(argument)]


def _classes(kind: Any) -> list[type]:
    """Classes that are given by their name and options."""
    plain = (int, float, str, PathLike, timedelta, Enum)
    return [
        part
        for part in dict.fromkeys(_parts(kind))
        if isinstance(part, type)
        and part.__module__ not in ("builtins", "typing")
        and not issubclass(part, plain)
    ]


_DESCRIPTIONS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
    dict: ("options, key: value", "options"),
    type(None): ("null", "null"),
}


def _in_words(kind: Any, is_many: bool = False) -> str:
    """A type in plain words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is dict:
        return _DESCRIPTIONS[dict][is_many]
    if origin is tuple and len(set(arguments)) == 1:
        return f"a list of {len(arguments)} {_in_words(arguments[0], True)}"
    if isinstance(origin, type) and len(arguments) == 1:
        return f"a list of {_in_words(arguments[0], True)}"
    if isinstance(origin, type) and origin is not UnionType:
        return f"a {origin.__name__}"
    if arguments:
        return " or ".join(dict.fromkeys(_in_words(argument, is_many) for argument in arguments))
    if kind in _DESCRIPTIONS:
        return _DESCRIPTIONS[kind][is_many]
    if isinstance(kind, type) and issubclass(kind, (int, float)):  # restricted by jsonargparse
        base = _in_words(int if issubclass(kind, int) else float, is_many)
        return f"{base} {str(kind.__doc__).rpartition('restricted to be ')[2]}"
    return str(getattr(kind, "__name__", None) or "another value")


def _wrong(path: str, place: str, value: Any, advice: str) -> InputError:
    return InputError(f"{_shown(path, place)} {place} is {shorten(value)}; give {advice}.")


def _shown(path: str, place: str) -> str:
    return f"--{path}" if place == COMMAND_LINE else path
