"""Denoising autoencoder, Vincent et al., ICML 2008, https://doi.org/10.1145/1390156.1390294."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.errors import check_range
from gvsl_lightning.tasks.pretraining import RestorationTask, Views


class Denoising(RestorationTask):
    """Restore a volume from a noisy copy of it.

    In 3D here: the corruption is additive Gaussian noise (the paper masks pixels of digits, which
    the other restorations do), the loss the mean squared error over all voxels.

    Args:
        noise: standard deviation of the noise, of volumes in [0, 1].
        **base: see :class:`gvsl_lightning.tasks.pretraining.RestorationTask`.

    Raises:
        InputError: if the noise is not positive.
    """

    def __init__(self, noise: float = 0.1, **base: Any) -> None:
        check_range("noise", noise, above=0)
        super().__init__(**base)

    def corrupt(self, volumes: Tensor, generator: torch.Generator) -> Views:
        noise = torch.randn(
            volumes.shape, dtype=volumes.dtype, device=volumes.device, generator=generator
        )
        return {"corrupted": volumes + self.hparams["noise"] * noise, "volume": volumes}
