"""The optimiser of every task, its schedule and the callbacks that come with it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import Denoising


def tiny(**options: Any) -> Denoising:
    return Denoising(backbone_options={"channels": [8, 16]}, **options)


class Rates(pl.Callback):
    """Learning rate of each step."""

    def __init__(self, start: float | None = None) -> None:
        self.start = start
        self.rates: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.start is not None:  # as a learning-rate finder does
            trainer.optimizers[0].param_groups[0]["lr"] = self.start

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(root: Path, task: Denoising, steps: int, *callbacks: pl.Callback, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(task, DataLoader([{"image": torch.rand(1, 8, 8, 8)}] * 4, batch_size=2))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_kind_and_options_of_the_optimiser(name: str, kind: type) -> None:
    task = tiny(optimizer=name, learning_rate=0.02, weight_decay=0.1)
    optimizer = task.configure_optimizers()
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)
    assert len(group["params"]) == len(list(task.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    task = tiny()
    task.backbone.requires_grad_(False)
    (group,) = task.configure_optimizers().param_groups
    assert len(group["params"]) == len(list(task.restoration_head.parameters()))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]), ("cosine", [0.25, 0.5, 0.75, 1, 0.75, 0.25])],
)
def test_learning_rate_of_each_step(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    rates = Rates()
    task = tiny(learning_rate=0.01, warmup_steps=3, schedule=schedule)
    fit(tmp_path, task, len(expected), rates)
    assert [rate / 0.01 for rate in rates.rates] == pytest.approx(expected)


def test_a_learning_rate_that_was_found_stays(tmp_path: Path) -> None:
    rates = Rates(start=0.003)
    fit(tmp_path, tiny(learning_rate=0.01), 3, rates)
    assert rates.rates == [0.003] * 3


def test_cosine_needs_a_last_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_steps or .*max_epochs"):
        fit(tmp_path, tiny(schedule="cosine"), -1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("learning_rate", -1.0),
        ("weight_decay", float("nan")),
        ("warmup_steps", -1),
    ],
)
def test_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is "):
        tiny(**{name: value})


def test_gradients_are_clipped_by_the_trainer(tmp_path: Path) -> None:
    norms = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, task: Any, *_: Any) -> None:
            parts = [p.grad.norm() for p in task.parameters() if p.grad is not None]
            if parts:
                norms.append(float(torch.stack(parts).norm()))

    fit(tmp_path, tiny(), 2, Norms(), gradient_clip_val=1e-3)
    assert norms
    assert max(norms) <= 1e-3 * (1 + 1e-4)
