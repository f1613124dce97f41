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
import io
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError, check_choice

Array = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]
Point = tuple[float, float, float]
Region = slice | npt.NDArray[np.intp]
Scalar = TypeVar("Scalar", bound=np.generic)


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
        modality: Decides on noise and on how intensities become [0, 1].
        view: Array axis to look along in figures.
        window: Intensities in [0, 1] shown black and white in figures.
    """

    labels: tuple[str, ...]
    extent: Point
    centre: Point
    tissues: Mapping[str, tuple[float, float]]
    draw: Callable[[_Canvas, np.random.Generator, int], None]
    parts: Mapping[str, str] = field(default_factory=dict)
    classes: int = 1
    modality: Literal["ct", "mr"] = "ct"
    view: int = 2
    window: tuple[float, float] = (0.35, 0.75)


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
    category = _class_of(index, seed, spec.classes)
    spec.draw(canvas, rng, category)
    finish = _finish_ct if spec.modality == "ct" else _finish_mr
    image, label = canvas.volumes()
    return {"image": finish(image, rng), "label": label, "class": category}


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


class PhantomDataset(Dataset[dict[str, Any]]):
    """Generated subjects as items of a map-style dataset.

    Args:
        scene: A name in ``SCENES``.
        length: Number of subjects.
        size: Voxels per axis (D, H, W).
        seed: Chooses the population.
        start: Index of the first subject.

    Items have ``image`` (float32 tensor (1, D, H, W), range [0, 1]), ``label`` (uint8 tensor
    (1, D, H, W)), ``class`` (int) and ``name`` (str). An item is generated when it is asked for.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        scene: str,
        length: int,
        size: Sequence[int] = (64, 64, 64),
        seed: int = 0,
        start: int = 0,
    ) -> None:
        if length < 0:
            raise InputError(f"The phantom has {length} subjects; ask for 0 or more.")
        _subject(scene, start, size, seed)
        self.scene = scene
        self.length = length
        self.size = tuple(size)
        self.seed = seed
        self.start = start

    @property
    def names(self) -> list[str]:
        """Name of every subject."""
        numbers = range(self.start, self.start + self.length)
        return [f"{self.scene}-{number:05d}" for number in numbers]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Generate subject ``start + index``."""
        if not 0 <= index < self.length:
            raise IndexError(f"subject {index} of {self.length}")
        number = self.start + index
        subject = generate_phantom(self.scene, number, self.size, self.seed)
        return {
            "image": torch.from_numpy(subject["image"])[None],
            "label": torch.from_numpy(subject["label"])[None],
            "class": subject["class"],
            "name": self.names[index],
        }


class Phantom(PairDataModule):
    """Pairs of generated subjects: pre-training data that needs no download.

    The subjects are always the same ones, whatever the ``seed`` of the pairs: the first
    ``num_val`` of the scene for validation, the ``num_train`` after them for training.

    Args:
        scene: ``cardiac_ct``, ``coronary_ct``, ``brain_mr`` or ``chest_ct``.
        size: Voxels per axis of the generated volumes.
        num_train: Number of training subjects.
        num_val: Number of validation subjects.
        patch_size: Size of what the network sees; by default the whole volume.
        **options: Further arguments of ``PairDataModule``.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        scene: str = "cardiac_ct",
        size: tuple[int, int, int] = (64, 64, 64),
        num_train: int = 200,
        num_val: int = 20,
        patch_size: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(patch_size=size if patch_size is None else patch_size, **options)
        self.validation = PhantomDataset(scene, num_val, size)
        self.training = PhantomDataset(scene, num_train, size, start=num_val)

    def configure_datasets(self) -> tuple[PhantomDataset, PhantomDataset]:
        """Training and validation subjects; no subject is in both."""
        return self.training, self.validation


def save_figure(path: str | Path, subjects: int = 3, size: int = 96) -> None:
    """Draw the first subjects of every scene, image beside labels, as the README shows them.

    Args:
        path: PNG to write; its folder is made if need be.
        subjects: Number of subjects per scene.
        size: Voxels per axis.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(3.6 * subjects, 1.8 * len(SCENES)), dpi=80, facecolor="black")
    axes = figure.subplots(len(SCENES), 2 * subjects, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
    for row, (scene, spec) in zip(axes, SCENES.items(), strict=True):
        colours = colormaps["hsv"]((0.6 + 0.382 * np.arange(len(spec.labels))) % 1)
        colours[:, 3] = [0, *[0.55] * (len(spec.labels) - 1)]
        black, white = spec.window
        for subject in range(subjects):
            phantom = generate_phantom(scene, subject, (size,) * 3)
            image = np.moveaxis(phantom["image"], spec.view, 0)[size // 2]
            labels = np.moveaxis(phantom["label"], spec.view, 0)
            # One slice of a thin vessel would be a dot: its label is shown through all slices.
            labels = labels[size // 2] if len(spec.labels) > 2 else labels.max(axis=0)
            plain, overlaid = row[2 * subject : 2 * subject + 2]
            for axis in (plain, overlaid):
                axis.imshow(_upright(image), cmap="gray", vmin=black, vmax=white, aspect="auto")
                axis.set_axis_off()
            overlaid.imshow(_upright(colours[labels]), interpolation="nearest", aspect="auto")
        row[0].text(0.03, 0.93, scene, transform=row[0].transAxes, color="white", va="top", size=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture)
    Image.open(picture).convert("RGB").quantize(200).save(path, optimize=True)


def _upright(plane: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """As radiologists look at it: the patient's right on the left, front or head on top."""
    return np.swapaxes(plane, 0, 1)[::-1, ::-1]


def _subject(
    scene: str, index: int, size: Sequence[int], seed: int
) -> tuple[Scene, np.random.Generator]:
    check_choice("scene", scene, SCENES)
    if index < 0 or seed < 0:
        raise InputError(f"Subject {index} of seed {seed} does not exist; give 0 or more for both.")
    if len(size) != 3 or min(size) < _SMALLEST:
        raise InputError(f"The size is {tuple(size)}; give three numbers of {_SMALLEST} or more.")
    return SCENES[scene], np.random.default_rng([seed, index, zlib.crc32(scene.encode())])


_SMALLEST = 16


def _class_of(index: int, seed: int, classes: int) -> int:
    """Every run of ``classes`` consecutive subjects holds each class once, in random order."""
    order = np.random.default_rng([seed, index // classes]).permutation(classes)
    return int(order[index % classes])


# ----------------------------------------------------------------------------- deformation
def _body_points(spec: Scene, rng: np.random.Generator, size: Sequence[int]) -> Array:
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
    extent, centre = (np.reshape(value, (3, 1, 1, 1)) for value in (spec.extent, spec.centre))
    return _spline(extent * moved + centre, size)


_INTERVALS = 3
_BEND = 0.25


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
    points: Array = field.reshape(channels, *size)
    return points


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
    """Volume of one subject, painted structure by structure; later ones cover earlier ones.

    Voxels are kept block by block, (blocks, voxels of a block): a structure only meets the blocks
    whose body coordinates it reaches.

    Attributes:
        points: Body coordinates (3, blocks, voxels).
        tissues: The subject's intensity of each tissue.
        pitch: Largest edge of a voxel in body units.
    """

    def __init__(self, spec: Scene, points: Array, rng: np.random.Generator) -> None:
        self.tissues = {
            name: float(mean + spread * rng.uniform(-1, 1))
            for name, (mean, spread) in spec.tissues.items()
        }
        self.pitch = max(
            2 * extent / size for extent, size in zip(spec.extent, points.shape[1:], strict=True)
        )
        self._size = points.shape[1:]
        self._values = {name: value for value, name in enumerate(spec.labels)}
        self._values.update({part: self._values[name] for part, name in spec.parts.items()})
        self.points = _split(points)
        self._low, self._high = self.points.min(axis=2), self.points.max(axis=2)
        self._image = np.full(self.points.shape[1:], self.tissues["air"], dtype=np.float32)
        self._label = np.zeros(self.points.shape[1:], dtype=np.uint8)

    def volumes(self) -> tuple[Array, npt.NDArray[np.uint8]]:
        """Image and label (D, H, W)."""
        return _join(self._image, self._size), _join(self._label, self._size)

    def measure(
        self, shape: _Shape, margin: float = 0.0, among: Region = slice(None)
    ) -> tuple[Region, Array]:
        """Signed distance to a shape on the blocks near it.

        Args:
            shape: What to measure.
            margin: How far from the shape a block counts as near.
            among: Blocks to choose from.

        Returns:
            The blocks and the distance (blocks, voxels).
        """
        low, high = shape.boxes()
        margin += 0.5 * self.pitch
        low, high = low - margin, high + margin
        region = np.flatnonzero(self._near(among, low.min(axis=0)[None], high.max(axis=0)[None]))
        if isinstance(among, np.ndarray):
            region = among[region]
        if isinstance(shape, _Ellipsoid):
            return region, shape.distance(self.points.take(region, axis=1))
        row, piece = np.nonzero(self._near(region, low, high))
        block = region[row]
        distance = shape.distance_to(piece, self.points.take(block, axis=1))
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        if len(starts):
            distance = np.minimum.reduceat(distance, starts, axis=0)
        return block[starts], distance

    def distance(self, shape: _Shape) -> Array:
        """Signed distance on all blocks; just a large number on those away from the shape."""
        result = np.full(self.points.shape[1:], _FAR, dtype=np.float32)
        region, distance = self.measure(shape)
        result[region] = distance
        return result

    def _near(self, region: Region, low: Vector, high: Vector) -> npt.NDArray[np.bool_]:
        """Which blocks of a region (rows) meet which boxes of the body (columns)."""
        low, high = low.astype(np.float32), high.astype(np.float32)
        near: npt.NDArray[np.bool_] = self._high[0, region, None] > low[:, 0]
        near &= self._low[0, region, None] < high[:, 0]
        for axis in (1, 2):
            near &= self._high[axis, region, None] > low[:, axis]
            near &= self._low[axis, region, None] < high[:, axis]
        return near

    def paint(
        self,
        tissue: str,
        name: str | None,
        shape: _Shape,
        within: Array | None = None,
    ) -> None:
        """Fill a shape; see ``fill``."""
        among = _ALL if within is None else np.flatnonzero(within.max(axis=1))
        self.fill(tissue, name, *self.measure(shape, among=among), within=within)

    def fill(
        self,
        tissue: str,
        name: str | None,
        region: Region,
        distance: Array,
        grow: float = 0.0,
        within: Array | None = None,
    ) -> None:
        """Blend a tissue in where the distance is below ``grow``.

        Args:
            tissue: Whose intensity to take.
            name: Structure to label, as background if the scene has no such label; None keeps
                the labels.
            region: Blocks to fill.
            distance: Signed distance (blocks, voxels) to the structure.
            grow: Width in body units of a layer to add around the structure.
            within: Share of each voxel of the volume that may be filled.
        """
        cover = self.cover(distance, grow)
        if within is not None:
            cover *= within[region]
        image = self._image[region]
        image += cover * (self.tissues[tissue] - image)
        self._image[region] = image
        if name is None:
            return
        inside = cover > 0.5
        label = self._label[region]
        if f"left {name}" in self._values:
            np.copyto(label, self._values[f"left {name}"], where=inside)
            inside &= self.points[0, region] > 0
            np.copyto(label, self._values[f"right {name}"], where=inside)
        else:
            np.copyto(label, self._values.get(name, 0), where=inside)
        self._label[region] = label

    def cover(self, distance: Array, grow: float = 0.0) -> Array:
        """Share of each voxel that lies within ``grow`` of a shape: edges are one voxel wide."""
        share: Array = distance * (-1 / self.pitch)
        share += 0.5 + grow / self.pitch
        np.clip(share, 0, 1, out=share)
        return share


_ALL = slice(None)
_BLOCK = 4
_FAR = 1e3


def _split(points: Array) -> Array:
    """Cut (C, D, H, W) into (C, blocks, voxels), repeating the last voxels to fill the blocks."""
    missing = [(-length) % _BLOCK for length in points.shape[1:]]
    if any(missing):
        points = np.pad(points, [(0, 0), *((0, extra) for extra in missing)], mode="edge")
    d, h, w = (length // _BLOCK for length in points.shape[1:])
    rows: npt.NDArray[Any] = points.view(_ROW[points.itemsize]).reshape(-1, d, _BLOCK, h, _BLOCK, w)
    cells = rows.transpose(0, 1, 3, 5, 2, 4).reshape(-1, d * h * w, _BLOCK**2)
    blocks: Array = cells.view(points.dtype)
    return blocks


def _join(blocks: npt.NDArray[Scalar], size: tuple[int, ...]) -> npt.NDArray[Scalar]:
    """Put (blocks, voxels) together to (D, H, W)."""
    d, h, w = (-(-length // _BLOCK) for length in size)
    rows: npt.NDArray[Any] = blocks.view(_ROW[blocks.itemsize]).reshape(d, h, w, _BLOCK, _BLOCK)
    volume = rows.transpose(0, 3, 1, 4, 2).reshape(d * _BLOCK, h * _BLOCK, w).view(blocks.dtype)
    return np.ascontiguousarray(volume[: size[0], : size[1], : size[2]])


# The four voxels of a row of a block move as one number, which is four times as fast.
_ROW: dict[int, type[np.generic]] = {1: np.uint32, 4: np.complex128}


# ----------------------------------------------------------------------------- shapes
_ENDLESS = math.inf
_CHUNK = 16384  # points whose intermediate results stay in the processor's cache


class _Ellipsoid:
    """Ellipsoid, its first radius along ``axis``; ``mirrored`` adds its left-right twin.

    ``base`` cuts off what lies below that height on the first axis. With ``_ENDLESS`` as its last
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


class _Tubes:
    """Straight pieces (P) of tubes, each with a radius at both of its ends.

    Args:
        path: Start and end of each piece (P, 2, 3).
        radii: Radius there (P, 2).
    """

    def __init__(self, path: Vector, radii: Vector) -> None:
        self.path, self.radii = path, radii

    def __add__(self, other: _Tubes) -> _Tubes:
        return _Tubes(
            np.concatenate([self.path, other.path]), np.concatenate([self.radii, other.radii])
        )

    def mirrored(self) -> _Tubes:
        """With the left-right twins."""
        return self + _Tubes(self.path * [-1, 1, 1], self.radii)

    def at_least(self, radius: float) -> _Tubes:
        """The same tubes, nowhere thinner than a radius."""
        return _Tubes(self.path, np.maximum(self.radii, radius))

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


def _frame(axis: Point) -> Vector:
    """Rows: the axis, and two directions at right angles to it."""
    first = np.array(axis) / np.linalg.norm(axis)
    second = np.cross(first, [0.0, 0.0, 1.0] if abs(first[2]) < 0.9 else [0.0, 1.0, 0.0])
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])


def _tube(points: Sequence[Point], radii: Sequence[float], pieces: int = 1) -> _Tubes:
    """Smooth tube through points (Catmull-Rom), ``pieces`` straight ones between two of them."""
    return _polyline(*_curve(points, radii, pieces))


def _curve(points: Sequence[Point], radii: Sequence[float], pieces: int) -> tuple[Vector, Vector]:
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


def _polyline(path: Vector, radii: Vector) -> _Tubes:
    return _Tubes(
        np.stack([path[:-1], path[1:]], axis=1), np.stack([radii[:-1], radii[1:]], axis=1)
    )


_Shape = _Ellipsoid | _Tubes


# ----------------------------------------------------------------------------- thorax
def _draw_thorax(canvas: _Canvas, rng: np.random.Generator, category: int) -> None:
    trunk = _TRUNK.distance(canvas.points)
    canvas.fill("fat", "trunk", _ALL, trunk)
    canvas.fill("muscle", "trunk", _ALL, trunk, grow=-0.16)
    cage = _CAGE.distance(canvas.points)
    canvas.fill("fat", "mediastinum", _ALL, cage, grow=-0.07)
    abdomen = _abdomen_distance(canvas.points[2], canvas.distance)
    lungs = _lung_distance(cage, abdomen, canvas.distance)
    canvas.fill("lung", "lung", _ALL, lungs)
    within = canvas.cover(lungs)
    canvas.paint("right blood", None, _lung_vessels(), within=within)
    if category:
        _draw_lesions(canvas, rng, within)
    np.maximum(abdomen, cage + 0.07, out=abdomen)
    canvas.fill("liver", "abdomen", _ALL, abdomen)
    within = canvas.cover(abdomen)
    for tissue, organ in _ABDOMEN:
        canvas.paint(tissue, "abdomen", organ, within=within)
    _draw_heart(canvas)
    _draw_bones(canvas, cage)
    # Thinner than a voxel's diagonal, an artery would fall apart on the grid.
    arteries = _coronary_arteries().at_least(canvas.pitch)
    canvas.paint("left blood", "coronary artery", arteries)


def _lung_distance(cage: Array, abdomen: Array, distance: Callable[[_Ellipsoid], Array]) -> Array:
    lungs: Array = np.maximum(cage + 0.1, -distance(_MEDIASTINUM))
    np.maximum(lungs, -abdomen, out=lungs)
    return lungs


def _abdomen_distance(height: Array, distance: Callable[[_Ellipsoid], Array]) -> Array:
    """What lies below the two domes of the diaphragm."""
    right, left = map(distance, _DIAPHRAGM)
    abdomen: Array = np.minimum(np.minimum(right, left), height + 1.4)
    return abdomen


def _lung_places(places: Vector) -> tuple[Array, Array]:
    """Distance of places (N, 3) to the rib cage and to the lungs."""
    points = places.T.astype(np.float32)
    cage = _CAGE.distance(points)

    def distance(shape: _Ellipsoid) -> Array:
        return shape.distance(points)

    return cage, _lung_distance(cage, _abdomen_distance(points[2], distance), distance)


def _draw_heart(canvas: _Canvas) -> None:
    """Fat, then walls, then the inside of all parts, so that neighbours share one wall."""
    parts = [
        (part, canvas.measure(shape, margin=part.fat)) for part in _heart() for shape in part.shapes
    ]
    for part, measured in parts:
        if part.fat > part.wall:
            canvas.fill("fat", f"{part.name} fat", *measured, grow=part.fat)
    for part, measured in parts:
        if part.wall:
            canvas.fill("muscle", f"{part.name} wall", *measured, grow=part.wall)
    for part, measured in parts:
        canvas.fill(part.tissue, part.name, *measured)
    canvas.paint("myocardium", None, _PAPILLARY_MUSCLES)


def _draw_bones(canvas: _Canvas, cage: Array) -> None:
    shell = np.abs(cage) - 0.055
    wall = np.flatnonzero(shell.min(axis=1) < canvas.pitch)
    _, a, s = canvas.points.take(wall, axis=1)
    ribs = np.maximum(shell[wall], _stripes(s + 0.45 * a, 0.45, 0.1))
    np.maximum(ribs, a - 1.0, out=ribs)
    np.maximum(ribs, -1.8 - s, out=ribs)
    bones = [(wall, ribs), *map(canvas.measure, _BONES)]
    for region, distance in bones:
        canvas.fill("cortical bone", "bone", region, distance)
    for region, distance in bones:
        canvas.fill("marrow", "bone", region, distance, grow=-0.045)
    region, distance = canvas.measure(_VERTEBRAE)
    np.maximum(distance, _stripes(canvas.points[2, region], 0.42, 0.05), out=distance)
    canvas.fill("muscle", "bone", region, distance)
    canvas.paint("muscle", "spinal canal", _SPINAL_CANAL)


def _stripes(height: Array, period: float, half_width: float) -> Array:
    """Distance to slabs that repeat along an axis."""
    phase = height * (1 / period)
    phase -= np.floor(phase)
    phase -= 0.5
    np.abs(phase, out=phase)
    phase *= period
    phase -= half_width
    return phase


def _draw_lesions(canvas: _Canvas, rng: np.random.Generator, within: Array) -> None:
    """Ground glass with consolidated cores, mostly low, at the back and near the chest wall."""
    places = rng.uniform([-1.9, -1.3, -1.0], [1.9, 0.9, 1.5], (512, 3))
    cage, depth = _lung_places(places)
    weight = np.exp(-4 * np.abs(cage + 0.35) - 0.6 * places[:, 1] - 0.4 * places[:, 2])
    weight[depth > -0.15] = 0
    chosen = rng.choice(512, size=rng.integers(3, 8), replace=False, p=weight / weight.sum())
    for x, y, z in places[chosen].tolist():
        u, v, w = rng.uniform(0.22, 0.5, 3).tolist()
        phase = rng.uniform(0, 2 * np.pi, 3).tolist()
        region, distance = canvas.measure(_Ellipsoid((x, y, z), (u, v, w)), margin=0.15)
        r, a, s = canvas.points[:, region]
        ragged = np.sin(11 * r + 5 * a + phase[0]) + np.sin(11 * a - 5 * s + phase[1])
        ragged += np.sin(11 * s + 5 * r + phase[2])
        ragged *= 0.05
        distance += ragged
        canvas.fill("ground glass", "lesion", region, distance, within=within)
        distance += ragged
        canvas.fill("consolidation", None, region, distance, grow=-0.16, within=within)


_TRUNK = _Ellipsoid((0.0, -0.08, 0.0), (2.3, 1.62, _ENDLESS))
_CAGE = _Ellipsoid((0.0, -0.08, -0.5), (1.98, 1.3, 2.65))
_MEDIASTINUM = _Ellipsoid((-0.05, -0.1, 0.0), (0.5, 1.3, _ENDLESS))
_DIAPHRAGM = (
    _Ellipsoid((0.95, 0.0, -1.85), (1.2, 1.3, 1.1)),
    _Ellipsoid((-0.95, 0.0, -1.95), (1.1, 1.3, 1.05)),
)
_ABDOMEN = (
    ("fat", _Ellipsoid((-1.0, -0.1, -1.9), (1.1, 1.0, 0.75))),
    ("spleen", _Ellipsoid((-1.35, -0.55, -1.5), (0.35, 0.55, 0.5))),
    ("muscle", _Ellipsoid((-0.8, 0.35, -1.5), (0.55, 0.5, 0.42))),
    ("air", _Ellipsoid((-0.8, 0.5, -1.4), (0.42, 0.3, 0.25))),
)
_VERTEBRAE = _Ellipsoid((0.0, -1.05, 0.0), (0.27, 0.23, _ENDLESS))
_SPINAL_CANAL = _Ellipsoid((0.0, -1.37, 0.0), (0.11, 0.1, _ENDLESS))
_BONES = (
    _Ellipsoid((0.0, -1.38, 0.0), (0.2, 0.17, _ENDLESS)),
    _Ellipsoid((0.0, -1.54, 0.0), (0.06, 0.16, _ENDLESS)),
    _VERTEBRAE,
    _Ellipsoid((0.0, 1.24, 0.3), (0.22, 0.08, 1.1)),
)
_LEFT_VENTRICLE = (-0.36, 0.12, -0.28)
_LEFT_VENTRICLE_AXIS = (-0.66, 0.54, -0.52)
_PAPILLARY_MUSCLES = _tube([(-0.42, 0.02, -0.42), (-0.62, 0.22, -0.55)], [0.04, 0.06]) + _tube(
    [(-0.47, 0.28, -0.2), (-0.66, 0.4, -0.4)], [0.04, 0.06]
)


@dataclass(frozen=True)
class _Part:
    """A cavity or vessel; ``wall`` and ``fat`` are the thicknesses around it in body units."""

    tissue: str
    name: str
    wall: float
    fat: float
    shapes: tuple[_Shape, ...]


@functools.cache
def _heart() -> tuple[_Part, ...]:
    """Airways, great vessels and chambers in painting order."""
    airway = _tube([(0.0, -0.3, 2.6), (0.02, -0.38, 1.5), (0.03, -0.42, 0.95)], [0.14, 0.13, 0.13])
    for x, z, first, last in ((0.6, 0.4, 0.12, 0.07), (-0.65, 0.35, 0.11, 0.06)):
        way = [(0.03, -0.42, 0.95), (0.55 * x, -0.49, z + 0.2), (x, -0.52, z)]
        airway += _tube(way, [first, (first + last) / 2, last])
    veins = _tube([(0.52, 0.02, 0.1), (0.48, 0.0, 0.6), (0.42, -0.02, 2.6)], [0.15, 0.13, 0.12])
    veins += _tube([(0.55, -0.15, -0.3), (0.5, -0.28, -0.8), (0.4, -0.45, -2.6)], [0.17] * 3)
    lung_veins = _tube(
        [(0.2, -0.45, 0.2), (0.55, -0.55, 0.25), (0.95, -0.6, 0.4)], [0.12, 0.1, 0.06]
    )
    for side, start, middle, end in (
        (1, 0.05, -0.02, -0.25),
        (-1, 0.22, 0.3, 0.45),
        (-1, 0.05, 0.0, -0.2),
    ):
        way = [(0.2 * side, -0.48, start), (0.53 * side, -0.58, middle), (0.92 * side, -0.63, end)]
        lung_veins += _tube(way, [0.12, 0.1, 0.06])
    outflow = _tube(
        [(-0.02, 0.6, -0.1), (-0.08, 0.58, 0.12), (-0.12, 0.48, 0.3)], [0.3, 0.24, 0.18]
    )
    lung_arteries = _tube(
        [(-0.12, 0.48, 0.3), (-0.17, 0.3, 0.55), (-0.2, 0.02, 0.72)], [0.18, 0.185, 0.18]
    )
    lung_arteries += _tube(
        [(-0.2, 0.02, 0.72), (-0.45, -0.25, 0.74), (-0.85, -0.42, 0.6)], [0.16, 0.13, 0.09]
    )
    lung_arteries += _tube(
        [(-0.2, 0.02, 0.72), (0.15, -0.16, 0.68), (0.5, -0.22, 0.6), (0.9, -0.35, 0.5)],
        [0.15, 0.14, 0.13, 0.09],
    )
    arch = [(-0.04, 0.02, 0.0), (0.05, 0.09, 0.2), (0.14, 0.12, 0.45), (0.19, 0.13, 0.8)]
    arch += [(0.12, 0.02, 1.15), (-0.06, -0.2, 1.32)]
    descending = [(-0.06, -0.2, 1.32), (-0.26, -0.5, 1.2), (-0.36, -0.68, 0.85)]
    descending += [(-0.36, -0.78, 0.3), (-0.3, -0.8, -0.6), (-0.2, -0.78, -1.4)]
    descending += [(-0.12, -0.75, -2.6)]
    ventricle = _Ellipsoid((0.1, 0.46, -0.28), (0.62, 0.3, 0.36), (-0.75, 0.3, -0.45))
    atrium = _Ellipsoid((0.58, -0.02, -0.08), (0.32, 0.36, 0.42))
    left_atrium = _Ellipsoid((0.02, -0.42, 0.1), (0.42, 0.27, 0.32))
    appendages = (
        _Ellipsoid((0.42, 0.3, 0.18), (0.2, 0.16, 0.16)),
        _Ellipsoid((-0.4, -0.12, 0.2), (0.2, 0.13, 0.13), (-0.5, 0.7, 0.1)),
    )
    muscle = _Ellipsoid(_LEFT_VENTRICLE, (0.66, 0.41, 0.41), _LEFT_VENTRICLE_AXIS, base=-0.36)
    cavity = _Ellipsoid(_LEFT_VENTRICLE, (0.52, 0.265, 0.265), _LEFT_VENTRICLE_AXIS, base=-0.39)
    radii = [0.17, 0.165, 0.16, 0.155, 0.15, 0.145, 0.14]
    return (
        _Part("air", "airway", 0.04, 0.04, (airway,)),
        _Part("left blood", "descending aorta", 0.02, 0.02, (_tube(descending, radii),)),
        _Part("right blood", "caval vein", 0.015, 0.015, (veins,)),
        _Part("left blood", "pulmonary vein", 0.015, 0.015, (lung_veins,)),
        _Part("right blood", "right ventricle", 0.055, 0.155, (ventricle, outflow)),
        _Part("right blood", "right atrium", 0.03, 0.13, (atrium, appendages[0])),
        _Part("left blood", "left atrium", 0.03, 0.1, (left_atrium, appendages[1])),
        _Part("right blood", "pulmonary artery", 0.025, 0.06, (lung_arteries,)),
        _Part("myocardium", "myocardium", 0.03, 0.13, (muscle,)),
        _Part("left blood", "left ventricle", 0.0, 0.0, (cavity,)),
        _Part(
            "left blood",
            "ascending aorta",
            0.03,
            0.1,
            (_tube(arch, [0.15, 0.21, 0.19, 0.19, 0.18, 0.17]),),
        ),
    )


@functools.cache
def _coronary_arteries() -> _Tubes:
    """Left and right coronary tree, drawn roughly and laid onto the surface of the heart."""
    right = [(0.13, 0.2, 0.24), (0.3, 0.42, 0.22), (0.52, 0.5, 0.08), (0.66, 0.42, -0.15)]
    right += [(0.6, 0.2, -0.48), (0.35, -0.08, -0.6), (0.08, -0.18, -0.58)]
    anterior = [(-0.05, 0.1, 0.25), (-0.28, 0.18, 0.26), (-0.38, 0.42, 0.1), (-0.45, 0.58, -0.1)]
    anterior += [(-0.6, 0.68, -0.35), (-0.8, 0.65, -0.6), (-0.8, 0.5, -0.8)]
    circumflex = [(-0.28, 0.18, 0.26), (-0.5, 0.0, 0.15), (-0.55, -0.25, -0.05)]
    circumflex += [(-0.42, -0.38, -0.28), (-0.15, -0.38, -0.42)]
    branches = [
        (right, 0.05, 0.03),
        ([right[3], (0.45, 0.7, -0.45), (0.15, 0.78, -0.65)], 0.034, 0.02),
        ([right[6], (-0.1, 0.05, -0.72), (-0.35, 0.3, -0.82), (-0.6, 0.4, -0.85)], 0.034, 0.02),
        (anterior, 0.052, 0.024),
        ([anterior[3], (-0.7, 0.45, -0.12), (-0.9, 0.35, -0.35)], 0.034, 0.02),
        ([anterior[4], (-0.82, 0.5, -0.42), (-0.95, 0.4, -0.55)], 0.03, 0.02),
        (circumflex, 0.044, 0.026),
        ([circumflex[2], (-0.72, -0.1, -0.25), (-0.82, 0.05, -0.5)], 0.034, 0.02),
    ]
    trees = []
    for points, first, last in branches:
        path, radii = _curve(points, np.linspace(first, last, len(points)).tolist(), 2)
        trees.append(_polyline(_onto_heart(path), radii))
    return functools.reduce(operator.add, trees)


def _onto_heart(path: Vector) -> Vector:
    """Move points along the gradient of the distance until they lie just outside the heart."""
    parts = [part for part in _heart() if part.fat > 0.05]

    def distance(points: Vector) -> Vector:
        field = points.T.astype(np.float32)
        nearest = np.min([s.distance(field) for part in parts for s in part.shapes], axis=0)
        return np.asarray(nearest, dtype=np.float64)

    for _ in range(20):
        slope = np.stack(
            [(distance(path + step) - distance(path - step)) / 0.02 for step in 0.01 * np.eye(3)], 1
        )
        error = distance(path) - _ARTERY_HEIGHT
        path = path - 0.5 * (error / ((slope**2).sum(1) + 0.1))[:, None] * slope
    return path


_ARTERY_HEIGHT = 0.06


@functools.cache
def _lung_vessels() -> _Tubes:
    """A tree in each lung: places in it join, near ones first, the closest branch so far."""
    rng = np.random.default_rng(7)
    paths, widths = [], []
    for side in (-1, 1):
        wanted = rng.uniform([0.4, -1.3, -1.1], [1.8, 1.1, 1.9], (900, 3)) * [side, 1, 1]
        wanted = wanted[_lung_places(wanted)[1] < -0.1][:30]
        nodes = [np.array([side * 0.55, -0.4, 0.45])]
        parents = [0]
        for goal in wanted[np.argsort(np.linalg.norm(wanted - nodes[0], axis=1))]:
            gaps = np.linalg.norm(np.array(nodes) - goal, axis=1)
            nearest = int(np.argmin(gaps))
            bend = rng.normal(0, 0.12, 3) * gaps[nearest]
            parents += [nearest, len(nodes)]
            nodes += [(nodes[nearest] + goal) / 2 + bend, goal]
        supplied = np.ones(len(nodes))
        for node in range(len(nodes) - 1, 0, -1):
            supplied[parents[node]] += supplied[node]
        radii = np.minimum(0.02 * supplied**0.4, 0.1)
        paths.append(np.stack([np.array(nodes)[parents[1:]], nodes[1:]], axis=1))
        widths.append(
            np.stack([np.minimum(radii[parents[1:]], 1.3 * radii[1:]), radii[1:]], axis=1)
        )
    return _Tubes(np.concatenate(paths), np.concatenate(widths))


# ----------------------------------------------------------------------------- brain
def _draw_brain(canvas: _Canvas, rng: np.random.Generator, category: int) -> None:
    _, a, s = canvas.points
    head = _HEAD.distance(canvas.points)
    np.minimum(head, np.maximum(canvas.distance(_NECK), s + 0.3), out=head)
    canvas.fill("scalp", None, _ALL, head)
    canvas.fill("muscle", None, _ALL, head, grow=-0.06)
    # The floor of the skull rises towards the forehead.
    skull = np.maximum(_SKULL.distance(canvas.points), 0.9 * (0.45 * a - s - 0.55))
    np.minimum(skull, canvas.distance(_FOSSA), out=skull)
    canvas.fill("skull", None, _ALL, skull, grow=0.085)
    canvas.fill("diploe", None, _ALL, np.abs(skull - 0.045), grow=0.012)
    canvas.fill("csf", "CSF", _ALL, skull)
    _draw_cerebellum(canvas)
    _draw_cerebrum(canvas)
    for tissue, name, shape in _deep_structures():
        canvas.paint(tissue, name, shape)


def _draw_cerebrum(canvas: _Canvas) -> None:
    """Grey matter lies near the fluid around the brain, white matter deeper.

    Sulci are sheets of fluid, the zero set of a gyroid, that reach a fixed depth under the hull.
    """
    hull = np.minimum(canvas.distance(_CEREBRUM), canvas.distance(_TEMPORAL_LOBES))
    holes = functools.reduce(np.minimum, map(canvas.distance, _HOLLOWS))
    core = canvas.distance(_CORE)
    region = np.flatnonzero(hull.min(axis=1) < 0)
    hull = hull[region]
    r, a, s = canvas.points[:, region]
    u, v, w = 11 * r, 11 * a, 11 * s
    sine, cosine = np.sin(u), np.cos(u)
    v += 0.35 * sine
    fold = sine * np.cos(v)
    fold += np.sin(v) * np.cos(w)
    fold += np.sin(w) * cosine
    np.abs(fold, out=fold)
    fold *= 1 / 15
    fold -= 0.004
    depth = np.maximum(fold, -0.17 - hull)
    np.minimum(depth, -hull, out=depth)
    fissure = np.maximum(np.abs(r) - 0.012, -core[region])
    np.minimum(depth, fissure, out=depth)
    np.minimum(depth, holes[region], out=depth)
    np.negative(depth, out=depth)
    canvas.fill("grey matter", "cerebral cortex", region, depth)
    canvas.fill("white matter", "cerebral white matter", region, depth, grow=-0.062)


def _draw_cerebellum(canvas: _Canvas) -> None:
    region, lobe = canvas.measure(_CEREBELLUM, margin=0.02)
    _, a, s = canvas.points[:, region]
    folia = np.sin(38 * s + 14 * a)
    canvas.fill("grey matter", "cerebellar cortex", region, lobe + 0.02 * folia)
    canvas.fill("white matter", "cerebellar white matter", region, lobe + 0.035 * folia, -0.095)


_HEAD = _Ellipsoid((0.0, 0.0, 0.02), (0.86, 1.02, 0.93))
_NECK = _Ellipsoid((0.0, -0.1, -1.0), (0.6, 0.75, 2.0))
_SKULL = _Ellipsoid((0.0, -0.01, 0.05), (0.71, 0.87, 0.76))
_CEREBRUM = _Ellipsoid((0.0, 0.0, 0.16), (0.68, 0.84, 0.6))
_TEMPORAL_LOBES = _Ellipsoid((0.4, 0.12, -0.25), (0.24, 0.42, 0.24), mirrored=True)
_CORE = _Ellipsoid((0.0, 0.02, 0.08), (0.3, 0.42, 0.26))
_HOLLOWS = (
    _Ellipsoid((0.0, -0.22, -0.5), (0.24, 0.32, 0.36)),
    _Ellipsoid((0.0, -0.42, -0.42), (0.62, 0.37, 0.31)),
    _Ellipsoid((0.0, 0.22, -0.48), (0.14, 0.24, 0.28)),
)
_FOSSA = _Ellipsoid((0.0, -0.38, -0.42), (0.64, 0.42, 0.34))
_CEREBELLUM = _Ellipsoid((0.25, -0.42, -0.42), (0.35, 0.34, 0.27), mirrored=True)


@functools.cache
def _deep_structures() -> tuple[tuple[str, str, _Shape], ...]:
    """Structures inside the brain as (tissue, name, shape), in painting order."""
    stem = [(0.0, -0.1, -0.12), (0.0, -0.14, -0.32), (0.0, -0.22, -0.6), (0.0, -0.3, -1.4)]
    caudate = [(0.16, 0.3, 0.06), (0.19, 0.24, 0.15), (0.21, 0.02, 0.22), (0.23, -0.18, 0.2)]
    horns = [(0.1, 0.4, 0.1), (0.09, 0.22, 0.2), (0.1, -0.05, 0.25), (0.18, -0.28, 0.18)]
    temporal = [(0.27, -0.36, 0.04), (0.37, -0.24, -0.08), (0.39, -0.05, -0.16)]
    ventricle = _tube([*horns, temporal[0]], [0.045, 0.07, 0.065, 0.07, 0.08], 2)
    ventricle += _tube(temporal, [0.07, 0.045, 0.035], 2)
    ventricle += _tube([temporal[0], (0.24, -0.62, 0.04)], [0.07, 0.03])
    hippocampus = [(0.3, 0.05, -0.24), (0.32, -0.1, -0.21), (0.3, -0.24, -0.11), (0.22, -0.3, 0.0)]
    return (
        ("brain stem", "brain stem", _tube(stem, [0.12, 0.14, 0.1, 0.08])),
        ("brain stem", "brain stem", _Ellipsoid((0.0, -0.08, -0.36), (0.17, 0.14, 0.14))),
        ("csf", "fourth ventricle", _Ellipsoid((0.0, -0.29, -0.4), (0.06, 0.05, 0.12))),
        ("caudate", "caudate", _tube(caudate, [0.07, 0.085, 0.055, 0.035], 2).mirrored()),
        ("csf", "lateral ventricle", ventricle.mirrored()),
        ("thalamus", "thalamus", _pair((0.12, -0.1, 0.07), (0.09, 0.17, 0.1))),
        ("csf", "third ventricle", _Ellipsoid((0.0, -0.03, 0.02), (0.034, 0.17, 0.11))),
        ("putamen", "putamen", _pair((0.31, 0.1, 0.05), (0.07, 0.22, 0.12))),
        ("pallidum", "pallidum", _pair((0.23, 0.06, 0.03), (0.055, 0.13, 0.08))),
        ("caudate", "accumbens", _pair((0.13, 0.3, -0.04), (0.065, 0.075, 0.055))),
        (
            "hippocampus",
            "hippocampus",
            _tube(hippocampus, [0.075, 0.07, 0.06, 0.045], 2).mirrored(),
        ),
        ("amygdala", "amygdala", _pair((0.27, 0.17, -0.22), (0.085, 0.085, 0.075))),
    )


def _pair(centre: Point, radii: Point) -> _Ellipsoid:
    return _Ellipsoid(centre, radii, mirrored=True)


# ----------------------------------------------------------------------------- scanner
def _finish_ct(image: Array, rng: np.random.Generator) -> Array:
    """Uneven tissue, a mild shading artefact, noise correlated in the slice; HU to [0, 1]."""
    image += _smooth_field(rng, image.shape, 4, 10.0)
    image += _smooth_field(rng, image.shape, 16, 12.0)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise[1:] += 0.6 * noise[:-1]
    noise[:, 1:] += 0.6 * noise[:, :-1]
    noise *= float(rng.uniform(8, 22))
    image += noise
    image += 1024
    image *= 1 / 2048
    return np.clip(image, 0, 1, out=image)


def _finish_mr(image: Array, rng: np.random.Generator) -> Array:
    """Tissue texture, receive-coil bias and magnitude noise."""
    texture = _smooth_field(rng, image.shape, 20, 0.04)
    texture += 1
    image *= texture
    bias = _smooth_field(rng, image.shape, 3, 0.1)
    image *= np.exp(bias, out=bias)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= float(rng.uniform(0.012, 0.035))
    image += noise
    np.abs(image, out=image)
    return np.minimum(image, 1, out=image)


def _smooth_field(
    rng: np.random.Generator, size: tuple[int, ...], intervals: int, deviation: float
) -> Array:
    # A cubic B-spline keeps 0.69 of the standard deviation of its coefficients along each axis.
    control = rng.standard_normal((1, *[intervals + 3] * 3)) * (deviation / 0.69**3)
    field: Array = _spline(control, size)[0]
    return field


_CT_TISSUES = {
    "air": (-1000.0, 10.0),
    "lung": (-830.0, 50.0),
    "fat": (-95.0, 15.0),
    "muscle": (55.0, 12.0),
    "liver": (95.0, 25.0),
    "spleen": (110.0, 25.0),
    "myocardium": (105.0, 25.0),
    "marrow": (220.0, 60.0),
    "cortical bone": (650.0, 120.0),
    "left blood": (390.0, 90.0),
    "right blood": (250.0, 120.0),
}
_HEART_PARTS = (
    "right ventricle",
    "right atrium",
    "left atrium",
    "myocardium",
    "left ventricle",
    "coronary artery",
)
_BRAIN_PAIRS = (
    "cerebral white matter",
    "cerebral cortex",
    "lateral ventricle",
    "cerebellar white matter",
    "cerebellar cortex",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
    "hippocampus",
    "amygdala",
    "accumbens",
)

SCENES: dict[str, Scene] = {
    "cardiac_ct": Scene(
        labels=(
            "background",
            "myocardium",
            "left atrium",
            "left ventricle",
            "right atrium",
            "right ventricle",
            "ascending aorta",
            "pulmonary artery",
        ),
        extent=(1.4, 1.4, 1.4),
        centre=(-0.05, 0.0, -0.1),
        tissues=_CT_TISSUES,
        draw=_draw_thorax,
    ),
    "coronary_ct": Scene(
        labels=("background", "coronary artery"),
        extent=(1.25, 1.25, 1.25),
        centre=(-0.1, 0.1, -0.1),
        view=1,
        tissues=_CT_TISSUES,
        draw=_draw_thorax,
    ),
    "brain_mr": Scene(
        labels=(
            "background",
            *(f"{side} {name}" for name in _BRAIN_PAIRS for side in ("left", "right")),
            "third ventricle",
            "fourth ventricle",
            "brain stem",
            "CSF",
        ),
        extent=(1.0, 1.12, 1.0),
        centre=(0.0, 0.0, 0.0),
        tissues={
            "air": (0.01, 0.01),
            "scalp": (0.85, 0.1),
            "muscle": (0.35, 0.06),
            "skull": (0.08, 0.03),
            "diploe": (0.4, 0.15),
            "csf": (0.17, 0.05),
            "grey matter": (0.5, 0.05),
            "white matter": (0.78, 0.04),
            "brain stem": (0.72, 0.04),
            "thalamus": (0.62, 0.03),
            "caudate": (0.53, 0.03),
            "putamen": (0.56, 0.03),
            "pallidum": (0.68, 0.03),
            "hippocampus": (0.51, 0.03),
            "amygdala": (0.49, 0.03),
        },
        draw=_draw_brain,
        modality="mr",
        window=(0.0, 1.0),
    ),
    "chest_ct": Scene(
        labels=("background", "left lung", "right lung", "heart", "aorta", "airway", "lesion"),
        extent=(2.5, 2.5, 2.05),
        centre=(0.0, -0.05, 0.1),
        tissues={
            **_CT_TISSUES,
            "left blood": (150.0, 100.0),
            "right blood": (150.0, 100.0),
            "ground glass": (-480.0, 120.0),
            "consolidation": (10.0, 40.0),
        },
        draw=_draw_thorax,
        parts={
            "ascending aorta": "aorta",
            "descending aorta": "aorta",
            **{
                chamber + layer: "heart"
                for chamber in _HEART_PARTS
                for layer in ("", " wall", " fat")
            },
        },
        classes=2,
        view=1,
        window=(0.0, 0.75),
    ),
}
