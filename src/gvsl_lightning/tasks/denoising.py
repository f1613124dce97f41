"""Denoising autoencoder, Vincent et al., ICML 2008, https://doi.org/10.1145/1390156.1390294."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks.pretraining import RestorationTask, Views


class Denoising(RestorationTask):
    """Restore a volume from a noisy copy of it.

    In 3D here: the corruption is additive Gaussian noise (the paper masks pixels of digits, which
    the other restorations do), the loss the mean squared error over all voxels.

    Args:
        noise: standard deviation of the noise, of volumes in [0, 1].
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if the noise is not positive.
    """

    def __init__(self, noise: float = 0.1, **base: Any) -> None:
        if not noise > 0:
            raise InputError(f"noise is {noise}; give a positive standard deviation.")
        super().__init__(**base)

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``corrupted`` and ``volume``."""
        noise = torch.randn(
            volumes.shape, dtype=volumes.dtype, device=volumes.device, generator=generator
        )
        return {"corrupted": volumes + self.hparams["noise"] * noise, "volume": volumes}
