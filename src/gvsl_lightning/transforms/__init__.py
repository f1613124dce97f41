"""Intensity presets, appearance corruptions and the spatial transform that a sample shares."""

from gvsl_lightning.transforms.corruption import (
    Corruptd,
    Corruption,
    GenesisCorruption,
    InPainting,
    LocalShuffling,
    NonLinearIntensity,
    OutPainting,
)
from gvsl_lightning.transforms.intensity import intensity_transforms
from gvsl_lightning.transforms.spatial import RandomSpatialTransform
from gvsl_lightning.transforms.views import RandomView

__all__ = [
    "Corruptd",
    "Corruption",
    "GenesisCorruption",
    "InPainting",
    "LocalShuffling",
    "NonLinearIntensity",
    "OutPainting",
    "RandomSpatialTransform",
    "RandomView",
    "intensity_transforms",
]
