"""The map from the voxels of a subject to places of the body."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gvsl_lightning.phantom.shapes import Array, Point
from gvsl_lightning.transforms.spatial import cubic_bspline_basis


def body_points(
    rng: np.random.Generator, extent: Point, centre: Point, size: Sequence[int]
) -> Array:
    """Where each voxel lies in the body: affine(x + u(x)), u a cubic B-spline displacement.

    Splines reproduce linear functions, so the affine acts on the control points and the whole map
    is one spline. A displacement is injective if its control points move by less than 1 / 2.48 of
    their spacing (Choi and Lee, Graphical Models 62, 2000).
    """
    spacing = 2 / _INTERVALS
    control = np.stack(
        np.meshgrid(*[np.arange(-1, _INTERVALS + 2) * spacing - 1] * 3, indexing="ij")
    )
    control += rng.uniform(-_BEND * spacing, _BEND * spacing, control.shape)
    scale = rng.uniform(0.91, 1.09, 3) * rng.uniform(0.95, 1.05)
    linear = _rotation(np.deg2rad(rng.uniform(-7, 7, 3))) @ np.diag(scale)
    linear += rng.uniform(-0.05, 0.05, (3, 3)) * (1 - np.eye(3))
    shift = rng.uniform(-0.05, 0.05, 3)
    moved = np.einsum("ij,jdhw->idhw", linear, control) + shift[:, None, None, None]
    half, middle = (np.reshape(value, (3, 1, 1, 1)) for value in (extent, centre))
    return spline(half * moved + middle, size)


_INTERVALS = 3
_BEND = 0.25


def spline(control: npt.NDArray[np.float64], size: Sequence[int]) -> Array:
    """Cubic B-spline lattice (C, I, J, K) evaluated on a grid of voxel centres: (C, D, H, W)."""
    field = control.astype(np.float32)
    channels = len(field)
    depth, height, width = (
        cubic_bspline_basis(length, points)
        for length, points in zip(size, field.shape[1:], strict=True)
    )
    field = field @ width.T
    field = height @ field
    field = depth @ field.reshape(channels, field.shape[1], -1)
    points: Array = field.reshape(channels, *size)
    return points


def _rotation(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, value in enumerate(angle):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(value)
        turn[i, j], turn[j, i] = -math.sin(value), math.sin(value)
        matrix = matrix @ turn
    return matrix
