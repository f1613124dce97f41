import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from gvsl_lightning.transforms.intensity import ScaleForegroundPercentilesd, intensity_transforms


def apply(volume: Tensor, modality: str, **options: object) -> Tensor:
    item = {"image": volume}
    for transform in intensity_transforms(modality, **options):
        item = transform(item)
    return item["image"]


def test_ct_maps_the_published_window_to_zero_and_one() -> None:
    hounsfield = torch.tensor([-3000.0, -1024.0, 0.0, 512.0, 1024.0, 3000.0]).view(1, 6, 1, 1)
    expected = ((hounsfield + 1024).clamp(0, 2048) / 2048).flatten()
    assert expected.tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert torch.allclose(apply(hounsfield, "ct").flatten(), expected)


def test_ct_window_for_shifted_values() -> None:
    shifted = torch.tensor([-5.0, 0.0, 1024.0, 2048.0, 4000.0]).view(1, 5, 1, 1)
    scaled = apply(shifted, "ct", window=(0, 2048)).flatten()
    assert scaled.tolist() == [0, 0, 0.5, 1, 1]


def test_none_stretches_each_channel_by_itself() -> None:
    volume = torch.stack([torch.linspace(-5, 5, 8), torch.linspace(100, 900, 8)]).view(2, 2, 2, 2)
    scaled = apply(volume, "none")
    assert torch.allclose(scaled[0].flatten(), torch.linspace(0, 1, 8))
    assert torch.allclose(scaled[1], scaled[0], atol=1e-6)


@pytest.mark.parametrize("factor", [1e-5, 0.01, 300.0, 1e6])
def test_mri_does_not_depend_on_the_scanners_unit(factor: float) -> None:
    volume = torch.rand(1, 16, 16, 16) + 0.1
    assert torch.allclose(apply(volume * factor, "mri"), apply(volume, "mri"), atol=1e-5)


def test_mri_percentiles_are_those_of_the_foreground() -> None:
    foreground = torch.rand(1, 20, 20, 20) * 400 + 50
    padded = torch.nn.functional.pad(foreground, (10,) * 6)
    scaled = apply(padded, "mri")
    low, high = np.percentile(foreground.numpy(), [0.5, 99.5])
    expected = ((foreground - low) / (high - low)).clamp(0, 1)
    assert torch.allclose(scaled[:, 10:-10, 10:-10, 10:-10], expected, atol=1e-3)
    assert scaled[:, :10].abs().max() == 0
    assert scaled.max() == 1


def test_mri_ignores_a_few_outliers() -> None:
    volume = torch.rand(1, 20, 20, 20) + 1
    with_outliers = volume.clone()
    with_outliers.view(-1)[:8] = 1e6
    difference = (apply(with_outliers, "mri") - apply(volume, "mri")).abs().flatten()[8:]
    assert difference.max() < 0.01


def test_mri_scales_channels_apart_and_survives_empty_ones() -> None:
    channel = torch.rand(8, 8, 8) + 0.5
    volume = torch.stack(
        [channel, channel * 1000, torch.zeros(8, 8, 8), torch.full((8, 8, 8), 7.0)]
    )
    scaled = apply(volume, "mri")
    assert torch.allclose(scaled[0], scaled[1], atol=1e-5)
    assert scaled[0].amax() == 1
    assert scaled[2:].abs().max() == 0


def test_mri_keeps_geometry_and_leaves_its_input_alone() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    volume = MetaTensor(torch.rand(1, 6, 6, 6) * 9, affine=affine)
    before = volume.clone()
    item = {"image": volume, "other": 1}
    scaled = ScaleForegroundPercentilesd("image")(item)
    assert torch.equal(scaled["image"].affine, affine)
    assert scaled["other"] == 1
    assert item["image"] is volume
    assert torch.equal(volume, before)


@pytest.mark.parametrize(
    ("modality", "window", "sentence"),
    [("pet", (0, 1), "use ct, mri or none"), ("ct", (5, 5), r"\(5, 5\) is empty")],
)
def test_wrong_options(modality: str, window: tuple[float, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        intensity_transforms(modality, window=window)
