import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import geometry
from gvsl_lightning.transforms import RandomSpatialTransform
from gvsl_lightning.transforms.spatial import bspline_displacement


def _seeded_generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _only(**options: Any) -> RandomSpatialTransform:
    still = {"rotation": 0.0, "scale": (1.0, 1.0), "shear": 0.0, "translation": 0.0, "elastic": 0.0}
    return RandomSpatialTransform(**{**still, **options})


def _smooth(samples: int, channels: int, shape: tuple[int, int, int]) -> Tensor:
    coarse = torch.rand(samples, channels, 4, 4, 4)
    return torch.nn.functional.interpolate(coarse, shape, mode="trilinear", align_corners=True)


class TestForward:
    def test_generator_reproduces_and_decides_alone(self) -> None:
        transform, volumes = RandomSpatialTransform(), torch.rand(2, 1, 16, 20, 18)
        (first,) = transform(volumes, generator=_seeded_generator())
        torch.manual_seed(99)
        (again,) = transform(volumes, generator=_seeded_generator())
        (other,) = transform(volumes, generator=_seeded_generator(4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_samples_differ_and_input_is_untouched(self) -> None:
        volumes = torch.rand(1, 1, 16, 20, 18).repeat(3, 1, 1, 1, 1)
        original = volumes.clone()
        (moved,) = RandomSpatialTransform()(volumes)
        assert torch.equal(volumes, original)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert (moved[i] - moved[j]).abs().mean() > 0.05

    def test_all_volumes_take_the_same_map(self) -> None:
        fixed, moving = torch.rand(2, 1, 16, 20, 18), torch.rand(2, 3, 16, 20, 18)
        first, second, third = RandomSpatialTransform()(fixed, moving, fixed)
        assert torch.equal(first, third)
        assert second.shape == moving.shape
        alone = [
            RandomSpatialTransform()(volume, generator=_seeded_generator())[0]
            for volume in (fixed, moving)
        ]
        together = RandomSpatialTransform()(fixed, moving, generator=_seeded_generator())
        for expected, found in zip(alone, together, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    def test_transformed_coordinates_are_the_drawn_map(self) -> None:
        shape = (20, 24, 22)
        grid = geometry.identity_grid(shape).expand(2, -1, -1, -1, -1)
        transform = RandomSpatialTransform()
        (read,) = transform(grid, generator=_seeded_generator())
        affine, displacement = transform.draw(2, shape, generator=_seeded_generator())
        points = geometry.compose(affine, displacement)
        last = torch.tensor(shape).view(1, 3, 1, 1, 1) - 1
        inside = ((points >= 0) & (points <= last)).all(1, keepdim=True)
        assert inside.float().mean() > 0.4
        torch.testing.assert_close(
            torch.where(inside, read, 0.0), torch.where(inside, points, 0.0), atol=1e-4, rtol=0
        )
        beyond = ((points < -1) | (points > last + 1)).any(1, keepdim=True).expand_as(read)
        assert beyond.any()
        assert (read[beyond] == 0).all()

    def test_batch_equals_loop(self) -> None:
        shape = (16, 20, 18)
        volumes, transform = torch.rand(3, 2, *shape), RandomSpatialTransform()
        (batch,) = transform(volumes, generator=_seeded_generator())
        affine, displacement = transform.draw(3, shape, generator=_seeded_generator())
        for n in range(3):
            points = geometry.compose(affine[n : n + 1], displacement[n : n + 1])
            alone = geometry.sample(volumes[n : n + 1], points)
            torch.testing.assert_close(batch[n : n + 1], alone, atol=1e-5, rtol=0)

    def test_nearest_keeps_labels_their_type_and_their_place(self) -> None:
        label = (_smooth(2, 1, (24, 24, 24)) > 0.5).long() * 7
        image = label.float()
        moved, moved_label = RandomSpatialTransform()(image, label, modes=["linear", "nearest"])
        assert moved_label.dtype == torch.int64
        assert set(moved_label.unique().tolist()) == {0, 7}
        # the interpolated image is above one half just where the nearest voxel is foreground,
        # save for voxels at the structure's surface
        assert ((moved > 3.5) == (moved_label == 7)).float().mean() > 0.97
        first, second, third = RandomSpatialTransform()(
            label, image, label, modes=["nearest", "linear", "nearest"]
        )
        assert torch.equal(first, third)
        assert second.dtype == torch.float32

    def test_rate_zero_is_an_independent_copy(self) -> None:
        volumes = torch.rand(2, 1, 12, 12, 12)
        (same,) = RandomSpatialTransform(rate=0.0)(volumes)
        assert torch.equal(same, volumes)
        assert same.data_ptr() != volumes.data_ptr()

    def test_rate_is_the_share_of_moved_samples(self) -> None:
        volumes = torch.rand(1000, 1, 8, 8, 8)
        (moved,) = RandomSpatialTransform(rate=0.3)(volumes)
        difference = (moved - volumes).abs().flatten(1).amax(1)
        assert (difference > 1e-2).float().mean() == pytest.approx(0.3, abs=0.05)
        assert ((difference > 1e-2) | (difference < 1e-5)).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_float32_inside_autocast_and_for_half_volumes(self, dtype: torch.dtype) -> None:
        volumes, transform = torch.rand(2, 1, 24, 20, 28), RandomSpatialTransform()
        (expected,) = transform(volumes, generator=_seeded_generator())
        with torch.autocast("cpu", dtype):
            (found,) = transform(volumes, generator=_seeded_generator())
        assert torch.equal(found, expected)
        (half,) = transform(volumes.to(dtype), generator=_seeded_generator())
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), expected, atol=1e-2, rtol=0)

    def test_only_a_translation_shifts_the_content(self) -> None:
        volumes = _smooth(4, 1, (32, 32, 32))
        transform = _only(translation=0.25)
        affine, _ = transform.draw(4, (32, 32, 32), generator=_seeded_generator())
        (moved,) = transform(volumes, generator=_seeded_generator())
        assert affine[:, :, 3].abs().max() > 4
        for n in range(4):
            points = geometry.identity_grid((32, 32, 32)) + affine[n, :, 3].view(1, 3, 1, 1, 1)
            expected = geometry.sample(volumes[n : n + 1], points)
            torch.testing.assert_close(moved[n : n + 1], expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("shapes", "modes"),
        [
            ([], None),
            ([(1, 1, 8, 8, 8), (1, 1, 8, 8, 9)], None),
            ([(1, 1, 8, 8, 8), (2, 1, 8, 8, 8)], None),
            ([(1, 8, 8, 8)], None),
            ([(1, 1, 8, 8, 8)], ["linear", "nearest"]),
            ([(1, 1, 8, 8, 8)], ["cubic"]),
        ],
    )
    def test_volumes_that_do_not_fit(
        self, shapes: list[tuple[int, ...]], modes: list[geometry.Mode] | None
    ) -> None:
        with pytest.raises(InputError, match="RandomSpatialTransform"):
            RandomSpatialTransform()(*(torch.rand(shape) for shape in shapes), modes=modes)


class TestDraw:
    def test_affine_parameters_stay_in_and_fill_their_ranges(self) -> None:
        shape = (5, 10, 20)
        turned, _ = _only(rotation=0.3).draw(2000, shape)
        linear = turned[:, :, :3]
        torch.testing.assert_close(
            linear @ linear.mT, torch.eye(3).expand(2000, 3, 3), atol=1e-5, rtol=0
        )
        # Rz Ry Rx: the last row's first entry is -sin(y)
        angle = torch.asin(-linear[:, 2, 0])
        assert angle.abs().max() <= 0.3 + 1e-5
        assert angle.min() < -0.29
        assert angle.max() > 0.29

        scaled, _ = _only(scale=(0.8, 1.5)).draw(2000, shape)
        diagonal = torch.diagonal(scaled[:, :, :3], dim1=1, dim2=2)
        assert ((diagonal >= 0.8 - 1e-5) & (diagonal <= 1.5 + 1e-5)).all()
        torch.testing.assert_close(diagonal.mean(0), torch.full((3,), 1.15), atol=0.02, rtol=0)
        assert torch.corrcoef(diagonal.T).sub(torch.eye(3)).abs().max() < 0.1

        sheared, _ = _only(shear=0.2).draw(2000, shape)
        entries = (sheared[:, :, :3] - torch.eye(3)).flatten(1)[:, [1, 2, 3, 5, 6, 7]]
        assert entries.abs().amax(0).sub(math.tan(0.2)).abs().max() < 0.01

        shifted, _ = _only(translation=0.1).draw(2000, shape)
        largest = shifted[:, :, 3].abs().amax(0)
        torch.testing.assert_close(largest, torch.tensor([0.5, 1.0, 2.0]), atol=0, rtol=0.02)

    @pytest.mark.parametrize("cells", [2, 5, 9])
    def test_elastic_never_folds(self, cells: int) -> None:
        for shape in ((32, 48, 40), (64, 64, 64)):
            _, displacement = RandomSpatialTransform(elastic_cells=cells).draw(6, shape)
            assert geometry.jacobian_determinant(displacement).min() > 0.2

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_worst_controls_do_not_fold(self, sign: float) -> None:
        # neighbours at opposite limits compress most
        index = torch.arange(8)
        parity = (-1.0) ** (index.view(-1, 1, 1) + index.view(-1, 1) + index)
        spacing = 60 / 5
        for axes in ((0,), (1,), (2,), (0, 1, 2)):
            controls = torch.zeros(1, 3, 8, 8, 8)
            controls[:, list(axes)] = sign * parity * 0.4 * spacing
            displacement = bspline_displacement(controls, (60, 60, 60))
            assert geometry.jacobian_determinant(displacement).min() > 0

    def test_elastic_is_smooth_and_scales_with_the_volume(self) -> None:
        sizes = ((32, 32, 32), (64, 64, 64))
        transform = RandomSpatialTransform(elastic_cells=4)
        small, large = (transform.draw(4, s, generator=_seeded_generator())[1] for s in sizes)
        pooled = torch.nn.functional.avg_pool3d(large, 2)
        torch.testing.assert_close(pooled / 2, small, atol=0.05, rtol=0)
        assert small.abs().amax((1, 2, 3, 4)).min() > 0.05
        for axis in (2, 3, 4):
            assert large.diff(n=2, dim=axis).abs().max() < 0.1

    def test_every_sample_has_its_own_strength(self) -> None:
        _, displacement = RandomSpatialTransform().draw(12, (24, 24, 24))
        strength = displacement.std((1, 2, 3, 4))
        assert strength.max() > 3 * strength.min()

    @pytest.mark.parametrize(
        "options",
        [
            {"rate": 1.5},
            {"scale": (0.0, 1.0)},
            {"scale": (1.2, 0.8)},
            {"elastic": 0.5},
            {"elastic": -0.1},
            {"elastic_cells": 0},
        ],
    )
    def test_bad_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=next(iter(options))):
            RandomSpatialTransform(**options)


class TestBSpline:
    def test_matches_a_loop_over_the_definition(self) -> None:
        shape, controls = (7, 9, 5), torch.randn(2, 3, 5, 6, 4)
        dense = bspline_displacement(controls, shape)
        for voxel in ((0, 0, 0), (6, 8, 4), (3, 2, 1), (5, 7, 0)):
            expected = torch.zeros(2, 3)
            starts, weights = [], []
            for index, size, points in zip(voxel, shape, (5, 6, 4), strict=True):
                place = (index + 0.5) / size * (points - 3)
                cell = int(place)
                u = place - cell
                starts.append(cell)
                weights.append(
                    (
                        (1 - u) ** 3 / 6,
                        (3 * u**3 - 6 * u**2 + 4) / 6,
                        (-3 * u**3 + 3 * u**2 + 3 * u + 1) / 6,
                        u**3 / 6,
                    )
                )
            for i in range(4):
                for j in range(4):
                    for k in range(4):
                        weight = weights[0][i] * weights[1][j] * weights[2][k]
                        at = (starts[0] + i, starts[1] + j, starts[2] + k)
                        expected += weight * controls[:, :, at[0], at[1], at[2]]
            torch.testing.assert_close(
                dense[:, :, voxel[0], voxel[1], voxel[2]], expected, atol=1e-5, rtol=0
            )

    def test_reproduces_constants_and_lines(self) -> None:
        line = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 3, 8, 6, 7)
        dense = bspline_displacement(line, (20, 9, 11))
        expected = (torch.arange(20) + 0.5) * 5 / 20 + 1
        torch.testing.assert_close(
            dense, expected.view(1, 1, 20, 1, 1).expand_as(dense), atol=1e-5, rtol=0
        )
