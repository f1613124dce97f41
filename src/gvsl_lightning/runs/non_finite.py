"""Losses and gradients that are NaN or infinite."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from gvsl_lightning.errors import InputError, check_choice, check_range
from gvsl_lightning.runs.batches import names_of
from gvsl_lightning.runs.gathering import gather_objects
from gvsl_lightning.runs.gradients import gradient_norms


class NonFiniteGuard(pl.Callback):
    """Stops a run, or skips a step, if a loss or a gradient is NaN or infinite.

    Such a step changes no weight in any process. The sentence names the step, the losses or parts
    of the model, and the volumes of all processes. In ``16-mixed``, infinite gradients are how the
    loss scaler finds its scale: they count once the scale is below 1.

    Every task of this package has this callback. One in ``trainer.callbacks`` takes its place, to
    choose other options.

    Args:
        action: ``stop`` the run, or ``skip`` the step with a warning; ``train/skipped`` is then the
            number of skipped steps of an epoch.
        max_skipped: skipped steps in a row; after one more the run stops.

    Raises:
        InputError: if an option is unknown or out of range; in training, if the run stops.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_skipped: int = 10) -> None:
        check_choice("action", action, ("stop", "skip"))
        check_range("max_skipped", max_skipped, 0)
        self.action = action
        self.max_skipped = max_skipped
        self._skipped_in_a_row = 0
        self._names: list[str] = []
        self._batches: list[tuple[list[str], dict[str, Tensor]]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._skipped_in_a_row, self._batches = 0, []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._names = names_of(batch) if isinstance(batch, Mapping) else []

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # only once in a step they are compared, which waits for the device
        losses = getattr(pl_module, "step_losses", None) or {"train/loss": loss.detach()}
        self._batches.append((self._names, losses))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        fault = self._find_fault(trainer, pl_module)
        self._batches = []
        skips = self.action == "skip"
        if skips:
            pl_module.log(
                "train/skipped", float(bool(fault)), on_step=False, on_epoch=True, reduce_fx="sum"
            )
        if not fault:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        advice = "look at these volumes, lower learning_rate or train in precision 32-true"
        if not skips:
            raise InputError(
                f"{fault}; {advice}, or skip such steps by the callback NonFiniteGuard with "
                "action: skip."
            )
        if self._skipped_in_a_row > self.max_skipped:
            raise InputError(
                f"{fault}, after {self.max_skipped} skipped steps in a row (max_skipped); {advice}."
            )
        rank_zero_warn(f"{fault}; the step is skipped.")
        optimizer.zero_grad()  # a parameter without gradient stays as it is

    def _find_fault(self, trainer: pl.Trainer, task: pl.LightningModule) -> str:
        """Name all that is not finite in a step, in the same words in all processes; or ''."""
        losses = [value for _, losses in self._batches for value in losses.values()]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale_too_large = scaler is not None and scaler.get_scale() >= 1
        norms = {} if scale_too_large else gradient_norms(task)
        finite = all_finite([*losses, *norms.values()])
        if trainer.strategy.reduce_boolean_decision(finite):
            return ""
        faults = [describe_non_finite(losses, names) for names, losses in self._batches]
        faults = _gather([fault for fault in faults if fault])
        if not faults:
            names = _gather([name for names, _ in self._batches for name in names])
            parts = [part for part, norm in norms.items() if not norm.isfinite()]
            faults = [f"the gradient of {_listed(parts)} is not finite for {_listed(names)}"]
        return f"Step {trainer.global_step}: {'; '.join(faults)}"


def describe_non_finite(losses: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Name the losses that are not finite, such as ``train/loss_ncc is nan for case 1, case 2``.

    Args:
        losses: name -> scalar. The total, ``STAGE/loss``, is named only if all terms are finite.
        names: of the volumes.

    Returns:
        The words; empty if all losses are finite.
    """
    if all_finite(losses.values()):
        return ""
    faults = {name: value for name, value in losses.items() if not value.isfinite()}
    terms = {name: value for name, value in faults.items() if not name.endswith("/loss")}
    values = ", ".join(f"{name} is {float(value)}" for name, value in (terms or faults).items())
    return f"{values} for {_listed(names)}"


def all_finite(scalars: Iterable[Tensor]) -> bool:
    """Whether none is NaN or infinite; waits for the device once."""
    stacked = [value.detach().float() for value in scalars]
    return not stacked or bool(torch.stack(stacked).isfinite().all())


def _gather(words: list[str]) -> list[str]:
    """Words of all processes."""
    return [word for part in gather_objects(words) for word in part]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "volumes without a name"
