"""The preparation of volumes warns where the preset does not fit their intensities."""

import warnings

import pytest
import torch
from monai.data.meta_tensor import MetaTensor

from gvsl_lightning.data import preparation
from gvsl_lightning.data.preparation import Preparation


def volume(low: float, high: float) -> dict[str, MetaTensor]:
    values = torch.linspace(low, high, 512).reshape(1, 8, 8, 8)
    return {"image": MetaTensor(values, affine=torch.eye(4, dtype=torch.float64))}


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_WARNED", set())


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({"modality": "ct"}, 0, 2048), ({"modality": "mri"}, -1024, 1800)],
)
def test_a_preset_of_other_intensities_is_warned_of_once(
    options: dict, low: float, high: float
) -> None:
    prepare = Preparation(**options)
    with pytest.warns(UserWarning, match=r"modality is .* a.nii.gz"):
        prepare(volume(low, high), "a.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(volume(low, high), "b.nii.gz")


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"modality": "ct"}, -1000, 800),
        ({"modality": "ct", "window": (0.0, 2048.0)}, 0, 2048),
        ({"modality": "mri"}, 0, 4000),
        ({"modality": "mri"}, -1, 1),
        ({"modality": "none"}, 0, 1),
    ],
)
def test_a_fitting_preset_is_not_warned_of(options: dict, low: float, high: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Preparation(**options)(volume(low, high), "a.nii.gz")
