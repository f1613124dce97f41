"""Generated 3D anatomy: the data that is always there.

A phantom body is a fixed set of smooth implicit functions in body coordinates. A subject is that
body seen through a random affine and a random invertible displacement: every voxel looks up its
own place in the body, so nothing is resampled and all subjects share one topology. Intensities,
noise, bias field and field of view are the subject's own.

Array axes point to the patient's right, anterior and superior (RAS), like every volume that the
other data modules load.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Point = tuple[float, float, float]
Region = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Scene:
    """What one kind of phantom shows.

    Attributes:
        labels: Name of every label value, "background" first.
        extent: Half the field of view per axis in body units (65 mm in CT, 95 mm in MR).
        centre: Middle of the field of view in body units.
        tissues: Intensity per tissue as (mean, spread over subjects), HU in CT, 0..1 in MR.
        draw: Draws the body onto a canvas.
        parts: Structures that are drawn separately but share a label: structure -> label name.
        classes: Number of classes that subjects belong to.
    """

    labels: tuple[str, ...]
    extent: Point
    centre: Point
    tissues: Mapping[str, tuple[float, float]]
    draw: Callable[[_Canvas, np.random.Generator, int], None]
    parts: Mapping[str, str]
    classes: int = 1
    modality: str = "ct"


def generate_phantom(
    scene: str, index: int, size: Sequence[int] = (64, 64, 64), seed: int = 0
) -> dict[str, Any]:
    """Generate one subject.

    The subject depends on the four arguments alone; its anatomy does not depend on ``size``.

    Args:
        scene: A name in ``SCENES``.
        index: Number of the subject, 0 or more.
        size: Voxels per axis; the field of view is the same for every size.
        seed: Chooses the population that ``index`` counts in.

    Returns:
        ``image``: float32 array (D, H, W) in [0, 1]. CT scenes map -1024..1024 HU to it.
        ``label``: uint8 array (D, H, W), named by ``SCENES[scene].labels``.
        ``class``: int; in ``chest_ct`` 1 with lung lesions and 0 without, otherwise 0.

    Raises:
        InputError: If the scene is unknown, or index or size is out of range.
    """
    spec, rng = _subject(scene, index, size, seed)
    canvas = _Canvas(spec, _body_points(spec, rng, size), rng)
    category = (_class_of(index, seed, spec.classes)) if spec.classes > 1 else 0
    spec.draw(canvas, rng, category)
    finish = _finish_ct if spec.modality == "ct" else _finish_mr
    return {"image": finish(canvas.image, rng), "label": canvas.label, "class": category}


def body_coordinates(
    scene: str, index: int, size: Sequence[int] = (64, 64, 64), seed: int = 0
) -> Array:
    """Body coordinates of each voxel of a subject: the true correspondence between subjects.

    Voxels of two subjects that hold the same coordinates show the same place of the body.

    Returns:
        Array (3, D, H, W) in body units; the map from voxels to it is invertible.
    """
    spec, rng = _subject(scene, index, size, seed)
    return _body_points(spec, rng, size)


def _subject(
    scene: str, index: int, size: Sequence[int], seed: int
) -> tuple[Scene, np.random.Generator]:
    spec = SCENES[scene]
    return spec, np.random.default_rng([seed, sorted(SCENES).index(scene), index])


def _class_of(index: int, seed: int, classes: int) -> int:
    """Every run of ``classes`` consecutive subjects holds each class once, in random order."""
    order = np.random.default_rng([seed, index // classes]).permutation(classes)
    return int(order[index % classes])


# ----------------------------------------------------------------------------- deformation
def _body_points(spec: Scene, rng: np.random.Generator, size: Sequence[int]) -> Array:
    """Where each voxel lies in the body: affine(x + u(x)), u a cubic B-spline displacement.

    Control points move by less than 1 / 2.48 of their spacing, which makes the displacement
    injective (Choi and Lee, Graphical Models 62, 2000, theorem 1 and section 5).
    """
    spacing = 2 / _INTERVALS
    control = rng.uniform(-0.4 * spacing, 0.4 * spacing, (3, *[_INTERVALS + 3] * 3))
    points = _spline(control, size)
    for axis, length in enumerate(size):
        shape = [1, 1, 1]
        shape[axis] = length
        points[axis] += ((2 * np.arange(length, dtype=np.float32) + 1) / length - 1).reshape(shape)
    angle = rng.uniform(-1, 1, 3) * np.deg2rad(10)
    linear = _rotation(angle) @ np.diag(rng.uniform(0.86, 1.14, 3) * rng.uniform(0.94, 1.06))
    linear += rng.uniform(-0.06, 0.06, (3, 3)) * (1 - np.eye(3))
    shift = rng.uniform(-0.09, 0.09, 3) 
    extent = np.array(spec.extent)
    matrix = (extent[:, None] * linear).astype(np.float32)
    offset = (np.array(spec.centre) + extent * shift).astype(np.float32)
    moved = matrix @ points.reshape(3, -1)
    moved += offset[:, None]
    return moved.reshape(3, *size)


_INTERVALS = 3


def _spline(control: npt.NDArray[np.float64], size: Sequence[int]) -> Array:
    """Cubic B-spline lattice (C, I, J, K) evaluated on a grid of voxel centres: (C, D, H, W)."""
    field = control.astype(np.float32)
    channels = len(field)
    depth, height, width = (
        _spline_basis(length, points) for length, points in zip(size, field.shape[1:], strict=True)
    )
    field = field @ width.T
    field = height @ field
    field = depth @ field.reshape(channels, field.shape[1], -1)
    return field.reshape(channels, *size)


@functools.lru_cache(maxsize=64)
def _spline_basis(length: int, points: int) -> Array:
    position = (np.arange(length) + 0.5) / length * (points - 3)
    knot = np.floor(position).astype(int)
    t = position - knot
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((length, points), dtype=np.float32)
    for offset, weight in enumerate(weights):
        basis[np.arange(length), knot + offset] = weight / 6
    return basis


def _rotation(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, value in enumerate(angle):
        i, j = [(1, 2), (0, 2), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(value)
        turn[i, j], turn[j, i] = -math.sin(value), math.sin(value)
        matrix = matrix @ turn
    return matrix


# ----------------------------------------------------------------------------- canvas
class _Canvas:
    """Volume of one subject, painted structure by structure; later ones cover earlier ones."""

    def __init__(self, spec: Scene, points: Array, rng: np.random.Generator) -> None:
        self.points = points
        self.image = np.full(points.shape[1:], 0.0, dtype=np.float32)
        self.label = np.zeros(points.shape[1:], dtype=np.uint8)
        self.tissues = {
            name: float(mean + spread * rng.uniform(-1, 1))
            for name, (mean, spread) in spec.tissues.items()
        }
        self.pitch = max(
            2 * extent / length for extent, length in zip(spec.extent, points.shape[1:], strict=True)
        )
        self._values = {name: value for value, name in enumerate(spec.labels)}
        self._values.update({part: self._values[name] for part, name in spec.parts.items()})
        self._stride = [max(1, length // 16) for length in points.shape[1:]]
        coarse = points[(slice(None), *[slice(None, None, step) for step in self._stride])]
        self._coarse = coarse.reshape(3, -1)
        self._coarse_shape = coarse.shape[1:]
        self._reach = np.array(
            [
                sum(
                    float(np.abs(np.diff(coarse[axis], axis=along)).max(initial=0.0))
                    for along in range(3)
                )
                for axis in range(3)
            ]
        )

    def region(self, low: Sequence[float], high: Sequence[float]) -> Region | None:
        """Smallest box of voxels, in steps of the coarse grid, that holds a box of the body."""
        near = np.ones(self._coarse.shape[1], dtype=bool)
        margin = self._reach + 1.5 * self.pitch
        for axis in range(3):
            near &= self._coarse[axis] > low[axis] - margin[axis]
            near &= self._coarse[axis] < high[axis] + margin[axis]
        grid = near.reshape(self._coarse_shape)
        slices = []
        for axis, step in enumerate(self._stride):
            hit = np.flatnonzero(grid.any(axis=tuple({0, 1, 2} - {axis})))
            if not len(hit):
                return None
            slices.append(slice(int(hit[0]) * step, (int(hit[-1]) + 1) * step))
        return slices[0], slices[1], slices[2]

    def measure(self, shape: _Shape) -> tuple[Region, Array] | None:
        """Signed distance to a shape, on the voxels near it."""
        region = self.region(*shape.box())
        if region is None:
            return None
        return region, shape.distance(self.points[(slice(None), *region)])

    def paint(
        self,
        tissue: str,
        name: str | None,
        shape: _Shape,
        grow: float = 0.0,
        within: Array | None = None,
    ) -> None:
        measured = self.measure(shape)
        if measured is not None:
            self.fill(tissue, name, *measured, grow=grow, within=within)

    def fill(
        self,
        tissue: str,
        name: str | None,
        region: Region,
        distance: Array,
        grow: float = 0.0,
        within: Array | None = None,
    ) -> None:
        """Blend a tissue in where the distance is below ``grow``; ``name=None`` keeps labels."""
        cover = distance * np.float32(-1 / self.pitch)
        cover += np.float32(0.5 + grow / self.pitch)
        np.clip(cover, 0, 1, out=cover)
        if within is not None:
            cover *= within[region]
        image = self.image[region]
        image += cover * (np.float32(self.tissues[tissue]) - image)
        if name is None:
            return
        inside = cover > 0.5
        label = self.label[region]
        if f"left {name}" in self._values:
            right = self.points[(0, *region)] > 0
            label[inside] = self._values[f"left {name}"]
            label[inside & right] = self._values[f"right {name}"]
        else:
            label[inside] = self._values.get(name, 0)


# ----------------------------------------------------------------------------- shapes
class _Shape:
    """Implicit surface: negative inside, about the distance to the surface in body units."""

    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        raise NotImplementedError

    def distance(self, points: Array) -> Array:
        raise NotImplementedError


class _Ellipsoid(_Shape):
    """Ellipsoid with axes along the rows of ``frame``; ``mirrored`` adds its left-right twin."""

    def __init__(
        self,
        centre: Point,
        radii: Point,
        frame: npt.NDArray[np.float64] | None = None,
        mirrored: bool = False,
    ) -> None:
        self.centre = centre
        self.radii = radii
        self.frame = None if frame is None else frame.astype(np.float32)
        self.mirrored = mirrored

    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        frame = np.eye(3) if self.frame is None else self.frame
        half = np.sqrt(((frame * np.array(self.radii)[:, None]) ** 2).sum(axis=0))
        low = [float(c - h) for c, h in zip(self.centre, half, strict=True)]
        high = [float(c + h) for c, h in zip(self.centre, half, strict=True)]
        return ([-high[0], *low[1:]] if self.mirrored else low), high

    def distance(self, points: Array) -> Array:
        local = [
            (np.abs(axis) if self.mirrored and i == 0 else axis) - np.float32(self.centre[i])
            for i, axis in enumerate(points)
        ]
        if self.frame is not None:
            local = [sum(float(w) * axis for w, axis in zip(row, local)) for row in self.frame]
        unit = np.zeros_like(local[0])
        slope = np.zeros_like(local[0])
        for axis, radius in zip(local, self.radii, strict=True):
            square = axis * np.float32(1 / radius)
            square *= square
            unit += square
            square *= np.float32(1 / radius**2)
            slope += square
        # First-order distance k (k - 1) / |gradient|: the plain k - 1 would blur long ends.
        np.sqrt(unit, out=unit)
        slope += np.float32(1e-6)
        np.sqrt(slope, out=slope)
        result = unit - np.float32(1)
        result *= unit
        result /= slope
        return result


class _Segment(_Shape):
    """Straight piece of a tube between two points, with a radius at each of them."""

    def __init__(
        self,
        start: npt.NDArray[np.float64],
        end: npt.NDArray[np.float64],
        radius: tuple[float, float],
        mirrored: bool = False,
    ) -> None:
        self.start, self.end, self.radius, self.mirrored = start, end, radius, mirrored

    def box(self) -> tuple[Sequence[float], Sequence[float]]:
        widest = max(self.radius)
        low = (np.minimum(self.start, self.end) - widest).tolist()
        high = (np.maximum(self.start, self.end) + widest).tolist()
        return ([-high[0], *low[1:]] if self.mirrored else low), high

    def distance(self, points: Array) -> Array:
        direction = self.end - self.start
        local = [
            (np.abs(axis) if self.mirrored and i == 0 else axis) - np.float32(self.start[i])
            for i, axis in enumerate(points)
        ]
        along = sum(axis * np.float32(d / (direction @ direction)) for axis, d in zip(local, direction))
        np.clip(along, 0, 1, out=along)
        square = np.zeros_like(along)
        for axis, d in zip(local, direction, strict=True):
            axis -= along * np.float32(d)
            axis *= axis
            square += axis
        np.sqrt(square, out=square)
        along *= np.float32(self.radius[1] - self.radius[0])
        square -= along
        square -= np.float32(self.radius[0])
        return square
