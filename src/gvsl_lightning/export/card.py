"""The card of a network: the options that its file holds, without paths of this machine."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytorch_lightning as pl
import torch

from gvsl_lightning import datamodules
from gvsl_lightning.data.regions import AroundLabel
from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms.intensity import Modality


def read_card(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the card of a file of weights.

    Args:
        path: a ``.ckpt`` of this package, or a ``.safetensors`` with its ``.json``.

    Returns:
        The card, without paths: ``backbone`` (name, in_channels, options), ``task``, ``data`` and
        other entries such as ``steps``; and all options of the data module.

    Raises:
        InputError: if there is no card.
    """
    # read_head refuses a damaged or missing file
    card: dict[str, Any] = {}
    with suppress(Exception):
        card = _read_json(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if not card:
        raise InputError(
            f"{path} does not say which network it holds: give a .ckpt of this package, or a "
            ".safetensors with its .json next to it."
        )
    data = {name: card["data"][name] for name in _DATA if name in card["data"]}
    task = {
        name: value
        for name, value in card["task"].items()
        if not name.startswith("_") and name != "weights"
    }
    others: dict[str, Any] = {
        name: value if name == "wandb" else _without_paths({name: value}).get(name)
        for name, value in card.items()
        if name not in _OWN
    }
    known: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if "trained_with" not in known and card.get("versions"):
        known["trained_with"] = {
            name: card[name] for name in ("versions", "date") if card.get(name)
        }
    return {"backbone": card["backbone"], "task": task, "data": data, **known}, card["data"]


def require_valid(values: Mapping[str, Any], prefix: str) -> None:
    """Check options of a card or of the command line.

    Args:
        values: by name; unknown names and None are passed over.
        prefix: of the name in the sentence.

    Raises:
        InputError: if a value cannot be used.
    """
    for name, (check, wanted) in _CHECKS.items():
        value = values.get(name)
        if value is not None and not check(value):
            raise InputError(f"{prefix}{name} is {value!r}, not {wanted}; correct it.")


def describe_hooks(
    class_name: str | None, options: Mapping[str, Any], intensity_given: bool
) -> tuple[str, ...]:
    """Describe preparation by hooks of a data module, which the card's options do not contain.

    Args:
        class_name: of the data module; no module is imported for it.
        options: of the data module.
        intensity_given: whether the command line names the intensity preset.

    Returns:
        Sentences.
    """
    if class_name is None:  # a checkpoint of a run without the command line
        crops = [f"{name} {options[name]}" for name in ("lungs", "crop") if options.get(name)]
        return tuple(f"Cropped beforehand by the data module ({crop})." for crop in crops)
    found = next(
        (known for known in _subclasses(pl.LightningDataModule) if known.__name__ == class_name),
        None,
    )
    if found is None:
        if intensity_given:
            return ()
        return (
            f"{class_name} is no data class of this package: hooks of its own are not recorded.",
        )
    sentences = []
    region: Any = getattr(found, "configure_region", None)
    if region is not None:
        try:
            box = region(SimpleNamespace(**options))
            if box is not None and not isinstance(box, AroundLabel):  # which needs a label map
                sentences.append(f"Cropped beforehand by {class_name}, to {box}.")
        except Exception:  # the hook may read any attribute of an instance
            sentences.append(f"Cropped beforehand by {class_name}.configure_region.")
    intensity: Any = getattr(found, "configure_intensity", None)
    if (
        not intensity_given
        and intensity
        and not intensity.__module__.startswith(datamodules.__name__)
    ):
        sentences.append(f"Intensities by {class_name}.configure_intensity.")
    return tuple(sentences)


_DATA = (
    "class",
    "scene",
    "modality",
    "window",
    "spacing",
    "transforms",
    "crop_foreground",
    "channels",
    "patch_size",
    "size",
    "resize",
    "lungs",
    "margin",
    "crop",
    "training_items",
    "description",
)
"""Options of a data module that describe the volumes; none holds a path."""

_PATH = re.compile(r"""(?:^|[\s"'(\[=,;])(?:~\w*/|\.{0,2}[/\\]\S|[A-Za-z]:[/\\]|file:)""")
_PATH_LIKE = re.compile(r"(?!\w+://)\S*[/\\]\S*")
_NAMES_PATH = re.compile(r"(?:.*_)?(?:root|paths?|folders?|files?|dirs?|directory|config)")

_OWN = ("backbone", "task", "data", "parameters", "versions", "date")

_Check = tuple[Callable[[Any], bool], str]


def _numbers(count: int, least: float, kinds: Any) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        return isinstance(x, kinds) and math.isfinite(x) and x > least

    def check(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == count and all(map(fits, value))

    return check


_voxels: _Check = (_numbers(3, 0, int), "three numbers of voxels above 0")
_limits = _numbers(2, -math.inf, (int, float))

_CHECKS: dict[str, _Check] = {
    "modality": (lambda value: value in get_args(Modality), "ct, mri or none"),
    "window": (lambda value: _limits(value) and value[0] < value[1], "two HU, the lower one first"),
    "spacing": (_numbers(3, 0, (int, float)), "three lengths in mm above 0"),
    "size": _voxels,
    "patch_size": _voxels,
    "window_size": _voxels,
    "crop_foreground": (lambda value: isinstance(value, int | float), "a number"),
    "transforms": (
        lambda value: (
            isinstance(value, list)
            and all(isinstance(spec, dict) and "class_path" in spec for spec in value)
        ),
        "a list of transforms, each with a class_path",
    ),
    "class_names": (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        ),
        "a list of names",
    ),
    "overlap": (lambda value: isinstance(value, int | float) and 0 <= value < 1, "0 to below 1"),
}


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    below: list[type[Any]] = base.__subclasses__()
    for known in below:
        yield known
        yield from _subclasses(known)


def _without_paths(value: Any) -> Any:
    """The value without entries that hold paths; None if the value is a path."""
    if isinstance(value, str):
        return None if _PATH.search(value) or _PATH_LIKE.fullmatch(value) else value
    if isinstance(value, Mapping):
        kept = {
            name: _without_paths(entry)
            for name, entry in value.items()
            if not _NAMES_PATH.fullmatch(str(name))
        }
        return {name: entry for name, entry in kept.items() if entry is not None}
    if isinstance(value, list | tuple):
        kept_items = [_without_paths(entry) for entry in value]
        return None if None in kept_items else kept_items
    return value


def _read_json(path: Path) -> dict[str, Any]:
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data, task = card.get("data") or {}, card.get("task") or {}
    architecture = {key: card["backbone"][key] for key in ("name", "in_channels", "options")}
    return {
        **card,
        "backbone": architecture,
        "task": task if isinstance(task, dict) else {"class": str(task)},
        "data": data if isinstance(data, dict) else {"description": str(data)},
    }


def _read_checkpoint(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    task = content["hyper_parameters"]
    data = content.get("datamodule_hyper_parameters") or {}

    def name_of(options: Mapping[str, Any]) -> dict[str, str]:
        path = options.get("_class_path")
        return {"class": path.rpartition(".")[-1]} if path else {}

    return {
        "backbone": {
            "name": task["backbone"],
            "in_channels": task["in_channels"],
            "options": task["backbone_options"] or {},
        },
        "task": {**name_of(task), **task},
        "data": {**name_of(data), **data},
        "weights": f"checkpoint {path.name}",
        "steps": content["global_step"],
        "epochs": content["epoch"] + 1,
        "wandb": content.get("wandb"),
        "versions": (content.get("record") or {}).get("versions"),
    }
