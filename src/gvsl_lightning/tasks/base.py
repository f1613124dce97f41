"""What every task shares: its hyper-parameters, its named hooks and its optimiser."""

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone, Features, build_backbone
from gvsl_lightning.nn.heads import ZMatchingHead

Batch = dict[str, Any]


class BaseTask(pl.LightningModule, ABC):
    """Base of all tasks: a backbone with something on top.

    Takes scalars only (also in the options dictionaries), so that every checkpoint reloads from the
    command line and from Python. A subclass overrides one of the hooks :meth:`configure_models`,
    :meth:`configure_losses` and :meth:`configure_metrics`, which read ``self.hparams``; its
    training step returns what :meth:`training_loss` makes of its losses.

    A loss or a gradient that is NaN or infinite changes no weight, and is reported with step, term
    and volumes, by all processes alike. In ``16-mixed``, infinite gradients are how the loss scaler
    finds its scale: they count once the scale is below 1.

    Args:
        backbone: name of the backbone, see :data:`gvsl_lightning.nn.backbones.BACKBONES`.
        backbone_options: options of the network.
        in_channels: channels of the volumes.
        optimizer: ``adam`` (the paper's) or ``adamw``.
        learning_rate: peak learning rate.
        weight_decay: of the optimiser.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        schedule: ``constant`` (the paper's), or ``cosine`` down to zero at the last step.
        compile: run the backbone through ``torch.compile``, see
            :class:`gvsl_lightning.nn.backbones.Backbone`; heads and losses stay as they are. Needs
            a C++ compiler, and up to minutes before the first step.
        non_finite: what to do in a step with a loss or gradient that is not finite: ``stop`` the
            run, or ``skip`` the step with a warning; ``train/skipped`` then counts them by epoch.
        max_skipped: steps in a row that ``skip`` allows before it stops, too.

    Raises:
        InputError: if an option is out of range or unknown.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: str = "unet",
        backbone_options: dict[str, Any] | None = None,
        in_channels: int = 1,
        optimizer: Literal["adam", "adamw"] = "adam",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        compile: bool = False,
        non_finite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        if optimizer not in ("adam", "adamw") or schedule not in ("constant", "cosine"):
            raise InputError(
                f"optimizer is {optimizer!r} and schedule {schedule!r}; choose adam or adamw, and "
                "constant or cosine."
            )
        if non_finite not in ("stop", "skip"):
            raise InputError(f"non_finite is {non_finite!r}; choose stop or skip.")
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_steps", warmup_steps),
            ("max_skipped", max_skipped),
        ):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; give 0 or a positive number.")
        self.save_hyperparameters()
        self._names: list[str] = []
        self._terms: dict[str, Tensor] = {}
        self._passes: list[tuple[list[str], dict[str, Tensor]]] = []
        self._skipped_in_a_row = 0
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()

    def configure_backbone(self) -> Backbone:
        """Build the backbone that the hyper-parameters name."""
        backbone = build_backbone(
            self.hparams["backbone"],
            in_channels=self.hparams["in_channels"],
            **(self.hparams["backbone_options"] or {}),
        )
        backbone.compiled = self.hparams["compile"]
        return backbone

    @abstractmethod
    def configure_models(self) -> None:
        """Create ``self.backbone`` and the heads."""

    def configure_losses(self) -> None:
        """Create the losses."""

    def configure_metrics(self) -> None:
        """Create the metrics."""

    def configure_model(self) -> None:
        """Under Lightning's ``ModelParallelStrategy``, share the parameters among the processes.

        FSDP2: each process keeps a part of every parameter, of its gradient and of the optimiser's
        state; a network, backbone or head, is whole from its forward to its backward pass. Other
        strategies leave the networks as they are.

        Raises:
            InputError: if the strategy is to split the computation of a network, too.
        """
        # a task that is loaded from a checkpoint has no trainer yet
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        # slow to import
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        mesh = self.trainer.strategy.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise InputError(
                f"ModelParallelStrategy has tensor_parallel_size={mesh['tensor_parallel'].size()}; "
                f"set it to 1 and data_parallel_size to {mesh.size()}, the number of processes."
            )
        for child in self.children():
            if any(True for _ in child.parameters()) and not isinstance(child, FSDPModule):
                fully_shard(child, mesh=mesh["data_parallel"])
                if isinstance(child, Backbone):
                    register_fsdp_forward_method(child, "encode")

    def forward(self, volume: Tensor) -> Features:
        """Features of a batch of volumes (N, in_channels, D, H, W)."""
        features: Features = self.backbone(volume)
        return features

    def gather(self, vectors: Tensor) -> Tensor:
        """Vectors (N, C) of all processes together, with their gradient, (processes * N, C)."""
        if self._trainer is None:
            return vectors
        gathered: Any = self.all_gather(vectors, sync_grads=vectors.is_floating_point())
        together: Tensor = gathered.reshape(-1, vectors.shape[-1])
        return together

    def training_loss(
        self, losses: dict[str, Tensor], batch: Batch, more: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Log the losses of a training batch by step and epoch, and watch whether they are finite.

        Args:
            losses: scalars, ``total`` and each term where there are several; logged as
                ``train/loss`` and ``train/loss_TERM``. With ``non_finite: skip``, those of a batch
                that are not finite are not logged.
            batch: which they are of.
            more: further scalars to be logged, by their full names.

        Returns:
            The total.
        """
        logged = name_losses("train", losses)
        self._terms = logged
        if self.hparams["non_finite"] == "stop" or all_finite(logged.values()):
            size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
            self.log_dict(
                {**logged, **(more or {})},
                on_step=True,
                on_epoch=True,
                batch_size=size,
                sync_dist=False,
            )
            self.log("loss", logged["train/loss"], prog_bar=True, logger=False)
        return losses["total"]

    def name_evaluated(
        self, stage: str, losses: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Losses of a validation or test batch by their names; warns of what is not finite."""
        named = name_losses(stage, losses)
        if not all_finite(named.values()):
            warnings.warn(f"{_lost(named)} for {_listed(names_of(batch))}.", stacklevel=2)
        return named

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember the names of the volumes, and make what is random follow from seed and batch.

        The global generator, from which dropout draws, is seeded anew for each batch of a seeded
        run. What it draws then depends neither on a resume nor on ``num_workers``; loaders draw
        from the same generator.
        """
        self._names = names_of(batch)
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            trained: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
            numbers = int(seed), self.global_rank, trained.processed
            drawn = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn[0]))

    def on_before_backward(self, loss: Tensor) -> None:
        """Remember the losses of the batch; what is not finite is looked for once in a step."""
        self._passes.append((self._names, self._terms or {"train/loss": loss.detach()}))
        self._terms = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Learn nothing, in all processes alike, if something is not finite in one of them.

        Raises:
            InputError: with ``non_finite: stop``, or after too many skipped steps in a row.
        """
        passes, self._passes = self._passes, []
        found = self._non_finite(passes)
        skip = self.hparams["non_finite"] == "skip"
        if skip:
            self.log(
                "train/skipped", float(bool(found)), on_step=False, on_epoch=True, reduce_fx="sum"
            )
        if not found:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        advice = "look at these volumes, lower learning_rate or train in precision 32-true"
        if not skip:
            raise InputError(f"{found}; {advice}, or pass over such steps by non_finite: skip.")
        if self._skipped_in_a_row > self.hparams["max_skipped"]:
            raise InputError(
                f"{found}, after {self.hparams['max_skipped']} skipped steps in a row "
                f"(max_skipped); {advice}."
            )
        rank_zero_warn(f"{found}; the step is skipped.")
        optimizer.zero_grad()  # a parameter without gradient stays as it is

    def _non_finite(self, passes: list[tuple[list[str], dict[str, Tensor]]]) -> str:
        """What is not finite in a step, the same words in all processes; empty if all is."""
        terms = [value for _, losses in passes for value in losses.values()]
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        overflows = scaler is not None and scaler.get_scale() >= 1
        norms = {
            name: norm
            for name, part in parts_of(self).items()
            if not overflows and (norm := gradient_norm(part)) is not None
        }
        finite = all_finite([*terms, *norms.values()])
        if self.trainer.strategy.reduce_boolean_decision(finite):
            return ""
        found = [f"{lost} for {_listed(names)}" for names, one in passes if (lost := _lost(one))]
        found = [text for texts in self._of_all_processes(found) for text in texts]
        if not found:
            names = [name for part, _ in passes for name in part]
            names = [name for part in self._of_all_processes(names) for name in part]
            lost_parts = [name for name, norm in norms.items() if not norm.isfinite()]
            found = [f"the gradient of {_listed(lost_parts)} is not finite for {_listed(names)}"]
        return f"Step {self.global_step}: {'; '.join(found)}"

    def _of_all_processes(self, words: list[str]) -> list[list[str]]:
        if self.trainer.world_size == 1:
            return [words]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, words)
        return gathered

    def configure_parameters(self) -> list[dict[str, Any]]:
        """Groups of trainable parameters: ``params``, and optionally ``lr`` and ``frozen_steps``.

        A group learns nothing in its ``frozen_steps`` first steps.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def _fused(self) -> bool | None:
        """Fused, an eighth of the time on a CPU; with it Lightning clips no mixed precision."""
        full = self._trainer is None or str(self._trainer.precision) in ("32-true", "64-true")
        return True if full and self.device.type == "cpu" else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam or AdamW on every trainable parameter, the learning rate scheduled by step."""
        algorithms = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = algorithms[self.hparams["optimizer"]](
            self.configure_parameters(),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
            fused=self._fused(),
        )
        warmup = self.hparams["warmup_steps"]
        cosine = self.hparams["schedule"] == "cosine"
        total = self.trainer.estimated_stepping_batches if cosine else math.inf
        if cosine and total == math.inf:
            raise InputError(
                "The cosine schedule needs to know the last step: set trainer.max_steps or "
                "trainer.max_epochs, or use schedule: constant."
            )

        def factor(step: int) -> float:
            if step < warmup:
                return float((step + 1) / (warmup + 1))
            if not cosine:
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

        def factor_of(frozen_steps: int) -> Callable[[int], float]:
            return lambda step: 0.0 if step < frozen_steps else factor(step)

        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [factor_of(group.get("frozen_steps", 0)) for group in optimizer.param_groups]
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether the trainer logs the step that it takes now, for what is too dear for every step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


def parts_of(task: pl.LightningModule) -> dict[str, nn.Module]:
    """The parts of a task by name: its networks, the two heads of a ``ZMatchingHead`` apart."""
    parts: dict[str, nn.Module] = {}
    for name, child in task.named_children():
        parts |= dict(child.named_children()) if isinstance(child, ZMatchingHead) else {name: child}
    return parts


def gradient_norm(part: nn.Module) -> Tensor | None:
    """Euclidean norm of the gradient of all parameters that have one; None if none has."""
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    if not gradients:
        return None
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def all_finite(scalars: Iterable[Tensor]) -> bool:
    """Whether none is NaN or infinite; waits for the device once."""
    stacked = [value.detach().float() for value in scalars]
    return not stacked or bool(torch.stack(stacked).isfinite().all())


def names_of(batch: Batch) -> list[str]:
    """Names of the volumes of a batch, fixed ones first; none if it has none."""
    return [name for key in ("name", "fixed_name", "moving_name") for name in batch.get(key, ())]


def name_losses(stage: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses by the names they are logged under: ``train/loss``, ``train/loss_ncc``."""
    return {
        f"{stage}/loss" if name == "total" else f"{stage}/loss_{name}": value.detach()
        for name, value in losses.items()
    }


def _lost(losses: dict[str, Tensor]) -> str:
    """Which losses are not finite; the total only if no term is known to make it so."""
    lost = {name: value for name, value in losses.items() if not value.isfinite()}
    terms = {name: value for name, value in lost.items() if not name.endswith("/loss")}
    return ", ".join(f"{name} is {float(value)}" for name, value in (terms or lost).items())


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "volumes without a name"
