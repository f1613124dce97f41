"""Labelled volumes for segmentation: from files or generated."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.transforms.croppad.dictionary import (
    RandCropByLabelClassesd,
    RandSpatialCropd,
    SpatialPadd,
)
from monai.transforms.transform import Transform
from monai.transforms.utility.dictionary import CastToTyped
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gvsl_lightning.data.crop import array_to_tensor
from gvsl_lightning.data.datasets import Mapped, Tolerant, VolumeDataset
from gvsl_lightning.data.find import find_volumes, lies_in
from gvsl_lightning.data.prepared import PreparedVolumes, open_prepared
from gvsl_lightning.data.read import check_volume, read_geometry, read_label, require_one_grid
from gvsl_lightning.data.regions import FindRegion
from gvsl_lightning.data.source import VolumeFile, anonymous, describe
from gvsl_lightning.datamodules.cases import CaseDataModule, Role
from gvsl_lightning.datamodules.phantom import PhantomDataset
from gvsl_lightning.datamodules.volume_data import FileDataModule, check_size
from gvsl_lightning.errors import InputError
from gvsl_lightning.phantom import SCENES
from gvsl_lightning.transforms.augmentation import augmentation_transforms


class LabelledVolumes(CaseDataModule):
    """Base of the segmentation data: patches for training, whole volumes for everything else.

    A training batch holds `image` (float32, `(N, C, *patch_size)`, about [0, 1]) and `label`
    (int64, `(N, 1, *patch_size)`, class indices and perhaps `ignore_index`). Other batches hold one
    whole volume: `image` on the prepared grid, `affine` (NumPy array, float64, (1, 4, 4), from its
    voxels to mm), and `original_affine`, `original_shape` of the volume on disk (NumPy arrays too).
    `label` lies on the prepared grid in validation and on the original one in test. All have
    `name`; volumes from disk have `source`.

    Args:
        class_names: Name of every class, the background first.
        patch_size: Size (D, H, W) of the training patches; smaller volumes are padded with zeros.
        balanced: Centre the patches on all classes equally often, instead of anywhere.
        ignore_index: Label value of voxels that neither train nor count.
        **options: see `gvsl_lightning.datamodules.cases.CaseDataModule`.
    """

    def __init__(
        self,
        class_names: list[str],
        patch_size: tuple[int, int, int] = (96, 96, 96),
        balanced: bool = True,
        ignore_index: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_size("patch_size", patch_size)
        self.patch_size = patch_size
        self.balanced = balanced
        self.ignore_index = ignore_index
        self.set_class_names(class_names)

    def set_class_names(self, class_names: list[str]) -> None:
        if len(class_names) < 2 or len(set(class_names)) < len(class_names):
            raise InputError(
                f"class_names is {class_names}; give the background and one or more other names, "
                "all different."
            )
        if self.ignore_index is not None and 0 <= self.ignore_index < len(class_names):
            raise InputError(
                f"ignore_index is {self.ignore_index}, which is the class "
                f"{class_names[self.ignore_index]!r}; give a number that is no class."
            )
        super().set_class_names(class_names)

    def configure_crop(self) -> list[Transform]:
        """Pad and crop to `patch_size`; of prepared volumes, nothing but the crop is read."""
        keys = ("image", "label")
        classes = len(self.class_names)
        crop: Transform = (
            RandCropByLabelClassesd(
                keys,
                "label",
                self.patch_size,
                ratios=[1] * classes,
                num_classes=classes,
                warn=False,
            )
            if self.balanced
            else RandSpatialCropd(keys, self.patch_size, random_size=False)
        )
        return [SpatialPadd(keys, self.patch_size), crop, CastToTyped(("image",), torch.float32)]

    def configure_augmentation(self) -> list[Transform]:
        return augmentation_transforms(("image", "label"))


class SegmentationDataModule(LabelledVolumes, FileDataModule):
    """Volumes and label maps from a folder, pattern or list; volumes alone for prediction.

    Every label map is read and compared with its image before training starts.

    Args:
        root: Folder, pattern, list or `dataset.json`; see
            `gvsl_lightning.data.find.find_volumes`. In prediction all its volumes are
            segmented, with or without labels.
        class_names: see `LabelledVolumes`.
        label_root: Folder of label maps named like the images.
        label_values: Class index of each value in the label maps, such as `{205: 1, 420: 2}`; 0
            stays the background. None: the values are the class indices.
        prepared: Folder into which `python -m gvsl_lightning prepare` prepared the volumes of
            `root` and `label_root` with the same options: training and validation cases are read
            from there. None: they are prepared at each access, or once if `cache` is true.
        **options: see `LabelledVolumes` and
            `gvsl_lightning.datamodules.volume_data.FileDataModule` (`modality`, `spacing`, ...).

    Attributes:
        is_predicted: Tells which volumes already have a prediction.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        class_names: list[str] | None = None,
        label_root: str | None = None,
        label_values: dict[int, int] | None = None,
        prepared: str | None = None,
        **options: Any,
    ) -> None:
        if root is None:
            raise InputError("root is missing; add --data.root=FOLDER.")
        super().__init__(class_names or [], **options)
        self.root = root
        self.label_root = label_root
        self.set_label_values(label_values)
        self.prepared = open_prepared(prepared)
        self.files: list[VolumeFile] = []
        self.is_predicted: Callable[[VolumeFile], bool] = lambda file: False

    def set_label_values(self, label_values: dict[int, int] | None) -> None:
        """Take the class index of each value in the label maps; None: the values are the indices.

        Raises:
            InputError: A value is mapped to no class.
        """
        classes = range(len(self.class_names))
        values = {value: value for value in classes} if label_values is None else label_values
        values = {0: 0, **values}
        for value, index in values.items():
            if index not in classes:
                raise InputError(
                    f"label_values maps {value} to class {index} and class_names has the classes "
                    f"0 to {len(classes) - 1}; correct one of them."
                )
        if self.ignore_index is not None:
            values = {**values, self.ignore_index: self.ignore_index}
        self.label_values = values

    def configure_cases(self) -> list[str]:
        """Find the volumes and their label maps."""
        self.files = self.find_files()
        return [file.name for file in self.files]

    def find_files(self) -> list[VolumeFile]:
        """Find the labelled volumes and their label maps; a hook to override."""
        return find_volumes(self.root, self.label_root, duplicates="refuse")

    def find_predicted(self) -> Sequence[VolumeFile]:
        """Find the volumes to predict; a hook to override."""
        return [
            file
            for file in find_volumes(self.root)
            if not (self.label_root and lies_in(file.image, self.label_root))
        ]

    def check_cases(self, indices: Sequence[int]) -> None:
        """Compare each label map with its image and with the known values."""
        assert self.split is not None
        training = [self.files[index] for index in self.split.train]
        subjects = self.configure_subjects([file.name for file in training])
        self.announce(training, self.patch_size, len(set(subjects)))
        channels = self.configure_preparation().channels
        check = partial(check_label, values=self.label_values, channels=channels)
        files = [self.files[index] for index in indices]
        with ThreadPoolExecutor(max(2, self.num_workers)) as pool:
            for _ in track(pool.map(check, files), "Checking labels", len(files), transient=True):
                pass

    def configure_region(self) -> FindRegion | None:
        """Choose the part of a volume that is prepared; a hook to override.

        It is called with the volume as stored and its label map, or None in prediction. Beyond the
        region, predictions are background.

        Returns:
            Something that can be pickled; None: volumes are prepared as a whole.
        """
        return None

    def configure_dataset(self, indices: Sequence[int], role: Role) -> Dataset[dict[str, Any]]:
        """Volumes of some cases with their labels."""
        files = [self.files[index] for index in indices]
        change = partial(_to_case, label_values=self.label_values, train=role == "train")
        if self.prepared is not None and role != "test":
            settings, region = self.preparation_settings(), self.configure_region()
            volumes = self.prepared.find(files, settings, region, labelled=True)
            volumes = anonymous(volumes) if self.anonymise else volumes
            return Mapped(PreparedVolumes(volumes, labelled=True, geometry=role != "train"), change)
        files = anonymous(files) if self.anonymise else files
        # a test label stays whole: predictions are compared with it on the grid of the file
        labels = {"labelled": True, "stored_labels": role == "test"}
        return Mapped(self._volumes(files, **labels), change)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of all volumes in `root`, one by one.

        A volume that cannot be read becomes a batch of `name` and `error`, so that it does not
        stop the others; one that `is_predicted` is left out.
        """
        found = self.find_predicted()
        found = anonymous(found) if self.anonymise else found
        files = [file for file in found if not self.is_predicted(file)]
        return self._one_by_one(Tolerant(self._volumes(files), [file.name for file in files]))

    def _volumes(self, files: Sequence[VolumeFile], **labels: bool) -> VolumeDataset:
        region = self.configure_region()
        return VolumeDataset(files, self.make_preparation(), find_region=region, **labels)


class PhantomSegmentation(LabelledVolumes):
    """Generated anatomy with its label maps.

    Args:
        scene: A name in `gvsl_lightning.phantom.SCENES`.
        size: Voxels per axis of the generated volumes.
        count: Number of subjects. They are those of `Phantom`: its first `num_val` validate there.
        start: Index of the first subject; choose one beyond the subjects of pre-training.
        class_names: None: those of the scene.
        patch_size: None: the whole volume.
        **options: see `LabelledVolumes`.
    """

    def __init__(
        self,
        scene: str = "cardiac_ct",
        size: tuple[int, int, int] = (64, 64, 64),
        count: int = 60,
        start: int = 1000,
        class_names: list[str] | None = None,
        patch_size: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> None:
        self.subjects = PhantomDataset(scene, count, size, start=start)
        names = list(SCENES[scene].labels)
        if class_names is not None and len(class_names) != len(names):
            raise InputError(
                f"class_names has {len(class_names)} names and {scene} the classes "
                f"{', '.join(names)}; give as many or leave it out."
            )
        super().__init__(
            names if class_names is None else class_names,
            patch_size=size if patch_size is None else patch_size,
            **options,
        )

    def configure_cases(self) -> list[str]:
        return self.subjects.names

    def configure_dataset(self, indices: Sequence[int], role: Role) -> Dataset[dict[str, Any]]:
        return Mapped(Subset(self.subjects, indices), _phantom_case)


def check_label(file: VolumeFile, values: dict[int, int], channels: int = 1) -> None:
    """Read a label map; compare it with the grid of its image and with the known values."""
    check_volume(file.image, channels)
    if file.label is None:
        raise InputError(
            f"{describe(file.image)} has no label map; add it, or leave the volume out of the "
            "split."
        )
    shape, affine = read_geometry(file.image)
    label = read_label(file.label)
    require_one_grid(file, shape, affine, label)
    for value in torch.unique(label.as_tensor()).tolist():
        if value not in values:
            raise InputError(
                f"{file.label} holds the value {value}, which is none of "
                f"{', '.join(map(str, values))}; correct label_values or class_names."
            )


def _to_case(item: dict[str, Any], label_values: dict[int, int], train: bool) -> dict[str, Any]:
    """Class indices in place of label values; a mapped image stays mapped for training."""
    image, label = item["image"], item["label"]
    if isinstance(image, np.ndarray):
        image, label = torch.from_numpy(image), array_to_tensor(label)
    case = {"image": image, "label": _classes(label, label_values), "name": item["name"]}
    return case if train else {**item, **case, "image": image.float()}


def _classes(label: Tensor, label_values: dict[int, int]) -> Tensor:
    """Class index of every voxel of a label map that holds known values only."""
    values = torch.tensor(sorted(label_values), dtype=label.dtype)
    classes = torch.tensor([label_values[value] for value in sorted(label_values)])
    return classes[torch.searchsorted(values, label.contiguous())]


def _phantom_case(subject: dict[str, Any]) -> dict[str, Any]:
    """A subject with the geometry of a volume of 1 mm voxels."""
    affine = np.eye(4)
    return {
        "image": subject["image"],
        "label": subject["label"].long(),
        "name": subject["name"],
        "affine": affine,
        "original_affine": affine,
        "original_shape": np.array(subject["image"].shape[1:]),
    }
