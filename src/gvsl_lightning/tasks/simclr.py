"""SimCLR, Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709."""

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.nn.heads import ProjectionHead
from gvsl_lightning.nn.losses import NTXentLoss
from gvsl_lightning.runs.batches import names_of
from gvsl_lightning.tasks.base import Batch
from gvsl_lightning.tasks.pretraining import TwoViewTask, Views


class SimCLR(TwoViewTask):
    """Tell the other view of a volume from the views of all other volumes of the step.

    In 3D here: views by :class:`gvsl_lightning.transforms.views.RandomView`, standardised global
    features, narrower heads. The negatives are the other volumes of all processes: one that is
    drawn twice in a step, as partners of pairs may be, is no negative of itself. The encoder alone
    is trained.

    Args:
        projection_channels: of the projection's hidden layer; it ends in half as many.
        temperature: of the NT-Xent loss.
        **base: see :class:`gvsl_lightning.tasks.pretraining.TwoViewTask`.

    Raises:
        InputError: if the temperature is not positive.
    """

    def __init__(
        self, projection_channels: int = 256, temperature: float = 0.1, **base: Any
    ) -> None:
        super().__init__(**base)

    def configure_heads(self) -> None:
        width = self.hparams["projection_channels"]
        self.projection_head = ProjectionHead(self.backbone.global_channels, width, width // 2)

    def configure_losses(self) -> None:
        super().configure_losses()
        self.contrast = NTXentLoss(self.hparams["temperature"])

    def views_of(self, batch: Batch, batch_idx: int = 0) -> Views:
        """``first``, ``second`` and, with names, ``volume``: a number (N, 1) for each volume."""
        views = super().views_of(batch, batch_idx)
        if not {"name", "fixed_name"} & set(batch):
            return views
        digests = [blake2b(name.encode(), digest_size=7).digest() for name in names_of(batch)]
        numbers = torch.tensor([int.from_bytes(digest, "big") for digest in digests])
        return {**views, "volume": numbers[:, None].to(views["first"].device, non_blocking=True)}

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """NT-Xent over the volumes of all processes, the same value in each."""
        projected = self.projection_head(
            self.embed_standardised(torch.cat([views["first"], views["second"]]))
        )
        first, second = (self.gather(half) for half in projected.chunk(2))
        volume = self.gather(views["volume"])[:, 0] if "volume" in views else None
        return {"total": self.contrast(first, second, volume)}
