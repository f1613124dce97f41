"""Displacement fields in millimetres, as ITK defines them, and resampling by them.

A field (X, Y, Z, 3) holds, at each voxel of a grid, the way in mm in the LPS system (to the left,
back and top) from this point of the fixed volume to the matching point of the moving volume.
Affines are NIfTI's: voxels to mm in the RAS system.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.heads import Matching

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_POINTS_AT_ONCE = 2**21


def displacement_field(
    matching: Matching,
    order: geometry.Order,
    fixed_grid: np.ndarray,
    moving_grid: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
) -> np.ndarray:
    """Bring a matching from the voxels that a network saw to any grid over the fixed volume.

    Between the network's voxels, the deformation is interpolated linearly; beyond them, it stays
    as at the border. The affine part is exact everywhere.

    Args:
        matching: Of one pair.
        order: How its two parts make one map, see `gvsl_lightning.nn.geometry.compose`.
        fixed_grid: From the voxels of the matched fixed volume to mm, (4, 4).
        moving_grid: The same for the matched moving volume.
        affine: From the voxels of the wanted grid to mm, (4, 4).
        shape: (X, Y, Z) of the wanted grid.

    Returns:
        Field (X, Y, Z, 3), float32.
    """
    matrix, displacement = (part.detach().cpu().double() for part in matching)
    size = (displacement.shape[2], displacement.shape[3], displacement.shape[4])
    straight = geometry.compose(matrix, None, size)
    bend = geometry.compose(matrix, displacement, order=order) - straight
    to_grid = np.linalg.inv(fixed_grid) @ affine
    away = moving_grid @ _about_origin(matrix[0].numpy(), size) @ to_grid - affine
    turn = torch.from_numpy(moving_grid[:3, :3].astype(np.float64))
    field = np.empty((*shape, 3), dtype=np.float32)
    for slab, voxels in _slabs(shape):
        bent = geometry.sample(bend, _moved(to_grid, voxels)[None], padding_mode="border")[0]
        way = _moved(away, voxels) + torch.einsum("ij,jxyz->ixyz", turn, bent)
        field[slab] = way.movedim(0, -1).numpy() * _RAS_TO_LPS
    return field


def resample(
    volume: np.ndarray,
    affine: np.ndarray,
    field: np.ndarray,
    field_affine: np.ndarray,
    mode: geometry.Mode = "linear",
    outside: float = 0.0,
) -> np.ndarray:
    """Lay a moving volume over the grid of a field, as ITK's resampling does.

    Args:
        volume: (C, X', Y', Z').
        affine: From its voxels to mm, (4, 4).
        field: (X, Y, Z, 3), see `displacement_field`.
        field_affine: From the field's voxels to mm, (4, 4).
        mode: `nearest` for labels.
        outside: Value of points more than half a voxel beyond the outermost voxel centres.

    Returns:
        (C, X, Y, Z), float32 if linear, the volume's own type if nearest.
    """
    values = torch.from_numpy(volume.astype(np.float64))[None]
    size = torch.tensor(volume.shape[1:], dtype=torch.float64)[:, None, None, None]
    to_volume = np.linalg.inv(affine)
    shape: tuple[int, int, int] = (field.shape[0], field.shape[1], field.shape[2])
    dtype = np.float32 if mode == "linear" else volume.dtype
    resampled = np.empty((len(volume), *shape), dtype=dtype)
    for slab, voxels in _slabs(shape):
        way = torch.from_numpy(field[slab] * _RAS_TO_LPS).movedim(-1, 0)
        points = _moved(to_volume, _moved(field_affine, voxels) + way)
        inside = ((points >= -0.5) & (points < size - 0.5)).all(dim=0)
        if mode == "nearest":
            points = (points + 0.5).floor()  # ITK rounds halves up, PyTorch to even numbers
        read = geometry.sample(values, points[None], mode, padding_mode="border")[0]
        resampled[:, slab] = read.where(inside, outside).numpy().astype(dtype)
    return resampled


def _about_origin(matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(4, 4) on voxels from (3, 4) about the centre of the volume."""
    centre = (np.array(shape) - 1) / 2
    homogeneous = np.eye(4)
    homogeneous[:3, :3] = matrix[:, :3]
    homogeneous[:3, 3] = matrix[:, 3] + centre - matrix[:, :3] @ centre
    return homogeneous


def _slabs(shape: tuple[int, int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Voxel indices (3, x, Y, Z), float64, of slabs that bound the memory."""
    thickness = max(1, _POINTS_AT_ONCE // (shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        slab = slice(start, min(start + thickness, shape[0]))
        sides = ((slab.start, slab.stop), (0, shape[1]), (0, shape[2]))
        axes = [torch.arange(low, high, dtype=torch.float64) for low, high in sides]
        yield slab, torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _moved(matrix: np.ndarray, points: Tensor) -> Tensor:
    """Apply (4, 4) to points (3, x, y, z)."""
    linear = torch.from_numpy(matrix[:3, :3].astype(np.float64))
    offset = torch.from_numpy(matrix[:3, 3].astype(np.float64))
    return torch.einsum("ij,jxyz->ixyz", linear, points) + offset[:, None, None, None]
