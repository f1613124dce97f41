"""The last lines that a run prints."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite, nan
from pathlib import Path
from shlex import quote
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table

from gvsl_lightning.callbacks.backbone_exporter import BackboneExporter
from gvsl_lightning.callbacks.matching_figure import MatchingFigure
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import read_metrics
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.tasks.segmentation import Segmentation
from gvsl_lightning.tasks.transfer import TransferTask


class RunSummary(pl.Callback):
    """Prints one line at the end of fit: how it went, and where the results are.

    Matching before and after; without matching, the validation loss and whether features collapse.
    """

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print; the last hook, so that the order of the callbacks does not matter."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [
            f"{title} {metrics[before]:.3f} -> {metrics[after]:.3f}"
            for title, before, after in (
                ("NCC", "val/ncc_before", "val/ncc_after"),
                ("Dice", "val/dice_before", "val/dice_after"),
            )
            if before in metrics and after in metrics
        ]
        if not parts:
            parts = [
                f"{title} {metrics[name]:.3f}"
                for title, name in (
                    ("validation loss", "val/loss"),
                    ("spread of the features", "val/feature_std"),
                    ("their effective rank", "val/effective_rank"),
                )
                if name in metrics
            ]
        if "val/folded" in metrics:
            parts.append(f"{100 * metrics['val/folded']:.2f} % of voxels folded")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MatchingFigure | BackboneExporter) and callback.last_path:
                kind = "figure" if isinstance(callback, MatchingFigure) else "backbone"
                parts.append(f"{kind} {callback.last_path}")
            # a FeatureFigure's, whose module imports this one
            parts += [f"figure {path}" for path in getattr(callback, "last_paths", ())]
        print(f"{trainer.global_step} steps: {', '.join(parts) or 'no validation'}")


class TransferSummary(pl.Callback):
    """Prints the end of a fine-tuning: split, best validation, checkpoint and the next command."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print; the last hook, so that the order of the callbacks does not matter."""
        if stage != "fit" or not trainer.is_global_zero or not isinstance(pl_module, TransferTask):
            return
        split = getattr(trainer.datamodule, "split", None)  # type: ignore[attr-defined]
        if split is not None:
            sizes = (len(split.train), len(split.val), len(split.test))
            print("Cases: {} train, {} validate, {} test".format(*sizes))
        assert pl_module.monitor is not None
        path = _best_checkpoint(trainer)
        # the best checkpoint of a resumed run may lie in the folder of an earlier one, with its row
        folders = [Path(path).parents[1]] if path else []
        best = _best_validation([*folders, run_folder(trainer)], *pl_module.monitor)
        if best:
            Console().print(_table(best, pl_module.monitor[0]))
        if path is None:
            return
        print(f"Checkpoint: {path}")
        if split is not None and split.test:
            print(f"Test it: gvsl test --ckpt {quote(path)}")
        if isinstance(pl_module, Segmentation):
            print(f"Segment other volumes: gvsl predict --ckpt {quote(path)} --root FOLDER")


def _best_validation(folders: Sequence[Path], score: str, mode: str) -> Mapping[str, float]:
    """The row of the best validation in the first folder that has any; empty if none has."""
    rows: list[dict[str, float]] = []
    for folder in folders:
        with suppress(InputError):  # there is no table without a logger
            rows = rows or [row for row in read_metrics(folder) if isfinite(row.get(score, nan))]
    sign = 1 if mode == "max" else -1
    return max(rows, key=lambda row: sign * row[score], default={})


def _table(best: Mapping[str, float], score: str) -> Table:
    table = Table(title=f"Best validation, step {best['step'] + 1:.0f}", title_justify="left")
    table.add_column("class")
    table.add_column(score.removeprefix("val/"), justify="right")
    for name, value in best.items():
        if name.startswith(f"{score}_"):
            table.add_row(name.removeprefix(f"{score}_"), f"{value:.3f}")
    table.add_row("mean", f"{best[score]:.3f}", style="bold")
    return table


def _best_checkpoint(trainer: Any) -> str | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            return callback.best_model_path
    return None
