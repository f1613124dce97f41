"""The report of a segmentation test."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from gvsl_lightning.callbacks.reporting import name_case, require_task, write_cases, write_figure
from gvsl_lightning.evaluation.case_figures import CaseDrawing, draw_cases
from gvsl_lightning.evaluation.scores import (
    mean_defined,
    segmentation_table,
    summarise_segmentation,
)
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.gathering import gather_dict
from gvsl_lightning.runs.loggers import log_segmentations, log_table
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
        self._folder = run_folder(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        name = outputs["name"]
        self._scores[name] = outputs["scores"]
        self._drawings[name] = CaseDrawing.of(
            *(outputs[key] for key in ("image", "label", "prediction", "affine"))
        )

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = require_task(self, pl_module, Segmentation).class_names
        scores = gather_dict(self._scores)
        drawings = gather_dict(self._drawings)
        summaries = summarise_segmentation(list(scores.values()), classes)
        for name, summary in summaries.items():
            if math.isfinite(summary.mean):
                metric, _, structure = name.partition(" ")
                suffix = "" if structure == "mean" else f"_{structure}"
                pl_module.log(f"test/{metric}{suffix}", summary.mean, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        self._write(trainer, scores, drawings, classes)
        Console().print(segmentation_table(summaries, classes, len(scores)))
        print(f"Cases: {self.last_path}, figure {self._folder / 'test_cases.png'}")

    def _write(
        self,
        trainer: pl.Trainer,
        scores: Mapping[str, dict[str, float]],
        drawings: Mapping[str, CaseDrawing],
        classes: Sequence[str],
    ) -> None:
        mean_dice = {
            name: mean_defined([case[f"dice {structure}"] for structure in classes[1:]])
            for name, case in scores.items()
        }
        rows = [
            {**name_case(trainer, name), "dice mean": mean_dice[name], **scores[name]}
            for name in sorted(scores)
        ]
        self.last_path = self._folder / "test_cases.csv"
        write_cases(self.last_path, rows)
        log_table(trainer, "test/cases", rows)
        ranked = sorted(
            (name for name in mean_dice if math.isfinite(mean_dice[name])),
            key=mean_dice.__getitem__,
        )
        if not ranked:
            return
        chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
        titles = [f"{kind}: {name}, Dice {mean_dice[name]:.3f}" for kind, name in chosen.items()]
        figure = draw_cases([drawings[name] for name in chosen.values()], titles, classes)
        write_figure(trainer, "test/sheet", self._folder / "test_cases.png", figure, dpi=100)
        slices = {
            f"test/{kind}": list(zip(*drawings[name][:3], strict=True))
            for kind, name in chosen.items()
        }
        log_segmentations(trainer, slices, titles, classes)
