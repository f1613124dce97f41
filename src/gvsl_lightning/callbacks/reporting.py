"""Functions that reports and writers share: the kind of task, tables, figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from matplotlib.figure import Figure

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import save_figure, write_csv
from gvsl_lightning.runs.loggers import log_figure

_Task = TypeVar("_Task", bound=pl.LightningModule)


def require_task(callback: pl.Callback, task: pl.LightningModule, *kinds: type[_Task]) -> _Task:
    """Return the task, which must be of one of the kinds that a callback is for.

    Raises:
        InputError: if the task is of another kind.
    """
    if not isinstance(task, kinds):
        raise InputError(
            f"{type(callback).__name__} is for {' or '.join(kind.__name__ for kind in kinds)} and "
            f"{type(task).__name__} is none: remove it from trainer.callbacks."
        )
    return task


def name_case(trainer: pl.Trainer, name: str) -> dict[str, str]:
    """First columns of a case's row: its name and, where the data know subjects, its subject."""
    subjects = getattr(trainer.datamodule, "subject_of", {})  # type: ignore[attr-defined]
    known = any(case != subject for case, subject in subjects.items())
    return {"name": name, "subject": subjects.get(name, name)} if known else {"name": name}


def write_cases(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a row for each case; undefined values (NaN) become empty cells."""
    defined = [
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    write_csv(path, list(rows[0]) if rows else ["name"], defined)


def write_figure(trainer: pl.Trainer, name: str, path: Path, figure: Figure, dpi: int) -> None:
    """Write a figure, and log it to the W&B and TensorBoard loggers under a name."""
    save_figure(figure, path, dpi)
    log_figure(trainer, name, path, figure)
