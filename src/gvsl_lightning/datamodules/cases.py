"""Labelled cases: their split, few-label subsets, and the loaders of fine-tuning and probing."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.transforms.compose import Compose
from monai.transforms.transform import Transform
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from gvsl_lightning.data.datasets import InMemory
from gvsl_lightning.data.preparation import instantiate_transform
from gvsl_lightning.data.splits import (
    Amount,
    Split,
    choose_labelled,
    read_split,
    require_apart_subjects,
    split_cases,
    subjects_of,
)
from gvsl_lightning.datamodules.loading import SeededSampler, loader_options, ranks
from gvsl_lightning.datamodules.volume_data import VolumeDataModule
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.runs.privacy import pseudonyms

Role = Literal["train", "val", "test"]


class CaseDataModule(VolumeDataModule, ABC):
    """Base of all labelled data: a subclass supplies cases, this class splits and loads them.

    Training items are augmented, and everything random in them follows from (seed, epoch, position
    in the epoch): a run depends neither on `num_workers` nor on having been resumed. The processes
    of a distributed run share the validation and test cases out among them, without repeating any.

    Args:
        val: Validation cases: a number, or below 1 a share such as 0.2.
        test: Test cases, likewise.
        split_by: `random`, or `name`: by name the last cases test, those before them validate.
        split_seed: Seed of a random split, apart from `seed`.
        split_file: JSON file `{"train": [...], "val": [...], "test": [...]}` of case names, in the
            place of the options above; cases that it does not name are left out.
        group_by: How names tell the subject: all volumes of a subject are in one part of every
            split; see `gvsl_lightning.data.splits.subjects_of`.
        folds: Cross-validation: the cases that do not test are dealt into so many folds.
        fold: The fold that validates, from 0; the others train.
        labelled: How many of the training cases to use, for studies with few labels: a number, or
            below 1 a share; None: all. With one seed, fewer cases are a subset of more.
        labelled_seed: Seed of this choice.
        batch_size: Training items per batch and device.
        seed: Seed of order and augmentation, 0 or greater.
        augmentation: True: the default of :meth:`configure_augmentation`; False: none; or MONAI
            dictionary transforms, each as `{"class_path": ..., "init_args": {...}}`.
        cache: Keep the prepared training and validation cases in memory, once per process.
        **options: see `gvsl_lightning.datamodules.volume_data.VolumeDataModule`.

    Attributes:
        class_names: Name of every class.
        subject_of: Name of a case -> its subject, after `setup`.
    """

    class_names: list[str]

    def __init__(
        self,
        val: Amount = 0.2,
        test: Amount = 0,
        split_by: Literal["random", "name"] = "random",
        split_seed: int = 0,
        split_file: str | None = None,
        group_by: str | None = None,
        folds: int | None = None,
        fold: int = 0,
        labelled: Amount | None = None,
        labelled_seed: int = 0,
        batch_size: int = 2,
        seed: int = 0,
        augmentation: bool | list[dict[str, Any]] = True,
        cache: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if folds is not None:
            check_range("folds", folds, 2)
            check_range("fold", fold, 0, below=folds)
        check_range("seed", seed, 0)
        check_range("split_seed", split_seed, 0)
        check_range("labelled_seed", labelled_seed, 0)
        check_range("batch_size", batch_size, 1)
        self.val = val
        self.test = test
        self.split_by = split_by
        self.split_seed = split_seed
        self.split_file = split_file
        self.group_by = group_by
        self.folds = folds
        self.fold = fold
        self.labelled = labelled
        self.labelled_seed = labelled_seed
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.cache = cache
        self.split: Split | None = None
        self.subject_of: dict[str, str] = {}
        self._datasets: dict[str, Dataset[dict[str, Any]]] = {}

    @abstractmethod
    def configure_cases(self) -> list[str]:
        """Find all cases; return their different names, sorted."""

    @abstractmethod
    def configure_dataset(self, indices: Sequence[int], role: Role) -> Dataset[dict[str, Any]]:
        """Make the dataset of some cases, without augmentation."""

    @abstractmethod
    def configure_augmentation(self) -> list[Transform]:
        """Make the random transforms of a training item."""

    def set_class_names(self, class_names: list[str]) -> None:
        """Take the classes, given or found in the data, as if they were given."""
        self.class_names = class_names
        # Lightning refuses a model and data that differ in a hyper-parameter
        self.save_hyperparameters({"class_names": class_names})

    def check_cases(self, indices: Sequence[int]) -> None:
        """Raise an InputError that names the first case that is wrong, before training starts."""

    def configure_strata(self) -> Sequence[Any] | None:
        """Class of every case, over which few labelled cases are spread; None: no classes."""
        return None

    def configure_subjects(self, names: Sequence[str]) -> list[str]:
        """Tell the subject of every case; a hook to override."""
        return subjects_of(names, self.group_by)

    def _subject_names(self, names: list[str], subjects: list[str]) -> dict[str, str]:
        if self.anonymise:
            names, subjects = list(pseudonyms(names)), list(pseudonyms(subjects))
        return dict(zip(names, subjects, strict=True))

    def setup(self, stage: str | None = None) -> None:
        """Find, split and check the cases once.

        Raises:
            InputError: A case or an option is wrong, or nothing is left for training.
        """
        if stage == "predict" or self.split is not None:
            return
        names = self.configure_cases()
        split = self.configure_split(names)
        subjects = self.configure_subjects(names)
        self.subject_of = self._subject_names(names, subjects)
        require_apart_subjects(split, subjects)
        train = choose_labelled(
            split.train, self.labelled, self.labelled_seed, self.configure_strata(), subjects
        )
        fits = stage in ("fit", None)
        if fits and not train:
            raise InputError(
                f"Of {len(names)} cases none is left for training; lower val and test or raise "
                "labelled."
            )
        self.split = Split(train, split.val, split.test)
        self.check_cases([*(train if fits else ()), *split.val, *split.test])

    def volume_datasets(self) -> list[Dataset[dict[str, Any]]]:
        """Training and validation cases without augmentation; none before `setup`."""
        if self.split is None:
            return []
        roles: tuple[Role, ...] = ("train", "val")
        return [self._dataset(role) for role in roles if getattr(self.split, role)]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of augmented training items."""
        dataset = self._dataset("train")
        transforms: Sequence[Any] = ()
        if isinstance(self.augmentation, list):
            transforms = [instantiate_transform(spec) for spec in self.augmentation]
        elif self.augmentation:
            transforms = self.configure_augmentation()
        augmented = _Augmented(dataset, [*self.configure_crop(), *transforms])
        sampler = CaseSampler(len(augmented), seed=self.seed, **ranks(self.trainer))
        return self.resumable_loader(
            augmented, sampler, batch_size=self.batch_size, **self._loader_options()
        )

    def configure_crop(self) -> list[Transform]:
        """Transforms that bring a training item to its size, before the augmentation."""
        return []

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Loader of whole validation cases; an empty list where there are none.

        Raises:
            InputError: There are more processes than cases.
        """
        return self._whole("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Loader of whole test cases.

        Raises:
            InputError: There are none, or more processes than cases.
        """
        loader = self._whole("test")
        if not loader:
            raise InputError("There are no test cases; set test, or name some in split_file.")
        return loader

    def _whole(self, role: Role) -> DataLoader[dict[str, Any]] | list[Any]:
        self.setup()
        assert self.split is not None
        count = len(getattr(self.split, role))
        if not count:
            return []
        shares = ranks(self.trainer)
        processes = shares["num_replicas"]
        if count < processes:
            raise InputError(
                f"{role} has {count} of the cases and there are {processes} processes, which need "
                f"one each; raise {role} or lower trainer.devices."
            )
        sampler = ShareSampler(count, **shares) if processes > 1 else None
        return self._one_by_one(self._dataset(role), sampler)

    def _one_by_one(
        self, dataset: Dataset[dict[str, Any]], sampler: Sampler[int] | None = None
    ) -> DataLoader[dict[str, Any]]:
        return DataLoader(dataset, batch_size=1, sampler=sampler, **self._loader_options())

    def _dataset(self, role: Role) -> Dataset[dict[str, Any]]:
        self.setup()
        assert self.split is not None
        if role not in self._datasets:
            dataset = self.configure_dataset(getattr(self.split, role), role)
            if self.cache and role != "test":
                dataset = InMemory(dataset, max(1, self.num_workers))
            self._datasets[role] = dataset
        return self._datasets[role]

    def configure_split(self, names: Sequence[str]) -> Split:
        """Split the cases of these names; a hook to override."""
        if self.split_file is not None:
            return read_split(self.split_file, names)
        return split_cases(
            len(names),
            self.val,
            self.test,
            seed=None if self.split_by == "name" else self.split_seed,
            folds=self.folds,
            fold=self.fold,
            strata=self.configure_strata(),
            groups=self.configure_subjects(names),
        )

    def _loader_options(self) -> dict[str, Any]:
        return {"collate_fn": collate_cases, **loader_options(self.num_workers)}


GEOMETRY = ("affine", "original_affine", "original_shape")
"""Keys of the geometry in items and batches: NumPy arrays of float64 and whole numbers."""


def collate_cases(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch as PyTorch does, but leave the geometry in NumPy arrays.

    Lightning neither rounds these to the trainer's precision nor moves them to a device, of which
    some know no float64.

    Args:
        items: Of one dataset.

    Returns:
        The same keys, `GEOMETRY` stacked in arrays of a leading axis N.
    """
    rest = [{key: value for key, value in item.items() if key not in GEOMETRY} for item in items]
    batch: dict[str, Any] = default_collate(rest)
    geometry = {
        key: np.stack([np.asarray(item[key]) for item in items])
        for key in GEOMETRY
        if key in items[0]
    }
    return {**batch, **geometry}


class ShareSampler(DistributedSampler[Any]):
    """A rank's share of the cases, so that every case is in one share; some have one case less.

    Lightning leaves a `DistributedSampler` in place; its own repeats cases until all ranks have as
    many.

    Args:
        count: Number of cases.
        num_replicas: Number of ranks.
        rank: Number of this rank.
    """

    def __init__(self, count: int, num_replicas: int, rank: int) -> None:
        cases: Any = range(count)
        super().__init__(cases, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.share = cases[rank::num_replicas]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.share)

    def __len__(self) -> int:
        return len(self.share)


class CaseSampler(SeededSampler):
    """Draw (case, seed): every case once per epoch."""

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Cases and seeds; further cases, to give all ranks as many, are drawn from the first."""
        cases = np.resize(random.permutation(self.count), self.total_size)
        return cases, random.integers(2**32, size=self.total_size)


class _Augmented(Dataset[dict[str, Any]]):
    """Items behind random transforms, which are seeded with the item's own number."""

    def __init__(self, items: Dataset[dict[str, Any]], transforms: Sequence[Any]) -> None:
        self.items = items
        self.transform = Compose(transforms)

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        case, seed = index if isinstance(index, tuple) else (index, index)
        self.transform.set_random_state(seed)
        given = dict(self.items[case])
        item: Any = self.transform(dict(given))
        item = item[0] if isinstance(item, list) else item
        # MONAI's transforms leave MetaTensor and turn label maps to float32
        return {
            key: convert_to_tensor(value, dtype=_trained_dtype(given[key]), track_meta=False)
            if isinstance(value, Tensor)
            else value
            for key, value in item.items()
        }


def _trained_dtype(given: Tensor) -> torch.dtype:
    return torch.float32 if given.is_floating_point() else given.dtype
