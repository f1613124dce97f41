import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.backbones import Features
from gvsl_lightning.nn.heads import (
    AffineHead,
    DeformableHead,
    ProjectionHead,
    RestorationHead,
    RunningStandardisation,
    ZMatchingHead,
)

SHAPE = (6, 8, 7)
# global and local channels of unet, basic_unet, dynunet, segresnet and swin_unetr by default
CHANNELS = [(512, 32), (256, 32), (320, 32), (128, 16), (384, 24)]
SMALL = (16, 8)


def random_features(
    channels: tuple[int, int] = SMALL, batch: int = 2, shape: tuple[int, ...] = SHAPE
) -> Features:
    global_channels, local_channels = channels
    return Features(
        torch.randn(batch, global_channels, 2, 2, 2), torch.randn(batch, local_channels, *shape)
    )


def small_head(**options: object) -> ZMatchingHead:
    return ZMatchingHead(*SMALL, affine_channels=16, deformable_channels=16, **options)


class Constant(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.values.expand(len(x), -1)


def set_last_layers(head: AffineHead, raw: float) -> None:
    """Make every number that the head predicts `raw` before its bounds, whatever it sees."""
    for name in ("rotation", "scale", "shear", "translation"):
        setattr(head, name, Constant(torch.full((getattr(head, name).out_features,), raw)))


def wake(head: nn.Module) -> nn.Module:
    """Weights as after some training: no longer the identity."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def without_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.any())
    ]


class TestZMatchingHead:
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_starts_at_the_identity(self, channels):
        head = ZMatchingHead(*channels)
        with torch.no_grad():
            affine, displacement = head(random_features(channels), random_features(channels))
        assert (affine.shape, displacement.shape) == ((2, 3, 4), (2, 3, *SHAPE))
        moved = geometry.compose(affine, displacement) - geometry.identity_grid(SHAPE)
        assert moved.abs().max() < 1e-3

    @pytest.mark.parametrize("channels", CHANNELS)
    def test_every_parameter_gets_a_gradient_at_the_start(self, channels):
        # in the released code no gradient reaches the affine head
        head = ZMatchingHead(*channels)
        affine, displacement = head(random_features(channels), random_features(channels))
        read = geometry.sample(torch.rand(2, 1, *SHAPE), geometry.compose(affine, displacement))
        (read * torch.randn_like(read)).sum().backward()
        assert without_gradient(head) == []

    def test_three_steps_of_adam_change_every_parameter(self):
        head = small_head()
        before = {name: value.clone() for name, value in head.state_dict().items()}
        moving, fixed = random_features(), random_features()
        volume = torch.rand(2, 1, *SHAPE)
        optimizer = torch.optim.Adam(head.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            read = geometry.sample(volume, geometry.compose(*head(moving, fixed)))
            (read - volume.flip(2)).square().mean().backward()
            optimizer.step()
        for name, value in head.state_dict().items():
            assert (value - before[name]).abs().max() > 1e-5, name
        affine = head(moving, fixed).affine
        assert (affine - geometry.identity_affine(2)).abs().min() > 1e-6

    def test_without_affine(self):
        head = wake(small_head(affine=False))
        moving, fixed = random_features(), random_features()
        affine, displacement = head(moving, fixed)
        assert torch.equal(affine, geometry.identity_affine(2))
        expected = head.deformable_head(moving.local_features, fixed.local_features)
        assert torch.equal(displacement, expected)
        assert displacement.abs().max() > 0.01
        assert not any(name.startswith("affine") for name, _ in head.named_parameters())

    def test_without_deformable(self):
        head = wake(small_head(deformable=False))
        moving, fixed = random_features(), random_features()
        affine, displacement = head(moving, fixed)
        assert torch.equal(displacement, torch.zeros(2, 3, *SHAPE))
        expected = head.affine_head(moving.global_features, fixed.global_features, SHAPE)
        assert torch.equal(affine, expected)
        assert (affine - geometry.identity_affine(2)).abs().max() > 0.01
        assert not any(name.startswith("deformable") for name, _ in head.named_parameters())

    def test_widths_are_the_papers_unless_given(self):
        default = ZMatchingHead(*SMALL)
        assert default.affine_head.rotation.in_features == 256
        assert default.deformable_head.displacement.in_channels == 16
        assert AffineHead(4).rotation.in_features == 256
        assert DeformableHead(4).displacement.in_channels == 16
        given = ZMatchingHead(*SMALL, affine_channels=24, deformable_channels=8)
        assert given.affine_head.rotation.in_features == 24
        assert given.deformable_head.displacement.in_channels == 8

    def test_without_both(self):
        with pytest.raises(InputError, match="Z-matching"):
            small_head(affine=False, deformable=False)

    def test_deformable_part_sees_aligned_features(self):
        head = wake(small_head())
        set_last_layers(head.affine_head, 0.0)
        with torch.no_grad():
            head.affine_head.translation.values[1] = math.atanh(1 / (0.25 * SHAPE[1]))
        moving, fixed = random_features(), random_features()
        affine, displacement = head(moving, fixed)
        assert affine[0, 1, 3].item() == pytest.approx(1)
        aligned = torch.zeros_like(moving.local_features)
        aligned[:, :, :, :-1] = moving.local_features[:, :, :, 1:]
        expected = head.deformable_head(aligned, fixed.local_features)
        torch.testing.assert_close(displacement, expected, rtol=0, atol=1e-4)
        unaligned = head.deformable_head(moving.local_features, fixed.local_features)
        assert (displacement - unaligned).abs().max() > 0.1

    def test_samples_do_not_see_each_other(self):
        head = wake(small_head())
        moving, fixed = random_features(batch=3), random_features(batch=3)
        together = head(moving, fixed)
        for n in range(3):
            one = slice(n, n + 1)
            alone = head(Features(*(v[one] for v in moving)), Features(*(v[one] for v in fixed)))
            for got, expected in zip(alone, together, strict=True):
                torch.testing.assert_close(got, expected[one], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_does_not_reach_it(self, dtype):
        head = wake(small_head())
        moving, fixed = random_features(), random_features()
        expected = head(moving, fixed)
        with torch.autocast("cpu", dtype):
            got = head(moving, fixed)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)

    def test_half_precision_features_are_read_in_float32(self):
        head = wake(small_head())
        moving, fixed = (Features(*(v.bfloat16() for v in random_features())) for _ in range(2))
        full = head(*(Features(*(v.float() for v in half)) for half in (moving, fixed)))
        with torch.autocast("cpu", torch.bfloat16):
            got = head(moving, fixed)
        for one, other in zip(got, full, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)


class TestAffineHead:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_limits_are_the_papers(self, sign):
        head = AffineHead(4, 16)
        set_last_layers(head, sign * 1e4)
        features = 1e6 * torch.randn(2, 4, 2, 2, 2)
        expected = geometry.affine_matrix(
            rotation=torch.full((2, 3), sign * math.pi / 9),
            scale=torch.full((2, 3), 1 + sign * 0.25),
            shear=torch.full((2, 6), sign * math.pi / 18),
            translation=sign * torch.tensor([[8.0, 12.0, 10.0]]).expand(2, 3),
        )
        torch.testing.assert_close(head(features, features, (32, 48, 40)), expected)

    def test_huge_features_stay_within_the_limits(self):
        head = wake(AffineHead(4, 16))
        for linear in (head.rotation, head.scale, head.shear, head.translation):
            nn.init.normal_(linear.weight, std=100.0)
        matrix = head(1e8 * torch.randn(8, 4, 2, 2, 2), 1e8 * torch.randn(8, 4, 2, 2, 2), SHAPE)
        quarter = torch.tensor(SHAPE) / 4
        assert bool((matrix[:, :, 3].abs() <= quarter + 1e-4).all())
        assert bool((matrix[:, :, 3].abs() > 0.9 * quarter).any())
        # three rotations, the largest scale and the shear matrix of norm at most 1 + 2 tan(10 deg)
        stretch = torch.linalg.matrix_norm(matrix[:, :, :3], ord=2)
        assert bool((stretch <= 1.25 * (1 + 2 * math.tan(math.pi / 18)) + 1e-4).all())

    def test_gradient_lives_beyond_the_limits(self):
        # a clamp at these limits would have none
        head = AffineHead(4, 16)
        set_last_layers(head, 3.0)
        features = torch.randn(1, 4, 2, 2, 2)
        matrix = head(features, features, SHAPE)
        (matrix * torch.randn_like(matrix)).sum().backward()
        for linear in (head.rotation, head.scale, head.shear, head.translation):
            assert bool((linear.values.grad.abs() > 1e-5).all())

    def test_a_volume_is_matched_to_itself_by_the_identity(self):
        head = wake(AffineHead(4, 16))
        features = torch.randn(2, 4, 2, 2, 2)
        affine = head(features, features, SHAPE)
        torch.testing.assert_close(affine, geometry.identity_affine(2), rtol=0, atol=1e-6)

    def test_swapping_the_pair_negates_every_parameter(self):
        head = wake(AffineHead(4, 16))
        seen: list[torch.Tensor] = []
        for linear in (head.rotation, head.scale, head.shear, head.translation):
            linear.register_forward_hook(lambda module, inputs, output: seen.append(output))
        a, b = torch.randn(2, 1, 4, 2, 2, 2)
        head(a, b, SHAPE)
        head(b, a, SHAPE)
        for there, back in zip(seen[:4], seen[4:], strict=True):
            torch.testing.assert_close(there, -back)
            assert there.abs().min() > 1e-3


class TestDeformableHead:
    def test_order_of_the_pair_matters(self):
        head = wake(DeformableHead(8))
        a, b = torch.randn(2, 1, 8, *SHAPE)
        assert (head(a, b) - head(b, a)).abs().max() > 1e-2

    def test_a_voxel_sees_its_surroundings_only(self):
        head = wake(DeformableHead(8, 16))
        for norm in (head.convolutions[0], head.convolutions[1]):
            norm.norm = nn.Identity()
        a, b = torch.randn(2, 1, 8, 9, 9, 9)
        changed = a.clone()
        changed[..., 0, 4, 4] += 1
        difference = (head(changed, b) - head(a, b)).abs().amax(dim=(0, 1, 3, 4))
        assert bool((difference[:4] > 0).all())
        assert bool((difference[4:] == 0).all())


class TestRestorationHead:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_gives_the_volumes_channels(self, channels):
        head = RestorationHead(8, channels)
        features = torch.randn(2, 8, *SHAPE)
        volume = head(features)
        assert volume.shape == (2, channels, *SHAPE)
        (volume * torch.randn_like(volume)).sum().backward()
        assert without_gradient(head) == []

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_does_not_reach_it(self, dtype):
        head = RestorationHead(8)
        features = torch.randn(1, 8, *SHAPE)
        expected = head(features)
        expected_of_half = head(features.to(dtype).float())
        with torch.autocast("cpu", dtype):
            assert torch.equal(head(features), expected)
            got = head(features.to(dtype))
        assert got.dtype == torch.float32
        assert torch.equal(got, expected_of_half)

    def test_is_the_papers(self):
        """Convolution to 16 channels, GroupNorm of 4 groups, LeakyReLU 0.2, convolution to 1."""
        head, features = wake(RestorationHead(8)), torch.randn(2, 8, *SHAPE)
        (kernel, bias), (weight, shift), (last, offset) = (
            module.parameters() for module in head.modules() if not list(module.children())
        )
        assert kernel.shape == (16, 8, 3, 3, 3)
        assert last.shape == (1, 16, 1, 1, 1)
        x = F.group_norm(F.conv3d(features, kernel, bias, padding=1), 4, weight, shift)
        torch.testing.assert_close(
            head(features), F.conv3d(F.leaky_relu(x, 0.2), last, offset), atol=1e-5, rtol=1e-4
        )

    def test_can_learn_the_identity(self):
        head = RestorationHead(8)
        features: Tensor = torch.randn(1, 8, *SHAPE)
        optimizer = torch.optim.Adam(head.parameters(), 3e-2)
        errors = []
        for _ in range(60):
            optimizer.zero_grad()
            error = (head(features) - features[:, :1]).square().mean()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.2 * errors[0]


class TestProjectionHead:
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("layers", [2, 3])
    def test_is_linear_layers_with_norms_and_activations_between(self, layers, norm):
        head = ProjectionHead(5, 7, 3, layers, norm)
        parameters = iter(head.parameters())
        expected = vectors = torch.randn(4, 2, 5)
        for width in (7,) * (layers - 1):
            expected = F.linear(expected, next(parameters), next(parameters))
            if norm:
                expected = F.layer_norm(expected, (width,), next(parameters), next(parameters))
            expected = F.leaky_relu(expected, 0.2)
        expected = F.linear(expected, next(parameters), next(parameters))
        assert list(parameters) == []
        assert expected.shape == (4, 2, 3)
        torch.testing.assert_close(head(vectors), expected)

    def test_defaults(self):
        shapes = [tuple(parameter.shape) for parameter in ProjectionHead(5).parameters()]
        assert shapes == [(32, 5), (32,), (16, 32), (16,)]


class TestRunningStandardisation:
    def test_statistics_are_those_of_all_batches_and_then_of_the_recent_ones(self) -> None:
        standardisation = RunningStandardisation(3, momentum=0.1)
        mean, variance = torch.zeros(3), torch.zeros(3)
        for number in range(30):
            batch = 5 + torch.tensor([1.0, 2.0, 0.5]) * torch.randn(8, 3)
            weight = max(1 / (number + 1), 0.1)
            mean = (1 - weight) * mean + weight * batch.mean(dim=0)
            spread = ((batch - mean) ** 2).mean(dim=0)
            variance = (1 - weight) * variance + weight * spread
            standardisation.update(batch)
        torch.testing.assert_close(standardisation.mean, mean)
        torch.testing.assert_close(standardisation.variance, variance)
        vectors = torch.randn(4, 3)
        expected = (vectors - mean) / variance.sqrt()
        torch.testing.assert_close(standardisation(vectors), expected, rtol=1e-3, atol=1e-3)

    def test_without_momentum_all_batches_count_alike(self) -> None:
        standardisation = RunningStandardisation(3, momentum=0)
        batches = torch.randn(200, 4, 3) * torch.linspace(0.5, 2, 200).view(-1, 1, 1)
        for batch in batches:
            standardisation.update(batch)
        torch.testing.assert_close(standardisation.mean, batches.mean(dim=(0, 1)))
        variance = batches.flatten(0, 1).var(dim=0)
        torch.testing.assert_close(standardisation.variance, variance, rtol=0.05, atol=0)

    def test_small_differences_count_and_rounding_does_not(self) -> None:
        different = 1 + 0.01 * torch.randn(50, 8)
        standardisation = RunningStandardisation(8)
        standardisation.update(different)
        assert 0.9 < float(standardisation(different).std()) < 1.1
        equal = torch.ones(50, 8) + 1e-7 * torch.randn(50, 8)
        standardisation = RunningStandardisation(8)
        standardisation.update(equal)
        assert float(standardisation(equal).abs().max()) < 1e-3

    def test_unit_of_the_features_changes_nothing(self) -> None:
        vectors = torch.randn(50, 3) * torch.tensor([1.0, 1e-3, 0.0])
        standardised = []
        for unit in (1.0, 1e-4, 1e4):
            standardisation = RunningStandardisation(3)
            standardisation.update(unit * vectors)
            standardised.append(standardisation(unit * vectors))
        torch.testing.assert_close(standardised[1], standardised[0])
        torch.testing.assert_close(standardised[2], standardised[0])
        assert not bool(standardised[0][:, 2].any())  # always the same number: zero, not NaN
        # at the smallest standard deviation, half of it is left
        assert 0.4 < float(standardised[0][:, 1].var()) < 0.9

    def test_gradient_does_not_pass_through_the_statistics(self) -> None:
        vectors = torch.randn(5, 3, requires_grad=True)
        standardisation = RunningStandardisation(3)
        standardisation.update(vectors)
        standardisation(vectors).sum().backward()
        expected = 1 / standardisation.variance.sqrt()
        torch.testing.assert_close(vectors.grad, expected.expand(5, 3), rtol=1e-3, atol=1e-3)
