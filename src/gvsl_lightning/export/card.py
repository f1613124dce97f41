"""The card of a network: the options that its file holds, without paths of this machine."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from gvsl_lightning import datamodules
from gvsl_lightning.errors import InputError


def read_card(path: Path) -> dict[str, Any]:
    """Read the card of a file of weights.

    Args:
        path: a ``.ckpt`` of this package, or a ``.safetensors`` with its ``.json``.

    Returns:
        ``backbone`` (name, in_channels, options), ``task``, ``data`` (options of the data module
        that describe the volumes) and other entries such as ``steps``; none holds a path.

    Raises:
        InputError: if there is no card.
    """
    card: dict[str, Any] = {}
    with suppress(Exception):  # `read_head` names a damaged or missing file
        card = _read_json(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if not card:
        raise InputError(
            f"{path} does not say which network it holds: give a .ckpt of this package, or a "
            ".safetensors with its .json next to it."
        )
    task = {
        name: value
        for name, value in card["task"].items()
        if not name.startswith("_") and name != "weights"
    }
    data = {name: card["data"][name] for name in _DATA if name in card["data"]}
    others = _without_paths({name: value for name, value in card.items() if name not in _OWN})
    if card.get("wandb"):
        others["wandb"] = card["wandb"]
    if card.get("versions"):
        dated = {name: card[name] for name in ("versions", "date") if card.get(name)}
        others.setdefault("trained_with", dated)
    return {"backbone": card["backbone"], "task": task, "data": data, **others}


def describe_hooks(data: Mapping[str, Any], intensity_given: bool) -> tuple[str, ...]:
    """Sentences on preparation by hooks of a data module, beyond the options of `Preparation`.

    Args:
        data: class and options of the data module, from a card; no module is imported for it.
        intensity_given: whether the command line names the intensity preset.
    """
    sentences = []
    if data.get("lungs"):
        how = f"{data['lungs']}, margin {data.get('margin')} mm"
        sentences.append(f"Cropped beforehand to the lungs ({how}).")
    if data.get("crop"):
        sentences.append(f"Cropped beforehand to {data['crop']} voxels.")
    name = str(data.get("class", ""))
    classes = {known.__name__: known for known in _subclasses(pl.LightningDataModule)}
    if name and name not in classes and not intensity_given:
        sentences.append(
            f"{name} is no data class of this package: hooks of its own are not recorded."
        )
    for hook in ("configure_region", *(() if intensity_given else ("configure_intensity",))):
        method = getattr(classes.get(name), hook, None)
        if method and not method.__module__.startswith(datamodules.__name__):
            sentences.append(f"Prepared by {name}.{hook}, which is not recorded.")
    return tuple(sentences)


_DATA = (
    *("class", "scene", "modality", "window", "spacing", "transforms", "crop_foreground"),
    *("channels", "patch_size", "size", "resize", "lungs", "margin", "crop", "training_items"),
    "description",
)
"""Options of a data module that describe the volumes; none holds a path."""

_OWN = ("backbone", "task", "data", "parameters", "versions", "date", "wandb")
"""Entries that are not copied as they are."""

_PATH = re.compile(r"""(?:^|[\s"'(\[=,;])(?:~\w*/|\.{0,2}[/\\]\S|[A-Za-z]:[/\\]|file:)""")
_PATH_LIKE = re.compile(r"(?!\w+://)\S*[/\\]\S*")
_NAMES_PATH = re.compile(r"(?:.*_)?(?:root|paths?|folders?|files?|dirs?|directory|config)")


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for known in base.__subclasses__():
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
        items = [_without_paths(entry) for entry in value]
        return None if None in items else items
    return value


def _read_json(path: Path) -> dict[str, Any]:
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data, task = card.get("data") or {}, card.get("task") or {}
    return {
        **card,
        "backbone": {key: card["backbone"][key] for key in ("name", "in_channels", "options")},
        "task": task if isinstance(task, dict) else {"class": str(task)},
        "data": data if isinstance(data, dict) else {"description": str(data)},
    }


def _read_checkpoint(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    task = content["hyper_parameters"]

    def with_class(options: Mapping[str, Any]) -> dict[str, Any]:
        path = options.get("_class_path")
        return {"class": path.rpartition(".")[-1], **options} if path else dict(options)

    return {
        "backbone": {
            "name": task["backbone"],
            "in_channels": task["in_channels"],
            "options": task["backbone_options"] or {},
        },
        "task": with_class(task),
        "data": with_class(content.get("datamodule_hyper_parameters") or {}),
        "weights": f"checkpoint {path.name}",
        "steps": content["global_step"],
        "epochs": content["epoch"] + 1,
        "wandb": content.get("wandb"),
        "versions": (content.get("record") or {}).get("versions"),
    }
