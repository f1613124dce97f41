"""One random spatial transform, shared by all volumes of a sample."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.nn import geometry

# Choi and Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", Graphical
# Models 2000: control points moved by less than spacing / 2.48 cannot fold a 3D field.
LARGEST_ELASTIC = 0.4


class RandomSpatialTransform(nn.Module):
    """Random affine map and smooth elastic deformation, one draw per sample, sampled once.

    The numbers are those of the paper (He et al., CVPR 2023). The displacement is a uniform cubic
    B-spline over a coarse grid of control points that move independently; their largest movement
    is bounded such that space never folds.

    Args:
        rate: Probability in [0, 1] that a sample is transformed.
        rotation: Largest angle in radians about each axis, either way.
        scale: Smallest and largest factor, drawn per axis.
        shear: Largest shear angle in radians, drawn for each of the six off-diagonal entries.
        translation: Largest shift over the volume's edge, drawn per axis, either way.
        elastic: Largest movement of a control point along an axis over the distance between
            control points, in [0, 0.4]; every sample draws its own limit between 0 and this. 0.4
            moves voxels by up to 0.4 / `elastic_cells` of the edge. 0 switches the deformation off.
        elastic_cells: Distances between control points along each edge, at least 1: the higher,
            the more local and the smaller the deformation.
    """

    def __init__(
        self,
        rate: float = 1.0,
        rotation: float = math.pi / 9,
        scale: tuple[float, float] = (0.75, 1.25),
        shear: float = math.pi / 18,
        translation: float = 0.1,
        elastic: float = LARGEST_ELASTIC,
        elastic_cells: int = 5,
    ) -> None:
        super().__init__()
        check_range("rate", rate, 0, 1)
        if not 0 < scale[0] <= scale[1]:
            raise InputError.about("scale", f"is {tuple(scale)}; give 0 < smallest <= largest.")
        check_range("elastic", elastic, 0, LARGEST_ELASTIC)  # more could fold space
        check_range("elastic_cells", elastic_cells, 1)
        self.rate = rate
        self.rotation = rotation
        self.scale = (scale[0], scale[1])
        self.shear = shear
        self.translation = translation
        self.elastic = elastic
        self.elastic_cells = elastic_cells

    def forward(
        self,
        *volumes: Tensor,
        modes: Sequence[geometry.Mode] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """Apply the same random map to all volumes of a sample.

        Args:
            volumes: Each (N, C, D, H, W) with its own C and type, the same N, D, H, W and device.
            modes: Interpolation of each volume, `linear` or `nearest` (labels); None for all
                linear.
            generator: Source of the draws, on the device of the volumes; None for the global one.

        Returns:
            New tensors of the same shapes and types; 0 where a voxel comes from outside.
        """
        if modes is None:
            modes = ["linear"] * len(volumes)
        _check(volumes, modes)
        if self.rate == 0:
            return tuple(volume.clone() for volume in volumes)
        samples, _, d, h, w = volumes[0].shape
        maps = self.draw(samples, (d, h, w), volumes[0].device, generator)
        coordinates = geometry.compose(*maps)
        moved = list(volumes)
        for mode in dict.fromkeys(modes):
            indices = [index for index in range(len(volumes)) if modes[index] == mode]
            # one reading for all channels; labels up to 2**24 are exact in float32
            stacked = torch.cat([volumes[index].float() for index in indices], dim=1)
            channels = [volumes[index].shape[1] for index in indices]
            parts = torch.split(geometry.sample(stacked, coordinates, mode), channels, dim=1)
            for index, part in zip(indices, parts, strict=True):
                moved[index] = part.to(volumes[index].dtype)
        return tuple(moved)

    def draw(
        self,
        samples: int,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw one map per sample, the identity for those that are left alone.

        Returns:
            Affine matrices (N, 3, 4) and displacements (N, 3, D, H, W) in voxels, float32, as
            :func:`gvsl_lightning.nn.geometry.compose` takes them.
        """

        def uniform(*size: int) -> Tensor:
            drawn = torch.rand((samples, *size), device=device, generator=generator)
            return drawn * 2 - 1

        applied = (torch.rand((samples, 1), device=device, generator=generator) < self.rate).float()
        smallest, largest = self.scale
        scale = (smallest + largest) / 2 + uniform(3) * (largest - smallest) / 2
        edges = torch.tensor(shape, dtype=torch.float32).to(device, non_blocking=True)
        affine = geometry.affine_matrix(
            rotation=uniform(3) * (self.rotation * applied),
            scale=1 + (scale - 1) * applied,
            shear=uniform(6) * (self.shear * applied),
            translation=uniform(3) * edges * (self.translation * applied),
        )
        limit = (uniform(1) + 1) / 2 * self.elastic * applied
        spacing = edges / self.elastic_cells
        points = self.elastic_cells + 3
        controls = uniform(3, points, points, points)
        controls = controls * (limit * spacing).view(samples, 3, 1, 1, 1)
        return affine, bspline_displacement(controls, shape)


def bspline_displacement(controls: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Expand control points to a dense displacement by uniform cubic B-splines.

    Args:
        controls: (N, 3, I, J, K), at least four along each axis: the movement of the control
            points, of which the outer ones lie beyond the volume.
        shape: (D, H, W) of the result.

    Returns:
        (N, 3, D, H, W) float32, twice continuously differentiable, in the unit of `controls`.
    """
    field = controls.float()
    with torch.autocast(field.device.type, enabled=False):
        for axis, size in enumerate(shape):
            basis = torch.from_numpy(cubic_bspline_basis(size, field.shape[2 + axis]))
            weights = basis.T.to(field.device, non_blocking=True)
            field = torch.movedim(torch.movedim(field, 2 + axis, -1) @ weights, -1, 2 + axis)
    return field.contiguous()


@functools.lru_cache(maxsize=64)
def cubic_bspline_basis(length: int, points: int) -> np.ndarray:
    """Weights of the control points of a uniform cubic B-spline at the voxel centres of one axis.

    The voxels span `points - 3` distances between control points; control point 1 lies on the
    beginning of the axis. (length, points) float32, shared by all callers: do not change it.
    """
    position = (np.arange(length) + 0.5) / length * (points - 3)
    knot = np.floor(position).astype(int)
    t = position - knot
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((length, points), dtype=np.float32)
    for offset, weight in enumerate(weights):
        basis[np.arange(length), knot + offset] = weight / 6
    return basis


def _check(volumes: Sequence[Tensor], modes: Sequence[str]) -> None:
    grids = {(*volume.shape[:1], *volume.shape[2:]) for volume in volumes}
    if len(grids) != 1 or any(volume.ndim != 5 for volume in volumes):
        shapes = ", ".join(str(tuple(volume.shape)) for volume in volumes) or "none"
        raise InputError(
            f"RandomSpatialTransform got volumes of shapes {shapes}: give one or more of shape "
            "(N, C, D, H, W) that differ in C only."
        )
    if len(modes) != len(volumes) or not {"linear", "nearest"}.issuperset(modes):
        raise InputError(
            f"RandomSpatialTransform got modes {list(modes)} for {len(volumes)} volumes: give one "
            "for each, linear or nearest."
        )
