"""Settings of every run that neither a configuration nor the command line changes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from gvsl_lightning.cli.diagnosis import find_class
from gvsl_lightning.cli.sources import settings
from gvsl_lightning.tasks import GVSL, Classification, MaskedAutoencoder, Segmentation
from gvsl_lightning.tasks.pretraining import PretrainTask, RestorationTask
from gvsl_lightning.tasks.transfer import TransferTask

SEED = 0
"""Default of ``seed_everything``."""


def run_defaults(words: Sequence[str], command: str = "") -> dict[str, Any]:
    """Return dotted key -> default for the words of a command line and its subcommand."""
    task = given_task(words, command)
    job = "transfer" if task and issubclass(task, TransferTask) else "pretrain"
    bases = task.__mro__ if task else ()
    logger = {
        "save_dir": "runs",
        "name": _run_name(words) or "gvsl",
        "offline": True,
        "project": "gvsl_lightning",
        "job_type": job,
    }
    return {
        "trainer.check_val_every_n_epoch": None,  # val_check_interval counts steps
        "trainer.val_check_interval": 500,
        "trainer.precision": "32-true",
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 10,
        "trainer.logger": _object("VersionedWandbLogger", **logger),
        "trainer.callbacks": [
            *map(_object, ("StepBar", "PartsTable", "Curves")),
            _checkpoint(getattr(task, "monitor", None)),
            *map(_object, next((_CALLBACKS[b] for b in bases if b in _CALLBACKS), ())),
        ],
    }


def given_task(words: Sequence[str], command: str = "") -> type | None:
    """Return the class of the model that a command line and its files name, if it exists."""
    names = [
        setting.value
        for setting in settings(words, command)
        if setting.key in ("model", "model.class_path") and isinstance(setting.value, str)
    ]
    return find_class(names[-1], pl.LightningModule) if names else None


_PRETRAINING = ("GradientNorms", "BackboneExporter", "RunSummary")
_CALLBACKS: dict[type, tuple[str, ...]] = {
    PretrainTask: _PRETRAINING,
    GVSL: ("MatchingFigure", *_PRETRAINING),
    RestorationTask: ("MatchingFigure", *_PRETRAINING),
    MaskedAutoencoder: ("FeatureFigure", *_PRETRAINING),
    Segmentation: ("SegmentationReport", "TransferSummary", "PredictionWriter"),
    Classification: ("ClassificationReport", "TransferSummary"),
}
"""Callbacks of a task: those of the nearest of its base classes."""


def _run_name(words: Sequence[str]) -> str | None:
    """Name of a run: that of the first configuration file, or of the run of the checkpoint."""
    trained = None
    for word, following in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        path = Path(value if equals else following)
        if option in ("-c", "--config") and path.suffix in (".yaml", ".yml"):
            return path.stem
        if option == "--ckpt_path" and path.parent.name == "checkpoints":
            trained = path.absolute().parents[2].name  # NAME/version_N/checkpoints/FILE
    return trained


def _checkpoint(monitor: tuple[str, str] | None) -> dict[str, Any]:
    if monitor is None:
        return _object("ResumableCheckpoint", filename="newest", save_last=True)
    score, mode = monitor
    return _object("ResumableCheckpoint", monitor=score, mode=mode, filename="best", save_last=True)


def _object(name: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}
