"""Context encoder, Pathak et al., CVPR 2016, https://arxiv.org/abs/1604.07379."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.tasks.pretraining import RestorationTask, Views
from gvsl_lightning.transforms.corruption import InPainting


class ContextEncoder(RestorationTask):
    """Restore what is cut out of a volume from what surrounds it.

    In 3D here: boxes are cut out (the paper's random blocks), filled with the volume's mean, and
    the loss is the paper's reconstruction loss, the mean squared error of what was cut out. Its
    adversarial loss, which sharpens the pictures, is left out; so the paper does where it learns
    features (section 5.2). A U-Net reads them, not an encoder with a bottleneck.

    Args:
        boxes: largest number of boxes in a volume.
        smallest: smallest edge of a box over the volume's edge on the same axis.
        largest: the edge over the volume's that every box stays below.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if an option is out of range.
    """

    def __init__(
        self, boxes: int = 10, smallest: float = 0.2, largest: float = 0.4, **base: Any
    ) -> None:
        super().__init__(**base)

    def configure_losses(self) -> None:
        """Create the cutting."""
        self.cutting = InPainting(
            boxes=self.hparams["boxes"],
            smallest=self.hparams["smallest"],
            largest=self.hparams["largest"],
        )

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``corrupted``, ``volume`` and the ``mask`` of what was cut out."""
        mask = self.cutting.draw(volumes, generator)
        mean = volumes.mean(dim=(2, 3, 4), keepdim=True)
        return {"corrupted": torch.where(mask, mean, volumes), "volume": volumes, "mask": mask}
