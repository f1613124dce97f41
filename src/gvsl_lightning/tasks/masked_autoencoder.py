"""Masked autoencoder, He et al., CVPR 2022, https://arxiv.org/abs/2111.06377."""

from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.tasks.pretraining import RestorationTask, Views
from gvsl_lightning.transforms.corruption import block_mask


class MaskedAutoencoder(RestorationTask):
    """Restore the masked blocks of a volume, the larger part, from the others.

    In 3D and on a U-Net here: cubic blocks are set to zero, and the loss is the mean squared error
    of the masked voxels, whose target is standardised within each block (the paper's better
    variant). It is the plain form: the convolutions see the zeros, which those of SparK (Tian et
    al., ICLR 2023, https://arxiv.org/abs/2301.03580) skip.

    Args:
        block: edge of the blocks in voxels.
        ratio: share of the blocks that is masked, between 0 and 1.
        standardised: standardise the target within each block.
        **base: see :class:`gvsl_lightning.tasks.pretraining.RestorationTask`.

    Raises:
        InputError: at the first batch, if block and ratio mask no part of a volume.
    """

    def __init__(
        self, block: int = 8, ratio: float = 0.6, standardised: bool = True, **base: Any
    ) -> None:
        super().__init__(**base)

    def corrupt(self, volumes: Tensor, generator: torch.Generator) -> Views:
        block = self.hparams["block"]
        mask = block_mask(volumes, block, self.hparams["ratio"], generator)
        target = standardise_blocks(volumes, block) if self.hparams["standardised"] else volumes
        return {"corrupted": volumes.masked_fill(mask, 0), "volume": target, "mask": mask}


def standardise_blocks(volumes: Tensor, block: int) -> Tensor:
    """Subtract each block's mean and divide by its standard deviation, float32.

    Args:
        volumes: (N, C, D, H, W).
        block: edge of the cubic blocks in voxels; those at the end of an axis may be cut.

    Returns:
        The same shape. A constant block becomes 0.
    """
    volumes = volumes.float()
    means = _block_means(volumes, block)
    variances = _block_means((volumes - means).square(), block)
    return (volumes - means) / (variances + 1e-6).sqrt()


def _block_means(volumes: Tensor, block: int) -> Tensor:
    """Mean of each voxel's block; cut blocks count only the voxels they have."""
    pooled = torch.nn.functional.avg_pool3d(volumes, block, ceil_mode=True, count_include_pad=False)
    for axis in (2, 3, 4):
        pooled = pooled.repeat_interleave(block, axis).narrow(axis, 0, volumes.shape[axis])
    return pooled
