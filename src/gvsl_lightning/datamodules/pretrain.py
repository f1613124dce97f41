"""Pre-training on a folder, pattern or list of volumes."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from operator import lt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from monai.transforms.croppad.dictionary import CropForegroundd
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.transform import MapTransform, Transform
from monai.utils.type_conversion import convert_to_tensor
from rich.progress import track
from torch.utils.data import Dataset

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume, PreparedVolumes
from gvsl_lightning.data.read import check_volume, is_constant, read_case
from gvsl_lightning.data.source import (
    PackedFiles,
    Source,
    VolumeFile,
    anonymous,
    describe,
    identity,
)
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.privacy import is_pseudonym
from gvsl_lightning.transforms.intensity import Modality, intensity_transforms

CHECKED = 1000
"""Headers that are checked before training starts, at most."""


class PretrainDataModule(PairDataModule):
    """Pairs from a folder, glob pattern or list of CT or MR volumes.

    Every volume is read, turned to RAS, resampled if `spacing` is given, brought to [0, 1] and,
    if wanted, cropped to its foreground. Every file is checked while it is read, and its header
    before training starts; of more than 1,000 files, the headers of 1,000 evenly chosen ones.

    With many volumes, `python -m gvsl_lightning prepare` does all this once. What it wrote is a
    `root` or `val_root` too: nothing but the crops is read then.

    Args:
        root: Folder, pattern, list or `dataset.json`; see
            `gvsl_lightning.data.find.find_volumes`. Or a folder of prepared volumes, or
            the fsspec URL of one, such as `s3://bucket/folder`: the options that prepare a volume
            must be those that it was prepared with.
        modality: Intensity preset: `ct`, `mri` or `none`; see
            `gvsl_lightning.transforms.intensity.intensity_transforms`.
        window: Lower and upper limit of the preset `ct` in HU.
        transforms: Takes the place of the preset: MONAI dictionary transforms on the key `image`,
            each as `{"class_path": "monai.transforms.Name", "init_args": {...}}`. They must lead
            to [0, 1] and be deterministic; the task makes random views later, on the device.
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
            in `root`, only serve to measure registration in validation. Prepared volumes bring
            theirs along.
        cache_folder: Where prepared volumes behind a URL are copied to, whole, at their first
            access; it grows to the size of all of them. None: crops are read by ranges of bytes at
            every access, see `gvsl_lightning.data.remote.RemoteArray`. Empty it after
            volumes behind the URL have changed.
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
        cache_folder: str | None = None,
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
        self.cache_folder = cache_folder

    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Find the files, split them and check their headers."""
        training, validation = self.configure_files()
        for source in _some(
            [f.image for f in (*training, *validation) if not isinstance(f, PreparedVolume)]
        ):
            check_volume(source, self.channels)
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
        for label in _some(
            [f.label for f in validation if f.label and not isinstance(f, PreparedVolume)]
        ):
            check_volume(label)
        return self._volumes(training, labelled=False), self._volumes(validation, labelled)

    def configure_files(self) -> tuple[list[VolumeFile], list[VolumeFile]]:
        """Choose the training and the validation files; a hook to override."""
        files = self.find_files()
        if len(files) < 2:
            raise InputError(
                f"{self.root} holds one volume and a pair needs at least two; add volumes."
            )
        if self.val_root is not None:
            validation = self._find(self.val_root)
            if len({_is_anonymous(file) for file in (*files, *validation)}) > 1:
                raise InputError(
                    f"Of {self.root} and {self.val_root} one was prepared with anonymise and one "
                    "was not, so what they have in common cannot be told; prepare both alike."
                )
            validating = {_origin(file) for file in validation}
            return [file for file in files if _origin(file) not in validating], validation
        chosen = self.configure_split(len(files), self._validation_count(len(files)))
        return (
            [file for index, file in enumerate(files) if index not in chosen],
            [file for index, file in enumerate(files) if index in chosen],
        )

    def find_files(self) -> list[VolumeFile]:
        """Find the volumes of `root`, each once: no pair is of a volume and itself."""
        if self.root is None:
            raise InputError("root is missing; add --data.init_args.root=FOLDER.")
        return self._find(self.root)

    def preparation_settings(self) -> dict[str, Any]:
        """What decides how volumes are prepared, by which prepared ones are known; a hook.

        Extend it where `configure_intensity` depends on options of your own.

        Returns:
            What JSON can hold. A setting that has no effect beside others is None.
        """
        return describe_preparation(
            self, PretrainDataModule.configure_intensity, self.crop_foreground
        )

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

    def _find(self, root: str | list[str]) -> list[VolumeFile]:
        folder = PreparedFolder.among(root)
        if folder is None:
            return find_volumes(root, self.label_root, duplicates="drop")
        settings = self.preparation_settings()
        if self.label_root is not None:
            settings["label_root"] = folder.shown(absolute(self.label_root))
        return list(folder.volumes(settings))

    def _volumes(self, files: Sequence[VolumeFile], labelled: bool) -> Dataset[dict[str, Any]]:
        if self.anonymise:
            files = anonymous(files)
        volumes: Dataset[dict[str, Any]]
        prepared = [file for file in files if isinstance(file, PreparedVolume)]
        if prepared and len(prepared) == len(files):
            copies = None if self.cache_folder is None else Path(self.cache_folder).expanduser()
            volumes = PreparedVolumes(prepared, labelled, not self.cache, copies)
            return InMemory(volumes, max(1, self.num_workers)) if self.cache else volumes
        volumes = _Volumes(
            files,
            self.channels,
            self.configure_intensity(),
            self.spacing,
            self.crop_foreground,
            labelled,
        )
        return InMemory(volumes, max(1, self.num_workers)) if self.cache and files else volumes


class Preparing(Protocol):
    """A data module that prepares volumes; see `PretrainDataModule` for its options."""

    modality: Modality
    window: tuple[float, float]
    transforms: list[dict[str, Any]] | None
    spacing: tuple[float, float, float] | None
    channels: int

    def configure_intensity(self) -> list[MapTransform]:
        """Make the transforms that bring `image` to [0, 1]."""


def describe_preparation(
    module: Preparing, hook: Callable[..., Any], crop_foreground: float | None = None
) -> dict[str, Any]:
    """What decides how a data module prepares volumes, see `PreparedFolder`.

    Args:
        module: The data module.
        hook: The `configure_intensity` that does what the options say.
        crop_foreground: See `PretrainDataModule`.

    Returns:
        What JSON can hold. A setting that has no effect beside others is None.
    """
    preset = module.transforms is None
    own: Any = type(module).configure_intensity
    settings = {
        "transforms": module.transforms,
        "modality": module.modality if preset else None,
        "window": [float(x) for x in module.window] if preset and module.modality == "ct" else None,
        "spacing": None if module.spacing is None else [float(size) for size in module.spacing],
        "crop_foreground": crop_foreground,
        "channels": module.channels,
        "configure_intensity": None if own is hook else f"{own.__module__}.{own.__qualname__}",
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _some(sources: Sequence[Source]) -> Sequence[Source]:
    """All sources, or `CHECKED` of them in even steps."""
    steps = np.linspace(0, len(sources) - 1, min(CHECKED, len(sources)))
    return [sources[index] for index in steps.round().astype(int)]


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
            InputError: A transform fails, or nothing is left of the volume or of its contrast.
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
        if is_constant(item["image"]):
            raise InputError(
                f"{describe(source)} holds a single value after preparation; leave it out or "
                "change window or transforms."
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
        self.files = PackedFiles(files)
        self.channels = channels
        self.labelled = labelled
        self.prepare = Preparation(intensity, spacing, crop_foreground, labelled)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        item = self.prepare(read_case(file, self.channels, self.labelled), file.image)
        plain = {key: convert_to_tensor(value, track_meta=False) for key, value in item.items()}
        prepared: dict[str, Any] = {"image": plain["image"].float(), "name": file.name}
        if self.labelled:
            prepared["label"] = plain["label"].round().to(torch.int32)
        return prepared


def absolute(root: str | Sequence[str]) -> Any:
    """The same path, or paths, from the root of the file system."""
    if isinstance(root, str | os.PathLike):
        return os.path.abspath(os.path.expanduser(root))
    return [absolute(path) for path in root]


def _origin(file: VolumeFile) -> tuple[Any, ...]:
    """What the file on disk is known by, or the one that a prepared volume was made of."""
    source = file.origin if isinstance(file, PreparedVolume) else file.image
    return identity(source if isinstance(source, str) else source[0])


def _is_anonymous(file: VolumeFile) -> bool:
    return isinstance(file, PreparedVolume) and is_pseudonym(file.origin)


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
        TypeError: It is no transform, or one that reads or writes files: the name of the reader
            that those take may be that of any function.
    """
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Transform)):
        raise TypeError(f"{path} is no transform")
    if any(kind.__module__.startswith("monai.transforms.io.") for kind in found.__mro__):
        raise TypeError(f"{path} reads or writes files")
    return found
