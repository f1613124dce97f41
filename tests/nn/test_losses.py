"""Each loss against a slow reference written from its paper, and under hostile intensities."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.losses import (
    SIMILARITIES,
    LocalNCCLoss,
    MINDLoss,
    MutualInformationLoss,
    NTXentLoss,
    PointContrastLoss,
    SimilarityLoss,
    SmoothnessLoss,
    SSIMLoss,
    box_sum,
    build_similarity,
    cosine_distance,
    voxel_cross_entropy,
)

NAMES = list(SIMILARITIES)
SHAPE = (2, 2, 12, 14, 13)
Volumes = np.ndarray


def textured(*shape: int, seed: int = 0) -> Tensor:
    """Smooth structures with a little noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(*shape, generator=generator)
    smooth = noise
    for _ in range(2):
        smooth = F.avg_pool3d(smooth, 3, stride=1, padding=1, count_include_pad=False)
    smooth = smooth + 0.05 * noise
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def per_volume(
    reference: Callable[[Volumes, Volumes], float], first: Tensor, second: Tensor
) -> float:
    """Mean of a reference over samples and channels."""
    a = first.double().flatten(0, 1).numpy()
    b = second.double().flatten(0, 1).numpy()
    return float(np.mean([reference(x, y) for x, y in zip(a, b, strict=True)]))


def windows(volume: Volumes, edge: int) -> list[Volumes]:
    positions = [range(max(1, size - edge + 1)) for size in volume.shape]
    return [
        volume[i : i + edge, j : j + edge, k : k + edge]
        for i, j, k in itertools.product(*positions)
    ]


def ncc_reference(edge: int, eps: float = 1e-5) -> Callable[[Volumes, Volumes], float]:
    def loss(prediction: Volumes, target: Volumes) -> float:
        squared = []
        for a, b in zip(windows(prediction, edge), windows(target, edge), strict=True):
            covariance = np.mean((a - a.mean()) * (b - b.mean()))
            floors = eps * prediction.var(), eps * target.var()
            squared.append(covariance**2 / ((a.var() + floors[0]) * (b.var() + floors[1])))
        return 1 - float(np.mean(squared))

    return loss


def released_ncc(prediction: Tensor, target: Tensor, window: int = 9) -> Tensor:
    """The released code's way: dense convolution with ones over zero-padded volumes."""
    ones = torch.ones(1, 1, window, window, window, dtype=prediction.dtype)

    def total(volume: Tensor) -> Tensor:
        return F.conv3d(volume, ones, padding=window // 2)

    voxels = window**3
    i_sum, j_sum = total(prediction), total(target)
    i_mean, j_mean = i_sum / voxels, j_sum / voxels
    cross = total(prediction * target) - j_mean * i_sum - i_mean * j_sum + i_mean * j_mean * voxels
    i_var = total(prediction**2) - 2 * i_mean * i_sum + i_mean**2 * voxels
    j_var = total(target**2) - 2 * j_mean * j_sum + j_mean**2 * voxels
    return 1 - (cross * cross / (i_var * j_var + 1e-5)).mean()


def mind_descriptor(radius: int, dilation: int) -> Callable[[Volumes], Volumes]:
    def descriptor(volume: Volumes) -> Volumes:
        def shifted(offset: Volumes) -> Volumes:
            last = np.array(volume.shape).reshape(3, 1, 1, 1) - 1
            i, j, k = np.clip(np.indices(volume.shape) + offset.reshape(3, 1, 1, 1), 0, last)
            values: Volumes = volume[i, j, k]
            return values

        axes = dilation * np.eye(3, dtype=int)
        neighbours = [sign * axis for axis in axes for sign in (-1, 1)]
        # Neighbours on different axes are sqrt(2) dilations apart, opposite ones 2 dilations.
        pairs = [
            (p, q)
            for p, q in itertools.combinations(neighbours, 2)
            if np.sum((p - q) ** 2) == 2 * dilation**2
        ]
        patch = np.array(list(itertools.product(range(-radius, radius + 1), repeat=3)))
        distances = np.zeros((12, *volume.shape))
        for row, (p, q) in enumerate(pairs):
            for step in patch:
                distances[row] += (shifted(p + step) - shifted(q + step)) ** 2 / len(patch)
        variance = distances.mean(0)
        variance = np.maximum(variance, 1e-3 * variance.mean())
        context: Volumes = np.exp(-(distances - distances.min(0)) / variance)
        return context

    return descriptor


def mind_reference(radius: int, dilation: int) -> Callable[[Volumes, Volumes], float]:
    descriptor = mind_descriptor(radius, dilation)
    return lambda prediction, target: float(
        np.mean((descriptor(prediction) - descriptor(target)) ** 2)
    )


def unit_range(volume: Volumes) -> Volumes:
    rescaled: Volumes = (volume - volume.min()) / (volume.max() - volume.min())
    return rescaled


def mi_reference(bins: int, sigma_ratio: float) -> Callable[[Volumes, Volumes], float]:
    def memberships(volume: Volumes) -> Volumes:
        positions = unit_range(volume).reshape(-1, 1) * (bins - 1)
        weights = np.exp(-(((positions - np.arange(bins)) / sigma_ratio) ** 2) / 2)
        shares: Volumes = weights / weights.sum(1, keepdims=True)
        return shares

    def loss(prediction: Volumes, target: Volumes) -> float:
        joint = memberships(prediction).T @ memberships(target) / prediction.size
        information = 0.0
        for i, j in itertools.product(range(bins), repeat=2):
            independent = joint[i].sum() * joint[:, j].sum()
            if joint[i, j] > 0:
                information += joint[i, j] * math.log(joint[i, j] / independent)
        return -information

    return loss


def ssim_reference(edge: int, sigma: float) -> Callable[[Volumes, Volumes], float]:
    centred = np.arange(edge) - (edge - 1) / 2
    line = np.exp(-((centred / sigma) ** 2) / 2)
    weights = np.einsum("i,j,k->ijk", line, line, line)
    weights /= weights.sum()

    def loss(prediction: Volumes, target: Volumes) -> float:
        prediction, target = unit_range(prediction), unit_range(target)
        values = []
        for a, b in zip(windows(prediction, edge), windows(target, edge), strict=True):
            mean_a, mean_b = np.sum(weights * a), np.sum(weights * b)
            var_a = np.sum(weights * (a - mean_a) ** 2)
            var_b = np.sum(weights * (b - mean_b) ** 2)
            covariance = np.sum(weights * (a - mean_a) * (b - mean_b))
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4))
        return 1 - float(np.mean(values))

    return loss


REFERENCES = {
    "ncc": (partial(LocalNCCLoss, window=5), ncc_reference(5)),
    "mind": (partial(MINDLoss, radius=1, dilation=2), mind_reference(1, 2)),
    "mi": (partial(MutualInformationLoss, bins=11, sigma_ratio=0.7), mi_reference(11, 0.7)),
    "ssim": (partial(SSIMLoss, window=5, sigma=1.2), ssim_reference(5, 1.2)),
}


@pytest.mark.parametrize("name", NAMES)
def test_equals_slow_reference(name: str) -> None:
    build, reference = REFERENCES[name]
    prediction, target = textured(2, 2, 6, 8, 7), textured(2, 2, 6, 8, 7, seed=1)
    # Unlike intensities per sample and channel: statistics that leak between them would show.
    prediction = prediction * torch.tensor([[1.0, 4.0], [0.3, 50.0]])[..., None, None, None]
    value = build()(prediction, target)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(per_volume(reference, prediction, target), abs=1e-5)


@pytest.mark.parametrize(
    ("build", "reference"),
    [
        (LocalNCCLoss, ncc_reference(9)),
        (partial(LocalNCCLoss, 3, eps=0.2), ncc_reference(3, 0.2)),
        (MINDLoss, mind_reference(2, 2)),
        (partial(MINDLoss, 0, 1), mind_reference(0, 1)),
        (MutualInformationLoss, mi_reference(23, 0.5)),
        (partial(MutualInformationLoss, 2, 1.5), mi_reference(2, 1.5)),
        (SSIMLoss, ssim_reference(11, 1.5)),
        (partial(SSIMLoss, 3, 0.5), ssim_reference(3, 0.5)),
    ],
)
def test_defaults_and_extreme_options_equal_slow_reference(
    build: Callable[[], SimilarityLoss], reference: Callable[[Volumes, Volumes], float]
) -> None:
    pair = textured(1, 1, 11, 12, 11), textured(1, 1, 11, 12, 11, seed=1)
    assert build()(*pair).item() == pytest.approx(per_volume(reference, *pair), abs=2e-5)


@pytest.mark.parametrize("name", ["ncc", "mind", "mi"])  # MONAI's SSIM computes in float32
def test_either_float64_makes_float64(name: str) -> None:
    loss = SIMILARITIES[name]()
    first, second = textured(1, 1, 6, 7, 5), textured(1, 1, 6, 7, 5, seed=1)
    exact = loss(first.double(), second.double())
    assert loss(first, second.double()) == loss(first.double(), second) == exact
    assert exact.dtype == torch.float64
    assert loss(first, second) != exact


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_exact(name: str) -> None:
    """Small steps on the loss in float64; MONAI's SSIM computes in float32 and gets wider ones."""
    loss = REFERENCES[name][0]()
    prediction = textured(1, 1, 6, 7, 5).double().requires_grad_()
    target = textured(1, 1, 6, 7, 5, seed=1).double().requires_grad_()
    steps = {"eps": 1e-2, "atol": 1e-4, "rtol": 1e-2} if name == "ssim" else {}
    assert torch.autograd.gradcheck(loss, (prediction, target), fast_mode=name != "ncc", **steps)


@pytest.mark.parametrize("name", NAMES)
def test_identical_volumes_give_the_minimum(name: str) -> None:
    target = textured(*SHAPE)
    others = [textured(*SHAPE, seed=1), target.roll(1, 2), target.flip(3), target.sqrt()]
    loss = SIMILARITIES[name]()
    best = loss(target, target).item()
    assert all(loss(other, target).item() > best for other in others)
    if name != "mi":
        assert best == pytest.approx(0, abs=1e-3)


def two_bright_ends(volumes: Tensor) -> Tensor:
    """The contrast of another modality, not even monotone: bright, dark and bright again."""
    return torch.cos(2 * math.pi * volumes)


@pytest.mark.parametrize(
    ("name", "contrast"),
    [*((name, torch.clone) for name in NAMES), ("mind", two_bright_ends), ("mi", two_bright_ends)],
)
def test_better_registered_is_lower(name: str, contrast: Callable[[Tensor], Tensor]) -> None:
    volume = textured(1, 1, 24, 24, 24)
    other, fixed, loss = contrast(volume), volume[:, :, :18], SIMILARITIES[name]()
    aligned, near, far = (loss(other[:, :, shift : shift + 18], fixed) for shift in (0, 2, 4))
    assert aligned < near < far


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    prediction, target = textured(*SHAPE).to(dtype), textured(*SHAPE, seed=1).to(dtype)
    loss = SIMILARITIES[name]()
    expected = loss(prediction.float(), target.float())
    assert torch.equal(loss(prediction, target), expected)
    assert torch.equal(loss(prediction, target.float()), expected)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    target = textured(*SHAPE, seed=1)
    loss = SIMILARITIES[name]()

    def value_and_gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        prediction = textured(*SHAPE).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(prediction, target)
        assert value.dtype == torch.float32
        return value, torch.autograd.grad(value, prediction)[0]

    for got, expected in zip(value_and_gradient(True), value_and_gradient(False), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "slope"),
    [(lambda x: x + 100, 1), (lambda x: x * 0.001, 0.001), (lambda x: x * 3000 - 1000, 3000)],
    ids=["offset", "scale", "hounsfield"],
)
def test_offset_and_scale_change_nothing(
    name: str, change: Callable[[Tensor], Tensor], slope: float
) -> None:
    prediction, target = textured(*SHAPE).requires_grad_(), textured(*SHAPE, seed=1)
    loss = SIMILARITIES[name]()
    expected = loss(prediction, target)
    expected_gradient = torch.autograd.grad(expected, prediction)[0] / slope
    changed = change(prediction.detach()).requires_grad_()
    for other in (target, change(target)):
        value = loss(changed, other)
        (gradient,) = torch.autograd.grad(value, changed)
        assert value.item() == pytest.approx(expected.item(), abs=1e-3)
        assert (gradient - expected_gradient).norm() < 1e-2 * expected_gradient.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1, -3e4])
def test_constant_volume_gives_no_gradient(name: str, constant: float) -> None:
    loss = SIMILARITIES[name]()
    flat = torch.full(SHAPE, constant, requires_grad=True)
    unrelated = {"ncc": 1.0, "mi": 0.0}
    for target in (textured(*SHAPE), torch.full(SHAPE, 2.0)):
        value = loss(flat, target)
        (gradient,) = torch.autograd.grad(value, flat)
        assert torch.isfinite(value)
        assert value.item() == pytest.approx(unrelated.get(name, value.item()), abs=1e-4)
        assert torch.isfinite(gradient).all()
        if name != "ssim":
            # SSIM alone has a slope at a flat window, through its local means.
            assert gradient.abs().max() == 0
    moving = textured(*SHAPE, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(moving, flat.detach()), moving)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    loss = SIMILARITIES[name]()
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 4\).*\(1, 1, 4, 4, 5\)"):
        loss(torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 5))
    with pytest.raises(ValueError, match=r"\(4, 4, 4\)"):
        loss(torch.rand(4, 4, 4), torch.rand(4, 4, 4))


class TestBoxSum:
    def test_a_box_has_three_edges(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            box_sum(torch.rand(1, 1, 4, 4, 4), (2, 2))

    @pytest.mark.parametrize("window", [(1, 1, 1), (2, 3, 4), (4, 1, 5)])
    def test_gradients(self, window: tuple[int, int, int]) -> None:
        volumes = torch.rand(1, 2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: box_sum(x, window), volumes)
        assert torch.autograd.gradgradcheck(lambda x: box_sum(x, window) ** 2, volumes)

    @given(
        shape=st.tuples(*[st.integers(1, 9)] * 3),
        window=st.tuples(*[st.integers(1, 9)] * 3),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_is_the_sum_of_every_box(
        self, shape: tuple[int, ...], window: tuple[int, ...], seed: int
    ) -> None:
        window = tuple(min(pair) for pair in zip(shape, window, strict=True))
        volume = np.random.default_rng(seed).normal(size=shape)
        boxes = np.lib.stride_tricks.sliding_window_view(volume, window)
        got = box_sum(torch.from_numpy(volume)[None, None], window)[0, 0]
        np.testing.assert_allclose(got.numpy(), boxes.sum(axis=(3, 4, 5)), atol=1e-12)


@st.composite
def pairs_of_volumes(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two volumes (1, 1, D, H, W) of float64, partly alike."""
    shape = draw(st.tuples(*[st.integers(1, 7)] * 3).filter(lambda shape: math.prod(shape) > 1))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first, noise = random.normal(size=(2, 1, 1, *shape))
    share = draw(st.floats(-1, 1))
    return torch.from_numpy(first), torch.from_numpy(share * first + (1 - abs(share)) * noise)


WINDOWS = st.sampled_from([3, 5, 7, 9])


class TestLocalNCC:
    @given(pair=pairs_of_volumes(), window=WINDOWS)
    def test_equals_a_slow_loop(self, pair: tuple[Tensor, Tensor], window: int) -> None:
        value = LocalNCCLoss(window)(*pair).item()
        assert value == pytest.approx(per_volume(ncc_reference(window), *pair), abs=1e-9)

    @given(pair=pairs_of_volumes(), window=WINDOWS)
    def test_is_symmetric_and_between_none_and_one(
        self, pair: tuple[Tensor, Tensor], window: int
    ) -> None:
        loss = LocalNCCLoss(window)
        value = loss(*pair).item()
        assert 0 <= value <= 1
        assert loss(*reversed(pair)).item() == pytest.approx(value, abs=1e-12)
        assert loss(pair[0], pair[0]).item() <= value + 1e-12

    @given(
        pair=pairs_of_volumes(),
        window=WINDOWS,
        gain=st.floats(1e-3, 1e3),
        sign=st.sampled_from([-1, 1]),
        offset=st.floats(-1e3, 1e3),
    )
    def test_gain_and_offset_change_nothing(
        self, pair: tuple[Tensor, Tensor], window: int, gain: float, sign: int, offset: float
    ) -> None:
        loss, (first, second) = LocalNCCLoss(window), pair
        changed = gain * (sign * first + offset)
        assert loss(changed, second).item() == pytest.approx(loss(*pair).item(), abs=1e-8)

    @pytest.mark.parametrize("shape", [(2, 1, 9, 9, 9), (1, 1, 5, 16, 7)])
    def test_zero_padding_equals_the_released_value(self, shape: tuple[int, ...]) -> None:
        prediction, target = textured(*shape), textured(*shape, seed=1)
        prediction[:, :, :4] = 0
        value = LocalNCCLoss(padding="zero")(prediction, target).item()
        exact = released_ncc(prediction.double(), target.double()).item()
        assert value == pytest.approx(exact, abs=1e-5)

    def test_zero_padding_of_faint_volumes_equals_the_released_value(self) -> None:
        """The constant in the denominator is as large as the product it is added to."""
        prediction, target = textured(1, 1, 9, 9, 9), textured(1, 1, 9, 9, 9, seed=1)
        for strength in (0.003, 0.006, 0.012):
            pair = (strength * prediction).double(), (strength * target).double()
            value = LocalNCCLoss(padding="zero")(*pair).item()
            assert value == pytest.approx(released_ncc(*pair).item(), abs=1e-9)
            assert value > LocalNCCLoss(padding="zero")(prediction, target).item() + 0.01

    def test_zero_padding_gradient_equals_the_released_one(self) -> None:
        prediction = textured(1, 1, 12, 11, 10).double().requires_grad_()
        target = textured(1, 1, 12, 11, 10, seed=1).double().requires_grad_()
        inputs = (prediction, target)
        ours = torch.autograd.grad(LocalNCCLoss(padding="zero")(*inputs), inputs)
        released = torch.autograd.grad(released_ncc(*inputs), inputs)
        torch.testing.assert_close(ours, released)

    def test_zero_padding_survives_offsets(self) -> None:
        """The released computation is off by more than 0.01 at an offset of 100."""
        offsets = torch.tensor([0.0, 300.0]).view(2, 1, 1, 1, 1)
        prediction, target = (textured(1, 1, 12, 12, 12, seed=seed) + offsets for seed in (0, 1))
        exact = released_ncc(prediction.double(), target.double()).item()
        value = LocalNCCLoss(padding="zero")(prediction, target).item()
        assert value == pytest.approx(exact, abs=2e-3)

    def test_known_values(self) -> None:
        target = torch.rand(1, 1, 32, 32, 32)
        assert LocalNCCLoss()(5 - 2 * target, target).item() == pytest.approx(0, abs=1e-4)
        # Equal parts of the target and of noise of the same variance: squared correlation 1/2.
        sum_of_both = target + torch.rand(1, 1, 32, 32, 32)
        assert LocalNCCLoss()(sum_of_both, target).item() == pytest.approx(0.5, abs=0.01)

    def test_window_is_clipped_to_a_smaller_volume(self) -> None:
        prediction, target = textured(1, 1, 4, 6, 5), textured(1, 1, 4, 6, 5, seed=1)
        expected = 1 - np.corrcoef(prediction.flatten(), target.flatten())[0, 1] ** 2
        assert LocalNCCLoss()(prediction, target).item() == pytest.approx(expected, abs=1e-4)

    def test_flat_background_counts_as_unrelated(self) -> None:
        volume = torch.zeros(1, 1, 20, 12, 12)
        volume[:, :, 10:] = textured(1, 1, 10, 12, 12)
        # Windows begin at 0..11; those at 0 and 1 hold only background.
        assert LocalNCCLoss()(volume, volume).item() == pytest.approx(2 / 12, abs=5e-3)

    def test_float32_keeps_precision_on_long_axes(self) -> None:
        ramp = torch.linspace(0, 20, 512)[:, None, None]
        prediction, target = (textured(1, 1, 512, 10, 10, seed=seed) + ramp for seed in (0, 1))
        exact_input = prediction.double().requires_grad_()
        exact = LocalNCCLoss()(exact_input, target.double())
        value = LocalNCCLoss()(prediction.requires_grad_(), target)
        assert value.item() == pytest.approx(exact.item(), abs=1e-5)
        (exact_gradient,) = torch.autograd.grad(exact, exact_input)
        (gradient,) = torch.autograd.grad(value, prediction)
        assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 1e-3


class TestMIND:
    def test_descriptor_is_in_the_order_of_the_neighbours(self) -> None:
        volume = textured(1, 1, 5, 6, 7)
        expected = mind_descriptor(1, 2)(volume[0, 0].double().numpy())
        got = MINDLoss(1, 2).descriptor(volume)[0]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)

    def test_faint_structure_is_measured_against_its_own_volume(self) -> None:
        """Below the floor of the variance, which differs between noise and a ramp."""
        volumes, descriptor = 0.01 * torch.rand(2, 1, 12, 5, 6), MINDLoss(1, 1).descriptor
        volumes[0, :, :6] += torch.rand(6, 5, 6)
        volumes[1, :, :6] += torch.linspace(0, 1, 6).view(6, 1, 1)
        together = descriptor(volumes)
        alone = torch.cat([descriptor(volume[None]) for volume in volumes])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    def test_inverted_contrast_is_identical(self) -> None:
        volume = textured(1, 1, 10, 10, 10)
        assert MINDLoss()(3 - 2 * volume, volume).item() == pytest.approx(0, abs=1e-6)


def test_mutual_information_of_identical_volumes_is_minus_the_entropy() -> None:
    # Two intensities, equally often, on bin centres, with narrow Parzen windows: one bit.
    volume = torch.tensor([0.0, 1.0]).repeat(32).reshape(1, 1, 4, 4, 4)
    loss = MutualInformationLoss(sigma_ratio=0.1)
    assert loss(volume, 1 - volume).item() == pytest.approx(-math.log(2), abs=1e-4)


def test_ssim_clips_its_window_to_a_smaller_volume() -> None:
    pair = textured(1, 1, 5, 5, 5), textured(1, 1, 5, 5, 5, seed=1)
    expected = per_volume(ssim_reference(5, 1.5), *pair)
    assert SSIMLoss(window=11)(*pair).item() == pytest.approx(expected, abs=1e-5)


class TestSmoothness:
    def test_equals_slow_loop(self) -> None:
        displacement = torch.randn(2, 3, 4, 5, 6)
        means = []
        for axis in (2, 3, 4):
            after = np.eye(5, dtype=int)[axis]
            steps = [
                (displacement[tuple(place + after)] - displacement[place]).item()
                for place in np.ndindex(2, 3, 4, 5, 6)
                if place[axis] + 1 < displacement.shape[axis]
            ]
            means.append(np.square(steps).mean())
        assert SmoothnessLoss()(displacement).item() == pytest.approx(np.mean(means), rel=1e-5)

    def test_known_values(self) -> None:
        parity = torch.tensor(np.indices((6, 6, 6)).sum(0))
        checkerboard = (0.5 * (-1.0) ** parity).expand(1, 3, 6, 6, 6)
        assert SmoothnessLoss()(checkerboard).item() == pytest.approx(4 * 0.5**2)
        translation = torch.tensor([3.0, -2.0, 7.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 5, 6, 7)
        assert SmoothnessLoss()(translation) == 0
        stretch = torch.zeros(1, 3, 5, 6, 7)
        stretch[:, 1] = 0.3 * torch.arange(6)[:, None]
        # One of nine partial derivatives is 0.3, whatever the size of the volume.
        assert SmoothnessLoss()(stretch).item() == pytest.approx(0.3**2 / 9)

    def test_half_precision_is_computed_in_float32(self) -> None:
        displacement = torch.randn(1, 3, 5, 6, 7).bfloat16()
        expected = SmoothnessLoss()(displacement.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(SmoothnessLoss()(displacement), expected)

    def test_gradient_is_exact(self) -> None:
        displacement = torch.randn(1, 3, 3, 4, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(SmoothnessLoss(), displacement)

    def test_axis_of_one_voxel_counts_as_smooth(self) -> None:
        displacement = torch.randn(1, 3, 1, 4, 5)
        expected = sum(displacement.diff(dim=axis).square().mean().item() for axis in (3, 4)) / 3
        assert SmoothnessLoss()(displacement).item() == pytest.approx(expected)

    @pytest.mark.parametrize("shape", [(1, 2, 4, 4, 4), (3, 4, 4, 4)])
    def test_wrong_shape_is_named(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            SmoothnessLoss()(torch.zeros(shape))


class TestPointContrast:
    def test_equals_slow_reference(self):
        torch.manual_seed(0)
        fixed, moving = torch.randn(2, 2, 5, 3).unbind()
        valid = torch.tensor([[True, True, False, True, True], [False, True, True, False, True]])
        terms = []
        for pair in range(2):
            points = [point for point in range(5) if valid[pair, point]]
            for ours, theirs in ((fixed, moving), (moving, fixed)):
                for point in points:
                    alike = [
                        float(F.cosine_similarity(ours[pair, point], theirs[pair, other], dim=0))
                        for other in points
                    ]
                    weights = [math.exp(value / 0.2) for value in alike]
                    terms.append(-math.log(weights[points.index(point)] / sum(weights)))
        loss = PointContrastLoss(temperature=0.2)(fixed, moving, valid)
        assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        by_default = PointContrastLoss()(fixed, moving, valid)
        assert by_default == PointContrastLoss(0.1)(fixed, moving, valid) != loss

    def test_equal_vectors_tell_nothing_apart(self):
        vectors, valid = torch.ones(1, 7, 4), torch.ones(1, 7, dtype=torch.bool)
        assert PointContrastLoss()(vectors, vectors, valid).item() == pytest.approx(math.log(7))
        basis = torch.eye(7)[None]
        assert PointContrastLoss(0.01)(basis, basis, valid).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_pair_without_valid_points_has_no_gradient(self, dtype):
        fixed = torch.randn(2, 6, 4, dtype=dtype, requires_grad=True)
        valid = torch.zeros(2, 6, dtype=torch.bool)
        loss = PointContrastLoss()(fixed, torch.randn(2, 6, 4), valid)
        assert (loss.item(), loss.dtype) == (0, torch.float32)
        loss.backward()
        assert not bool(fixed.grad.any())
        valid[1] = True
        PointContrastLoss()(fixed, torch.randn(2, 6, 4), valid).backward()
        assert not bool(fixed.grad[0].any())
        assert bool(fixed.grad[1].isfinite().all())
        assert bool(fixed.grad[1].any())


class TestBuildSimilarity:
    def test_unknown_name_and_option_are_named(self) -> None:
        with pytest.raises(InputError, match=r"^similarity .*'mse'.*ncc"):
            build_similarity("mse")
        with pytest.raises(InputError, match=r"^similarity_options\.size .*window"):
            build_similarity("ncc", size=9)

    def test_registered_class_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Own(LocalNCCLoss):
            pass

        monkeypatch.setitem(SIMILARITIES, "own", Own)
        loss = build_similarity("own", window=3, padding="zero")
        assert (type(loss), loss.window, loss.padding) == (Own, 3, "zero")

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ncc", {"window": 8}),
            ("ncc", {"window": 1}),
            ("ncc", {"padding": "same"}),
            ("ncc", {"eps": 0}),
            ("mind", {"radius": -1}),
            ("mind", {"dilation": 0}),
            ("mi", {"bins": 1}),
            ("mi", {"sigma_ratio": 0}),
            ("ssim", {"window": 4}),
            ("ssim", {"sigma": 0}),
        ],
    )
    def test_impossible_options_are_named(self, name: str, options: dict[str, object]) -> None:
        (option,) = options
        with pytest.raises(InputError, match=f"^{option} "):
            build_similarity(name, **options)


def nt_xent_reference(
    first: Tensor, second: Tensor, temperature: float, samples: Sequence[int]
) -> float:
    """Equation 1 of SimCLR, view by view; views of equal samples are no negatives."""
    views = [*first, *second]
    count = len(first)
    losses = []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        scores = {
            k: float(views[i] @ views[k] / views[i].norm() / views[k].norm()) / temperature
            for k in range(2 * count)
            if k == partner or samples[k % count] != samples[i % count]
        }
        losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[partner])
    return sum(losses) / len(losses)


class TestNTXent:
    @pytest.mark.parametrize("temperature", [0.1, 1.0])
    def test_equals_slow_reference(self, temperature: float) -> None:
        first, second = torch.randn(2, 5, 7)
        got = NTXentLoss(temperature)(first, second).item()
        expected = nt_xent_reference(first, second, temperature, range(5))
        assert got == pytest.approx(expected, rel=1e-5)

    def test_a_single_sample_has_no_negatives(self) -> None:
        first = torch.randn(1, 4, requires_grad=True)
        loss = NTXentLoss()(first, torch.randn(1, 4))
        loss.backward()
        assert loss.item() == 0
        assert bool(first.grad.isfinite().all())

    def test_a_sample_that_is_there_twice_is_no_negative_of_itself(self) -> None:
        first, second = torch.randn(2, 4, 7)
        samples = [5, 8, 5, 9]
        got = NTXentLoss(0.1)(first, second, torch.tensor(samples)).item()
        assert got == pytest.approx(nt_xent_reference(first, second, 0.1, samples), rel=1e-4)
        assert got < NTXentLoss(0.1)(first, second).item()

    def test_best_where_views_agree(self) -> None:
        apart = torch.eye(4)
        good, bad = NTXentLoss()(apart, apart), NTXentLoss()(apart, apart.roll(1, 0))
        assert float(good) < 1e-3 < 5 < float(bad)


@pytest.mark.parametrize("loss", [PointContrastLoss, NTXentLoss])
def test_temperature_must_be_positive(loss: type[PointContrastLoss | NTXentLoss]) -> None:
    with pytest.raises(InputError, match=r"^temperature "):
        loss(0)


def test_cosine_distance_trains_the_prediction_alone() -> None:
    prediction, target = (torch.randn(5, 6, requires_grad=True) for _ in range(2))
    loss = cosine_distance(prediction, target)
    lengths = prediction.norm(dim=1) * target.norm(dim=1)
    expected = 1 - ((prediction * target).sum(dim=1) / lengths).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert target.grad is None
    assert bool(prediction.grad.any())


@pytest.mark.usefixtures("_determinism")
def test_cross_entropy_is_the_same_deterministically() -> None:
    logits = torch.rand(2, 4, 3, 5, 2)
    label = torch.randint(4, (2, 1, 3, 5, 2))
    label[0, 0, 0] = 9
    expected = voxel_cross_entropy(logits, label, ignore_index=9)
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(voxel_cross_entropy(logits, label, ignore_index=9), expected)
