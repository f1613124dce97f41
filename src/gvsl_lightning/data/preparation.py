"""How a stored volume becomes the network's input: axes, voxel size, intensities, foreground."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from math import inf
from operator import lt
from typing import Any, get_args

from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.dictionary import CropForegroundd
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.transform import MapTransform, Transform

from gvsl_lightning.data.read import is_constant
from gvsl_lightning.data.source import Source, describe
from gvsl_lightning.errors import InputError, cause_of, check_choice, check_range
from gvsl_lightning.transforms.intensity import Modality, intensity_transforms


@dataclass(frozen=True)
class Preparation:
    """Turn a volume to RAS, resample it, bring it to [0, 1] and crop it to its foreground.

    Pre-training, labelled data, registration and the command `prepare` share this object.

    Attributes:
        modality: Intensity preset: `ct`, `mri` or `none`; see
            `gvsl_lightning.transforms.intensity.intensity_transforms`.
        window: Lower and upper limit of the preset `ct` in HU.
        transforms: MONAI dictionary transforms on the key `image`, in place of the preset, each as
            `{"class_path": "monai.transforms.Name", "init_args": {...}}`. They must be
            deterministic and map intensities to [0, 1]; they must not move or resize volumes.
        spacing: Voxel size in mm along right, front and top; None: as stored.
        crop_foreground: Crop to the box of all voxels above this value in [0, 1]; None: no crop.
        channels: Channels of every volume.
        intensity: Transforms made in Python, in place of `modality`, `window` and `transforms`.

    Raises:
        InputError: An attribute is out of range.
    """

    modality: Modality = "none"
    window: tuple[float, float] = (-1024.0, 1024.0)
    transforms: list[dict[str, Any]] | None = None
    spacing: tuple[float, float, float] | None = None
    crop_foreground: float | None = None
    channels: int = 1
    intensity: Sequence[MapTransform] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("modality", self.modality, get_args(Modality))
        check_range("channels", self.channels, 1)
        if len(self.window) != 2 or not -inf < self.window[0] < self.window[1] < inf:
            raise InputError.about("window", f"is {self.window}; give a lower and a higher limit.")
        spacing = self.spacing
        if spacing is not None and [0 < edge < inf for edge in spacing] != [True] * 3:
            raise InputError.about("spacing", f"is {spacing}; give three positive lengths in mm.")

    def settings(self) -> dict[str, Any]:
        """The preparation as JSON values; a setting that has no effect beside others is None."""
        preset = self.transforms is None
        settings = {
            "transforms": self.transforms,
            "modality": self.modality if preset else None,
            "window": list(map(float, self.window)) if preset and self.modality == "ct" else None,
            "spacing": None if self.spacing is None else list(map(float, self.spacing)),
            "crop_foreground": self.crop_foreground,
            "channels": self.channels,
        }
        as_json: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return as_json

    def intensity_transforms(self) -> list[MapTransform]:
        """Make the transforms that bring `image` to [0, 1].

        Raises:
            InputError: A transform cannot be made.
        """
        if self.intensity is not None:
            return list(self.intensity)
        if self.transforms is not None:
            return [instantiate_transform(spec) for spec in self.transforms]
        return intensity_transforms(self.modality, window=self.window)

    def __call__(self, item: dict[str, Any], source: Source) -> dict[str, Any]:
        """Prepare one volume.

        Args:
            item: `image` and perhaps `label` as from `read_case`.
            source: Their file, for error messages.

        Returns:
            The same keys; the affines of the prepared volumes lead from their voxels to mm.

        Raises:
            InputError: A transform fails, or nothing is left of the volume or of its contrast.
        """
        self._warn_of_preset(item["image"], source)
        values = None
        if "label" in item:
            # MONAI resamples in float32, which holds no large value: move indices of values
            item, stored = dict(item), item["label"]
            values, indices = stored.as_tensor().unique(return_inverse=True)
            item["label"] = MetaTensor(indices.float(), affine=stored.affine)
        try:
            for transform in self._steps["label" in item]:
                item = transform(item)
        except Exception as error:
            raise InputError(
                f"{describe(source)} cannot be prepared ({cause_of(error)}); correct the "
                "transforms or leave the volume out."
            ) from error
        if values is not None:
            moved = item["label"]
            label = values[moved.as_tensor().round().long()]
            item["label"] = MetaTensor(label, affine=moved.affine)
        if min(item["image"].shape[1:]) < 1:
            fault = "has no voxel above crop_foreground; lower it or leave the volume out."
            raise InputError(f"{describe(source)} {fault}")
        if is_constant(item["image"]):
            raise InputError(
                f"{describe(source)} holds a single value after preparation; leave it out or "
                "change window or transforms."
            )
        return item

    def _warn_of_preset(self, image: Any, source: Source) -> None:
        """Warn once in a process if the intensities do not look like those of the preset."""
        if self.transforms is not None or self.modality in _WARNED:
            return
        low, high = float(image.min()), float(image.max())
        if self.modality == "ct" and low >= 0 > self.window[0]:
            found = "no value below 0: are its values HU?"
        elif self.modality == "mri" and low <= -500 and high >= 500:
            found = f"values from {low:g} to {high:g}, as CT has in HU."
        else:
            return
        _WARNED.add(self.modality)
        warnings.warn(
            f"modality is {self.modality} and {describe(source)} has {found} Set modality, window "
            "or transforms.",
            stacklevel=2,
        )

    @cached_property
    def _steps(self) -> tuple[list[MapTransform], list[MapTransform]]:
        """All transforms for an image alone, and for an image with its label map."""
        intensity = self.intensity_transforms()
        return self._build(intensity, ["image"]), self._build(intensity, ["image", "label"])

    def _build(self, intensity: Sequence[MapTransform], keys: list[str]) -> list[MapTransform]:
        steps: list[MapTransform] = [Orientationd(keys, axcodes="RAS", labels=None)]
        if self.spacing is not None:
            steps.append(Spacingd(keys, self.spacing, mode=["bilinear", "nearest"][: len(keys)]))
        steps += intensity
        if self.crop_foreground is not None:
            above = partial(lt, self.crop_foreground)
            steps.append(CropForegroundd(keys, source_key="image", select_fn=above))
        return steps


_WARNED: set[str] = set()
"""Presets that this process has warned of."""


def instantiate_transform(spec: dict[str, Any]) -> MapTransform:
    """Make a MONAI transform from `class_path` and `init_args`.

    Raises:
        InputError: It cannot be made.
    """
    try:
        transform: MapTransform = find_transform(spec["class_path"])(**spec.get("init_args", {}))
    except Exception as error:
        raise InputError(
            f"The transform {spec} cannot be made ({cause_of(error)}); write class_path and "
            "init_args of a MONAI dictionary transform."
        ) from error
    return transform


def find_transform(path: str) -> Any:
    """Import a class of transforms by its path.

    Raises:
        ImportError, AttributeError: There is none.
        TypeError: The class is no transform, or a transform that reads or writes files: the name
            of a reader could be that of any function.
    """
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Transform)):
        raise TypeError(f"{path} is no transform")
    if any(kind.__module__.startswith("monai.transforms.io.") for kind in found.__mro__):
        raise TypeError(f"{path} reads or writes files")
    return found
