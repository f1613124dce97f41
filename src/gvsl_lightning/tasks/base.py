"""What every task shares: its hyper-parameters, its named hooks and its optimiser."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from gvsl_lightning.backbones import Backbone, Features, build_backbone
from gvsl_lightning.errors import InputError


class BaseTask(pl.LightningModule, ABC):
    """Base of all tasks: a backbone with something on top.

    Takes scalars only (also in the options dictionaries), so that every checkpoint reloads from the
    command line and from Python. A subclass overrides one of the hooks :meth:`configure_models`,
    :meth:`configure_losses` and :meth:`configure_metrics`, which read ``self.hparams``.

    Args:
        backbone: name of the backbone, see :data:`gvsl_lightning.backbones.BACKBONES`.
        backbone_options: options of the network.
        in_channels: channels of the volumes.
        optimizer: ``adam`` (the paper's) or ``adamw``.
        learning_rate: peak learning rate.
        weight_decay: of the optimiser.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        schedule: ``constant`` (the paper's), or ``cosine`` down to zero at the last step.
        compile: run the backbone through ``torch.compile``, see
            :class:`gvsl_lightning.backbones.Backbone`; heads and losses stay as they are. Needs a
            C++ compiler, and up to minutes before the first step.

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
    ) -> None:
        super().__init__()
        if optimizer not in ("adam", "adamw") or schedule not in ("constant", "cosine"):
            raise InputError(
                f"optimizer is {optimizer!r} and schedule {schedule!r}; choose adam or adamw, and "
                "constant or cosine."
            )
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_steps", warmup_steps),
        ):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; give 0 or a positive number.")
        self.save_hyperparameters()
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
        # not in torch 2.5
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
