import pytest
import torch
import torch.nn.functional as F

from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms import RandomView


def smooth(count: int = 1) -> torch.Tensor:
    coarse = torch.rand(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(16, 16, 16), mode="trilinear", align_corners=True)


def view(volumes: torch.Tensor, seed: int = 0, **options: object) -> torch.Tensor:
    return RandomView(**options)(volumes, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


STILL = {"scale": (1.0, 1.0), "translation": 0.0, "rotation": 0.0, "shear": 0.0}


def test_nothing_left_to_chance_is_the_volume_itself() -> None:
    got = view(smooth(), **STILL, nonlinear_rate=0.0, noise=0.0)
    torch.testing.assert_close(got, smooth(), rtol=0, atol=1e-5)


def test_zoom_shows_the_middle() -> None:
    got = view(smooth(), **{**STILL, "scale": (0.5, 0.5)}, nonlinear_rate=0.0, noise=0.0)
    expected = F.interpolate(smooth(), scale_factor=2, mode="trilinear")[..., 8:24, 8:24, 8:24]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_each_sample_and_seed_has_its_own_draw() -> None:
    same = smooth().expand(4, -1, -1, -1, -1)
    first = view(same)
    assert len({float(one.mean()) for one in first}) == 4
    assert torch.equal(first, view(same))
    assert not torch.equal(first, view(same, seed=1))
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_noise_in_some_samples_at_most_as_strong_as_said() -> None:
    grey = torch.full((400, 1, 6, 6, 6), 0.5)
    noise = view(grey, **STILL, nonlinear_rate=0.0, noise_rate=0.25, noise=0.1) - grey
    spread = noise.flatten(1).std(dim=1)
    noisy = spread > 1e-4
    assert float(noisy.float().mean()) == pytest.approx(0.25, abs=0.06)
    assert 0.04 < float(spread[noisy].mean()) < 0.06
    assert float(spread.max()) < 0.12


@pytest.mark.parametrize("options", [{"noise": -0.1}, {"noise_rate": 2.0}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} "):
        RandomView(**options)
