"""Base of all tasks: hyper-parameters, named hooks and optimiser."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from gvsl_lightning.errors import check_choice, check_range
from gvsl_lightning.nn.backbones import Backbone, Features, build_backbone
from gvsl_lightning.runs.batches import names_of
from gvsl_lightning.runs.non_finite import NonFiniteGuard, all_finite, describe_non_finite
from gvsl_lightning.runs.seeding import BatchSeeding
from gvsl_lightning.runs.sharding import share_parameters
from gvsl_lightning.tasks.schedule import SCHEDULES, build_schedule

Batch = dict[str, Any]

OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class BaseTask(pl.LightningModule, ABC):
    """Base of all tasks: a backbone with something on top.

    All options are scalars or dictionaries of scalars, so that every checkpoint reloads by itself.
    A subclass overrides one of the hooks :meth:`configure_models`, :meth:`configure_losses` and
    :meth:`configure_metrics`, which read ``self.hparams``; its training step returns
    :meth:`training_loss` of its losses.

    Args:
        backbone: name of the backbone, see :data:`gvsl_lightning.nn.backbones.BACKBONES`, or the
            path of a builder. From Python also a backbone itself, such as
            :func:`gvsl_lightning.nn.wrapped.wrap_backbone` makes; checkpoints do not hold it, and
            ``load_from_checkpoint(path, backbone=...)`` takes it again.
        backbone_options: options of the network.
        in_channels: channels of the volumes.
        optimizer: ``adam`` (the paper's) or ``adamw``.
        learning_rate: the peak.
        weight_decay: of the optimiser.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        schedule: ``constant`` (the paper's), or ``cosine`` down to zero at the last step.
        compile: run the backbone through ``torch.compile``, which needs a C++ compiler and up to
            minutes before the first step.

    Attributes:
        step_losses: losses of the last training batch by their logged names.

    Raises:
        InputError: if an option is out of range or unknown.
    """

    monitor: ClassVar[tuple[str, str] | None] = ("val/loss", "min")
    """Score that chooses the best checkpoint and its direction; None: the newest one is kept."""

    backbone: Backbone

    def __init__(
        self,
        backbone: str | Backbone = "unet",
        backbone_options: dict[str, Any] | None = None,
        in_channels: int = 1,
        optimizer: Literal["adam", "adamw"] = "adam",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "constant",
        compile: bool = False,
    ) -> None:
        super().__init__()
        check_choice("optimizer", optimizer, OPTIMIZERS)
        check_choice("schedule", schedule, SCHEDULES)
        check_range("learning_rate", learning_rate, 0)
        check_range("weight_decay", weight_decay, 0)
        check_range("warmup_steps", warmup_steps, 0)
        self._given: tuple[Backbone, ...] = ()  # in a tuple, as it is no part beside self.backbone
        if isinstance(backbone, Backbone):
            self._given = (backbone,)
            self.save_hyperparameters(ignore=["backbone"])
            self.save_hyperparameters(
                {"backbone": backbone.name, "in_channels": backbone.in_channels}
            )
        else:
            self.save_hyperparameters()
        self.step_losses: dict[str, Tensor] = {}
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()

    def configure_backbone(self) -> Backbone:
        """Build the backbone that the hyper-parameters name, or take the given one."""
        if self._given:
            (backbone,) = self._given
        else:
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

    def forward(self, volume: Tensor) -> Features:
        """Features of a batch of volumes (N, in_channels, D, H, W)."""
        features: Features = self.backbone(volume)
        return features

    def training_loss(
        self, losses: dict[str, Tensor], batch: Batch, more: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Log the losses and the learning rate of a training step, if all losses are finite.

        Args:
            losses: scalars, ``total`` and each term where there are several; logged as
                ``train/loss`` and ``train/loss_TERM``. The method returns the total.
            batch: the training batch.
            more: further scalars by their full names.
        """
        self.step_losses = name_losses("train", losses)
        if all_finite(self.step_losses.values()):
            size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
            logged = {**self.step_losses, **(more or {})}
            if self.trainer.optimizers:
                logged["train/learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict(logged, batch_size=size, sync_dist=False)
            self.log("loss", logged["train/loss"], prog_bar=True, logger=False)
        return losses["total"]

    def name_evaluated(
        self, stage: str, losses: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Losses of a validation or test batch by their names; warns if one is not finite."""
        named = name_losses(stage, losses)
        if fault := describe_non_finite(named, names_of(batch)):
            warnings.warn(f"{fault}.", stacklevel=2)
        return named

    def gather(self, vectors: Tensor) -> Tensor:
        """Vectors (N, C) of all processes together, with their gradient, (processes * N, C)."""
        if self._trainer is None:
            return vectors
        gathered: Any = self.all_gather(vectors, sync_grads=vectors.is_floating_point())
        together: Tensor = gathered.reshape(-1, vectors.shape[-1])
        return together

    def configure_callbacks(self) -> list[pl.Callback]:
        """:class:`NonFiniteGuard` and :class:`BatchSeeding`, unless the trainer has them."""
        own: tuple[type[pl.Callback], ...] = (NonFiniteGuard, BatchSeeding)
        given: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [kind() for kind in own if not any(isinstance(one, kind) for one in given)]

    def configure_model(self) -> None:
        # a task that is loaded from a checkpoint has no trainer yet
        if self._trainer is not None:
            share_parameters(self)

    def configure_parameters(self) -> list[dict[str, Any]]:
        """Groups of trainable parameters: ``params``, and optionally ``lr`` and ``frozen_steps``.

        The learning rate of a group is 0 in its first ``frozen_steps`` steps.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam or AdamW on every trainable parameter; the learning rate is scheduled by step."""
        full = self._trainer is None or str(self._trainer.precision) in ("32-true", "64-true")
        optimizer: torch.optim.Optimizer = OPTIMIZERS[self.hparams["optimizer"]](
            self.configure_parameters(),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
            # fused takes an eighth of the time on a CPU; with it Lightning clips no mixed precision
            fused=True if full and self.device.type == "cpu" else None,
        )
        scheduler = build_schedule(
            optimizer,
            self.hparams["schedule"],
            self.hparams["warmup_steps"],
            lambda: self.trainer.estimated_stepping_batches,
        )
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def is_log_step(trainer: pl.Trainer) -> bool:
    """Whether the trainer logs its current step; expensive scores are computed in such steps."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


def name_losses(stage: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses by the names they are logged under: ``train/loss``, ``train/loss_ncc``."""
    return {
        f"{stage}/loss" if name == "total" else f"{stage}/loss_{name}": value.detach()
        for name, value in losses.items()
    }
