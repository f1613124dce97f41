"""Matching by correlation: a displacement read off the similarity of features, coarse to fine.

Cost volumes in learned pyramids: PWC-Net, Sun et al., CVPR 2018, https://arxiv.org/abs/1709.02371.
Expected offset under a softmax: PDD-Net, Heinrich, MICCAI 2019,
https://arxiv.org/abs/1907.10931.
Stationary velocity fields: Arsigny et al., MICCAI 2006.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import check_range
from gvsl_lightning.nn import geometry


class CorrelationHead(nn.Module):
    """Displacement between two volumes from the correlation of their features.

    For each level of a feature pyramid, coarse to fine: warp the moving features by the
    displacement so far, compare each fixed feature with the moving features at all offsets within a
    radius, and add the expected offset under a softmax of these similarities to a velocity field.
    The displacement is the integral of the velocity, so that it folds almost nowhere.

    The head has no convolution. The only way to match is that the same anatomy has the same
    features, and the softmax over offsets contrasts each place with its neighbours. The head of the
    paper (:class:`gvsl_lightning.nn.heads.DeformableHead`) regresses the displacement from
    concatenated features instead.

    Equal volumes give zero: the expected offset of the fixed features among themselves is
    subtracted.

    Args:
        radii: search radius in voxels of each level, coarse to fine; the last level is the finest
            of the pyramid. A pyramid with more levels loses its coarsest ones, a pyramid with fewer
            uses the last radii.
        temperature: initial factor of the similarities in the softmax, learned for each level.

    Raises:
        InputError: if a radius is below 1 or the temperature is not positive.
    """

    def __init__(self, radii: Sequence[int] = (2, 2, 2, 1), temperature: float = 10.0) -> None:
        super().__init__()
        for radius in radii:
            check_range("radii", radius, 1)
        check_range("temperature", temperature, above=0)
        self.radii = tuple(radii)
        self.log_temperature = nn.Parameter(torch.full((len(radii),), math.log(temperature)))

    def forward(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> Tensor:
        """Match the moving volume to the fixed one.

        Args:
            moving: feature pyramid of the moving volumes, coarse to fine, each level
                (N, C, d, h, w); as from :meth:`gvsl_lightning.nn.backbones.Backbone.pyramid`.
            fixed: feature pyramid of the fixed volumes, of the same shapes.

        Returns:
            (N, 3, D, H, W) displacement in voxels of the finest level.
        """
        levels = min(len(self.radii), len(fixed))
        velocity: Tensor | None = None
        with torch.autocast(fixed[0].device.type, enabled=False):
            for level in range(-levels, 0):
                ours, theirs = fixed[level].float(), moving[level].float()
                if velocity is None:
                    velocity = ours.new_zeros(len(ours), 3, *ours.shape[2:])
                else:
                    velocity = _resize(velocity, ours.shape[2:])
                    theirs = geometry.warp(
                        theirs, geometry.integrate(velocity), padding_mode="border"
                    )
                scale = self.log_temperature[level].exp()
                ours, theirs = F.normalize(ours, dim=1), F.normalize(theirs, dim=1)
                radius = self.radii[level]
                found = expected_offset(scale * local_correlation(ours, theirs, radius))
                with torch.no_grad():  # its gradient costs a third of the head and is not needed
                    bias = expected_offset(scale * local_correlation(ours, ours, radius))
                velocity = velocity + _smooth(found - bias)
            assert velocity is not None
            return geometry.integrate(velocity)


def local_correlation(fixed: Tensor, moving: Tensor, radius: int) -> Tensor:
    """Inner products of fixed features with moving features at all offsets within a radius.

    Args:
        fixed: (N, C, D, H, W).
        moving: the same shape; beyond its border the nearest voxel counts.
        radius: in voxels, on each axis.

    Returns:
        (N, (2 radius + 1)^3, D, H, W), ``c(p, o) = <fixed(p), moving(p + o)>``; the offsets in
        array order, the last axis fastest.
    """
    d, h, w = fixed.shape[2:]
    fixed = fixed.contiguous()  # sums over channels last take twice as long on a CPU
    padded = F.pad(moving.contiguous(), [radius] * 6, mode="replicate")
    steps = range(2 * radius + 1)
    products = [
        (fixed * padded[:, :, i : i + d, j : j + h, k : k + w]).sum(dim=1)
        for i in steps
        for j in steps
        for k in steps
    ]
    return torch.stack(products, dim=1)


def expected_offset(similarities: Tensor) -> Tensor:
    """Mean offset under the softmax of similarities.

    Args:
        similarities: (N, (2 r + 1)^3, D, H, W), as from :func:`local_correlation`.

    Returns:
        (N, 3, D, H, W) in voxels, each within [-r, r].
    """
    side = round(similarities.shape[1] ** (1 / 3))
    axis = torch.arange(side, dtype=similarities.dtype, device=similarities.device) - side // 2
    offsets = torch.cartesian_prod(axis, axis, axis)
    return torch.einsum("nkdhw,ka->nadhw", similarities.softmax(dim=1), offsets)


def _resize(velocity: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring a velocity to a finer level; its unit is the voxel of the level."""
    factors = [new / old for new, old in zip(shape, velocity.shape[2:], strict=True)]
    finer = F.interpolate(velocity, size=tuple(shape), mode="trilinear", align_corners=False)
    return finer * finer.new_tensor(factors).view(1, 3, 1, 1, 1)


def _smooth(field: Tensor) -> Tensor:
    """Mean of 3x3x3 voxels."""
    return F.avg_pool3d(F.pad(field, [1] * 6, mode="replicate"), 3, stride=1)
