"""Pre-training on a folder, pattern or list of volumes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import Dataset

from gvsl_lightning.data.datasets import InMemory, VolumeDataset
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume, PreparedVolumes
from gvsl_lightning.data.read import check_volume
from gvsl_lightning.data.source import (
    VolumeFile,
    anonymous,
    describe,
    evenly,
    first_file,
    identity,
)
from gvsl_lightning.data.splits import read_split, subjects_of
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.datamodules.volume_data import FileDataModule
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.runs.privacy import is_pseudonym

CHECKED = 1000
"""Headers that are checked before training starts, at most."""


class PretrainDataModule(PairDataModule, FileDataModule):
    """Pairs from a folder, glob pattern or list of CT or MR volumes.

    Every volume is read, turned to RAS, resampled if `spacing` is given, brought to [0, 1] and,
    if wanted, cropped to its foreground. Every file is checked while it is read, and its header
    before training starts; of more than 1,000 files, the headers of 1,000 evenly chosen ones.

    With many volumes, `python -m gvsl_lightning prepare` does all this once. Its folder is a
    `root` or `val_root` too: only the crops are read from it.

    Args:
        root: Folder, pattern, list or `dataset.json`; see
            `gvsl_lightning.data.find.find_volumes`. Or a folder of prepared volumes, or
            the fsspec URL of one, such as `s3://bucket/folder`: the options that prepare a volume
            must be the same as in `prepare`.
        cache: Keep all prepared volumes in memory, float32, once per process of a distributed
            run. Otherwise each pair is read from its files again.
        val_root: Validation volumes, like `root`; those that `root` holds too do not train.
            Otherwise some of `root` are set aside.
        val_count: Number of volumes to set aside. None: `val_fraction` of them.
        val_fraction: Share of the volumes to set aside, in [0, 1); none of fewer than four
            volumes, and otherwise never a single one, which makes no pair.
        split_seed: Seed of the choice of these volumes, apart from `seed` so that runs with other
            seeds stay comparable.
        split_file: JSON file `{"train": [...], "val": [...], "test": [...]}` of names, as labelled
            data take it: those of `val` are set aside and those of `test` are left out.
        group_by: How names tell the subject: all volumes of a subject train or all validate; see
            `gvsl_lightning.data.splits.subjects_of`.
        across_subjects: Leave pairs of one subject out of the validation.
        label_root: Folder of label maps named like the images. Labels, from here or from the list
            in `root`, are not used for training: they measure registration in validation. Prepared
            volumes have their own.
        cache_folder: Where prepared volumes behind a URL are copied to, whole, at their first
            access; it grows to the size of all of them. None: crops are read by ranges of bytes at
            every access, see `gvsl_lightning.data.remote.RemoteArray`. Empty it after
            volumes behind the URL have changed.
        **options: see `PairDataModule` (`patch_size`, `batch_size`, ...) and
            `gvsl_lightning.datamodules.volume_data.FileDataModule` (`modality`, `spacing`, ...).
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        cache: bool = False,
        val_root: str | list[str] | None = None,
        val_count: int | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        split_file: str | None = None,
        group_by: str | None = None,
        across_subjects: bool = False,
        label_root: str | None = None,
        cache_folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_range("val_fraction", val_fraction, 0, below=1)
        self.root = root
        self.cache = cache
        self.val_root = val_root
        self.val_count = val_count
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.split_file = split_file
        self.group_by = group_by
        self.across_subjects = across_subjects
        self._validating: list[VolumeFile] = []
        self.label_root = label_root
        self.cache_folder = cache_folder

    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Find the files, split them and check their headers."""
        channels = self.configure_preparation().channels
        training, validation = self.configure_files()
        self._validating = validation
        for file in _checked([*training, *validation]):
            check_volume(file.image, channels)
        subjects = self.configure_subjects([file.name for file in training])
        self.announce(training, self.patch_size, len(set(subjects)))
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
        for file in _checked(validation):
            if file.label is not None:
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
            validation = self._find(self.val_root)
            if len({_is_anonymous(file) for file in (*files, *validation)}) > 1:
                raise InputError(
                    f"Of {self.root} and {self.val_root} only one was prepared with anonymise, so "
                    "volumes in both cannot be found; prepare both alike."
                )
            validating = {_origin(file) for file in validation}
            return [file for file in files if _origin(file) not in validating], validation
        if self.split_file is not None:
            split = read_split(self.split_file, [file.name for file in files])
            held = {*split.val, *split.test}
            training = [file for index, file in enumerate(files) if index not in held]
            return training, [files[index] for index in split.val]
        chosen = self.configure_split(len(files), self._validation_count(len(files)))
        subjects = self.configure_subjects([file.name for file in files])
        validating_subjects = {subjects[index] for index in chosen}
        chosen = {index for index, subject in enumerate(subjects) if subject in validating_subjects}
        return (
            [file for index, file in enumerate(files) if index not in chosen],
            [file for index, file in enumerate(files) if index in chosen],
        )

    def configure_subjects(self, names: Sequence[str]) -> list[str]:
        """Tell the subject of every volume; a hook to override."""
        return subjects_of(names, self.group_by)

    def validation_subjects(self) -> Sequence[str] | None:
        names = [file.name for file in self._validating]
        return self.configure_subjects(names) if self.across_subjects else None

    def find_files(self) -> list[VolumeFile]:
        """Find the volumes of `root`, each once: no pair is of a volume and itself."""
        if self.root is None:
            raise InputError("root is missing; add --data.root=FOLDER.")
        return self._find(self.root)

    def configure_split(self, count: int, validation: int) -> set[int]:
        """Choose `validation` of `count` volumes, sorted by name, by index; a hook to override."""
        order = np.random.default_rng(self.split_seed).permutation(count)
        return set(order[:validation].tolist())

    def _validation_count(self, count: int) -> int:
        chosen = self.val_count
        if chosen is None:
            chosen = max(2, round(self.val_fraction * count)) if self.val_fraction else 0
            if count - chosen < 2:
                chosen = 0
                rank_zero_warn(
                    f"{self.root} holds {count} volumes, and all of them train: the run has no "
                    "validation scores. Add volumes, or give others as val_root."
                )
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
            settings["label_root"] = folder.hide(absolute(self.label_root))
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
        volumes = VolumeDataset(files, self.make_preparation(), labelled)
        return InMemory(volumes, max(1, self.num_workers)) if self.cache and files else volumes


def _checked(files: Sequence[VolumeFile]) -> list[VolumeFile]:
    """The volumes whose headers are checked."""
    return evenly([file for file in files if not isinstance(file, PreparedVolume)], CHECKED)


def absolute(root: str | Sequence[str]) -> Any:
    """The same path, or paths, from the root of the file system."""
    if isinstance(root, str | os.PathLike):
        return os.path.abspath(os.path.expanduser(root))
    return [absolute(path) for path in root]


def _origin(file: VolumeFile) -> tuple[Any, ...]:
    """Identity of the file on disk that a volume, prepared or not, comes from."""
    return identity(file.source if isinstance(file, PreparedVolume) else first_file(file.image))


def _is_anonymous(file: VolumeFile) -> bool:
    return isinstance(file, PreparedVolume) and is_pseudonym(file.source)
