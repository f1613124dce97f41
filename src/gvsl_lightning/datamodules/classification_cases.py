"""Labelled volumes for classification: from files or generated."""

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms.croppad.array import ResizeWithPadOrCrop
from monai.transforms.spatial.array import Resize
from monai.transforms.transform import Transform
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gvsl_lightning.data.datasets import Mapped, Tolerant, VolumeDataset
from gvsl_lightning.data.find import find_volume, find_volumes
from gvsl_lightning.data.prepared import PreparedVolume, PreparedVolumes, open_prepared
from gvsl_lightning.data.read import check_volume
from gvsl_lightning.data.regions import FindRegion
from gvsl_lightning.data.source import (
    Source,
    VolumeFile,
    anonymous,
    describe,
    refuse_duplicates,
)
from gvsl_lightning.datamodules.cases import CaseDataModule, Role
from gvsl_lightning.datamodules.phantom import PhantomDataset
from gvsl_lightning.datamodules.volume_data import FileDataModule, check_size
from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms.augmentation import augmentation_transforms


class ClassifiedVolumes(CaseDataModule):
    """Base of the classification data.

    A batch holds `image` (float32, `(N, C, *size)`, range [0, 1]), `target` (int64, (N,), the
    class; with `multi_label` float32, (N, classes), 1 where a class applies) and `name`.

    Args:
        class_names: Name of every class.
        size: Size (D, H, W) in voxels of the network's input.
        multi_label: Whether any number of classes applies to a volume, instead of exactly one.
        **options: see `gvsl_lightning.datamodules.cases.CaseDataModule`.
    """

    def __init__(
        self,
        class_names: list[str],
        size: tuple[int, int, int] = (96, 96, 96),
        multi_label: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        fewest = 1 if multi_label else 2
        if len(class_names) < fewest or len(set(class_names)) < len(class_names):
            raise InputError(f"class_names is {class_names}; give {fewest} or more different ones.")
        check_size("size", size)
        self.set_class_names(class_names)
        self.size = size
        self.multi_label = multi_label

    def configure_augmentation(self) -> list[Transform]:
        return augmentation_transforms(("image",))


class ClassificationDataModule(ClassifiedVolumes, FileDataModule):
    """Volumes and their classes from a table, a list or one folder for each class.

    Args:
        root: One of

            - a CSV file with the columns `path` and `label`; several classes of a volume are
              separated by semicolons, none is an empty cell;
            - a JSON file, a list of `{"path": path, "label": class or list of classes}`;
            - a folder with one folder for each class, named like it.

            A label is a name of `class_names` or its index; paths are relative to the file. In
            prediction any folder, pattern or list of volumes, see
            `gvsl_lightning.data.find.find_volumes`.
        class_names: see `ClassifiedVolumes`.
        size: Size (D, H, W) in voxels of the network's input: the volume's centre, cropped or
            padded with zeros.
        resize: Scale the whole volume to `size` instead.
        prepared: Folder into which `python -m gvsl_lightning prepare` prepared these volumes with
            the same options: training and validation cases are read from there. None: they are
            prepared at each access, or once if `cache` is true.
        **options: see `ClassifiedVolumes` and
            `gvsl_lightning.datamodules.volume_data.FileDataModule` (`modality`, `spacing`, ...).
    """

    def __init__(
        self,
        root: str | None = None,
        class_names: list[str] | None = None,
        size: tuple[int, int, int] = (96, 96, 96),
        resize: bool = False,
        prepared: str | None = None,
        **options: Any,
    ) -> None:
        if root is None:
            raise InputError("root is missing; add --data.root=FOLDER or a table.")
        super().__init__(class_names or [], size, **options)
        self.root = root
        self.resize = resize
        self.prepared = open_prepared(prepared)
        self.cases: list[tuple[str, Source, tuple[int, ...]]] = []

    def configure_cases(self) -> list[str]:
        """Read the table or the folders."""
        listed = _folders(self.root) if os.path.isdir(self.root) else _listed(self.root)
        refuse_duplicates([source for _, source, _ in listed])
        self.cases = sorted(
            (name, source, self._classes(source, label)) for name, source, label in listed
        )
        return [name for name, _, _ in self.cases]

    def configure_strata(self) -> Sequence[Any]:
        return [classes for _, _, classes in self.cases]

    def check_cases(self, indices: Sequence[int]) -> None:
        channels = self.configure_preparation().channels
        for index in indices:
            check_volume(self.cases[index][1], channels)

    def configure_region(self) -> FindRegion | None:
        """Choose the part of a volume that is prepared; a hook to override.

        Returns:
            Something that can be pickled, see
            :meth:`gvsl_lightning.datamodules.segmentation_cases.SegmentationDataModule.configure_region`;
            it gets no label map. None: volumes are prepared as a whole.
        """
        return None

    def configure_dataset(self, indices: Sequence[int], role: Role) -> Dataset[dict[str, Any]]:
        """Volumes of some cases with their targets."""
        cases = [self.cases[index] for index in indices]
        files = [VolumeFile(source, name) for name, source, _ in cases]
        region = self.configure_region()
        volumes: Sequence[VolumeFile] = files
        if self.prepared is not None and role != "test":
            volumes = self.prepared.find(files, self.preparation_settings(), region)
        volumes = anonymous(volumes) if self.anonymise else volumes
        found = [volume for volume in volumes if isinstance(volume, PreparedVolume)]
        items: Dataset[dict[str, Any]] = PreparedVolumes(found, labelled=False)
        if not found:
            items = VolumeDataset(volumes, self.make_preparation(), find_region=region)
        targets = {
            volume.name: self._target(classes)
            for volume, (_, _, classes) in zip(volumes, cases, strict=True)
        }
        return Mapped(items, partial(self._fit(), targets=targets))

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of all volumes in `root`, without targets, one by one.

        A volume that cannot be read becomes a batch of `name` and `error`, so that it does not
        stop the others.
        """
        is_table = os.path.isfile(self.root) and self.root.endswith((".csv", ".json"))
        paths = [path for path, _ in _table(self.root, labelled=False)] if is_table else self.root
        files = find_volumes(paths)
        files = anonymous(files) if self.anonymise else files
        region = self.configure_region()
        volumes = VolumeDataset(files, self.make_preparation(), find_region=region)
        names = [file.name for file in files]
        return self._one_by_one(Tolerant(Mapped(volumes, self._fit()), names))

    def _fit(self) -> Callable[..., dict[str, Any]]:
        size = Resize(self.size) if self.resize else ResizeWithPadOrCrop(self.size)
        return partial(_to_case, fit=size)

    def _classes(self, source: Source, label: Any) -> tuple[int, ...]:
        names = label if isinstance(label, list) else str(label).split(";")
        names = [str(name).strip() for name in names if str(name).strip()]
        classes = set()
        for name in names:
            if name in self.class_names:
                classes.add(self.class_names.index(name))
            elif name.isdigit() and int(name) < len(self.class_names):
                classes.add(int(name))
            else:
                raise InputError(
                    f"{describe(source)} has the label {name!r} and the classes are "
                    f"{', '.join(self.class_names)}; correct {self.root} or class_names."
                )
        if not self.multi_label and len(classes) != 1:
            raise InputError(
                f"{describe(source)} has {len(classes)} labels; give it one, or set multi_label to "
                "true."
            )
        return tuple(sorted(classes))

    def _target(self, classes: tuple[int, ...]) -> Tensor:
        if not self.multi_label:
            return torch.tensor(classes[0])
        target = torch.zeros(len(self.class_names))
        target[list(classes)] = 1.0
        return target


class PhantomClassification(ClassifiedVolumes):
    """Generated chests with and without lesions.

    Args:
        size: Voxels per axis of the generated volumes.
        count: Number of subjects.
        start: Index of the first subject; choose one beyond the subjects of pre-training.
        class_names: Name of the class without and of that with lesions.
        **options: see `ClassifiedVolumes`.
    """

    def __init__(
        self,
        size: tuple[int, int, int] = (64, 64, 64),
        count: int = 60,
        start: int = 1000,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        names = ["healthy", "lesions"] if class_names is None else class_names
        super().__init__(names, size, **options)
        if len(names) != 2 or self.multi_label:
            raise InputError("The phantom's chests have two classes, of which one applies.")
        self.subjects = PhantomDataset("chest_ct", count, size, start=start)

    def configure_cases(self) -> list[str]:
        return self.subjects.names

    def configure_dataset(self, indices: Sequence[int], role: Role) -> Dataset[dict[str, Any]]:
        return Mapped(Subset(self.subjects, indices), _phantom_case)


def _to_case(
    item: dict[str, Any], fit: Transform, targets: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """`image` of the size that the network sees, `name` and perhaps `target`."""
    image = item["image"]
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
        image = image.float() if isinstance(fit, Resize) else image
    fitted = convert_to_tensor(fit(image), track_meta=False).float().clamp(0, 1)
    case = {"image": fitted, "name": item["name"]}
    return case if targets is None else {**case, "target": targets[item["name"]]}


def _phantom_case(subject: dict[str, Any]) -> dict[str, Any]:
    target = torch.tensor(subject["class"])
    return {"image": subject["image"], "target": target, "name": subject["name"]}


def _folders(root: str) -> list[tuple[str, Source, Any]]:
    """Name and source of every volume, and the name of the folder in `root` that it lies in."""
    listed: list[tuple[str, Source, Any]] = []
    for folder in sorted(Path(os.path.abspath(root)).iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            for file in find_volumes(str(folder)):
                source = file.image
                below = os.path.relpath(source, folder) if isinstance(source, str) else file.name
                listed.append((f"{folder.name}/{below}", source, folder.name))
    if not listed:
        raise InputError(f"{root} holds no folder of volumes for each class; make one of each.")
    return listed


def _listed(path: str) -> list[tuple[str, Source, Any]]:
    """Name, source and label of every entry of a table."""
    rows = _table(path)
    common = os.path.commonpath([os.path.dirname(path) for path, _ in rows])
    return [(os.path.relpath(path, common), find_volume(path).image, label) for path, label in rows]


def _table(path: str, labelled: bool = True) -> list[tuple[str, Any]]:
    """Absolute path and label of every entry; without labels, entries may be paths alone."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows: Any = json.load(file) if path.endswith(".json") else list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; correct root.") from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); correct it.") from error
    folder = os.path.dirname(os.path.abspath(path))
    listed = []
    for row in rows if isinstance(rows, list) else [None]:
        if not labelled:
            row = {"label": "", **(row if isinstance(row, Mapping) else {"path": row})}
        entry = row if isinstance(row, Mapping) else {}
        if "label" not in entry or not isinstance(entry.get("path"), str) or not entry["path"]:
            raise InputError(
                f"{path} has the entry {row}; give every entry a path and a label, in a CSV file "
                "under these column names."
            )
        label = "" if entry["label"] is None else entry["label"]
        listed.append((os.path.join(folder, os.path.expanduser(entry["path"])), label))
    if not listed:
        raise InputError(f"{path} lists no volume; add some.")
    return listed
