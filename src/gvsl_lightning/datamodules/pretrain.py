"""Pre-training on a folder, pattern or list of volumes."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import lt
from typing import Any

import numpy as np
import torch
from monai.transforms.croppad.dictionary import CropForegroundd
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.transform import MapTransform
from monai.utils.type_conversion import convert_to_tensor
from pytorch_lightning.cli import instantiate_class
from rich.progress import track
from torch.utils.data import Dataset

from gvsl_lightning.datamodules.base import PairDataModule
from gvsl_lightning.datamodules.volumes import (
    Source,
    VolumeFile,
    cause_of,
    check_volume,
    describe,
    find_volumes,
    identity,
    read_volume,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms.intensity import Modality, intensity_transforms


class PretrainDataModule(PairDataModule):
    """Pairs from a folder, glob pattern or list of CT or MR volumes.

    Every volume is read, turned to RAS, resampled if `spacing` is given, brought to [0, 1] and,
    if wanted, cropped to its foreground. The headers of all files are checked before training
    starts, the voxels while they are read.

    Args:
        root: Folder, pattern, list or `dataset.json`; see
            `gvsl_lightning.datamodules.volumes.find_volumes`.
        modality: Intensity preset: `ct`, `mri` or `none`; see
            `gvsl_lightning.transforms.intensity.intensity_transforms`.
        window: Lower and upper limit of the preset `ct` in HU.
        transforms: Takes the place of the preset: MONAI dictionary transforms on the key `image`,
            each as `{"class_path": "monai.transforms.Name", "init_args": {...}}`. They must lead
            to [0, 1] and be deterministic; augmentation happens later, on the device.
        spacing: Voxel size in mm along right, front and top to which the volumes are resampled.
        crop_foreground: Crop to the box of all voxels above this value in [0, 1], after intensity
            scaling.
        channels: Channels of every volume.
        cache: Keep all prepared volumes in memory, float32, once per process of a distributed
            run. Otherwise each pair is read from its files again.
        val_root: Validation volumes, like `root`; those that `root` holds too do not train.
            Otherwise some of `root` are set aside.
        val_count: Number of volumes to set aside. None: `val_fraction` of them.
        val_fraction: Share of the volumes to set aside, in [0, 1); none of fewer than four
            volumes, and otherwise never a single one, which makes no pair.
        split_seed: Seed of the choice of these volumes, apart from `seed` so that runs with other
            seeds stay comparable.
        label_root: Folder of label maps named like the images. Labels, from here or from the list
            in `root`, only serve to measure registration in validation.
        **pair_options: Options of `PairDataModule`: `patch_size`, `batch_size`, ...

    Raises:
        InputError: A path, a file or an option is wrong; the sentence names it.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        modality: Modality = "none",
        window: tuple[float, float] = (-1024.0, 1024.0),
        transforms: list[dict[str, Any]] | None = None,
        spacing: tuple[float, float, float] | None = None,
        crop_foreground: float | None = None,
        channels: int = 1,
        cache: bool = False,
        val_root: str | list[str] | None = None,
        val_count: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        label_root: str | None = None,
        **pair_options: Any,
    ) -> None:
        super().__init__(**pair_options)
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction is {val_fraction}; give a number from 0 to below 1.")
        if spacing is not None and min(spacing) <= 0:
            raise InputError(f"spacing is {spacing}; give three positive lengths in mm.")
        self.root = root
        self.modality = modality
        self.window = window
        self.transforms = transforms
        self.spacing = spacing
        self.crop_foreground = crop_foreground
        self.channels = channels
        self.cache = cache
        self.val_root = val_root
        self.val_count = val_count
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.label_root = label_root

    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Find the files, check their headers and split them."""
        training, validation = self.configure_files()
        for file in (*training, *validation):
            check_volume(file.image, self.channels)
        labelled = any(file.label for file in validation)
        if self.label_root is not None and validation and not labelled:
            raise InputError(
                f"{self.label_root} holds no label map that is named like a validation volume, "
                f"such as {validation[0].name}; correct label_root or the names."
            )
        for file in validation if labelled else ():
            if file.label is None:
                raise InputError(
                    f"{describe(file.image)} has no label map although other validation volumes "
                    "have one; add it or leave the volume out."
                )
            check_volume(file.label)
        return self._volumes(training, labelled=False), self._volumes(validation, labelled)

    def configure_files(self) -> tuple[list[VolumeFile], list[VolumeFile]]:
        """Choose the training and the validation files; a hook to override."""
        files = self.find_files()
        if len(files) < 2:
            raise InputError(
                f"{self.root} holds one volume and a pair needs at least two; add volumes."
            )
        if self.val_root is not None:
            validation = find_volumes(self.val_root, self.label_root, duplicates="drop")
            validating = {identity(file.image) for file in validation}
            return [file for file in files if identity(file.image) not in validating], validation
        chosen = self.configure_split(len(files), self._validation_count(len(files)))
        return (
            [file for index, file in enumerate(files) if index not in chosen],
            [file for index, file in enumerate(files) if index in chosen],
        )

    def find_files(self) -> list[VolumeFile]:
        """Find the volumes of `root`, each once: no pair is of a volume and itself."""
        if self.root is None:
            raise InputError("root is missing; add --data.init_args.root=FOLDER.")
        return find_volumes(self.root, self.label_root, duplicates="drop")

    def configure_intensity(self) -> list[MapTransform]:
        """Make the transforms that bring `image` to [0, 1]; a hook to override."""
        return build_intensity(self.modality, self.window, self.transforms)

    def configure_split(self, count: int, validation: int) -> set[int]:
        """Choose the validation volumes; a hook to override.

        Args:
            count: Number of volumes, which are sorted by name.
            validation: How many of them validate.

        Returns:
            Their indices.
        """
        order = np.random.default_rng(self.split_seed).permutation(count)
        return set(order[:validation].tolist())

    def _validation_count(self, count: int) -> int:
        chosen = self.val_count
        if chosen is None:
            chosen = max(2, round(self.val_fraction * count)) if self.val_fraction else 0
            chosen = 0 if count - chosen < 2 else chosen
        if not 0 <= chosen <= count - 2:
            raise InputError(
                f"val_count is {chosen} of {count} volumes in {self.root}; leave at least two for "
                "training."
            )
        return chosen

    def _volumes(self, files: Sequence[VolumeFile], labelled: bool) -> Dataset[dict[str, Any]]:
        volumes = _Volumes(
            files,
            self.channels,
            self.configure_intensity(),
            self.spacing,
            self.crop_foreground,
            labelled,
        )
        return InMemory(volumes, max(1, self.num_workers)) if self.cache and files else volumes


def build_intensity(
    modality: Modality, window: tuple[float, float], transforms: list[dict[str, Any]] | None
) -> list[MapTransform]:
    """Transforms that bring `image` to [0, 1]; see `PretrainDataModule` for the arguments.

    Raises:
        InputError: A transform cannot be made, or the preset is unknown.
    """
    if transforms is None:
        return intensity_transforms(modality, window=window)
    return [instantiate_transform(spec) for spec in transforms]


class Preparation:
    """Turn a volume to RAS, resample it, bring it to [0, 1] and crop it to its foreground.

    Args:
        intensity: Transforms that bring `image` to [0, 1].
        spacing: Voxel size in mm; None: as stored.
        crop_foreground: Crop to the box of all voxels above this value; None: no crop.
        labelled: Take `label` along.
    """

    def __init__(
        self,
        intensity: Sequence[MapTransform],
        spacing: tuple[float, float, float] | None = None,
        crop_foreground: float | None = None,
        labelled: bool = False,
    ) -> None:
        keys = ["image", "label"] if labelled else ["image"]
        self.transforms: list[MapTransform] = [Orientationd(keys, axcodes="RAS", labels=None)]
        if spacing is not None:
            self.transforms += [Spacingd(keys, spacing, mode=["bilinear", "nearest"][: len(keys)])]
        self.transforms += intensity
        if crop_foreground is not None:
            self.transforms += [
                CropForegroundd(keys, source_key="image", select_fn=partial(lt, crop_foreground))
            ]

    def __call__(self, item: dict[str, Any], source: Source) -> dict[str, Any]:
        """Prepare one volume.

        Args:
            item: `image` and, if wanted, `label` as from `read_volume`.
            source: Where they come from, for messages.

        Returns:
            The same keys; the affines of the prepared volumes lead from their voxels to mm.

        Raises:
            InputError: A transform fails, or nothing is left of the volume.
        """
        try:
            for transform in self.transforms:
                item = transform(item)
        except Exception as error:
            raise InputError(
                f"{describe(source)} cannot be prepared ({cause_of(error)}); correct the "
                "transforms or leave the volume out."
            ) from error
        if min(item["image"].shape[1:]) < 1:
            raise InputError(
                f"{describe(source)} has no voxel above crop_foreground; lower it or leave the "
                "volume out."
            )
        return item


class _Volumes(Dataset[dict[str, Any]]):
    """Prepared volumes, read at each access."""

    def __init__(
        self,
        files: Sequence[VolumeFile],
        channels: int,
        intensity: Sequence[MapTransform],
        spacing: tuple[float, float, float] | None,
        crop_foreground: float | None,
        labelled: bool,
    ) -> None:
        self.files = files
        self.channels = channels
        self.labelled = labelled
        self.prepare = Preparation(intensity, spacing, crop_foreground, labelled)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        item: dict[str, Any] = {"image": read_volume(file.image, self.channels)}
        if self.labelled:
            assert file.label is not None
            item["label"] = read_volume(file.label)
            if item["label"].shape[1:] != item["image"].shape[1:]:
                raise InputError(
                    f"{file.label} has the shape {tuple(item['label'].shape[1:])} and its image "
                    f"{tuple(item['image'].shape[1:])}; give the label map of this image."
                )
        item = self.prepare(item, file.image)
        plain = {key: convert_to_tensor(value, track_meta=False) for key, value in item.items()}
        prepared: dict[str, Any] = {"image": plain["image"].float(), "name": file.name}
        if self.labelled:
            prepared["label"] = plain["label"].round().to(torch.int32)
        return prepared


class InMemory(Dataset[dict[str, Any]]):
    """All items of a dataset, made once, in threads and with a progress bar."""

    def __init__(self, volumes: Dataset[dict[str, Any]], threads: int) -> None:
        count = len(volumes)  # type: ignore[arg-type]
        with ThreadPoolExecutor(threads) as pool:
            items = pool.map(volumes.__getitem__, range(count))
            self.items = list(track(items, "Preparing volumes", total=count))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def instantiate_transform(spec: dict[str, Any]) -> MapTransform:
    """Make a MONAI transform from `class_path` and `init_args`.

    Raises:
        InputError: It cannot be made.
    """
    try:
        transform: MapTransform = instantiate_class((), spec)
    except Exception as error:
        raise InputError(
            f"The transform {spec} cannot be made ({cause_of(error)}); write class_path and "
            "init_args of a MONAI dictionary transform."
        ) from error
    return transform
