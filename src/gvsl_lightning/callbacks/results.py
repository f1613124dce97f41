"""What test and predict leave behind: tables, picture sheets and NIfTI files."""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gvsl_lightning.data.find import require_apart
from gvsl_lightning.data.read import write_volume
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.case_figures import CaseDrawing, draw_cases
from gvsl_lightning.evaluation.scores import (
    Interval,
    bootstrap,
    mean_defined,
    score_class,
    segmentation_table,
    summarise_segmentation,
)
from gvsl_lightning.runs.files import remove_partials, require_writable, save_figure, write_csv
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.loggers import log_figure, log_segmentations, log_table
from gvsl_lightning.tasks.classification import Classification
from gvsl_lightning.tasks.segmentation import Segmentation


class SegmentationReport(pl.Callback):
    """Reports a test: ``test_cases.csv``, ``test_cases.png``, a printed table and logged means.

    The sheet shows the worst, the median and the best case by mean Dice.

    Attributes:
        last_path: the newest table, once there is one.
    """

    def __init__(self) -> None:
        self.last_path: Path | None = None
        self._folder = Path()
        self._scores: dict[str, dict[str, float]] = {}
        self._drawings: dict[str, CaseDrawing] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        self._folder = run_folder(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the test before."""
        self._scores, self._drawings = {}, {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores, and of the volumes three slices."""
        name = outputs["name"]
        self._scores[name] = outputs["scores"]
        self._drawings[name] = CaseDrawing.of(
            *(outputs[key] for key in ("image", "label", "prediction", "affine"))
        )

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, print and log."""
        if not isinstance(pl_module, Segmentation):
            raise InputError(
                f"SegmentationReport is for Segmentation and {type(pl_module).__name__} is none: "
                "remove it from trainer.callbacks."
            )
        classes = pl_module.class_names
        scores = _of_all_ranks(self._scores)
        drawings = _of_all_ranks(self._drawings)
        summaries = summarise_segmentation(list(scores.values()), classes)
        for name, summary in summaries.items():
            if math.isfinite(summary.mean):
                metric, _, structure = name.partition(" ")
                suffix = "" if structure == "mean" else f"_{structure}"
                pl_module.log(f"test/{metric}{suffix}", summary.mean, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        mean_dice = {
            name: mean_defined([case[f"dice {structure}"] for structure in classes[1:]])
            for name, case in scores.items()
        }
        rows = [
            {"name": name, "dice mean": mean_dice[name], **scores[name]} for name in sorted(scores)
        ]
        self.last_path = self._folder / "test_cases.csv"
        _write_csv(self.last_path, rows)
        log_table(trainer, "test/cases", rows)
        ranked = sorted(
            (name for name in mean_dice if math.isfinite(mean_dice[name])),
            key=mean_dice.__getitem__,
        )
        if ranked:
            chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
            titles = [
                f"{kind}: {name}, Dice {mean_dice[name]:.3f}" for kind, name in chosen.items()
            ]
            figure = draw_cases([drawings[name] for name in chosen.values()], titles, classes)
            path = self._folder / "test_cases.png"
            save_figure(figure, path, dpi=100)
            log_figure(trainer, "test/sheet", path, figure)
            slices = {
                f"test/{kind}": list(zip(*drawings[name][:3], strict=True))
                for kind, name in chosen.items()
            }
            log_segmentations(trainer, slices, titles, classes)
        Console().print(segmentation_table(summaries, classes, len(scores)))
        print(f"Cases: {self.last_path}, figure {self._folder / 'test_cases.png'}")


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
        self.resamples = resamples
        self.last_path: Path | None = None
        self._folder = Path()
        self._cases: dict[str, tuple[Tensor, Tensor]] = {}
        self._predictions: dict[str, Tensor] = {}
        self._errors: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        self._folder = run_folder(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the test before."""
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
        """Keep the predictions."""
        for index, name in enumerate(outputs["name"]):
            self._cases[name] = (outputs["probabilities"][index], outputs["target"][index])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, print and log."""
        if not isinstance(pl_module, Classification):
            raise InputError(
                f"ClassificationReport is for Classification and {type(pl_module).__name__} is "
                "none: remove it from trainer.callbacks."
            )
        cases = _of_all_ranks(self._cases)
        names = sorted(cases)
        probabilities = torch.stack([cases[name][0] for name in names])
        targets = torch.stack([cases[name][1] for name in names])
        classes = pl_module.class_names
        several = bool(pl_module.hparams["multi_label"])
        truth = targets.long() if several else torch.eye(len(classes)).long()[targets]
        found = (
            (probabilities > 0.5).long()
            if several
            else torch.eye(len(classes)).long()[probabilities.argmax(dim=1)]
        )
        intervals = self._intervals(probabilities, found, truth, classes)
        for (score, name), interval in intervals.items():
            if math.isfinite(interval.value):
                suffix = "" if name == "mean" else f"_{name}"
                pl_module.log(f"test/{score}{suffix}", interval.value, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.last_path = self._folder / "test_cases.csv"
        rows = [
            {
                "name": name,
                "label": ";".join(
                    one for one, applies in zip(classes, truth[place], strict=True) if applies
                ),
                **_probabilities(classes, probabilities[place]),
            }
            for place, name in enumerate(names)
        ]
        _write_csv(self.last_path, rows)
        log_table(trainer, "test/cases", rows)
        table = Table(
            title=f"Test, {len(names)} cases, 95 % intervals of {self.resamples} resamples",
            title_justify="left",
        )
        for column in ("class", "cases", "AUROC", "AP", "F1"):
            table.add_column(column)
        for name in (*classes, "mean"):
            count = len(names) if name == "mean" else int(truth[:, classes.index(name)].sum())
            cells = [str(intervals[score, name]) for score in ("auroc", "ap", "f1")]
            table.add_row(name, str(count), *cells, end_section=name == classes[-1])
        Console().print(table)
        print(f"Cases: {self.last_path}")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the prediction before."""
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
        """Keep the probabilities, or why there are none."""
        if "error" in outputs:
            self._errors.update(zip(outputs["name"], outputs["error"], strict=True))
        else:
            self._predictions.update(zip(outputs["name"], outputs["probabilities"], strict=True))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the probabilities and say what could not be read."""
        predictions, errors = _of_all_ranks(self._predictions), _of_all_ranks(self._errors)
        if trainer.is_global_zero:
            assert isinstance(pl_module, Classification)
            self._folder.mkdir(parents=True, exist_ok=True)
            self.last_path = self._folder / "predictions.csv"
            rows = [
                {"name": name, **_probabilities(pl_module.class_names, predictions[name])}
                for name in sorted(predictions)
            ]
            _write_csv(self.last_path, rows)
            print(f"{len(rows)} volumes: {self.last_path}")
        _refuse_errors(trainer, errors, len(predictions))

    def _intervals(
        self, probabilities: Tensor, found: Tensor, truth: Tensor, classes: Sequence[str]
    ) -> dict[tuple[str, str], Interval]:
        """Interval of every score for each class and for their mean."""
        intervals: dict[tuple[str, str], Interval] = {}
        for score in ("auroc", "ap", "f1"):
            given = found.float() if score == "f1" else probabilities

            def of_class(
                predictions: Tensor, targets: Tensor, score: str = score, index: int = 0
            ) -> float:
                return score_class(score, predictions[:, index], targets[:, index])

            def mean(predictions: Tensor, targets: Tensor, score: str = score) -> float:
                return mean_defined(
                    [
                        score_class(score, one, true)
                        for one, true in zip(predictions.T, targets.T, strict=True)
                    ]
                )

            for index, name in enumerate(classes):
                of_this = partial(of_class, index=index)
                intervals[score, name] = bootstrap(of_this, given, truth, self.resamples)
            intervals[score, "mean"] = bootstrap(mean, given, truth, self.resamples)
        return intervals


class PredictionWriter(BasePredictionWriter):
    """Writes predicted label maps as NIfTI files on the grid of the volumes they belong to.

    A volume keeps its name, relative to the folder that was searched (of a pattern or list, to the
    one that all volumes have in common), and its geometry (sform and qform). Probabilities, where
    the task gives them, become ``NAME_probabilities.nii.gz`` with one channel for each class. At
    the end, the volumes that could not be read are named, and the exit code is not 0.

    Args:
        folder: where to write.
        overwrite: whether to predict volumes again that have a file there. Otherwise they are left
            out.

    Raises:
        InputError: at the end, if a volume could not be predicted.
    """

    def __init__(self, folder: str = "predictions", overwrite: bool = False) -> None:
        super().__init__("batch")
        self.folder = folder
        self.overwrite = overwrite
        self._folder = Path(folder).expanduser()
        self._errors: dict[str, str] = {}
        self._written: dict[str, bool] = {}
        self._kept: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the data which volumes are done."""
        super().setup(trainer, pl_module, stage)
        self._errors, self._written, self._kept = {}, {}, set()
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "predict" or datamodule is None:
            return
        if not isinstance(pl_module, Segmentation):
            raise InputError(
                f"PredictionWriter is for Segmentation and {type(pl_module).__name__} is none: "
                "remove it from trainer.callbacks."
            )
        self.check_folder(datamodule)
        if trainer.is_global_zero:
            remove_partials(self._folder)
        if not self.overwrite:
            names = ["{}_probabilities"] if pl_module.hparams["probabilities"] else []

            def is_predicted(name: str) -> bool:
                done = all(self._path(one.format(name)).exists() for one in ("{}", *names))
                if done:
                    self._kept.add(name)
                return done

            datamodule.is_predicted = is_predicted

    def check_folder(self, data: pl.LightningDataModule) -> None:
        """Look at the folder before there is something to write.

        Raises:
            InputError: it lies where the volumes of the data are searched for.
            OSError: it cannot be written to.
        """
        require_apart(self._folder, data)
        require_writable(self._folder)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one volume."""
        name = prediction["name"]
        if "error" in prediction:
            self._errors[name] = prediction["error"]
            return
        source, affine = prediction["source"], prediction["affine"]
        if "probabilities" in prediction:
            channels = np.moveaxis(prediction["probabilities"].numpy(), 0, -1)
            write_volume(self._path(f"{name}_probabilities"), channels, source, affine)
        write_volume(self._path(name), prediction["prediction"].numpy(), source, affine)
        self._written[name] = True

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was written and what could not be read."""
        errors, written = _of_all_ranks(self._errors), _of_all_ranks(self._written)
        if trainer.is_global_zero:
            print(f"{len(written)} volumes written to {self._folder}")
        _refuse_errors(trainer, errors, len(written))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say how many files were kept, also where nothing was left to predict."""
        if self._kept and trainer.is_global_zero:
            print(f"{len(self._kept)} volumes kept that were in {self._folder} already")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.nii.gz"


def _of_all_ranks(mine: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries of all ranks in one; cases that a rank repeats to have as many count once."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return mine
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def _refuse_errors(trainer: pl.Trainer, errors: Mapping[str, str], predicted: int) -> None:
    """Print what could not be predicted; end with an error if there is anything."""
    if not errors:
        return
    count, first = len(errors) + predicted, next(iter(errors.values()))
    if len(errors) == 1:
        raise InputError(f"1 of {count} volumes was not predicted: {first}")
    if trainer.is_global_zero:
        for error in errors.values():
            print(f"not predicted: {error}", file=sys.stderr)
    raise InputError(
        f"{len(errors)} of {count} volumes were not predicted, the first one because {first}"
    )


def _probabilities(class_names: Sequence[str], values: Tensor) -> dict[str, float]:
    """Columns of one volume."""
    return {
        f"probability {name}": float(value) for name, value in zip(class_names, values, strict=True)
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table; undefined values become empty cells."""
    defined = [
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    write_csv(path, list(rows[0]) if rows else ["name"], defined)
