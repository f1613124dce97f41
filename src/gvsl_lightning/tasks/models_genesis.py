"""Models Genesis, Zhou et al., MedIA 2021, https://arxiv.org/abs/2004.07882."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.tasks.pretraining import RestorationTask, Views
from gvsl_lightning.transforms.corruption import GenesisCorruption


class ModelsGenesis(RestorationTask):
    """Restore a volume from a copy changed by up to four transformations.

    Local shuffling, a non-linear intensity change, and in-painting or out-painting, with the rates
    of the paper; the mean squared error over all voxels. It is a 3D method. Left out is its random
    mirroring; adapted are the density of the shuffling, see
    :class:`gvsl_lightning.transforms.corruption.LocalShuffling`, and the optimiser, which is that
    of the other methods here.

    Args:
        shuffling_rate: probability of the local shuffling.
        nonlinear_rate: probability of the intensity change.
        painting_rate: probability of in-painting or out-painting.
        outpainting_share: share of out-painting in them.
        **base: see :class:`gvsl_lightning.tasks.pretraining.RestorationTask`.

    Raises:
        InputError: if an option is unknown or out of range.
    """

    def __init__(
        self,
        shuffling_rate: float = 0.5,
        nonlinear_rate: float = 0.9,
        painting_rate: float = 0.9,
        outpainting_share: float = 0.8,
        **base: Any,
    ) -> None:
        super().__init__(**base)

    def configure_losses(self) -> None:
        super().configure_losses()
        self.corruption = GenesisCorruption(
            self.hparams["shuffling_rate"],
            self.hparams["nonlinear_rate"],
            self.hparams["painting_rate"],
            self.hparams["outpainting_share"],
        )

    def corrupt(self, volumes: Tensor, generator: torch.Generator) -> Views:
        return {"corrupted": self.corruption(volumes, generator), "volume": volumes}
