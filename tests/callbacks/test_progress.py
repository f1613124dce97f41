"""Progress, curves and the end of a fine-tuning, in a run of several epochs."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger

from gvsl_lightning.callbacks import StepBar, TransferSummary
from gvsl_lightning.cli.main import main
from gvsl_lightning.runs.files import read_metrics, write_csv
from gvsl_lightning.tasks import Segmentation

FIT = [
    *("fit", "--model=Segmentation", "--model.mode=scratch"),
    "--model.class_names=[background,coronary artery]",
    *(
        "--model.backbone_options={channels: [8, 16]}",
        "--data=PhantomSegmentation",
        "--data.scene=coronary_ct",
    ),
    *("--data.size=[16,16,16]", "--data.count=6", "--data.val=2", "--data.test=1"),
    *("--trainer.max_steps=5", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"),
    *("--trainer.log_every_n_steps=1", "--trainer.logger=CSVLogger", "--seed_everything=0"),
    *("--trainer.logger.save_dir=runs", "--trainer.logger.name=a"),
]


class Watch(pl.Callback):
    """Remembers the bar of the training."""

    seen: tuple[float, Any] = (0, None)
    shown: Any = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (bar,) = (one for one in trainer.callbacks if isinstance(one, StepBar))
        Watch.seen = bar.train_progress_bar.completed, bar.train_progress_bar.total
        Watch.shown = bar.get_metrics(trainer, pl_module)


def test_a_fine_tuning_shows_its_progress_and_ends_with_its_best_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([*FIT, f"--trainer.callbacks+={__name__}.Watch"])
    assert Watch.seen == (5, 5)  # the steps of all epochs of three batches
    run = Path("runs", "a", "version_0")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    validations = [row for row in read_metrics(run) if "val/dice" in row]
    best = max(validations, key=lambda row: row["val/dice"])
    printed = capsys.readouterr().out
    assert f"step {best['step'] + 1:.0f}" in printed
    assert f"{best['val/dice_coronary artery']:.3f}" in printed
    checkpoint = run / "checkpoints" / "best.ckpt"
    assert f"gvsl predict --ckpt {checkpoint} --root FOLDER" in printed


class Validated(BoringModel):
    """Logs a validation score without a word to the bar."""

    monitor = ("val/loss", "min")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.25)


def test_the_bar_shows_the_monitored_score_of_any_task(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_steps=2,
        limit_val_batches=1,
        callbacks=[StepBar(), Watch()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(Validated())
    assert Watch.shown == {"val/loss": 0.25}


def test_the_summary_of_a_resumed_run_is_that_of_the_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best checkpoint is an earlier run's, in a folder whose name a shell would split."""
    best = tmp_path / "a run" / "version_0" / "checkpoints" / "best.ckpt"
    write_csv(
        best.parents[1] / "validation.csv",
        ["step", "val/dice", "val/dice_artery"],
        [
            {"step": 1, "val/dice": "nan", "val/dice_artery": "nan"},
            {"step": 3, "val/dice": 0.75, "val/dice_artery": 0.75},
            {"step": 5, "val/dice": 0.5, "val/dice_artery": 0.5},
        ],
    )
    newer = tmp_path / "a run" / "version_1"
    write_csv(newer / "validation.csv", ["step", "val/dice"], [{"step": 7, "val/dice": 0.25}])
    checkpoint = ModelCheckpoint()
    checkpoint.best_model_path = str(best)
    trainer = pl.Trainer(
        logger=CSVLogger(tmp_path, "a run", version=1), callbacks=[checkpoint], accelerator="cpu"
    )
    trainer.datamodule = None
    task = Segmentation(["background", "artery"], mode="scratch")
    TransferSummary().teardown(trainer, task, "fit")
    printed = capsys.readouterr().out
    assert "step 4" in printed
    assert "0.750" in printed
    (command,) = (line for line in printed.splitlines() if "predict" in line)
    assert str(best) in shlex.split(command)
