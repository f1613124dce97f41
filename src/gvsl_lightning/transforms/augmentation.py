"""Random MONAI transforms of labelled training patches."""

import math
from collections.abc import Sequence

from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined
from monai.transforms.transform import Transform


def augmentation_transforms(keys: Sequence[str]) -> list[Transform]:
    """Mild spatial and intensity augmentation of volumes in [0, 1].

    Turned by up to 15 degrees, scaled by up to 15 %, sheared and shifted a little in one of two
    items; contrast, brightness, noise and sharpness vary in fewer. No mirroring: left and right
    differ in most anatomy.

    Args:
        keys: `image`, or `image` and `label`; label maps move along, by nearest neighbours.

    Returns:
        Dictionary transforms for channel-first volumes.
    """
    affine = RandAffined(
        keys,
        prob=0.5,
        rotate_range=math.pi / 12,
        scale_range=0.15,
        shear_range=0.1,
        translate_range=4,
        mode=["bilinear", "nearest"][: len(keys)],
        padding_mode="zeros",
    )
    return [
        affine,
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        RandScaleIntensityd("image", factors=0.15, prob=0.3),
        RandShiftIntensityd("image", offsets=0.1, prob=0.3),
        RandGaussianNoised("image", prob=0.2, std=0.05),
        RandGaussianSmoothd("image", (0.3, 1.0), (0.3, 1.0), (0.3, 1.0), prob=0.1),
    ]
