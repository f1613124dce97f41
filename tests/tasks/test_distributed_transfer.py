"""Two processes on the CPU validate, test and train on labels what one process would."""

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from forked import Forked, strategy
from gvsl_lightning.callbacks import SegmentationReport
from gvsl_lightning.datamodules import PhantomClassification, PhantomSegmentation
from gvsl_lightning.tasks import Classification, Segmentation
from gvsl_lightning.weights import save_backbone

CASES = 3  # an odd number, of which the processes cannot have as many


class KeepNames(pl.Callback):
    """Writes which case every process tests in each batch: `{folder}/{rank}-{batch}.txt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        path = self.folder / f"{trainer.global_rank}-{batch_idx}.txt"
        path.write_text(batch["name"][0])


def trainer(folder: Path, processes: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": processes,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": [Forked(), *callbacks],
    }
    if processes > 1:
        given["strategy"] = strategy()
    return pl.Trainer(**(given | options))


def labelled(**options: Any) -> PhantomSegmentation:
    given = {"size": (16, 16, 16), "count": 10, "val": CASES, "test": CASES, "split_by": "name"}
    return PhantomSegmentation("cardiac_ct", **(given | options))


def segmentation(**options: Any) -> Segmentation:
    torch.manual_seed(0)
    given = {
        "class_names": labelled().class_names,
        "mode": "scratch",
        "backbone_options": {"channels": [8, 16]},
        "window_size": (16, 16, 16),
    }
    return Segmentation(**(given | options))


def chests() -> PhantomClassification:
    return PhantomClassification(size=(16, 16, 16), count=8, val=CASES, split_by="name")


def classification() -> Classification:
    torch.manual_seed(0)
    return Classification(
        class_names=["healthy", "lesions"],
        mode="scratch",
        backbone_options={"channels": [8, 16]},
    )


class KeepWeights(pl.Callback):
    """Writes what a process has at the end: weights, and steps of Adam for each parameter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = trainer.optimizers[0].state
        steps = {
            name: int(state[part]["step"]) if part in state else 0
            for name, part in pl_module.named_parameters()
        }
        content = {"weights": pl_module.state_dict(), "steps": steps}
        torch.save(content, self.folder / f"{trainer.global_rank}.pt")


def test_frozen_epochs(tmp_path: Path) -> None:
    weights = save_backbone(segmentation().backbone, tmp_path / "backbone.safetensors", {})
    ends = []
    for processes in (1, 2):
        model = segmentation(mode="finetune", weights=str(weights), frozen_epochs=1)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        data = labelled(batch_size=2 // processes, augmentation=False)
        folder = tmp_path / str(processes)
        folder.mkdir()
        trainer(folder, processes, KeepWeights(folder), max_epochs=2).fit(model, data)
        ends.append([torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))])
    (alone,), (first, second) = ends
    assert first["steps"] == second["steps"] == alone["steps"]
    assert {name: 4 if name.startswith("head") else 2 for name in alone["steps"]} == alone["steps"]
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        moved = (value - start[name]).norm()
        assert moved > 0, name
        assert (first["weights"][name] - value).norm() < 0.05 * moved, name


@pytest.mark.parametrize(("task", "data"), [(segmentation, labelled), (classification, chests)])
def test_validation_counts_every_case_once(tmp_path: Path, task: Any, data: Any) -> None:
    (alone,), (together,) = (
        trainer(tmp_path, processes).validate(task(), data(), verbose=False) for processes in (1, 2)
    )
    assert together.keys() == alone.keys()
    assert len(alone) > 2
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-5), name


def test_a_test_runs_every_case_once(tmp_path: Path) -> None:
    tables, names = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run = trainer(folder, processes, SegmentationReport(), KeepNames(folder))
        run.test(segmentation(), labelled(), verbose=False)
        with open(folder / "test_cases.csv", newline="") as file:
            tables.append(list(csv.DictReader(file)))
        names.append(sorted(path.read_text() for path in folder.glob("*.txt")))
    assert len(names[0]) == len(set(names[0])) == CASES
    assert names[1] == names[0]
    assert tables[1] == tables[0]
