"""Context encoder, Pathak et al., CVPR 2016, https://arxiv.org/abs/1604.07379."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.tasks.pretraining import RestorationTask, Views
from gvsl_lightning.transforms.corruption import InPainting


class ContextEncoder(RestorationTask):
    """Restore boxes that are cut out of a volume from their surroundings.

    In 3D here: boxes (the paper's random blocks) are filled with the volume's mean, and the loss is
    the paper's reconstruction loss, the mean squared error inside the boxes. The adversarial loss,
    which sharpens the pictures, is left out, as in the paper's experiments on features (section
    5.2). The network is a U-Net, not an encoder with a bottleneck.

    Args:
        boxes: largest number of boxes in a volume.
        smallest: smallest edge of a box over the volume's edge on the same axis.
        largest: upper bound of box edge / volume edge.
        **base: see :class:`gvsl_lightning.tasks.pretraining.RestorationTask`.

    Raises:
        InputError: if an option is out of range.
    """

    def __init__(
        self, boxes: int = 10, smallest: float = 0.2, largest: float = 0.4, **base: Any
    ) -> None:
        super().__init__(**base)

    def configure_losses(self) -> None:
        super().configure_losses()
        self.cutting = InPainting(
            boxes=self.hparams["boxes"],
            smallest=self.hparams["smallest"],
            largest=self.hparams["largest"],
        )

    def corrupt(self, volumes: Tensor, generator: torch.Generator) -> Views:
        mask = self.cutting.draw(volumes, generator)
        mean = volumes.mean(dim=(2, 3, 4), keepdim=True)
        return {"corrupted": torch.where(mask, mean, volumes), "volume": volumes, "mask": mask}
