"""Checkpoints of tasks that were not trained, for commands that ask for one."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from gvsl_lightning.tasks import GVSL, Segmentation


def save_untrained(task: pl.LightningModule, path: Path) -> Path:
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return path


def segmentation_checkpoint(path: Path, class_names: list[str], **options: Any) -> Path:
    task = Segmentation(
        class_names, mode="scratch", backbone_options={"channels": [8, 16]}, **options
    )
    return save_untrained(task, path)


def registration_checkpoint(path: Path, **options: Any) -> Path:
    return save_untrained(GVSL(**{"backbone_options": {"channels": [8, 16]}, **options}), path)
