"""Intensity presets, appearance corruptions and the spatial transform that a sample shares."""

from gvsl_lightning.transforms.corruption import (
    Corruptd,
    Corruption,
    InPainting,
    LocalShuffling,
    NonLinearIntensity,
)
from gvsl_lightning.transforms.intensity import intensity_transforms
from gvsl_lightning.transforms.spatial import RandomSpatialTransform

__all__ = [
    "Corruptd",
    "Corruption",
    "InPainting",
    "LocalShuffling",
    "NonLinearIntensity",
    "RandomSpatialTransform",
    "intensity_transforms",
]
