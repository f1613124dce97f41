"""The volume of one subject while structures are painted into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gvsl_lightning.phantom.shapes import Array, Ellipsoid, Point, Shape, Vector

Region = slice | npt.NDArray[np.intp]
Scalar = TypeVar("Scalar", bound=np.generic)


class Canvas:
    """Volume of one subject, painted structure by structure; later ones cover earlier ones.

    Voxels are kept block by block, (blocks, voxels of a block): a structure only meets the blocks
    whose body coordinates it reaches.

    Args:
        points: Body coordinates (3, D, H, W).
        extent: Half the field of view per axis in body units.
        tissues: The subject's intensity of each tissue.
        values: Label value of each structure.

    Attributes:
        points: Body coordinates (3, blocks, voxels).
        pitch: Largest edge of a voxel in body units.
    """

    def __init__(
        self,
        points: Array,
        extent: Point,
        tissues: Mapping[str, float],
        values: Mapping[str, int],
    ) -> None:
        self.tissues = tissues
        self.pitch = max(
            2 * half / size for half, size in zip(extent, points.shape[1:], strict=True)
        )
        self._size = points.shape[1:]
        self._values = values
        self.points = _split(points)
        self._low, self._high = self.points.min(axis=2), self.points.max(axis=2)
        self._image = np.full(self.points.shape[1:], self.tissues["air"], dtype=np.float32)
        self._label = np.zeros(self.points.shape[1:], dtype=np.uint8)

    def volumes(self) -> tuple[Array, npt.NDArray[np.uint8]]:
        """Image and label (D, H, W)."""
        return _join(self._image, self._size), _join(self._label, self._size)

    def measure(
        self, shape: Shape, margin: float = 0.0, among: Region = slice(None)
    ) -> tuple[Region, Array]:
        """Signed distance to a shape on the blocks near it.

        Args:
            shape: The shape to measure.
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
        if isinstance(shape, Ellipsoid):
            return region, shape.distance(self.points.take(region, axis=1))
        row, piece = np.nonzero(self._near(region, low, high))
        block = region[row]
        distance = shape.distance_to(piece, self.points.take(block, axis=1))
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        if len(starts):
            distance = np.minimum.reduceat(distance, starts, axis=0)
        return block[starts], distance

    def distance(self, shape: Shape) -> Array:
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
        shape: Shape,
        within: Array | None = None,
    ) -> None:
        """Fill a shape; see ``fill``."""
        among = ALL if within is None else np.flatnonzero(within.max(axis=1))
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


ALL = slice(None)
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
