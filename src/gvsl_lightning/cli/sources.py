"""The settings that configuration files and words of a command line give."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from os.path import exists, isfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gvsl_lightning.errors import InputError, nearest

COMMAND_LINE = "on the command line"
"""Place of a setting that a word gives."""

_CONFIGS = Path(__file__).parents[1] / "configs"


class Setting(NamedTuple):
    """A key that a configuration file or a word of the command line gives.

    Attributes:
        key: dotted, with the index of an item of a list: ``trainer.callbacks[0].init_args``.
        value: of the key.
        place: ``in FILE`` or :data:`COMMAND_LINE`.
    """

    key: str
    value: Any
    place: str

    @property
    def dashes(self) -> str:
        """Signs before the key where a word gives it."""
        return "--" if self.place == COMMAND_LINE else ""

    @property
    def name(self) -> str:
        """The key as it is written."""
        return f"{self.dashes}{self.key}"

    def __str__(self) -> str:
        return f"{self.name} {self.place}".strip()


def settings(
    words: Sequence[str], command: str = "", taken: Collection[str] | None = None
) -> list[Setting]:
    """All settings of the files and words of a command line, in their order.

    A key with keys below it is a setting, too, and so is each item of a list.

    Args:
        words: of the command line.
        command: name of the subcommand; files before it hold its options under its name.
        taken: top-level keys that are read from files; None: all of them.

    Raises:
        InputError: if a file cannot be read.
    """
    is_option = re.compile("--?[A-Za-z]").match
    is_own = not command
    found: list[Setting] = []
    for index, word in enumerate(words):
        is_own = is_own or word == command
        if not is_option(word):
            continue
        key, equals, value = word.lstrip("-").partition("=")
        following = takewhile(lambda w: w != command and not is_option(w), words[index + 1 :])
        values = [value] if equals else list(following)
        if key in ("c", "config"):
            for name in values[:1]:
                inline = None if isfile(name) else load(name)
                tree = inline if isinstance(inline, dict) else read_yaml(name)
                tree = tree if is_own else tree.get(command) or {}
                if taken is not None:
                    tree = {key: value for key, value in tree.items() if key in taken}
                place = COMMAND_LINE if isinstance(inline, dict) else f"in {name}"
                found += _below("", tree, place)
        elif is_own and values and key != "print_config" and not key.endswith(".help"):
            nested: Any = values[0] if len(values) == 1 else values
            for name in reversed(key.rstrip("+").split(".")):
                nested = {name: nested}
            found += _below("", nested, COMMAND_LINE)
    return found


def with_config_paths(words: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations behind ``--config`` by their paths."""
    found = list(words)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            found[index] = f"{option}={config_path(value)}"
        elif index + 1 < len(words):
            found[index + 1] = config_path(words[index + 1])
    return found


def config_path(name: str) -> str:
    """Find a configuration.

    Args:
        name: path of a file, or name of a shipped configuration: ``gvsl_mri`` or, where two folders
            have the same name, ``finetune/hippocampus``. Settings in braces are returned as given.

    Raises:
        InputError: if there is no such file and no such configuration, or more than one.
    """
    if isfile(name) or isinstance(load(name), dict):
        return name
    shipped = {
        path.relative_to(_CONFIGS).with_suffix("").as_posix(): path
        for path in sorted(_CONFIGS.rglob("*.yaml"))
    }
    found = [key for key in shipped if name in (key, key.rpartition("/")[2])]
    if len(found) == 1:
        return str(shipped[found[0]])
    if found:
        raise InputError(f"--config {name} names {len(found)} files; {nearest('', found)}")
    if exists(name):  # a folder, which is refused when it is read
        return name
    short = Path(name).with_suffix("").as_posix().removeprefix("configs/")
    names = {key.rpartition("/")[2] for key in shipped} if "/" not in short else set(shipped)
    several = {name for name in names if sum(k.endswith(f"/{name}") for k in shipped) > 1}
    advice = nearest(short, (names - several) | set(shipped), listed="correct its path.")
    raise InputError(f"{name} cannot be read, as it does not exist; {advice}")


def read_yaml(path: str) -> dict[str, Any]:
    """Read a file of options.

    Raises:
        InputError: if the file does not exist, or is no YAML of keys and values; the sentence names
            the line and the reason.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} cannot be read, as it does not exist; correct its path."
        ) from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise InputError(f"{path} cannot be read ({error}); give a YAML file.") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        reason = problem or str(error).splitlines()[0]
        raise InputError(f"{path}{place} is no valid YAML: {reason}; correct it.") from error
    if not content:
        raise InputError(f"{path} is empty; give it lines of the form key: value.")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {shorten(content)}; give it lines of the form key: value.")
    return {str(key): value for key, value in content.items()}


def load(text: str) -> Any:
    """Return the value that a word means in YAML; the word itself if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def shorten(value: Any) -> str:
    """Return the text of a value, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _with_parts(setting: Setting) -> Iterator[Setting]:
    """A setting and those below it; a text may be a written structure or name a file of one."""
    key, value, place = setting
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and isfile(value):
        yield setting
        value, place = read_yaml(value), f"in {value}"
    else:
        value = load(value) if isinstance(value, str) and place == COMMAND_LINE else value
        yield Setting(key, value, place)
    if isinstance(value, dict):
        yield from _below(f"{key}.", value, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _with_parts(Setting(f"{key}[{index}]", item, place))


def _below(above: str, tree: Mapping[Any, Any], place: str) -> Iterator[Setting]:
    for key, value in tree.items():
        yield from _with_parts(Setting(f"{above}{key}", value, place))
