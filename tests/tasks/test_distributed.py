"""Two processes on the CPU must train exactly what one would on the same pairs."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from forked import Forked, strategy
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.tasks import GVSL

STEPS = 2


class Volumes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        coarse = torch.rand(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(index))
        image = F.interpolate(coarse, size=(18, 18, 18), mode="trilinear")[0]
        return {"image": image, "label": (image * 4).long(), "name": f"volume {index}"}


class Pairs(PairDataModule):
    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return Volumes(), Volumes()


class KeepGradients(pl.Callback):
    """Writes what every process has after each backward pass: `{folder}/{step}-{rank}.pt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.fixed = batch["fixed"]

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gradients = {name: value.grad for name, value in pl_module.named_parameters()}
        content = {"fixed": self.fixed, "gradients": gradients}
        torch.save(content, self.folder / f"{trainer.global_step}-{trainer.global_rank}.pt")


def tiny() -> GVSL:
    torch.manual_seed(0)
    # one seed draws the views of all pairs of a process, so they are off here
    return GVSL(
        backbone_options={"channels": [8, 16]},
        affine_channels=16,
        learning_rate=1e-3,
        corruption=False,
        spatial=False,
    )


def train(folder: Path, batch_size: int, **options: Any) -> tuple[GVSL, dict[str, float]]:
    folder.mkdir()
    task = tiny()
    data = Pairs(patch_size=(16, 16, 16), batch_size=batch_size, val_pairs=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[Forked(), KeepGradients(folder)],
        **options,
    )
    trainer.fit(task, data)
    return task, {name: float(value) for name, value in trainer.callback_metrics.items()}


def read(folder: Path, step: int, rank: int) -> dict[str, Any]:
    return torch.load(folder / f"{step}-{rank}.pt", weights_only=True)


Run = tuple[Path, GVSL, dict[str, float]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "alone"
    return folder, *train(folder, batch_size=2)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "together"
    return folder, *train(folder, batch_size=1, devices=2, strategy=strategy())


def test_processes_see_different_pairs_of_the_same_batch(alone: Run, together: Run):
    assert {file.stem for file in together[0].glob("*.pt")} == {"0-0", "0-1", "1-0", "1-1"}
    for step in range(STEPS):
        parts = [read(together[0], step, rank)["fixed"] for rank in range(2)]
        assert not torch.equal(*parts)
        assert torch.equal(torch.cat(parts), read(alone[0], step, 0)["fixed"])


def test_gradients_are_those_of_one_process(alone: Run, together: Run):
    expected = read(alone[0], 0, 0)["gradients"]
    for rank in range(2):
        got = read(together[0], 0, rank)["gradients"]
        assert got.keys() == expected.keys()
        for name, value in got.items():
            assert_close(value, expected[name], name)
            assert bool(value.any()), name


def test_processes_stay_equal(together: Run):
    last = [read(together[0], STEPS - 1, rank)["gradients"] for rank in range(2)]
    for name, value in last[0].items():
        assert torch.equal(value, last[1][name]), name


def test_validation_is_that_of_one_process(alone: Run, together: Run):
    expected, got = alone[2], together[2]
    assert got.keys() == expected.keys()
    names = [name for name in expected if name.startswith("val/")]
    assert {"val/ncc_after", "val/dice_after", "val/affine_spread"} <= set(names)
    for name in names:
        assert got[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-4), name


def test_weights_end_as_those_of_one_process(alone: Run, together: Run):
    start = nn.utils.parameters_to_vector(tiny().parameters())
    expected = nn.utils.parameters_to_vector(alone[1].parameters())
    got = nn.utils.parameters_to_vector(together[1].parameters())
    assert (got - expected).norm() < 0.01 * (expected - start).norm()


def assert_close(value: Tensor, expected: Tensor, name: str) -> None:
    """Equal to 1e-5 of the largest gradient of the parameter, and to 1e-5 absolutely."""
    scale = min(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(
        value, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}"
    )
