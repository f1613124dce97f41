import itertools

import pytest
import torch
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.nn.correlation import CorrelationHead, expected_offset, local_correlation
from gvsl_lightning.nn.heads import ZMatchingHead
from gvsl_lightning.tasks import GVSL

GENERATOR = torch.Generator().manual_seed(3)


def patches(volume: Tensor) -> Tensor:
    """The 27 intensities around each voxel as features, (1, 27, D, H, W)."""
    shifts = itertools.product((-1, 0, 1), repeat=3)
    return torch.cat([volume.roll(shift, (2, 3, 4)) for shift in shifts], dim=1)


def pyramid(size: int = 16, levels: int = 4, channels: int = 6) -> list[Tensor]:
    sizes = [size // 2**level for level in reversed(range(levels))]
    return [torch.randn(2, channels, s, s, s, generator=GENERATOR) for s in sizes]


def test_correlation_is_the_inner_product_at_every_offset() -> None:
    fixed, moving = torch.randn(2, 1, 3, 4, 5, 6, generator=GENERATOR)
    found = local_correlation(fixed, moving, 1)
    offsets = list(itertools.product((-1, 0, 1), repeat=3))
    for d, h, w in itertools.product(range(4), range(5), range(6)):
        for place, (a, b, c) in enumerate(offsets):
            i, j, k = min(max(d + a, 0), 3), min(max(h + b, 0), 4), min(max(w + c, 0), 5)
            expected = (fixed[0, :, d, h, w] * moving[0, :, i, j, k]).sum()
            torch.testing.assert_close(found[0, place, d, h, w], expected)


def test_one_likely_offset_is_the_expected_one() -> None:
    similarities = torch.zeros(1, 125, 2, 2, 2)
    similarities[:, 2 * 25 + 4 * 5 + 1] = 1e3  # offset (0, 2, -1)
    expected = torch.tensor([0.0, 2.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 2)
    torch.testing.assert_close(expected_offset(similarities), expected)


def test_equal_volumes_give_zero() -> None:
    features = pyramid()
    assert CorrelationHead()(features, features).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, -2, 0), (0, 1, 2)])
def test_a_shifted_volume_is_found_by_patches_of_intensities(shift: tuple[int, int, int]) -> None:
    fixed = torch.rand(1, 1, 16, 16, 16, generator=GENERATOR)
    moving = fixed.roll(shift, (2, 3, 4))
    centred = [patches(volume) - 0.5 for volume in (moving, fixed)]
    found = CorrelationHead([3], temperature=200)([centred[0]], [centred[1]])
    inside = found[..., 5:11, 5:11, 5:11]
    expected = torch.tensor(shift, dtype=torch.float32).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(inside, expected.expand_as(inside), atol=0.05, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flipped_volumes_give_the_flipped_displacement(axis: int) -> None:
    moving, fixed = pyramid(), pyramid()
    head = CorrelationHead()
    found = head(moving, fixed)
    flipped = head([m.flip(axis + 2) for m in moving], [f.flip(axis + 2) for f in fixed])
    sign = torch.ones(1, 3, 1, 1, 1)
    sign[:, axis] = -1
    torch.testing.assert_close(flipped, sign * found.flip(axis + 2), atol=1e-3, rtol=1e-3)


def test_no_displacement_folds_even_at_an_extreme_temperature() -> None:
    head = CorrelationHead(temperature=1e4)
    for _ in range(20):
        displacement = head(pyramid(), pyramid())
        assert displacement.abs().max() > 0.5
        assert geometry.folded_fraction(displacement).max() < 1e-3


def test_the_negative_velocity_is_the_inverse_map() -> None:
    velocity = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    velocity = torch.nn.functional.interpolate(velocity, size=(16, 16, 16), mode="trilinear")
    there, back = geometry.integrate(velocity), geometry.integrate(-velocity)
    residual = there + geometry.warp(back, there, padding_mode="border")
    assert there.abs().max() > 1
    assert residual[..., 4:12, 4:12, 4:12].abs().mean() < 0.02


def test_constant_velocity_is_its_own_integral() -> None:
    velocity = torch.full((1, 3, 6, 6, 6), 0.7)
    torch.testing.assert_close(geometry.integrate(velocity), velocity)


@pytest.mark.parametrize("size", [(16, 16, 16), (13, 10, 7), (9, 24, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_size_in_any_precision(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    backbone = build_backbone("unet", channels=[8, 8, 16])
    head = ZMatchingHead(16, 8, matching="correlation")
    volumes = torch.rand(2, 1, *size, generator=GENERATOR)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        levels = backbone.pyramid(volumes)
        affine, displacement = head([x[:1] for x in levels], [x[1:] for x in levels])
    assert displacement.shape == (1, 3, *size)
    assert displacement.dtype == torch.float32
    assert displacement.isfinite().all()
    torch.testing.assert_close(affine, geometry.identity_affine(1))


def test_matching_alone_trains_every_stage_of_the_backbone_and_the_temperatures() -> None:
    task = GVSL(
        backbone_options={"channels": [8, 8, 16]}, matching="correlation", restoration=False
    )
    volumes = torch.rand(2, 1, 16, 16, 16, generator=GENERATOR)
    views = {"fixed": volumes[:1], "corrupted": volumes[:1], "moving": volumes[1:]}
    task.compute_losses(views)["total"].backward()
    for name, parameter in task.named_parameters():
        if name.startswith(("backbone", "matching_head")):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    for stage in (*task.backbone.encoder, *task.backbone.decoder):
        assert any(parameter.grad.abs().max() > 0 for parameter in stage.parameters())


@pytest.mark.parametrize(
    ("options", "key"), [({"radii": [2, 0]}, "radii"), ({"temperature": 0.0}, "temperature")]
)
def test_options_out_of_range(options: dict[str, object], key: str) -> None:
    with pytest.raises(InputError, match=key):
        CorrelationHead(**options)  # type: ignore[arg-type]


def test_unknown_matching() -> None:
    with pytest.raises(InputError, match="matching"):
        ZMatchingHead(16, 8, matching="corelation")
