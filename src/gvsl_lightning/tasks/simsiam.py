"""SimSiam, Chen and He, CVPR 2021, https://arxiv.org/abs/2011.10566."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.nn.heads import ProjectionHead
from gvsl_lightning.nn.losses import cosine_distance
from gvsl_lightning.tasks.pretraining import TwoViewTask, Views


class SimSiam(TwoViewTask):
    """Predict one view's projection from the other's, without gradient through the target.

    In 3D here: views by :class:`gvsl_lightning.transforms.views.RandomView`, standardised global
    features, narrower heads, and LayerNorm where the paper has BatchNorm in their hidden layers, so
    that small batches work; that at the projection's end is left out. The encoder alone is trained.

    Args:
        projection_channels: of the projection (three layers).
        prediction_channels: of the prediction's hidden layer.
        **base: see :class:`gvsl_lightning.tasks.pretraining.TwoViewTask`.
    """

    monitor = None  # its loss tells nothing about the features

    def __init__(
        self, projection_channels: int = 256, prediction_channels: int = 64, **base: Any
    ) -> None:
        super().__init__(**base)

    def configure_heads(self) -> None:
        width = self.hparams["projection_channels"]
        self.projection_head = ProjectionHead(
            self.backbone.global_channels, width, width, layers=3, norm=True
        )
        self.prediction_head = ProjectionHead(
            width, self.hparams["prediction_channels"], width, norm=True
        )

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Cosine distance of each prediction to the other view's projection, the mean of both."""
        first, second = self.projection_head(
            self.embed_standardised(torch.cat([views["first"], views["second"]]))
        ).chunk(2)
        total = (
            cosine_distance(self.prediction_head(first), second)
            + cosine_distance(self.prediction_head(second), first)
        ) / 2
        return {"total": total}
