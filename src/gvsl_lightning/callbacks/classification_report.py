"""The report of a classification test, and the table of predictions."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gvsl_lightning.callbacks.prediction_errors import raise_prediction_errors
from gvsl_lightning.callbacks.reporting import name_case, require_task, write_cases
from gvsl_lightning.errors import check_range
from gvsl_lightning.evaluation.scores import Interval, bootstrap, mean_defined, score_class
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.gathering import gather_dict
from gvsl_lightning.runs.loggers import log_table
from gvsl_lightning.tasks.classification import Classification


class ClassificationReport(pl.Callback):
    """Reports a test: ``test_cases.csv``, and AUROC, AP and F1 with bootstrap 95 % intervals.

    In ``predict`` it writes ``predictions.csv``, the probabilities of every volume; then the
    volumes that could not be read are named, and the exit code is not 0. F1 is that of the most
    probable class, with several labels that of probabilities above 0.5.

    Args:
        resamples: of the bootstrap.

    Attributes:
        last_path: the newest table, once there is one.

    Raises:
        InputError: at the end of ``predict``, if a volume could not be predicted.
    """

    def __init__(self, resamples: int = 1000) -> None:
        check_range("resamples", resamples, 1)
        self.resamples = resamples
        self.last_path: Path | None = None
        self._folder = Path()
        self._cases: dict[str, tuple[Tensor, Tensor]] = {}
        self._predictions: dict[str, Tensor] = {}
        self._errors: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cases = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for index, name in enumerate(outputs["name"]):
            self._cases[name] = (outputs["probabilities"][index], outputs["target"][index])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = require_task(self, pl_module, Classification).class_names
        cases = gather_dict(self._cases)
        names = sorted(cases)
        probabilities = torch.stack([cases[name][0] for name in names])
        targets = torch.stack([cases[name][1] for name in names])
        single = torch.eye(len(classes)).long()
        if pl_module.hparams["multi_label"]:
            truth, found = targets.long(), (probabilities > 0.5).long()
        else:
            truth, found = single[targets], single[probabilities.argmax(dim=1)]
        subjects = [name_case(trainer, name).get("subject", name) for name in names]
        intervals = self._intervals(probabilities, found, truth, classes, subjects)
        for (score, name), interval in intervals.items():
            if math.isfinite(interval.value):
                suffix = "" if name == "mean" else f"_{name}"
                pl_module.log(f"test/{score}{suffix}", interval.value, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        rows = [
            {
                **name_case(trainer, name),
                "label": ";".join(
                    one for one, is_true in zip(classes, row, strict=True) if is_true
                ),
                **_probabilities(classes, values),
            }
            for name, row, values in zip(names, truth, probabilities, strict=True)
        ]
        self.last_path = self._folder / "test_cases.csv"
        write_cases(self.last_path, rows)
        log_table(trainer, "test/cases", rows)
        Console().print(self._table(intervals, truth, classes))
        print(f"Cases: {self.last_path}")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._predictions, self._errors = {}, {}

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "error" in outputs:
            self._errors.update(zip(outputs["name"], outputs["error"], strict=True))
        else:
            self._predictions.update(zip(outputs["name"], outputs["probabilities"], strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = require_task(self, pl_module, Classification).class_names
        predictions, errors = gather_dict(self._predictions), gather_dict(self._errors)
        if trainer.is_global_zero:
            rows = [
                {"name": name, **_probabilities(classes, predictions[name])}
                for name in sorted(predictions)
            ]
            self.last_path = self._folder / "predictions.csv"
            write_cases(self.last_path, rows)
            print(f"{len(rows)} volumes: {self.last_path}")
        raise_prediction_errors(trainer, errors, len(predictions))

    def _table(
        self,
        intervals: Mapping[tuple[str, str], Interval],
        truth: Tensor,
        classes: Sequence[str],
    ) -> Table:
        table = Table(
            title=f"Test, {len(truth)} cases, 95 % intervals of {self.resamples} resamples",
            title_justify="left",
        )
        for column in ("class", "cases", "AUROC", "AP", "F1"):
            table.add_column(column)
        for name in (*classes, "mean"):
            count = len(truth) if name == "mean" else int(truth[:, classes.index(name)].sum())
            cells = [str(intervals[score, name]) for score in ("auroc", "ap", "f1")]
            table.add_row(name, str(count), *cells, end_section=name == classes[-1])
        return table

    def _intervals(
        self,
        probabilities: Tensor,
        found: Tensor,
        truth: Tensor,
        classes: Sequence[str],
        subjects: Sequence[str],
    ) -> dict[tuple[str, str], Interval]:
        """Interval of every score for each class and for their mean."""
        places = {name: [index] for index, name in enumerate(classes)}
        places["mean"] = list(range(len(classes)))
        return {
            (score, name): bootstrap(
                partial(_mean_score, score),
                (found.float() if score == "f1" else probabilities)[:, columns],
                truth[:, columns],
                self.resamples,
                subjects=subjects,
            )
            for score in ("auroc", "ap", "f1")
            for name, columns in places.items()
        }


def _mean_score(score: str, predictions: Tensor, targets: Tensor) -> float:
    """Mean of a score over the columns where it is defined."""
    columns = zip(predictions.T, targets.T, strict=True)
    return mean_defined([score_class(score, one, true) for one, true in columns])


def _probabilities(class_names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Columns of one volume."""
    return {
        f"probability {name}": float(value) for name, value in zip(class_names, values, strict=True)
    }
