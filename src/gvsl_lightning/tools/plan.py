"""``python -m gvsl_lightning plan``: look at a folder and write a configuration for it."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse.typing import PositiveFloat
from rich.console import Console
from rich.table import Table

from gvsl_lightning.cli.diagnosis import call
from gvsl_lightning.data.splits import split_cases, subjects_of
from gvsl_lightning.data.survey import Survey, survey
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import require_writable, write_text
from gvsl_lightning.tasks import GVSL

_SMALL = {"channels": [8, 16, 32, 64]}
"""Network for a CPU, 0.7 million parameters."""

_FEWEST_STEPS, _SMALLEST_PATCH, _FEWEST_LABELLED = 500, 32, 6

_CACHED_VOXELS = 250_000_000
"""Voxels of all prepared volumes that are kept in memory, 1 GB."""


def main(args: Sequence[str]) -> None:
    """Run the command: `plan` with its arguments as ``--name value``."""
    call(plan, "python -m gvsl_lightning plan", args)


def plan(
    root: str,
    labels: str | None = None,
    hours: PositiveFloat = 1.0,
    out: str = "plan.yaml",
    overwrite: bool = False,
) -> None:
    """Look at a folder of volumes, and write a configuration of a pre-training for this machine.

    Prints the facts of the folder, each choice with its reason, and the estimated time and memory
    from two measured steps. With labels it writes a second configuration, for fine-tuning, and the
    split of both: the test volumes take no part in the pre-training.

    Args:
        root: folder, pattern, list or dataset.json of volumes.
        labels: folder of label maps named like the volumes.
        hours: length of the pre-training; it decides the size of the patch and the number of steps,
            between 500 and 20,000.
        out: file of the configuration; that of the fine-tuning gets _finetune before its suffix,
            and the split is a JSON file with _split there.
        overwrite: replace files that are there.

    Raises:
        InputError: a path or a volume is wrong, or a file is there.
    """
    path = Path(out)
    tuned = path.with_stem(f"{path.stem}_finetune")
    split = path.with_name(f"{path.stem}_split.json")
    for file in (path, tuned, split):
        if file.exists() and not overwrite:
            raise InputError(f"{file} is there; give another --out, or add --overwrite=true.")
    require_writable(path.absolute().parent)
    facts, console = survey(root, labels), Console()
    console.print(_facts(facts))
    if facts.count < 2:
        raise InputError(f"{root} holds one volume and a pair needs at least two; add volumes.")
    design = _design(facts)
    with console.status("Measuring a step"):
        seconds, memory = _measure(design)
        while seconds * _FEWEST_STEPS > hours * 3600 and max(design.patch_size) > _SMALLEST_PATCH:
            design = _design(facts, max(design.patch_size) - 16)
            seconds, memory = _measure(design)
    steps = int(min(20_000, max(_FEWEST_STEPS, round(hours * 3600 / seconds, -2))))
    parts = _split(facts)
    data = {
        **_preparation(facts),
        **({} if parts is None else {"split_file": str(split.absolute())}),
        **_loading(design),
    }
    if parts is not None:
        write_text(split, json.dumps(parts, indent=1, ensure_ascii=False) + "\n")
    write_text(path, _header(root) + _yaml(_pretraining(root, labels, data, design, steps)))
    console.print(_choices(facts, design, steps, seconds, memory))
    console.print(f"Next: gvsl fit --config {path}", highlight=False, soft_wrap=True)
    if labels is not None and parts is not None:
        write_text(tuned, _header(root) + _yaml(_finetuning(root, labels, facts, data, design)))
        weights = f"runs/{path.stem}/version_0/backbone.safetensors"
        console.print(
            f"Then: gvsl fit --config {tuned} --model.weights={weights} --test_after_fit=true",
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            "Compare methods: gvsl benchmark --config benchmark/folder --out runs/compare"
        )
    elif labels is not None:
        console.print(
            f"No fine-tuning: it needs {_FEWEST_LABELLED} label maps and there are "
            f"{len(facts.labelled)}."
        )


@dataclass(frozen=True)
class _Design:
    """Choices for a folder and a machine."""

    patch_size: tuple[int, ...]
    padding: float
    """Voxels of the patch for each voxel of the volume in it."""
    backbone_options: dict[str, Any] | None
    batch_size: int
    learning_rate: float
    num_workers: int
    cache: bool


def _design(facts: Survey, most: int | None = None) -> _Design:
    """Choices, with edges of the patch of at most so many voxels."""
    has_gpu = torch.cuda.is_available()
    unit = 16 if has_gpu else 8
    most = most or (96 if has_gpu else 64)
    size = facts.size
    patch = tuple(int(min(most, max(2 * unit, edge // unit * unit))) for edge in size)
    inside = math.prod(min(edge, float(full)) for edge, full in zip(patch, size, strict=True))
    cores = os.cpu_count() or 1
    cache = facts.count * float(size.prod()) < _CACHED_VOXELS
    return _Design(
        patch_size=patch,
        padding=math.prod(patch) / inside,
        backbone_options=None if has_gpu else _SMALL,
        batch_size=2,
        learning_rate=1e-4 if has_gpu else 2e-3,
        num_workers=0 if cache else max(1, min(8, cores - 1)),
        cache=cache,
    )


def _measure(design: _Design) -> tuple[float, float]:
    """Seconds of a training step and peak memory of the process in GiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = GVSL(backbone_options=design.backbone_options, matching="correlation").to(device)
    optimiser = torch.optim.Adam(task.parameters())
    seconds = []
    for seed in range(3):
        volumes = torch.rand(2, design.batch_size, 1, *design.patch_size, device=device)
        start = time.perf_counter()
        batch = {"fixed": volumes[0], "moving": volumes[1], "seed": seed}
        losses = task.compute_losses(task.views_of(batch))
        losses["total"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        return min(seconds[1:]), torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return min(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _preparation(facts: Survey) -> dict[str, Any]:
    return {
        "modality": facts.modality,
        **({"window": list(facts.window)} if facts.modality == "ct" else {}),
        "spacing": None if facts.spacing is None else list(facts.spacing),
        **({} if facts.group_by is None else {"group_by": facts.group_by}),
    }


def _loading(design: _Design) -> dict[str, Any]:
    return {
        "patch_size": list(design.patch_size),
        "batch_size": design.batch_size,
        "num_workers": design.num_workers,
        "cache": design.cache,
        "seed": "${seed_everything}",
    }


def _split(facts: Survey) -> dict[str, list[str]] | None:
    """A fifth of the labelled volumes to test and a fifth to validate; None of fewer than six."""
    names = facts.labelled
    if len(facts.classes) < 2 or len(names) < _FEWEST_LABELLED:
        return None
    validating = max(2, round(0.2 * len(names)))  # two make a pair
    split = split_cases(len(names), validating, 0.2, groups=subjects_of(names, facts.group_by))
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return {role: [names[index] for index in part] for role, part in parts.items()}


def _pretraining(
    root: str, labels: str | None, data: dict[str, Any], design: _Design, steps: int
) -> dict[str, Any]:
    return {
        "trainer": {
            "max_steps": steps,
            "gradient_clip_val": 1.0,
            "val_check_interval": max(50, steps // 10),
        },
        "model": {
            "class_path": "GVSL",
            "init_args": {
                "matching": "correlation",
                "backbone_options": design.backbone_options,
                "learning_rate": design.learning_rate,
                "warmup_steps": 50,
                "schedule": "cosine",
            },
        },
        "data": {
            "class_path": "PretrainDataModule",
            "init_args": {
                "root": str(Path(root).absolute()),
                **({} if labels is None else {"label_root": str(Path(labels).absolute())}),
                **data,
            },
        },
    }


def _finetuning(
    root: str, labels: str, facts: Survey, data: dict[str, Any], design: _Design
) -> dict[str, Any]:
    values = [value for value in facts.classes if value]
    names = ["background", *(f"structure {value}" for value in values)]
    places = {0: 0, **{value: index for index, value in enumerate(values, start=1)}}
    return {
        "trainer": {"max_steps": 1000, "gradient_clip_val": 1.0, "val_check_interval": 100},
        "model": {
            "class_path": "Segmentation",
            "init_args": {
                "class_names": names,
                "loss": "dice_ce",
                "window_size": list(design.patch_size),
                "learning_rate": 1.0e-3,
                "schedule": "cosine",
            },
        },
        "data": {
            "class_path": "SegmentationDataModule",
            "init_args": {
                "root": str(Path(root).absolute()),
                "label_root": str(Path(labels).absolute()),
                "class_names": "${model.init_args.class_names}",
                "label_values": places,
                **data,
            },
        },
    }


def _header(root: str) -> str:
    return f"# Planned for {root}\n"


def _yaml(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _facts(facts: Survey) -> Table:
    table = Table(title="Folder", title_justify="left", show_header=False)
    table.add_row("volumes", f"{facts.count} of {facts.subjects} subjects")
    table.add_row("voxels", _range(facts.sizes))
    table.add_row("voxel size, mm", _range(facts.spacings))
    table.add_row("orientation", ", ".join(f"{k} ({v})" for k, v in facts.orientations.items()))
    table.add_row("intensities", f"{facts.low:g} to {facts.high:g}")
    if facts.classes:
        classes = ", ".join(f"{k}: {v:.3g} cm3" for k, v in facts.classes.items() if k)
        table.add_row("label values", f"{classes}  ({len(facts.labelled)} label maps)")
    return table


def _range(rows: np.ndarray) -> str:
    low, middle, high = (_size(row) for row in np.quantile(rows, (0, 0.5, 1), axis=0))
    return f"{middle}  (from {low} to {high})"


def _size(edges: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{edge:.3g}" for edge in edges)


def _choices(facts: Survey, design: _Design, steps: int, seconds: float, memory: float) -> Table:
    table = Table(title="Plan", title_justify="left", show_header=False)
    window = f", window {facts.window[0]:g} to {facts.window[1]:g}" * (facts.modality == "ct")
    table.add_row("modality", f"{facts.modality}{window}", f"{facts.reason}")
    spacing = "as stored" if facts.spacing is None else f"{_size(facts.spacing)} mm"
    table.add_row("spacing", spacing, "all equal" if facts.spacing is None else "the median")
    padded = f"; {design.padding:.1f} voxels for each voxel of a volume" * (design.padding > 1.2)
    table.add_row("patch", _size(design.patch_size), f"below the median size{padded}")
    network = "channels 8, 16, 32, 64" if design.backbone_options else "the paper's U-Net"
    table.add_row("network", network, "for a CPU" if design.backbone_options else "for a GPU")
    stored = "kept in memory" if design.cache else f"read by {design.num_workers} processes"
    table.add_row("volumes", stored, "")
    table.add_row("steps", f"{steps}, {design.batch_size} pairs each", f"{seconds:.2f} s a step")
    table.add_row("time, memory", f"{steps * seconds / 3600:.1f} hours", f"{memory:.1f} GiB")
    return table
