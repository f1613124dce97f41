"""Spatial transforms of volumes in ONE convention.

Array axis order (D, H, W) everywhere; coordinates and displacements are in voxels; a transform maps
a point of the *fixed* grid to the point of the *moving* volume that is sampled there. Everything is
computed in float32 (float64 input stays float64), also under autocast: half-precision coordinates
are off by half a voxel at the size of a CT.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gvsl_lightning.nn.deterministic import sample_linear

Mode = Literal["linear", "nearest"]
PaddingMode = Literal["zeros", "border"]
Order = Literal["displacement_first", "affine_first"]


def affine_matrix(rotation: Tensor, scale: Tensor, shear: Tensor, translation: Tensor) -> Tensor:
    """Compose affine matrices as ``shear @ scale @ Rz @ Ry @ Rx``, then the translation.

    Batched and differentiable in every argument (GVSL, He et al., CVPR 2023, section 3.2).

    Args:
        rotation: (N, 3) angles in radians about array axes 0, 1, 2.
        scale: (N, 3) factors along axes 0, 1, 2; 1 is the identity.
        shear: (N, 6) angles in radians; the matrix entry at (row, column) = (0,1), (0,2), (1,0),
            (1,2), (2,0), (2,1) is the tangent of each.
        translation: (N, 3) in voxels.

    Returns:
        (N, 3, 4) matrices ``[M | t]`` acting on voxel coordinates about the volume's centre ``c``:
        ``A(p) = M (p - c) + c + t``.
    """
    arguments = {"rotation": rotation, "scale": scale, "shear": shear, "translation": translation}
    for name, value in arguments.items():
        size = 6 if name == "shear" else 3
        if value.shape != (len(rotation), size):
            raise ValueError(f"{name} must have shape (N, {size}), got {tuple(value.shape)}")
    rotation, scale, shear, translation = map(_full, (rotation, scale, shear, translation))
    with _no_autocast(rotation):
        cos_x, cos_y, cos_z = torch.cos(rotation).unbind(1)
        sin_x, sin_y, sin_z = torch.sin(rotation).unbind(1)
        zero, one = torch.zeros_like(cos_x), torch.ones_like(cos_x)
        rotate_x = _matrix(one, zero, zero, zero, cos_x, -sin_x, zero, sin_x, cos_x)
        rotate_y = _matrix(cos_y, zero, sin_y, zero, one, zero, -sin_y, zero, cos_y)
        rotate_z = _matrix(cos_z, -sin_z, zero, sin_z, cos_z, zero, zero, zero, one)
        s01, s02, s10, s12, s20, s21 = torch.tan(shear).unbind(1)
        sheared = _matrix(one, s01, s02, s10, one, s12, s20, s21, one)
        rotated = _product(rotate_z, _product(rotate_y, rotate_x))
        linear = _product(sheared, scale.unsqueeze(2) * rotated)
        return torch.cat([linear, translation.unsqueeze(2)], dim=2)


def identity_affine(batch_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Identity matrices of shape (N, 3, 4), float32."""
    return torch.eye(3, 4, device=device).expand(batch_size, 3, 4)


def identity_grid(shape: tuple[int, int, int], device: torch.device | str = "cpu") -> Tensor:
    """Voxel coordinates (1, 3, D, H, W), float32: channel ``a`` is the index along axis ``a``.

    Grids are cached per shape and device: do not write into one.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes the current cuda:N
    d, h, w = (int(size) for size in shape)
    return _cached_grid(d, h, w, device)


def compose(
    affine: Tensor | None,
    displacement: Tensor | None,
    shape: tuple[int, int, int] | None = None,
    order: Order = "displacement_first",
) -> Tensor:
    """Compose an affine map and a displacement field into one coordinate map.

    Args:
        affine: (N, 3, 4) as from :func:`affine_matrix`, or None for the identity.
        displacement: (N, 3, D, H, W) in voxels, or None for zero.
        shape: (D, H, W) of the grid; needed only without a displacement.
        order: ``displacement_first`` is ``phi(p) = A(p + u(p))``: the displacement deforms the
            affinely aligned volume. ``affine_first`` is equation 12 of the paper,
            ``phi(p) = A(p) + u(A(p))``: the displacement is read at the affinely moved point.

    Returns:
        (N, 3, D, H, W) coordinates in voxels, for :func:`sample`.
    """
    if order not in ("displacement_first", "affine_first"):
        raise ValueError(f"order must be displacement_first or affine_first, got {order!r}")
    if displacement is not None:
        _require_displacement(displacement)
        displacement = _full(displacement)
        shape = (displacement.shape[2], displacement.shape[3], displacement.shape[4])
        device = displacement.device
    elif shape is None:
        raise ValueError("compose needs a displacement or the shape of the grid")
    else:
        device = torch.device("cpu") if affine is None else affine.device
    grid = identity_grid(shape, device)
    if affine is None:
        return grid if displacement is None else grid + displacement
    if displacement is None:
        return _apply_affine(affine, grid, shape)
    if order == "displacement_first":
        return _apply_affine(affine, grid + displacement, shape)
    moved = _apply_affine(affine, grid, shape)
    return moved + sample(displacement, moved, padding_mode="border")


def sample(
    volume: Tensor,
    coordinates: Tensor,
    mode: Mode = "linear",
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Read a volume at voxel coordinates.

    Args:
        volume: (N, C, D, H, W), any dtype.
        coordinates: (N or 1, 3, D', H', W') in voxels of ``volume``, as from :func:`compose`.
        mode: ``linear`` (trilinear), or ``nearest`` for labels.
        padding_mode: outside the volume, ``zeros`` or the nearest ``border`` voxel.

    Returns:
        (N, C, D', H', W'); float32 (float64 stays) if linear, the volume's own dtype if nearest.
    """
    if (
        volume.ndim != 5
        or coordinates.ndim != 5
        or coordinates.shape[1] != 3
        or coordinates.shape[0] not in (1, volume.shape[0])
    ):
        raise ValueError(
            "sample needs a volume (N, C, D, H, W) and coordinates (N or 1, 3, D, H, W), got "
            f"{tuple(volume.shape)} and {tuple(coordinates.shape)}"
        )
    if mode not in ("linear", "nearest") or padding_mode not in ("zeros", "border"):
        raise ValueError(
            f"mode must be linear or nearest and padding_mode zeros or border, got {mode!r} and "
            f"{padding_mode!r}"
        )
    coordinates = _full(coordinates).expand(volume.shape[0], -1, -1, -1, -1)
    values = _full(volume)
    if padding_mode == "zeros" and 1 in values.shape[2:]:
        # grid_sample reads an axis of one voxel at any coordinate, as if it went on without end
        d, h, w = (int(size == 1) for size in values.shape[2:])
        values = F.pad(values, (0, w, 0, h, 0, d))
    dtype = torch.promote_types(values.dtype, coordinates.dtype)
    values, coordinates = values.to(dtype), coordinates.to(dtype)
    with _no_autocast(volume):
        if mode == "nearest":
            return _grid_sample(values, coordinates, "nearest", padding_mode).to(volume.dtype)
        if torch.are_deterministic_algorithms_enabled():
            return sample_linear(values, coordinates, padding_mode)
        return _grid_sample(values, coordinates, "bilinear", padding_mode)


def warp(
    volume: Tensor,
    displacement: Tensor,
    mode: Mode = "linear",
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Deform a volume: ``warp(volume, u)(p) = volume(p + u(p))``.

    Args:
        volume: (N, C, D, H, W).
        displacement: (N, 3, D, H, W) in voxels, array axis order. Zero gives the volume back; +1
            on one axis everywhere moves the content by one voxel towards index 0.
        mode: see :func:`sample`.
        padding_mode: see :func:`sample`.
    """
    return sample(volume, compose(None, displacement), mode, padding_mode)


def integrate(velocity: Tensor, steps: int = 5) -> Tensor:
    """Displacement of a stationary velocity field after unit time, by scaling and squaring.

    Source: Arsigny et al., A Log-Euclidean Framework for Statistics on Diffeomorphisms,
    MICCAI 2006.

    Args:
        velocity: (N, 3, D, H, W) in voxels.
        steps: squarings; the field is first divided by ``2 ** steps``.

    Returns:
        (N, 3, D, H, W) in voxels. The negative velocity gives the inverse map.
    """
    displacement: Tensor = _full(velocity) / 2.0**steps
    for _ in range(steps):
        displacement = displacement + warp(displacement, displacement, padding_mode="border")
    return displacement


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the Jacobian of ``p + u(p)`` by forward differences.

    Forward differences see a fold between two neighbouring voxels; central ones skip it.

    Args:
        displacement: (N, 3, D, H, W) in voxels, at least two voxels along each axis.

    Returns:
        (N, D-1, H-1, W-1); 1 where nothing is deformed, zero or negative where space folds.
    """
    _require_displacement(displacement, edge=2)
    field = _full(displacement)
    corner = field[:, :, :-1, :-1, :-1]
    a = field[:, :, 1:, :-1, :-1] - corner
    b = field[:, :, :-1, 1:, :-1] - corner
    c = field[:, :, :-1, :-1, 1:] - corner
    return (
        (1 + a[:, 0]) * ((1 + b[:, 1]) * (1 + c[:, 2]) - c[:, 1] * b[:, 2])
        - b[:, 0] * (a[:, 1] * (1 + c[:, 2]) - c[:, 1] * a[:, 2])
        + c[:, 0] * (a[:, 1] * b[:, 2] - (1 + b[:, 1]) * a[:, 2])
    )


def folded_fraction(displacement: Tensor) -> Tensor:
    """Share (N,) of voxels where ``p + u(p)`` folds (Jacobian determinant <= 0).

    An affine map of positive determinant around it changes no sign, so this holds for the composed
    map too.
    """
    return (jacobian_determinant(displacement) <= 0).float().mean(dim=(1, 2, 3))


def _require_displacement(field: Tensor, edge: int = 1) -> None:
    if field.ndim != 5 or field.shape[1] != 3 or min(field.shape[2:]) < edge:
        raise ValueError(
            f"displacement must have shape (N, 3, D, H, W) of {edge} or more voxels on each axis, "
            f"got {tuple(field.shape)}"
        )


def _grid_sample(values: Tensor, coordinates: Tensor, mode: str, padding_mode: str) -> Tensor:
    # grid_sample wants (x, y, z) in [-1, 1]; with align_corners=True the ends are voxel centres
    # (centring before dividing halves the rounding error)
    half = [max(size - 1, 1) / 2 for size in values.shape[2:]]
    normalised = [(coordinates[:, axis] - half[axis]) / half[axis] for axis in (2, 1, 0)]
    grid = torch.stack(normalised, dim=-1)
    # on a CPU, grid_sample gives each sample of the batch to one thread: groups of channels become
    # samples, so that all threads have two (and fewer channels at once in the cache)
    samples, channels = values.shape[:2]
    groups = math.gcd(channels, 2 * torch.get_num_threads()) if values.is_cpu else 1
    read = F.grid_sample(
        values.reshape(samples * groups, channels // groups, *values.shape[2:]),
        grid.repeat_interleave(groups, dim=0),
        mode=mode,
        padding_mode=padding_mode,
        align_corners=True,
    )
    return read.reshape(samples, channels, *grid.shape[1:4])


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _matrix(*entries: Tensor) -> Tensor:
    return torch.stack(entries, dim=1).reshape(-1, 3, 3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # no matrix product in this file: where TF32 is allowed, it keeps three decimal digits
    return (a.unsqueeze(3) * b.unsqueeze(1)).sum(dim=2)


@lru_cache(maxsize=32)
def _cached_grid(d: int, h: int, w: int, device: torch.device) -> Tensor:
    # a tensor made in inference mode (validation) could not be used in training afterwards
    with torch.inference_mode(False), torch.no_grad():
        axes = [torch.arange(size, dtype=torch.float32, device=device) for size in (d, h, w)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)


def _apply_affine(affine: Tensor, points: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if affine.ndim != 3 or affine.shape[1:] != (3, 4):
        raise ValueError(f"affine must have shape (N, 3, 4), got {tuple(affine.shape)}")
    affine = _full(affine)
    centre = affine.new_tensor([(size - 1) / 2 for size in shape])
    with _no_autocast(affine):
        linear, translation = affine[:, :, :3], affine[:, :, 3]
        offset = translation + centre - (linear * centre).sum(dim=2)
        moved = offset[:, :, None, None, None]
        for axis in range(3):
            moved = moved + linear[:, :, axis, None, None, None] * points[:, None, axis]
    return moved
