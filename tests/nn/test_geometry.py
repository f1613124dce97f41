import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gvsl_lightning.nn.geometry import (
    affine_matrix,
    compose,
    folded_fraction,
    identity_affine,
    identity_grid,
    jacobian_determinant,
    sample,
    warp,
)

EDGES = st.integers(1, 9)
GRIDS = st.tuples(EDGES, EDGES, EDGES)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = [(8, 8, 8), (7, 12, 9), (1, 5, 6), (3, 4, 160)]
PLANES = {0: (1, 2), 1: (2, 0), 2: (0, 1)}


def affine(
    rotation: tuple[float, ...] = (0, 0, 0),
    scale: tuple[float, ...] = (1, 1, 1),
    shear: tuple[float, ...] = (0, 0, 0, 0, 0, 0),
    translation: tuple[float, ...] = (0, 0, 0),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return affine_matrix(
        *(torch.tensor([value], dtype=dtype) for value in (rotation, scale, shear, translation))
    )


def random_parameters(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        torch.empty(batch, 3, dtype=dtype).uniform_(-0.4, 0.4),
        torch.empty(batch, 3, dtype=dtype).uniform_(0.7, 1.3),
        torch.empty(batch, 6, dtype=dtype).uniform_(-0.2, 0.2),
        torch.empty(batch, 3, dtype=dtype).uniform_(-2, 2),
    )


def affine_of_one_sample(
    rotation: np.ndarray, scale: np.ndarray, shear: np.ndarray, translation: np.ndarray
) -> np.ndarray:
    """Entry by entry, without a word in common with the code under test."""
    matrix = np.eye(3)
    for axis in range(3):
        cos, sin = math.cos(rotation[axis]), math.sin(rotation[axis])
        turn = np.eye(3)
        after, last = (axis + 1) % 3, (axis + 2) % 3
        turn[after, after] = turn[last, last] = cos
        turn[after, last], turn[last, after] = -sin, sin
        matrix = turn @ matrix
    sheared = np.eye(3)
    for angle, place in zip(shear, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], strict=True):
        sheared[place] = math.tan(angle)
    return np.hstack([sheared @ np.diag(scale) @ matrix, translation.reshape(3, 1)])


def moved_points(matrix: np.ndarray, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A(p) of points (K, 3)."""
    centre = (np.array(shape) - 1) / 2
    return (points - centre) @ matrix[:, :3].T + centre + matrix[:, 3]


def grid_points(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)


def as_points(coordinates: Tensor) -> np.ndarray:
    """(1, 3, D, H, W) to (K, 3)."""
    return coordinates[0].flatten(1).T.double().numpy()


class TestAffineMatrix:
    def test_equals_a_slow_reference(self):
        parameters = random_parameters(5, torch.float64)
        got = affine_matrix(*parameters)
        assert got.shape == (5, 3, 4)
        for n in range(5):
            expected = affine_of_one_sample(*(value[n].numpy() for value in parameters))
            np.testing.assert_allclose(got[n].numpy(), expected, atol=1e-12)

    def test_order_is_shear_scale_z_y_x(self):
        quarter = math.pi / 2
        # x first: axis 1 goes to axis 2, which y then turns to axis 0
        turned = affine(rotation=(quarter, quarter, 0))[0, :, :3]
        torch.testing.assert_close(turned[:, 1], torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)
        # scaling after the rotation stretches array axis 0, whatever was turned there
        stretched = affine(rotation=(0, 0, quarter), scale=(3, 1, 1))[0, :, :3]
        torch.testing.assert_close(stretched[0], torch.tensor([0.0, -3, 0]), atol=1e-6, rtol=0)
        # shearing after the scaling is not scaled along its row
        sheared = affine(scale=(3, 5, 1), shear=(0.1, 0, 0, 0, 0, 0))[0, :, :3]
        torch.testing.assert_close(sheared[0], torch.tensor([3, 5 * math.tan(0.1), 0]))

    def test_neutral_parameters_are_the_identity(self):
        assert torch.equal(affine(), identity_affine(1))
        assert identity_affine(3).shape == (3, 3, 4)

    def test_gradient(self):
        parameters = [value.requires_grad_() for value in random_parameters(2, torch.float64)]
        assert torch.autograd.gradcheck(affine_matrix, parameters)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("rotation", (2, 4)),
            ("scale", (2, 1)),
            ("shear", (2, 3)),
            ("translation", (1, 3)),
            ("translation", (3,)),
        ],
    )
    def test_error_names_the_shape(self, name, shape):
        names = ("rotation", "scale", "shear", "translation")
        parameters = dict(zip(names, random_parameters(2), strict=True))
        with pytest.raises(ValueError, match=rf"^{name} .*{re.escape(str(shape))}"):
            affine_matrix(**{**parameters, name: torch.zeros(shape)})


class TestIdentity:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("mode", ["linear", "nearest"])
    @pytest.mark.parametrize("padding_mode", ["zeros", "border"])
    def test_zero_displacement(self, shape, mode, padding_mode):
        # the released code is off by up to half a voxel here
        volume = torch.rand(2, 3, *shape)
        warped = warp(volume, torch.zeros(2, 3, *shape), mode, padding_mode)
        torch.testing.assert_close(warped, volume, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("order", ["displacement_first", "affine_first"])
    def test_identity_matrix(self, shape, order):
        coordinates = compose(identity_affine(2), torch.zeros(2, 3, *shape), order=order)
        assert coordinates.shape == (2, 3, *shape)
        expected = identity_grid(shape).expand(2, -1, -1, -1, -1)
        torch.testing.assert_close(coordinates, expected, rtol=0, atol=1e-4)

    def test_grid_counts_voxels_in_array_order(self):
        grid = identity_grid((2, 3, 4))
        assert (grid.shape, grid.dtype) == ((1, 3, 2, 3, 4), torch.float32)
        assert grid[0, :, 1, 2, 3].tolist() == [1, 2, 3]
        assert grid[0, :, 1, 0, 2].tolist() == [1, 0, 2]

    def test_grid_is_cached(self):
        assert identity_grid((4, 3, 5)) is identity_grid((4, 3, 5), torch.device("cpu"))

    def test_grid_made_in_inference_mode_serves_training(self):
        shape = (3, 11, 5)  # of no other test: the grid must be new here
        with torch.inference_mode():
            warp(torch.rand(1, 1, *shape), torch.zeros(1, 3, *shape))
        matrix = identity_affine(1).clone().requires_grad_()
        compose(matrix, None, shape).sum().backward()
        assert matrix.grad is not None
        torch.testing.assert_close(matrix.grad[0, :, 3], torch.full((3,), 3 * 11 * 5.0))


class TestWarp:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_border_padding_repeats_the_last_voxel(self, axis):
        volume = torch.rand(1, 1, 5, 6, 7)
        displacement = torch.zeros(1, 3, 5, 6, 7)
        displacement[:, axis] = 100
        edge = volume.narrow(2 + axis, volume.shape[2 + axis] - 1, 1).expand_as(volume)
        bordered = warp(volume, displacement, padding_mode="border")
        torch.testing.assert_close(bordered, edge, rtol=0, atol=1e-5)
        assert torch.equal(warp(volume, displacement), torch.zeros_like(volume))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16])
    def test_nearest_keeps_type_and_values(self, dtype):
        labels = torch.tensor([0, 7, 205])[torch.randint(0, 3, (1, 1, 8, 9, 10))].to(dtype)
        warped = warp(labels, torch.randn(1, 3, 8, 9, 10), "nearest", "border")
        assert warped.dtype == dtype
        assert set(warped.unique().tolist()) == {0, 7, 205}
        assert not torch.equal(warped, labels)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
    def test_linear_is_float32(self, dtype):
        volume = torch.randint(0, 200, (1, 1, 4, 4, 4)).to(dtype)
        warped = warp(volume, torch.full((1, 3, 4, 4, 4), 0.3))
        expected = warp(volume.float(), torch.full((1, 3, 4, 4, 4), 0.3))
        assert warped.dtype == torch.float32
        assert torch.equal(warped, expected)

    def test_batch_equals_loop(self):
        volume, displacement = torch.rand(3, 2, 5, 6, 7), torch.randn(3, 3, 5, 6, 7)
        matrices = affine_matrix(*random_parameters(3))
        for order in ("displacement_first", "affine_first"):
            together = sample(volume, compose(matrices, displacement, order=order))
            parts = zip(volume.split(1), matrices.split(1), displacement.split(1), strict=True)
            alone = torch.cat([sample(v, compose(a, u, order=order)) for v, a, u in parts])
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)

    def test_one_map_serves_a_whole_batch(self):
        volume, coordinates = torch.rand(3, 1, 5, 6, 7), compose(None, torch.randn(1, 3, 5, 6, 7))
        expected = torch.cat([sample(one.unsqueeze(0), coordinates) for one in volume])
        assert torch.equal(sample(volume, coordinates), expected)

    def test_output_grid_may_differ_from_the_volumes(self):
        volume = torch.rand(1, 1, 8, 9, 10)
        corner = sample(volume, identity_grid((3, 4, 5)))
        torch.testing.assert_close(corner, volume[:, :, :3, :4, :5], rtol=0, atol=1e-5)


class TestAffineMap:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("edge", [5, 6])
    def test_quarter_turn_equals_rot90(self, axis, edge):
        shape = [edge, edge, edge]
        shape[axis] = 9
        volume = torch.rand(1, 2, *shape)
        rotation = [0.0, 0.0, 0.0]
        rotation[axis] = math.pi / 2
        turned = sample(volume, compose(affine(rotation=tuple(rotation)), None, tuple(shape)))
        # the content turns against the map of the coordinates
        expected = torch.rot90(volume, -1, [2 + plane for plane in PLANES[axis]])
        inner = (slice(None), slice(None), *[slice(1, -1)] * 3)
        torch.testing.assert_close(turned[inner], expected[inner], rtol=0, atol=1e-4)

    def test_equals_a_slow_reference_on_a_non_cubic_grid(self):
        shape = (5, 9, 7)
        parameters = random_parameters(1, torch.float64)
        got = as_points(compose(affine_matrix(*parameters), None, shape))
        matrix = affine_of_one_sample(*(value[0].numpy() for value in parameters))
        np.testing.assert_allclose(got, moved_points(matrix, grid_points(shape), shape), atol=1e-10)


class TestComposition:
    def test_displacement_first_is_the_affine_of_the_displaced_point(self):
        shape = (6, 8, 7)
        displacement = torch.randn(1, 3, *shape, dtype=torch.float64)
        parameters = random_parameters(1, torch.float64)
        matrix = affine_of_one_sample(*(value[0].numpy() for value in parameters))
        points = grid_points(shape) + as_points(displacement)
        got = as_points(compose(affine_matrix(*parameters), displacement))
        np.testing.assert_allclose(got, moved_points(matrix, points, shape), atol=1e-10)

    def test_affine_first_reads_the_displacement_at_the_moved_point(self):
        shape = (6, 8, 7)
        linear = 0.3 * np.random.default_rng(0).standard_normal((3, 3))
        # a linear field is interpolated exactly
        field = torch.from_numpy(grid_points(shape) @ linear.T).T.reshape(1, 3, *shape)
        parameters = random_parameters(1, torch.float64)
        matrix = affine_of_one_sample(*(value[0].numpy() for value in parameters))
        moved = moved_points(matrix, grid_points(shape), shape)
        inside = ((moved >= 0) & (moved <= np.array(shape) - 1)).all(axis=1)
        assert inside.sum() > 50
        got = as_points(compose(affine_matrix(*parameters), field, order="affine_first"))
        np.testing.assert_allclose(got[inside], (moved + moved @ linear.T)[inside], atol=1e-10)

    def test_is_sampled_once(self):
        shape = (8, 9, 10)
        volume = torch.rand(1, 1, *shape)
        half = torch.zeros(1, 3, *shape)
        half[:, 0] = 0.5
        half_matrix = affine(translation=(0.5, 0, 0))
        once = sample(volume, compose(half_matrix, half))
        torch.testing.assert_close(once[:, :, :-1], volume[:, :, 1:], rtol=0, atol=1e-5)
        twice = warp(sample(volume, compose(half_matrix, None, shape)), half)
        assert twice[:, :, 1:-2].std() < 0.8 * once[:, :, 1:-2].std()

    def test_without_affine_is_grid_plus_displacement(self):
        displacement = torch.randn(2, 3, 4, 5, 6)
        assert torch.equal(compose(None, displacement), identity_grid((4, 5, 6)) + displacement)
        assert torch.equal(compose(None, None, (4, 5, 6)), identity_grid((4, 5, 6)))

    @pytest.mark.parametrize("order", ["displacement_first", "affine_first"])
    def test_gradient(self, order):
        volume = torch.rand(2, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        displacement = (0.7 * torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)).requires_grad_()
        parameters = [value.requires_grad_() for value in random_parameters(2, torch.float64)]

        def read(volume: Tensor, displacement: Tensor, *parameters: Tensor) -> Tensor:
            return sample(volume, compose(affine_matrix(*parameters), displacement, order=order))

        assert torch.autograd.gradcheck(read, (volume, displacement, *parameters))


class TestAutocast:
    @pytest.mark.parametrize("order", ["displacement_first", "affine_first"])
    def test_half_precision_changes_nothing(self, order):
        shape = (4, 5, 120)  # bf16 cannot count beyond 256 nor halve beyond 128
        volume, displacement = torch.rand(2, 1, *shape), torch.randn(2, 3, *shape)
        parameters = random_parameters(2)

        def results() -> tuple[Tensor, ...]:
            coordinates = compose(affine_matrix(*parameters), displacement, order=order)
            return (
                coordinates,
                sample(volume, coordinates),
                warp(volume, displacement),
                jacobian_determinant(displacement),
                folded_fraction(displacement),
            )

        expected = results()
        with torch.autocast("cpu", torch.bfloat16):
            got = results()
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)


class TestPrecision:
    def test_half_precision_is_computed_in_float32(self):
        half = torch.bfloat16
        parameters, field = random_parameters(1, half), torch.randn(1, 3, 3, 4, 5, dtype=half)
        exact = [value.float() for value in parameters]
        assert torch.equal(affine_matrix(*parameters), affine_matrix(*exact))
        assert torch.equal(jacobian_determinant(field), jacobian_determinant(field.float()))
        assert torch.equal(compose(None, field), compose(None, field.float()))
        volume = torch.rand(1, 1, 3, 4, 5, dtype=half)
        places = identity_grid((3, 4, 5)).to(half) + 0.25
        assert torch.equal(sample(volume, places), sample(volume.float(), places.float()))

    @pytest.mark.usefixtures("_determinism")
    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_either_float64_makes_float64(self, position, deterministic):
        torch.use_deterministic_algorithms(deterministic)
        volume, places = torch.rand(1, 1, 3, 4, 5), identity_grid((3, 4, 5)) + 0.3
        displacement = torch.rand(1, 3, 3, 4, 5)
        pairs = [(sample, [volume, places]), (compose, [identity_affine(1), displacement])]
        for function, pair in pairs:
            exact = function(*(value.double() for value in pair))
            pair[position] = pair[position].double()
            torch.testing.assert_close(function(*pair), exact)


def test_coordinates_are_made_on_the_wanted_device():
    """The device `meta` computes nothing, but knows where the result would be."""
    displacement = torch.empty(2, 3, 3, 4, 5, device="meta")
    results = [
        identity_affine(2, "meta"),
        identity_grid((3, 4, 5), "meta"),
        compose(None, displacement),
        jacobian_determinant(displacement),
    ]
    assert {result.device.type for result in results} == {"meta"}
    assert identity_affine(2).device.type == "cpu"
    assert compose(None, None, (3, 4, 5)).device.type == "cpu"


@pytest.mark.usefixtures("_determinism")
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_volume_is_read_alike_deterministically(padding):
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(2, 3, 5, 7, 6, dtype=torch.float64, generator=generator).requires_grad_()
    # beyond every side of the volume, too
    places = torch.rand(2, 3, 4, 6, 5, dtype=torch.float64, generator=generator) * 11 - 2
    places.requires_grad_()
    weights = torch.rand(2, 3, 4, 6, 5, dtype=torch.float64, generator=generator)

    def read() -> tuple[Tensor, ...]:
        values = sample(volume, places, padding_mode=padding)
        return values, *torch.autograd.grad((values * weights).sum(), (volume, places))

    expected = read()
    torch.use_deterministic_algorithms(True)
    for found, value in zip(read(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    whole = identity_grid((5, 7, 6))
    assert torch.equal(sample(volume, whole, padding_mode=padding), volume)


@pytest.mark.usefixtures("_determinism")
def test_labels_are_read_alike_deterministically():
    labels, places = torch.randint(9, (1, 1, 4, 5, 6)), 6 * torch.rand(1, 3, 4, 5, 6)
    expected = sample(labels, places, mode="nearest")
    torch.use_deterministic_algorithms(True)
    assert torch.equal(sample(labels, places, mode="nearest"), expected)


class TestJacobian:
    def test_of_a_linear_field_is_known(self):
        linear = 0.5 * torch.randn(3, 3, dtype=torch.float64)
        field = (linear @ identity_grid((4, 6, 5)).double().flatten(2)).view(1, 3, 4, 6, 5)
        determinant = jacobian_determinant(field)
        assert determinant.shape == (1, 3, 5, 4)
        expected = torch.linalg.det(torch.eye(3, dtype=torch.float64) + linear)
        torch.testing.assert_close(determinant, expected.expand_as(determinant))

    def test_gradient(self):
        field = torch.randn(2, 3, 3, 4, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(jacobian_determinant, field)

    def test_nothing_folds_without_displacement(self):
        assert folded_fraction(torch.zeros(2, 3, 4, 4, 4)).tolist() == [0, 0]
        assert bool((jacobian_determinant(torch.full((1, 3, 4, 4, 4), 3.0)) == 1).all())

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_one_fold_is_counted_in_its_own_sample(self, axis):
        field = torch.zeros(2, 3, 5, 5, 5)
        index = [slice(None)] * 3
        index[axis] = slice(2, None)
        field[(1, axis, *index)] = -1.5  # the voxels from 2 on jump over those before them
        assert folded_fraction(field).tolist() == [0, 0.25]

    def test_collapsed_slices_fold(self):
        field = torch.zeros(1, 3, 4, 4, 4)
        field[:, 0] = -identity_grid((4, 4, 4))[:, 0]  # all slices in one place
        assert folded_fraction(field).item() == 1

    def test_checkerboard_folds(self):
        # central differences are zero everywhere on this field
        parity = identity_grid((9, 9, 9)).sum(1, keepdim=True) % 2 * 2 - 1
        field = torch.zeros(1, 3, 9, 9, 9)
        field[:, :1] = 0.6 * parity
        assert folded_fraction(field).item() == pytest.approx(0.5)
        assert folded_fraction(field * 0.8).item() == 0


def numbers(seed: int, *shape: int) -> Tensor:
    """In [-1, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, dtype=torch.float64, generator=generator) - 1


def random_affine(seed: int, rigid: bool = False) -> Tensor:
    """Any rotation and translation, and unless rigid a scale and a shear; float64."""
    rotation, scale, translation = numbers(seed, 3, 1, 3)
    shear = numbers(seed + 1, 1, 6)
    if rigid:
        scale, shear = torch.zeros_like(scale), torch.zeros_like(shear)
    return affine_matrix(math.pi * rotation, 1 + 0.5 * scale, 0.4 * shear, 20 * translation)


class TestProperties:
    @given(shape=GRIDS, seed=SEEDS)
    def test_rigid_motions_keep_distances(self, shape, seed):
        matrix = random_affine(seed, rigid=True)
        before = identity_grid(shape).double().flatten(2)[0].T
        after = compose(matrix, None, shape).flatten(2)[0].T
        # between neighbours in memory, and between points further apart
        for step in range(1, min(len(before), 40)):
            torch.testing.assert_close(
                (after.roll(step, 0) - after).norm(dim=1),
                (before.roll(step, 0) - before).norm(dim=1),
            )
        linear = matrix[0, :, :3]
        torch.testing.assert_close(linear @ linear.T, torch.eye(3, dtype=torch.float64))
        assert torch.linalg.det(linear) > 0

    @given(shape=GRIDS, seed=SEEDS)
    def test_the_centre_moves_by_the_translation(self, shape, seed):
        matrix = random_affine(seed)
        moved = compose(matrix, None, shape).mean(dim=(0, 2, 3, 4))
        centre = torch.tensor([(size - 1) / 2 for size in shape], dtype=torch.float64)
        torch.testing.assert_close(moved, centre + matrix[0, :, 3])

    @given(shape=st.tuples(*[st.integers(2, 6)] * 3), seed=SEEDS)
    def test_volume_grows_by_the_determinant(self, shape, seed):
        rotation, scale, translation = numbers(seed, 3, 1, 3)
        scale = 1 + 0.5 * scale
        unsheared = affine_matrix(3 * rotation, scale, torch.zeros(1, 6), translation)
        torch.testing.assert_close(torch.linalg.det(unsheared[0, :, :3]), scale.prod())
        matrix = random_affine(seed)
        determinant = jacobian_determinant(compose(matrix, None, shape) - identity_grid(shape))
        expected = torch.linalg.det(matrix[0, :, :3])
        torch.testing.assert_close(determinant, expected.expand_as(determinant))

    @given(shape=GRIDS, seed=SEEDS)
    def test_the_inverse_leads_back(self, shape, seed):
        matrix = random_affine(seed)
        linear = torch.linalg.inv(matrix[:, :, :3])
        inverse = torch.cat([linear, -linear @ matrix[:, :, 3:]], dim=2)
        there = compose(matrix, None, shape) - identity_grid(shape)
        back = compose(inverse, there)
        torch.testing.assert_close(back, identity_grid(shape).double(), atol=1e-6, rtol=0)

    @given(shape=GRIDS, seed=SEEDS)
    def test_the_orders_differ_by_the_linear_part_of_a_translation(self, shape, seed):
        matrix, step = random_affine(seed), 3 * numbers(seed + 2, 1, 3, 1, 1, 1)
        displacement = step.expand(1, 3, *shape)
        first = compose(matrix, displacement, order="displacement_first")
        last = compose(matrix, displacement, order="affine_first")
        moved = matrix[0, :, :3] @ step.flatten() - step.flatten()
        expected = moved.view(1, 3, 1, 1, 1).expand_as(first)
        torch.testing.assert_close(first - last, expected, atol=1e-6, rtol=1e-6)

    @given(shape=GRIDS, seed=SEEDS)
    def test_coordinates_are_read_as_themselves(self, shape, seed):
        """Trilinear interpolation is exact on a linear function, here the voxels' own places."""
        ends = torch.tensor(shape).view(1, 3, 1, 1, 1) - 1
        places = (ends / 2 + 2 * ends * numbers(seed, 1, 3, 3, 4, 5)).double()
        read = sample(identity_grid(shape), places, padding_mode="border")
        expected = torch.minimum(places.clamp_min(0), ends)
        torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)
        assume(bool((places - places.floor() - 0.5).abs().min() > 1e-6))
        nearest = sample(identity_grid(shape), places, mode="nearest", padding_mode="border")
        assert torch.equal(nearest.double(), expected.round())

    @given(shape=GRIDS, shift=st.tuples(*[st.integers(-9, 9)] * 3), nearest=st.booleans())
    def test_whole_voxels_move_the_content_and_leave_zeros(self, shape, shift, nearest):
        volume = numbers(0, 2, 1, *shape)
        displacement = torch.tensor(shift).view(1, 3, 1, 1, 1).expand(2, 3, *shape).double()
        expected = torch.zeros_like(volume)
        for voxel in np.ndindex(shape):
            source = np.add(voxel, shift)
            if (source >= 0).all() and (source < shape).all():
                expected[(..., *voxel)] = volume[(..., *source)]
        warped = warp(volume, displacement, mode="nearest" if nearest else "linear")
        torch.testing.assert_close(warped, expected, atol=1e-12, rtol=0)

    @given(
        shape=GRIDS,
        axes=st.permutations(range(3)),
        signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
        padding_mode=st.sampled_from(["zeros", "border"]),
        seed=SEEDS,
    )
    def test_no_axis_differs_from_another(self, shape, axes, signs, padding_mode, seed):
        flipped = [place + 2 for place in range(3) if signs[place] < 0]

        def turned(volume: Tensor) -> Tensor:
            return volume.permute(0, 1, *(axis + 2 for axis in axes)).flip(flipped)

        volume, displacement = numbers(seed, 1, 2, *shape), 3 * numbers(seed + 1, 1, 3, *shape)
        direction = torch.tensor(signs).view(1, 3, 1, 1, 1)
        turned_displacement = turned(displacement)[:, list(axes)] * direction
        torch.testing.assert_close(
            warp(turned(volume), turned_displacement, padding_mode=padding_mode),
            turned(warp(volume, displacement, padding_mode=padding_mode)),
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("volume", "coordinates"),
        [
            ((1, 4, 4, 4), (1, 3, 4, 4, 4)),
            ((1, 1, 4, 4, 4), (1, 4, 4, 4, 3)),
            ((2, 1, 4, 4, 4), (3, 3, 4, 4, 4)),
        ],
    )
    def test_shapes_of_sample(self, volume, coordinates):
        with pytest.raises(ValueError, match=re.escape(f"{volume} and {coordinates}")):
            sample(torch.zeros(volume), torch.zeros(coordinates))

    @pytest.mark.parametrize("options", [{"mode": "bilinear"}, {"padding_mode": "reflection"}])
    def test_options_of_sample(self, options):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            sample(torch.zeros(1, 1, 2, 2, 2), identity_grid((2, 2, 2)), **options)

    @pytest.mark.parametrize("shape", [(1, 1, 4, 4, 4), (3, 4, 4, 4)])
    def test_displacement_of_compose(self, shape):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            compose(None, torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(3, 4), (2, 4, 4), (2, 3, 3)])
    def test_affine_of_compose(self, shape):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            compose(torch.zeros(shape), None, (4, 4, 4))

    def test_compose_needs_a_grid_and_a_known_order(self):
        with pytest.raises(ValueError, match=r"^compose "):
            compose(identity_affine(1), None)
        with pytest.raises(ValueError, match="affine_last"):
            compose(identity_affine(1), torch.zeros(1, 3, 2, 2, 2), order="affine_last")

    @pytest.mark.parametrize(
        "shape", [(3, 4, 4, 4), (1, 2, 4, 4, 4), (1, 3, 1, 4, 4), (1, 3, 4, 1, 4), (1, 3, 4, 4, 1)]
    )
    def test_displacement_of_jacobian(self, shape):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            jacobian_determinant(torch.zeros(shape))
