"""Shapes as signed distances: ellipsoids and tubes in body coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Point = tuple[float, float, float]
ENDLESS = math.inf
_CHUNK = 16384  # points whose intermediate results stay in the processor's cache


class Ellipsoid:
    """Ellipsoid, its first radius along ``axis``; ``mirrored`` adds its left-right twin.

    ``base`` cuts the shape off below that height on the first axis. With ``ENDLESS`` as its last
    radius it is a cylinder.
    """

    def __init__(
        self,
        centre: Point,
        radii: Point,
        axis: Point | None = None,
        mirrored: bool = False,
        base: float | None = None,
    ) -> None:
        self.centre = centre
        self.radii = radii
        self.frame = None if axis is None else _frame(axis)
        self.mirrored = mirrored
        self.base = base

    def boxes(self) -> tuple[Vector, Vector]:
        half = np.array(self.radii)
        if self.frame is not None:
            half = np.sqrt(((self.frame * half[:, None]) ** 2).sum(axis=0))
        low, high = self.centre - half, self.centre + half
        if self.mirrored:
            low[0] = -high[0]
        return low[None], high[None]

    def distance(self, points: Array) -> Array:
        flat = points.reshape(3, -1)
        result = np.empty(flat.shape[1], dtype=np.float32)
        for start in range(0, len(result), _CHUNK):
            chosen = slice(start, start + _CHUNK)
            result[chosen] = self._distance(flat[:, chosen])
        return result.reshape(points.shape[1:])

    def _distance(self, points: Array) -> Array:
        offsets = points - np.array(self.centre, dtype=np.float32)[:, None]
        if self.mirrored:
            np.subtract(np.abs(points[0]), self.centre[0], out=offsets[0])
        if self.frame is not None:
            offsets = self.frame.astype(np.float32) @ offsets
        below = None if self.base is None else self.base - offsets[0]
        offsets *= offsets
        radii = np.array(self.radii, dtype=np.float32)
        norms = np.stack([radii**-2, radii**-4]) @ offsets
        norms[1] += 1e-6
        level, slope = np.sqrt(norms, out=norms)
        # k (k - 1) / |gradient| is a distance to first order; k - 1 alone would blur long ends.
        result: Array = level - 1
        result *= level
        result /= slope
        return result if below is None else np.maximum(result, below, out=result)


class Tubes:
    """Straight pieces (P) of tubes, each with a radius at both of its ends.

    Args:
        path: Start and end of each piece (P, 2, 3).
        radii: Radius there (P, 2).
    """

    def __init__(self, path: Vector, radii: Vector) -> None:
        self.path, self.radii = path, radii

    def __add__(self, other: Tubes) -> Tubes:
        return Tubes(
            np.concatenate([self.path, other.path]), np.concatenate([self.radii, other.radii])
        )

    def mirrored(self) -> Tubes:
        """With the left-right twins."""
        return self + Tubes(self.path * [-1, 1, 1], self.radii)

    def at_least(self, radius: float) -> Tubes:
        """The same tubes, nowhere thinner than a radius."""
        return Tubes(self.path, np.maximum(self.radii, radius))

    def boxes(self) -> tuple[Vector, Vector]:
        widest = self.radii.max(axis=1)[:, None]
        return self.path.min(axis=1) - widest, self.path.max(axis=1) + widest

    def distance(self, points: Array) -> Array:
        """Distance of points (3, N) to the nearest piece: (N)."""
        nearest: Array = self.distance_to(np.arange(len(self.path)), points[:, None]).min(axis=0)
        return nearest

    def distance_to(self, piece: npt.NDArray[np.intp], points: Array) -> Array:
        """Distance to one of the pieces for each row of points (3, N, V): (N, V)."""
        start = self.path[:, 0].astype(np.float32)[piece, :, None]
        axis = (self.path[:, 1] - self.path[:, 0]).astype(np.float32)[piece, :, None]
        radii = self.radii.astype(np.float32)[piece, :, None]
        step = axis / (axis**2).sum(axis=1, keepdims=True)
        offsets = [points[i] - start[:, i] for i in range(3)]
        along = offsets[0] * step[:, 0]
        along += offsets[1] * step[:, 1]
        along += offsets[2] * step[:, 2]
        np.clip(along, 0, 1, out=along)
        result: Array = np.zeros_like(along)
        for i, offset in enumerate(offsets):
            offset -= along * axis[:, i]
            offset *= offset
            result += offset
        np.sqrt(result, out=result)
        along *= radii[:, 1] - radii[:, 0]
        result -= along
        result -= radii[:, 0]
        return result


Shape = Ellipsoid | Tubes


def _frame(axis: Point) -> Vector:
    """Rows: the axis, and two directions at right angles to it."""
    first = np.array(axis) / np.linalg.norm(axis)
    second = np.cross(first, [0.0, 0.0, 1.0] if abs(first[2]) < 0.9 else [0.0, 1.0, 0.0])
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


def tube(points: Sequence[Point], radii: Sequence[float], pieces: int = 1) -> Tubes:
    """Smooth tube through points (Catmull-Rom), ``pieces`` straight ones between two of them."""
    return polyline(*curve(points, radii, pieces))


def curve(points: Sequence[Point], radii: Sequence[float], pieces: int) -> tuple[Vector, Vector]:
    """Places (P, 3) and radii (P) along a smooth curve through points; see ``tube``."""
    knots = np.array([(*point, radius) for point, radius in zip(points, radii, strict=True)])
    padded = np.concatenate([knots[:1], knots, knots[-1:]])
    before, start, end, after = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    path = []
    for t in np.arange(pieces) / pieces:
        path.append(
            start
            + 0.5 * t * (end - before)
            + t**2 * (before - 2.5 * start + 2 * end - 0.5 * after)
            + t**3 * (1.5 * (start - end) + 0.5 * (after - before))
        )
    curve = np.concatenate([np.stack(path, axis=1).reshape(-1, 4), knots[-1:]])
    return curve[:, :3], curve[:, 3]


def polyline(path: Vector, radii: Vector) -> Tubes:
    """Straight tubes from each place (P, 3) to the next one."""
    return Tubes(np.stack([path[:-1], path[1:]], axis=1), np.stack([radii[:-1], radii[1:]], axis=1))
