"""Progress, curves and the end of a fine-tuning, in a run of several epochs."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from gvsl_lightning.callbacks import StepBar
from gvsl_lightning.cli.main import main
from gvsl_lightning.runs.files import read_metrics

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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (bar,) = (one for one in trainer.callbacks if isinstance(one, StepBar))
        Watch.seen = bar.train_progress_bar.completed, bar.train_progress_bar.total


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
    assert (
        f"gvsl predict --ckpt {checkpoint.absolute()}" in printed.replace("\n", "")
        or str(checkpoint) in printed
    )
