"""BYOL, Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from gvsl_lightning.errors import check_range
from gvsl_lightning.nn.heads import ProjectionHead, RunningStandardisation
from gvsl_lightning.nn.losses import cosine_distance
from gvsl_lightning.tasks.pretraining import TwoViewTask, Views, pool


class BYOL(TwoViewTask):
    """Predict the teacher's projection of the other view; the teacher is a moving average.

    In 3D here: views by :class:`gvsl_lightning.transforms.views.RandomView`, standardised global
    features, narrower heads, and LayerNorm where the paper has BatchNorm, so that small batches
    work (Richemond et al. 2020, https://arxiv.org/abs/2010.10241). The encoder alone is trained.

    Args:
        projection_channels: of the projection and the hidden layers (the paper's 4096 and 256).
        momentum: of the teacher at the beginning, in [0, 1]; it rises to 1 at the last step along
            half a cosine, and stays where the last step is unknown.
        **base: see :class:`gvsl_lightning.tasks.pretraining.TwoViewTask`.

    Raises:
        InputError: if the momentum is out of range.
    """

    monitor = None  # its loss tells nothing about the features

    def __init__(
        self, projection_channels: int = 256, momentum: float = 0.996, **base: Any
    ) -> None:
        check_range("momentum", momentum, 0, 1)
        super().__init__(**base)

    def configure_heads(self) -> None:
        width = self.hparams["projection_channels"]
        self.projection_head = ProjectionHead(
            self.backbone.global_channels, width, width, norm=True
        )
        self.prediction_head = ProjectionHead(width, width, width, norm=True)
        self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.teacher_standardisation = RunningStandardisation(self.backbone.global_channels)
        self.teacher_projection = copy.deepcopy(self.projection_head).requires_grad_(False)

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Cosine distance of each prediction to the teacher's other view, the mean of both."""
        both = torch.cat([views["first"], views["second"]])
        predicted = self.prediction_head(self.projection_head(self.embed_standardised(both)))
        with torch.no_grad():
            pooled = pool(self.teacher_backbone.encode(both))
            standardised = self.standardise(pooled, self.teacher_standardisation)
            first, second = self.teacher_projection(standardised).chunk(2)
        return {"total": cosine_distance(predicted, torch.cat([second, first]))}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # the trainer counts this step afterwards
        self.update_teacher(self.momentum_at(self.trainer.global_step + 1))

    def momentum_at(self, step: int) -> float:
        """The teacher's momentum after a number of steps."""
        base: float = self.hparams["momentum"]
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            return base
        return 1 - (1 - base) * (math.cos(math.pi * min(step / max(total, 1), 1)) + 1) / 2

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's parameters towards the student's; its buffers become the student's."""
        teachers = (self.teacher_backbone, self.teacher_projection)
        students = (self.backbone, self.projection_head)
        for teacher, student in zip(teachers, students, strict=True):
            for mean, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(weight, 1 - momentum)
            for kept, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
                kept.copy_(buffer)
