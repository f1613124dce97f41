"""The ten tasks of the Medical Segmentation Decathlon, for pre-training and for segmentation.

Source: Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022,
http://medicaldecathlon.com.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from monai.apps.datasets import DecathlonDataset
from monai.apps.utils import download_and_extract

from gvsl_lightning.data.find import find_volumes, load_json
from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.prepared import PreparedFolder
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import subjects_of
from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.datamodules.segmentation_cases import SegmentationDataModule
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.transforms.intensity import Modality


class Decathlon(PretrainDataModule):
    """Pairs of volumes of one task of the Medical Segmentation Decathlon.

    The intensity preset and the number of channels follow from the task's `dataset.json`. Training
    images only, since the test images have no labels to measure registration with; the last ones
    by name validate.

    Args:
        root: Folder that holds the folder of the task, or into which it is downloaded. Or the
            folder that `prepare` made of the task.
        task: Name of the task and of its folder, such as `Task04_Hippocampus`.
        download: Download the task, checked and unpacked by MONAI, where its folder is missing.
        modality: Intensity preset; None: `ct` for CT, `mri` for everything else.
        val_count: How many of the last cases validate; None: `val_fraction` of them. `split_seed`
            has no effect.
        test_count: How many cases, the last ones by name, are left out altogether: those before
            them validate.
        **options: see `PretrainDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        task: str = "Task04_Hippocampus",
        download: bool = False,
        modality: Modality | None = None,
        val_count: int | None = None,
        test_count: int = 0,
        **options: Any,
    ) -> None:
        self.prepared = PreparedFolder.among(root)
        self.folder = self.prepared.path if self.prepared else _task_folder(root, task)
        found = self.prepared.root if self.prepared else str(self.folder)
        super().__init__(found, val_count=val_count, **options)
        self.task = task
        self.download = download
        self.preset = modality
        self.test_count = test_count

    def prepare_data(self) -> None:
        """Download the task if it is wanted and missing."""
        if self.download and self.prepared is None:
            _download(self.folder)

    def configure_preparation(self) -> Preparation:
        """Take preset and channels from `dataset.json` or from the prepared volumes."""
        if self.prepared is not None:
            settings = self.prepared.settings
            modality = self.preset or settings["modality"] or self.preparation.modality
            return replace(self.preparation, modality=modality, channels=settings["channels"])
        modalities = _modalities(self.folder)
        modality = _preset(self.folder, modalities, self.preset)
        return replace(self.preparation, modality=modality, channels=len(modalities))

    def find_files(self) -> list[VolumeFile]:
        """Find the training images, without the cases kept for a test."""
        files = super().find_files()
        if not 0 <= self.test_count <= len(files) - 2:
            raise InputError(
                f"test_count is {self.test_count} and {self.folder} has {len(files)} cases; leave "
                "at least two for training."
            )
        subjects = self.configure_subjects([file.name for file in files])
        held = set(subjects[len(files) - self.test_count :])
        return [file for file, subject in zip(files, subjects, strict=True) if subject not in held]

    def configure_subjects(self, names: Sequence[str]) -> list[str]:
        """Tell the subject of every case: that of the task, unless `group_by` says another one."""
        return _subjects(self.task, self.group_by, names)

    def configure_split(self, count: int, validation: int) -> set[int]:
        """Validate on the last cases by name."""
        return set(range(count - validation, count))


class DecathlonSegmentation(SegmentationDataModule):
    """Volumes and label maps of one task of the Medical Segmentation Decathlon.

    Classes, intensity preset and number of channels follow from the task's `dataset.json`. Training
    images only, since the test images have no labels. By name, the last cases test and those before
    them validate: a pre-training on `Decathlon` with `test_count` as large as `test` has seen none
    of the test cases.

    Args:
        root: Folder that holds the folder of the task, or into which it is downloaded.
        task: see `Decathlon`.
        download: see `Decathlon`.
        class_names: Name of every class, the background first; None: those of `dataset.json`,
            which are known once the task is there. A root without the task predicts its own
            volumes; class names, modality and channels must then be given, as a checkpoint does.
        label_values: Class index of each value in the label maps, together with `class_names`.
        modality: Intensity preset; None: `ct` for CT, `mri` for everything else.
        channels: Channels of every volume; None: as many as modalities.
        split_by: `name`, or `random`.
        **options: see `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        task: str = "Task04_Hippocampus",
        download: bool = False,
        class_names: list[str] | None = None,
        label_values: dict[int, int] | None = None,
        modality: Modality | None = None,
        channels: int | None = None,
        split_by: Literal["random", "name"] = "name",
        **options: Any,
    ) -> None:
        folder = _task_folder(root, task)
        if class_names is None and label_values is not None:
            raise InputError("label_values are given without class_names; give both or neither.")
        super().__init__(
            str(folder),
            # any two until dataset.json, which may have to be downloaded first, names them
            class_names or ["background", "structure"],
            label_values=label_values,
            modality=modality or "none",
            channels=channels or 1,
            split_by=split_by,
            **options,
        )
        self.folder = folder
        self.task = task
        self.download = download
        self._given = (class_names, modality, channels)
        if folder.exists():
            self._read_description()

    def prepare_data(self) -> None:
        """Download the task if it is wanted and missing."""
        if self.download:
            _download(self.folder)

    def setup(self, stage: str | None = None) -> None:
        self._read_description()
        super().setup(stage)

    def configure_subjects(self, names: Sequence[str]) -> list[str]:
        """Tell the subject of every case: that of the task, unless `group_by` says another one."""
        return _subjects(self.task, self.group_by, names)

    def find_predicted(self) -> Sequence[VolumeFile]:
        """Find the images of the task; all volumes of `root` if it does not hold the task."""
        if self.folder.exists():
            return super().find_predicted()
        return find_volumes(str(self.folder.parent))

    def _read_description(self) -> None:
        class_names, modality, channels = self._given
        if None not in self._given and not self.folder.exists():
            return
        modalities = _modalities(self.folder)
        self.preparation = replace(
            self.preparation,
            modality=_preset(self.folder, modalities, modality),
            channels=channels or len(modalities),
        )
        if class_names is None:
            labels = _labels(self.folder)
            label_values = {value: index for index, value in enumerate(labels)}
            self.set_class_names(list(labels.values()))
            self.set_label_values(label_values)
            self.save_hyperparameters({"label_values": label_values})


def _hippocampus_subject(name: str) -> str:
    """Cases 2k - 1 and 2k are the two hippocampi of one subject."""
    digits = re.search(r"(\d+)\D*$", name)
    return f"subject {(int(digits[1]) + 1) // 2}" if digits else name


_SUBJECTS = {"Task04_Hippocampus": _hippocampus_subject}
"""Task -> the subject of a case by its name."""


def _subjects(task: str, group_by: str | None, names: Sequence[str]) -> list[str]:
    own = _SUBJECTS.get(task) if group_by is None else None
    return [own(name) for name in names] if own else subjects_of(names, group_by)


def _task_folder(root: str | None, task: str) -> Path:
    if root is None:
        raise InputError(f"root is missing; add --data.root=FOLDER, where FOLDER holds {task}.")
    return Path(root).expanduser() / task


def _download(folder: Path) -> None:
    """Download the task that a folder is named after, if the folder is missing."""
    if folder.exists():
        return
    task = folder.name
    if task not in DecathlonDataset.resource:
        raise InputError(
            f"There is no task {task} to download; choose one of "
            f"{', '.join(DecathlonDataset.resource)}."
        )
    archive = folder.with_suffix(".tar")
    try:
        download_and_extract(
            DecathlonDataset.resource[task],
            archive,
            folder.parent,
            hash_val=DecathlonDataset.md5[task],
            hash_type="md5",
        )
    except Exception as error:  # MONAI raises none more exact where there is no network
        raise InputError(
            f"{archive} cannot be downloaded and unpacked ({cause_of(error)}); remove the "
            "incomplete download and try again."
        ) from error


def _modalities(folder: Path) -> list[str]:
    return list(_numbered_names(folder, "modality", '{"0": "MRI"}').values())


def _preset(folder: Path, modalities: list[str], given: Modality | None) -> Modality:
    if given == "ct" and "CT" not in modalities:
        raise InputError(
            f"modality is ct and {folder / 'dataset.json'} says {', '.join(modalities)}; set "
            "modality to null or mri."
        )
    return given or ("ct" if "CT" in modalities else "mri")


def _labels(folder: Path) -> dict[int, str]:
    """Name of the class of each value in the label maps, ascending."""
    labels = _numbered_names(folder, "labels", '{"0": "background", "1": "liver"}')
    return dict(sorted((int(value), name) for value, name in labels.items()))


def _numbered_names(folder: Path, key: str, example: str) -> dict[str, str]:
    """An entry of `dataset.json` that leads from numbers to names."""
    description = folder / "dataset.json"
    if not description.is_file():
        raise InputError(
            f"{description} does not exist; correct root and task or set download to true."
        )
    content = load_json(str(description))
    named = content.get(key) if isinstance(content, dict) else None
    if not isinstance(named, dict) or "0" not in named or not all(map(str.isdigit, named)):
        raise InputError(f'{description} has no "{key}" such as {example}; add it.')
    return {number: str(name) for number, name in named.items()}
