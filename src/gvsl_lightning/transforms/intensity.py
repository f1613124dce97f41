"""Intensity presets: from the scanner's values to [0, 1], as MONAI dictionary transforms."""

from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.intensity.dictionary import ScaleIntensityd, ScaleIntensityRanged
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from gvsl_lightning.errors import InputError

Modality = Literal["ct", "mri", "none"]


def intensity_transforms(
    modality: Modality,
    keys: KeysCollection = "image",
    window: tuple[float, float] = (-1024.0, 1024.0),
) -> list[MapTransform]:
    """Transforms that bring channel-first volumes to [0, 1], each volume by itself.

    Args:
        modality: `ct`: the window, linearly, clipped. `mri`: `ScaleForegroundPercentilesd`, for
            scanners whose units differ by orders of magnitude. `none`: minimum to 0 and maximum
            to 1, each channel by itself, as GVSL does with brain MR.
        keys: Keys of the volumes.
        window: Lower and upper limit in HU; the default is the published one, HU + 1024 clipped
            to [0, 2048] and divided by 2048 (He et al., Geometric Visual Similarity Learning,
            CVPR 2023, experiment details). Use (0, 2048) for data that were stored as HU + 1024.

    Returns:
        A list of one transform.

    Raises:
        InputError: `modality` is unknown, or `window` is empty.
    """
    if modality == "ct":
        lower, upper = window
        if lower >= upper:
            raise InputError(f"The window {window} is empty; give a lower and a higher limit.")
        return [ScaleIntensityRanged(keys, lower, upper, b_min=0.0, b_max=1.0, clip=True)]
    if modality == "mri":
        return [ScaleForegroundPercentilesd(keys)]
    if modality == "none":
        return [ScaleIntensityd(keys, minv=0.0, maxv=1.0, channel_wise=True)]
    raise InputError(f"There is no preset {modality!r} of intensities; use ct, mri or none.")


class ScaleForegroundPercentilesd(MapTransform):
    """Map two percentiles of the voxels that are not zero to 0 and 1, and clip.

    Zero is what masks and padding leave behind; counting it would make the result depend on the
    size of the background. A channel without foreground, or with a constant one, becomes 0.

    Args:
        keys: Keys of channel-first volumes; every channel is scaled by itself.
        lower: Percentile that becomes 0, in percent.
        upper: Percentile that becomes 1, in percent.
        allow_missing_keys: Whether absent keys are skipped.
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 0.5,
        upper: float = 99.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.lower = lower
        self.upper = upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Scale the volumes at `keys`; the given dictionary and its volumes stay as they are."""
        scaled = dict(data)
        for key in self.key_iterator(scaled):
            volume: Tensor = convert_to_tensor(scaled[key], dtype=torch.float32, track_meta=False)
            channels = torch.stack([self._scale(channel) for channel in volume])
            scaled[key] = convert_to_dst_type(channels, scaled[key], dtype=torch.float32)[0]
        return scaled

    def _scale(self, channel: Tensor) -> Tensor:
        foreground = channel[channel != 0]
        low, high = (_percentile(foreground, rank) for rank in (self.lower, self.upper))
        if not low < high:
            return torch.zeros_like(channel)
        return ((channel - low) / (high - low)).clamp(0.0, 1.0)


def _percentile(values: Tensor, percent: float) -> float:
    """Nearest-rank percentile: `torch.quantile` refuses more than 16 million values."""
    if values.numel() == 0:
        return 0.0
    rank = round(percent / 100 * (values.numel() - 1)) + 1
    return float(values.kthvalue(rank).values)
