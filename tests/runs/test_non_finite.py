"""A loss or gradient that is not finite changes nothing, and is named with step and volumes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.callbacks import GradientNorms, NonFiniteGuard
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.heads import RunningStandardisation
from gvsl_lightning.tasks import GVSL, Denoising, Segmentation
from gvsl_lightning.tasks.base import BaseTask

EDGE, BAD = 8, 2
TINY: dict[str, Any] = {"backbone_options": {"channels": [8, 16]}, "learning_rate": 1e-3}


class Volumes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(1, EDGE, EDGE, EDGE, generator=generator)
        return {"image": image, "label": (image > 0.5).long(), "name": f"volume {index}"}


class Pairs(PairDataModule):
    """Four steps of two pairs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(patch_size=(EDGE,) * 3, batch_size=2, val_pairs=2, **options)

    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return Volumes(), Volumes()


class Poisoned(GVSL):
    """Makes a term of given steps NaN or infinite, or a gradient alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(affine_channels=8, **TINY, **options)
        self.poison: dict[int, tuple[str, float]] = {}

    def compute_losses(self, views: dict[str, Tensor]) -> Any:
        losses = super().compute_losses(views)
        name, value = self.poison.get(self.batch if self.training else -1, ("", 0.0))
        if name == "gradient":
            displacement = self.last_matching.displacement
            losses["total"] = losses["total"] + (0 * displacement).square().sum().sqrt()
        elif name:
            losses[name] = losses[name] * value
            losses["total"] = losses["total"] + losses[name]
        return losses

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batch = batch_idx
        return super().training_step(batch, batch_idx)


class Keep(pl.Callback):
    """The weights and moments after each step, and the names of each batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[Any, Any]] = []
        self.names: list[list[str]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights.append(copy.deepcopy(task.state_dict()))
        self.moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    def on_train_batch_start(self, trainer: pl.Trainer, task: Any, batch: Any, index: int) -> None:
        self.names.append([*batch["fixed_name"], *batch["moving_name"]])


def fit(
    task: BaseTask,
    root: Path,
    *callbacks: pl.Callback,
    data: Any = None,
    keep: Keep | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Keep]:
    keep = keep or Keep()
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": root,
            "callbacks": [*callbacks, *([keep] if data is None else [])],
            **options,
        }
    )
    trainer.fit(task, data or Pairs())
    return trainer, keep


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(torch.equal(first, second)) if isinstance(first, Tensor) else first == second


@pytest.mark.parametrize(
    ("term", "value", "fault"),
    [
        ("ncc", math.nan, "train/loss_ncc is nan"),
        ("smoothness", math.inf, "train/loss_smoothness is inf"),
        ("restoration", -math.inf, "train/loss_restoration is -inf"),
        ("gradient", math.nan, "backbone, affine_head, deformable_head"),
    ],
)
def test_a_run_stops_and_names_step_term_and_volumes(
    tmp_path: Path, term: str, value: float, fault: str
) -> None:
    task = Poisoned()
    with torch.no_grad():
        # heads that are at the identity pass no gradient on to what lies behind them
        for parameter in task.matching_head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if term == "smoothness":
        task.smoothness = Ones()
    task.poison[BAD] = (term, value)
    keep = Keep()
    with pytest.raises(InputError) as raised:
        fit(task, tmp_path, keep=keep)
    sentence = str(raised.value)
    assert sentence.startswith(f"Step {BAD}: ")
    assert fault in sentence
    assert f"for {', '.join(keep.names[BAD])};" in sentence
    assert "action: skip" in sentence
    assert len(keep.weights) == BAD
    assert same(task.state_dict(), keep.weights[-1])


class Ones(nn.Module):
    """Infinity times the smoothness of heads that move nothing is none."""

    def forward(self, displacement: Tensor) -> Tensor:
        return 1 + displacement.square().mean()


@pytest.mark.parametrize("term", ["ncc", "gradient"])
def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path: Path, term: str) -> None:
    task = Poisoned(weight_decay=0.1, optimizer="adamw")
    task.poison[BAD] = (term, math.nan)
    # the norms of a step that is skipped are logged before its gradient is dropped
    callbacks = (NonFiniteGuard("skip"), GradientNorms())
    with pytest.warns(UserWarning, match=rf"Step {BAD}: .* volume \d"):
        trainer, keep = fit(task, tmp_path, *callbacks, log_every_n_steps=1, gradient_clip_val=1.0)
    assert trainer.global_step == 4
    for kept in (keep.weights, keep.moments):
        assert [same(kept[k], kept[k + 1]) for k in range(3)] == [False, True, False]
    assert all(value.isfinite().all() for value in task.state_dict().values())
    assert float(trainer.callback_metrics["train/skipped"]) == 1
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    alternate = Poisoned()
    alternate.poison = {0: ("ncc", math.nan), 2: ("ncc", math.nan)}
    guard = NonFiniteGuard("skip", max_skipped=1)
    with pytest.warns(UserWarning, match="Step 0: "):
        assert fit(alternate, tmp_path, guard)[0].global_step == 4
    task = Poisoned()
    task.poison = {1: ("ncc", math.nan), 2: ("ncc", math.nan)}
    with (
        pytest.warns(UserWarning, match="Step 1: "),
        pytest.raises(InputError, match=r"^Step 2: .*max_skipped"),
    ):
        fit(task, tmp_path, guard)


def test_a_guard_of_the_trainer_takes_the_place_of_the_tasks_own(tmp_path: Path) -> None:
    guard = NonFiniteGuard("skip", max_skipped=3)
    for callbacks, action in (((), "stop"), ((guard,), "skip")):
        trainer, _ = fit(Poisoned(), tmp_path, *callbacks, limit_train_batches=1)
        trainer.fit(Poisoned(), Pairs())  # the second run of a trainer
        (found,) = [one for one in trainer.callbacks if isinstance(one, NonFiniteGuard)]
        assert found.action == action
        assert found is guard or not callbacks


def test_of_accumulated_batches_the_guilty_one_is_named(tmp_path: Path) -> None:
    task = Poisoned()
    task.poison[BAD] = ("ncc", math.nan)
    keep = Keep()
    with pytest.raises(InputError) as raised:
        fit(task, tmp_path, keep=keep, accumulate_grad_batches=2)
    assert f"Step 1: train/loss_ncc is nan for {', '.join(keep.names[BAD])};" in str(raised.value)


def test_half_precision_looks_for_its_scale_but_not_for_ever(tmp_path: Path) -> None:
    class Steep(Poisoned):
        """Its gradient is finite, but not times the first scale, 64."""

        slope = 1e37

        def compute_losses(self, views: dict[str, Tensor]) -> Any:
            losses = super().compute_losses(views)
            rise = self.slope * self.last_matching.displacement.mean()
            losses["total"] = losses["total"] + rise - rise.detach()
            return losses

    def half() -> list[Any]:  # the trainer's own option trains in bf16 on a CPU
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]

    task = Steep()
    trainer, keep = fit(task, tmp_path, plugins=half())
    scale = trainer.precision_plugin.scaler.get_scale()
    assert 1 <= scale < 64
    assert same(keep.weights[0], keep.weights[1])
    task = Poisoned()
    task.poison = dict.fromkeys(range(4), ("gradient", math.nan))  # whatever the scale
    with pytest.raises(InputError, match=r"Step \d+: .*backbone, affine_head"):
        fit(task, tmp_path, plugins=half(), max_epochs=20)
    task = Poisoned()
    task.poison[BAD] = ("ncc", math.nan)
    with pytest.raises(InputError, match=f"Step {BAD}: train/loss_ncc is nan"):
        fit(task, tmp_path, plugins=half())


def broken(module: nn.Module) -> None:
    module.register_forward_hook(lambda *arguments: arguments[-1] * math.nan)


def segmentation() -> tuple[BaseTask, Any]:
    task = Segmentation(["background", "bright"], mode="scratch", **TINY)
    broken(task.loss)
    return task, DataLoader(Volumes(), batch_size=1)


def denoising() -> tuple[BaseTask, Any]:
    task = Denoising(**TINY)
    broken(task.restoration_head)
    return task, Pairs()


class OwnStep(GVSL):
    """Of somebody who does not know :meth:`BaseTask.training_loss`."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.compute_losses(self.views_of(batch))["total"] * math.nan


@pytest.mark.parametrize(
    "made", [segmentation, denoising, lambda: (OwnStep(affine_channels=8, **TINY), Pairs())]
)
def test_every_kind_of_task_is_watched(
    tmp_path: Path, made: Callable[[], tuple[BaseTask, Any]]
) -> None:
    task, data = made()
    before = copy.deepcopy(dict(task.named_parameters()))
    with pytest.raises(InputError, match=r"^Step 0: train/loss is nan for volume \d"):
        fit(task, tmp_path, data=data)
    assert same(before, dict(task.named_parameters()))


@pytest.mark.filterwarnings("ignore:.*monitor")
def test_validation_names_what_is_not_finite(tmp_path: Path) -> None:
    task, data = denoising()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    with pytest.warns(UserWarning, match=r"val/loss is nan for volume \d, .*volume \d\.$"):
        trainer.validate(task, data, verbose=False)


def test_vectors_that_are_not_finite_do_not_spoil_running_statistics() -> None:
    vectors = torch.rand(5, 3)
    spoilt = torch.cat([vectors, torch.tensor([[1.0, math.nan, 2.0]])])
    expected, standardisation = RunningStandardisation(3), RunningStandardisation(3)
    for one, given in ((expected, vectors), (standardisation, spoilt)):
        one.update(given)
    standardisation.update(torch.full((2, 3), math.inf))
    assert same(expected.state_dict(), standardisation.state_dict())


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"action is 'ignore'.*skip, stop"):
        NonFiniteGuard("ignore")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_skipped is -1"):
        NonFiniteGuard(max_skipped=-1)
