"""Settings of validate, test and predict that the checkpoint brings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gvsl_lightning.cli.sources import settings
from gvsl_lightning.errors import InputError
from gvsl_lightning.weights import read_checkpoint

SHORT = {"--ckpt": "--ckpt_path", "--root": "--data.root"}
"""Short name of an option of validate, test and predict -> its name."""

FIXED = {
    "model": ("class_names", "in_channels", "backbone", "backbone_options"),
    "data": (
        *("class_names", "label_values", "modality", "window", "transforms"),
        *("spacing", "crop_foreground", "channels"),
    ),
}
"""Options that a checkpoint settles: other values would prepare volumes in another way."""


def with_checkpoint(words: Sequence[str]) -> list[str]:
    """Add the model and the data of a checkpoint to a command that evaluates it.

    Options of the command line and of its files come later and win, except those in
    :data:`FIXED`.

    Args:
        words: of the command line.

    Raises:
        InputError: if an option contradicts the checkpoint.
    """
    command, *rest = words or [""]
    if command not in ("validate", "test", "predict"):
        return list(words)
    rest = [_long(word) for word in rest]
    path = _value(rest, "--ckpt_path")
    trained = _trained(path)
    if not trained:
        is_path = path and path not in ("best", "last", "hpc") and "://" not in path
        if is_path and not any(word.startswith(("-c", "--config", "--model")) for word in rest):
            raise InputError(
                f"{path} is no checkpoint of a run, or does not exist; correct --ckpt_path."
            )
        return [command, *rest]
    last: dict[tuple[str, str], tuple[Any, str]] = {}
    for key, value, place in settings([command, *rest], command):
        part, _, name = key.replace(".init_args.", ".").partition(".")
        if part in trained:
            last[part, name] = value, place
    for (part, name), (value, place) in last.items():
        _require_same(part, name, value, place, trained, str(path))
    return [command, f"--config={json.dumps(trained)}", *rest]


def _long(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{SHORT.get(name, name)}{equals}{value}"


def _value(words: Sequence[str], option: str) -> str | None:
    """The last value of an option."""
    found = None
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else "".join(words[index + 1 : index + 2])
    return found


def _trained(path: str | None) -> dict[str, Any]:
    """Model and data of the run that wrote a checkpoint; {} if it does not hold them."""
    if not path or not Path(path).is_file():
        return {}
    try:
        content = read_checkpoint(Path(path), mmap=True)
        config = yaml.safe_load(content["config"])
        model, data = config["model"], config["data"]
        known = {**content.get("preparation", {}), **content["hyper_parameters"]}
        for name in FIXED["data"]:
            if name in data["init_args"] and known.get(name) is not None:
                data["init_args"][name] = known[name]  # as a description of the data set said
        return {"model": model, "data": data}
    except Exception:  # a damaged file, or one of another program: refused where it is loaded
        return {}


def _require_same(
    part: str, name: str, value: Any, place: str, trained: Mapping[str, Any], path: str
) -> None:
    options = trained[part].get("init_args", {})
    if name not in FIXED[part] or name not in options or str(value).startswith("${"):
        return
    if _comparable(value) != _comparable(options[name]):
        raise InputError(
            f"{part}.{name} is {value} {place}, and {path} was trained with {options[name]}; "
            "leave the option out."
        )


def _comparable(value: Any) -> Any:
    """A value to compare: numbers as floats, keys as texts."""
    if isinstance(value, Mapping):
        return {str(key): _comparable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(one) for one in value]
    return float(value) if isinstance(value, int | float) else value
