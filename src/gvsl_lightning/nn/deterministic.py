"""Operations whose gradient is deterministic on a GPU, for ``Trainer(deterministic=True)``.

PyTorch refuses the gradients of ``max_pool3d``, of trilinear ``interpolate`` and of ``grid_sample``
on CUDA while deterministic algorithms are on: their kernels add in random order.
"""

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def max_pool(x: Tensor) -> Tensor:
    """Maximum of every 2x2x2 voxels: (N, C, D, H, W) to half the size."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.max_pool3d(x, 2)
    d, h, w = (size // 2 for size in x.shape[2:])
    return x.reshape(*x.shape[:2], d, 2, h, 2, w, 2).amax(dim=(3, 5, 7))


def upsample(x: Tensor) -> Tensor:
    """Trilinear upsampling by 2 (``align_corners``): (N, C, D, H, W) to twice the size."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
    # one matrix product for each axis
    doubled = x.float()
    for axis in (2, 3, 4):
        size = x.shape[axis]
        place = torch.arange(2 * size, device=x.device) * ((size - 1) / (2 * size - 1))
        distance = (place - torch.arange(size, device=x.device)[:, None]).abs()
        weights = (1 - distance).clamp_min(0)
        doubled = (doubled.movedim(axis, -1) @ weights).movedim(-1, axis)
    return doubled.to(x.dtype)


def sample_linear(
    volume: Tensor, coordinates: Tensor, padding_mode: Literal["zeros", "border"]
) -> Tensor:
    """Trilinear interpolation, as :func:`gvsl_lightning.nn.geometry.sample`.

    Args:
        volume: (N, C, D, H, W).
        coordinates: (N, 3, D', H', W') in voxels, of the same dtype.
        padding_mode: outside the volume, ``zeros`` or the nearest ``border`` voxel.

    Returns:
        (N, C, D', H', W').
    """
    sizes = torch.tensor(volume.shape[2:], device=volume.device).view(1, 3, 1)
    points = coordinates.flatten(2)
    if padding_mode == "border":
        points = torch.minimum(points.clamp_min(0), (sizes - 1).to(points.dtype))
    # one row for each voxel: the gradient sorts rows, not single numbers
    rows = volume.flatten(2).transpose(1, 2).flatten(0, 1)
    # checkpoints, or the backward pass would keep eight volumes
    read: Tensor = sum(
        checkpoint(
            _read_corner,
            rows,
            points,
            sizes,
            corner,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for corner in itertools.product((0, 1), repeat=3)
    )
    samples, channels = volume.shape[:2]
    read = read.reshape(samples, -1, channels).transpose(1, 2)
    return read.reshape(samples, channels, *coordinates.shape[2:])


def _read_corner(
    rows: Tensor, points: Tensor, sizes: Tensor, corner: tuple[int, int, int]
) -> Tensor:
    """Weighted values (N * P, C) of one of the eight voxels around each point (N, 3, P)."""
    first = points.detach().floor()
    place = first.long() + torch.tensor(corner, device=points.device).view(1, 3, 1)
    inside = ((place >= 0) & (place < sizes)).all(dim=1)
    d, h, w = torch.minimum(place.clamp_min(0), sizes - 1).unbind(1)
    sample = torch.arange(len(points), device=points.device).unsqueeze(1)
    index = ((sample * sizes[:, 0] + d) * sizes[:, 1] + h) * sizes[:, 2] + w
    a, b, c = (
        share if end else 1 - share
        for share, end in zip((points - first).unbind(1), corner, strict=True)
    )
    weight = a * b * c * inside
    return rows.index_select(0, index.flatten()) * weight.flatten().unsqueeze(1)
