"""The table of registered pairs: ``registration.csv``."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.scores import dice_scores, surface_distances
from gvsl_lightning.runs.files import cell_text, write_csv

Row = dict[str, str | float]

_TEXTS = ("pair", "fixed", "moving")
_FIRST = (*_TEXTS, "ncc_before", "ncc_after", "folded")


def measure_labels(
    fixed: np.ndarray, before: np.ndarray, after: np.ndarray, spacing: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Dice and 95 % Hausdorff distance of the structures of a fixed label map.

    Args:
        fixed: Integers (X, Y, Z).
        before: The moving labels before registration, on the same grid.
        after: The same after it.
        spacing: Voxel size in mm along the three axes.

    Returns:
        The columns of `RegistrationWriter`'s table, NaN where a value is undefined.
    """
    structures = [int(value) for value in np.unique(fixed) if value > 0]
    target, *others = (torch.from_numpy(m.astype(np.int64)) for m in (fixed, before, after))
    moving = dict(zip(("before", "after"), others, strict=True))
    dice = {
        time: dice_scores(labels[None], target[None], structures)[0].tolist()
        for time, labels in moving.items()
    }
    distance: dict[str, list[float]] = {"before": [], "after": []}
    for structure in structures:
        for time, labels in moving.items():
            masks = labels == structure, target == structure
            distance[time].append(surface_distances(*masks, spacing)[0])
    defined = np.isfinite([distance["before"], distance["after"]]).all(axis=0)
    columns: dict[str, float] = {}
    for kind, values, counted in (
        ("dice", dice, np.ones(len(structures), bool)),
        ("hd95_mm", distance, defined),
    ):
        for time, numbers in values.items():
            columns[f"{kind}_{time}"] = _mean(np.array(numbers)[counted])
        for index, structure in enumerate(structures):
            for time, numbers in values.items():
                columns[f"{kind}_{time}_{structure}"] = numbers[index]
    return columns


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a table by the name of the pair; none if the file does not exist."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not set(_FIRST) <= set(reader.fieldnames or ()):
            raise InputError(f"{path} is another table; move it or give another folder.")
        return {
            cell_text(row["pair"]): {
                key: cell_text(value) if key in _TEXTS else float(value)
                for key, value in row.items()
                if value
            }
            for row in reader
        }


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Write all rows, the mean columns first."""
    others = {key for row in rows.values() for key in row} - set(_FIRST)
    columns = [*_FIRST, *sorted(others, key=_place)]
    cells = [{key: _cell(value) for key, value in rows[name].items()} for name in sorted(rows)]
    write_csv(path, columns, cells)


def summarise(rows: Sequence[Row], kept: int, failed: int, folder: Path) -> str:
    """The line that a run prints at its end: counts, and means over the pairs."""
    counts = f"{len(rows)} pairs registered ({kept} kept, {failed} failed) in {folder}"
    parts = []
    for title, column, unit in (
        ("NCC", "ncc", ""),
        ("Dice", "dice", ""),
        ("HD95", "hd95_mm", " mm"),
    ):
        both = [
            numbers
            for row in rows
            if np.isfinite(
                numbers := [float(row.get(f"{column}_{t}", math.nan)) for t in ("before", "after")]
            ).all()
        ]
        if both:
            before, after = np.mean(both, axis=0)
            parts.append(f"{title} {before:.3f} -> {after:.3f}{unit} ({len(both)} pairs)")
    folded = [folded for row in rows if math.isfinite(folded := float(row.get("folded", math.nan)))]
    if folded:
        parts.append(f"{100 * np.mean(folded):.2f} % of voxels folded ({len(folded)} pairs)")
    return f"{counts}: {', '.join(parts)}" if parts else counts


def _place(column: str) -> tuple[bool, bool, int, bool]:
    """Means first, then structure by structure; Dice before distance, before before after."""
    *kind, last = column.split("_")
    structure = int(last) if last.isdigit() else 0
    return structure > 0, column.startswith("hd95"), structure, "after" in (*kind, last)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
