"""Displacement fields in mm, compared with points mapped one by one, and with SimpleITK."""

from itertools import product

import numpy as np
import pytest
import SimpleITK
import torch
import torch.nn.functional as F

from gvsl_lightning.evaluation import fields
from gvsl_lightning.evaluation.fields import displacement_field, resample
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.heads import Matching

LPS = np.array([-1.0, -1.0, 1.0])


def random_affine(random: np.random.Generator) -> np.ndarray:
    """Oblique, in half the cases mirrored, axes in any order, anisotropic, shifted."""
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * random.uniform(0.5, 4.0, 3)
    affine[:3, 3] = random.uniform(-150, 150, 3)
    return affine


def random_matching(
    random: np.random.Generator, shape: tuple[int, int, int], size: float = 1.5
) -> Matching:
    def numbers(*dimensions: int) -> torch.Tensor:
        return torch.from_numpy(random.uniform(-1, 1, dimensions)).float()

    affine = geometry.affine_matrix(
        0.3 * numbers(1, 3), 1 + 0.2 * numbers(1, 3), 0.1 * numbers(1, 6), numbers(1, 3)
    )
    coarse = numbers(1, 3, 3, 3, 3) * size
    return Matching(affine, F.interpolate(coarse, shape, mode="trilinear", align_corners=True))


def interpolated(volume: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Value (C,) of (C, X, Y, Z) between voxels, as at the border beyond it."""
    point = np.clip(point, 0, np.array(volume.shape[1:]) - 1)
    low = np.minimum(np.floor(point), np.array(volume.shape[1:]) - 2).astype(int)
    rest = point - low
    total = np.zeros(len(volume))
    for corner in product((0, 1), repeat=3):
        weight = np.prod(np.where(corner, rest, 1 - rest))
        total += weight * volume[:, low[0] + corner[0], low[1] + corner[1], low[2] + corner[2]]
    return total


def way(matching: Matching, fixed, moving, point: np.ndarray) -> np.ndarray:
    """From a point in mm to its place in the moving volume, in mm RAS; displacement first."""
    matrix, displacement = (part[0].double().numpy() for part in matching)
    centre = (np.array(displacement.shape[1:]) - 1) / 2
    voxel = np.linalg.solve(fixed, [*point, 1])[:3]
    voxel += interpolated(displacement, voxel)
    target = matrix[:, :3] @ (voxel - centre) + centre + matrix[:, 3]
    return (moving @ [*target, 1])[:3] - point


@pytest.mark.parametrize("seed", range(2))
def test_field_leads_where_each_point_is_mapped_to(seed: int) -> None:
    random = np.random.default_rng(seed)
    matching = random_matching(random, (7, 9, 6))
    fixed, moving, affine = (random_affine(random) for _ in range(3))
    # a grid that reaches beyond the network's
    affine[:3, 3] += (fixed @ [3, 4, 2.5, 1] - affine @ [5, 5, 5, 1])[:3]
    field = displacement_field(matching, "displacement_first", fixed, moving, affine, (11, 10, 12))
    assert field.shape == (11, 10, 12, 3)
    assert field.dtype == np.float32
    beyond = 0
    for voxel in random.integers(0, field.shape[:3], (200, 3)):
        point = (affine @ [*voxel, 1])[:3]
        seen = np.linalg.solve(fixed, [*point, 1])[:3]
        beyond += bool((seen < 0).any() or (seen > [6, 8, 5]).any())
        expected = way(matching, fixed, moving, point)
        assert np.allclose(field[tuple(voxel)] * LPS, expected, atol=1e-3)
    assert 20 < beyond < 200


@pytest.mark.parametrize("order", ["displacement_first", "affine_first"])
def test_on_the_networks_own_grid_it_is_the_networks_warp(order: geometry.Order) -> None:
    random = np.random.default_rng(5)
    matching = random_matching(random, (8, 9, 10), size=0.8)
    volume = torch.from_numpy(random.uniform(size=(1, 2, 8, 9, 10))).float()
    affine = random_affine(random)
    field = displacement_field(matching, order, affine, affine, affine, (8, 9, 10))
    coordinates = geometry.compose(*matching, order=order)
    expected = geometry.sample(volume, coordinates)[0]
    limit = torch.tensor([7.0, 8.0, 9.0])[:, None, None, None]
    inside = ((coordinates[0] >= 0) & (coordinates[0] <= limit)).all(dim=0).numpy()
    assert 0.3 < inside.mean() < 1
    warped = resample(volume[0].numpy(), affine, field, affine)
    assert np.allclose(warped[:, inside], expected.numpy()[:, inside], atol=1e-4)


def itk_image(array: np.ndarray, affine: np.ndarray, vector: bool = False) -> SimpleITK.Image:
    axes = (2, 1, 0, 3) if vector else (2, 1, 0)
    image = SimpleITK.GetImageFromArray(array.transpose(axes), isVector=vector)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((LPS[:, None] * affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((LPS * affine[:3, 3]).tolist())
    return image


@pytest.mark.parametrize("seed", range(3))
def test_resampling_equals_simpleitk(seed: int) -> None:
    random = np.random.default_rng(seed)
    matching = random_matching(random, (9, 8, 7))
    fixed, moving = random_affine(random), random_affine(random)
    field = displacement_field(matching, "displacement_first", fixed, moving, fixed, (9, 8, 7))
    volume = random.uniform(-1000, 1000, (1, 8, 7, 9)).astype(np.float32)
    label = random.integers(0, 300, (1, 8, 7, 9)).astype(np.int32)
    transform = SimpleITK.DisplacementFieldTransform(
        itk_image(field.astype(np.float64), fixed, vector=True)
    )
    grid = itk_image(np.zeros((9, 8, 7), np.float32), fixed)
    for array, mode, interpolator in (
        (volume, "linear", SimpleITK.sitkLinear),
        (label, "nearest", SimpleITK.sitkNearestNeighbor),
    ):
        image = itk_image(array[0], moving)
        reference = SimpleITK.Resample(image, grid, transform, interpolator, -77.0)
        expected = SimpleITK.GetArrayFromImage(reference).transpose(2, 1, 0)
        found = resample(array, moving, field, fixed, mode, outside=-77.0)
        assert found.dtype == array.dtype
        assert 0.02 < (expected == -77).mean() < 0.9
        assert np.abs(found[0] - expected).max() <= (1e-2 if mode == "linear" else 0)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    matching = random_matching(random, (9, 8, 7))
    fixed, moving = random_affine(random), random_affine(random)
    arguments = (matching, "displacement_first", fixed, moving, fixed, (9, 8, 7))
    volume = random.uniform(size=(1, 8, 7, 9))
    whole = displacement_field(*arguments)
    warped = resample(volume, moving, whole, fixed)
    monkeypatch.setattr(fields, "_POINTS_AT_ONCE", 2 * 8 * 7)  # slabs of 2, 2, 2, 2 and 1
    assert np.array_equal(displacement_field(*arguments), whole)
    assert np.array_equal(resample(volume, moving, whole, fixed), warped)
