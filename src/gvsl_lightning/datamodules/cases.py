"""Labelled cases: their split, few-label subsets, and the loaders of fine-tuning and probing."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from monai.transforms.compose import Compose
from monai.transforms.transform import Transform
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from gvsl_lightning.datamodules.pairs import (
    SeededSampler,
    hide_options,
    loader_options,
    ranks,
    resumable_loader,
)
from gvsl_lightning.datamodules.pretrain import InMemory, instantiate_transform
from gvsl_lightning.errors import InputError

Amount = int | float
"""Below 1 a share of the cases, from 1 on their number (the command line may make 5 to 5.0)."""

Role = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Split:
    """Indices of cases, without overlap."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


class CaseDataModule(pl.LightningDataModule, ABC):
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
        folds: Cross-validation: the cases that do not test are dealt into so many folds.
        fold: The fold that validates, from 0; the others train.
        labelled: How many of the training cases to use, for studies with few labels: a number, or
            below 1 a share; None: all. With one seed, fewer cases are a subset of more.
        labelled_seed: Seed of this choice.
        batch_size: Training items per batch and device.
        num_workers: Loader processes.
        seed: Seed of order and augmentation, 0 or greater.
        augmentation: True: the default of :meth:`configure_augmentation`; False: none; or MONAI
            dictionary transforms, each as `{"class_path": ..., "init_args": {...}}`.
        cache: Keep the prepared training and validation cases in memory, once per process.
        anonymise: Write and log pseudonyms in the place of names of cases and paths of data, see
            :mod:`gvsl_lightning.runs.privacy`.

    Attributes:
        class_names: Name of every class.

    Raises:
        InputError: An option is out of range.
    """

    class_names: list[str]

    def __init__(
        self,
        val: Amount = 0.2,
        test: Amount = 0,
        split_by: Literal["random", "name"] = "random",
        split_seed: int = 0,
        split_file: str | None = None,
        folds: int | None = None,
        fold: int = 0,
        labelled: Amount | None = None,
        labelled_seed: int = 0,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
        augmentation: bool | list[dict[str, Any]] = True,
        cache: bool = False,
        anonymise: bool = False,
    ) -> None:
        super().__init__()
        if folds is not None and not (folds >= 2 and 0 <= fold < folds):
            raise InputError(
                f"folds is {folds} and fold {fold}; give at least two folds, and a fold from 0 to "
                "one less."
            )
        if seed < 0 or split_seed < 0 or labelled_seed < 0:
            raise InputError("seed, split_seed or labelled_seed is negative; give 0 or more.")
        if batch_size < 1 or num_workers < 0:
            raise InputError(
                f"batch_size is {batch_size} and num_workers {num_workers}; give 1 or more, and 0 "
                "or more."
            )
        self.save_hyperparameters()
        self.anonymise = anonymise
        if anonymise:
            hide_options(self)
        self.val = val
        self.test = test
        self.split_by = split_by
        self.split_seed = split_seed
        self.split_file = split_file
        self.folds = folds
        self.fold = fold
        self.labelled = labelled
        self.labelled_seed = labelled_seed
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.augmentation = augmentation
        self.cache = cache
        self.split: Split | None = None
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
        """Take the classes, given or found in the data, as if they were given.

        Args:
            class_names: Name of every class.

        Raises:
            InputError: They do not fit the options.
        """
        self.class_names = class_names
        # Lightning refuses a model and data that differ in a hyper-parameter
        self.save_hyperparameters({"class_names": class_names})

    def check_cases(self, indices: Sequence[int]) -> None:
        """Raise an InputError that names the first case that is wrong, before training starts."""

    def configure_strata(self) -> Sequence[Any] | None:
        """Class of every case, over which few labelled cases are spread; None: no classes."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Find, split and check the cases once.

        Raises:
            InputError: A case or an option is wrong, or nothing is left for training.
        """
        if stage == "predict" or self.split is not None:
            return
        names = self.configure_cases()
        split = self.configure_split(names)
        train = choose_labelled(
            split.train, self.labelled, self.labelled_seed, self.configure_strata()
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
        return resumable_loader(
            augmented, sampler, self.trainer, False, self.batch_size, **self._loader_options()
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
        """Split the cases; a hook to override.

        Args:
            names: Name of every case.
        """
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
        )

    def _loader_options(self) -> dict[str, Any]:
        return {"collate_fn": collate_cases, **loader_options(self.num_workers)}


GEOMETRY = ("affine", "original_affine", "original_shape")
"""What an item and a batch say of where the volumes lie: float64 and whole numbers, in NumPy."""


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


class Tolerant(Dataset[dict[str, Any]]):
    """Items of a dataset; one that cannot be read becomes its name and what is wrong with it.

    Args:
        items: The dataset.
        names: Name of every item.
    """

    def __init__(self, items: Dataset[dict[str, Any]], names: Sequence[str]) -> None:
        self.items = items
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load one item, or else `name` and `error`."""
        try:
            return self.items[index]
        except InputError as error:
            return {"name": self.names[index], "error": str(error)}


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


def split_cases(
    count: int,
    val: Amount,
    test: Amount,
    seed: int | None = 0,
    folds: int | None = None,
    fold: int = 0,
    strata: Sequence[Any] | None = None,
) -> Split:
    """Split cases into training, validation and test.

    Args:
        count: Number of cases.
        val: How many, or which share, validate; without effect where there are folds.
        test: How many, or which share, test.
        seed: Of the random order; None: the order stays, and the last cases test.
        folds: Deal the cases that do not test into so many folds; one validates.
        fold: The number of that one.
        strata: Class of every case: in a random order, each part gets its share of every class.

    Returns:
        The split; each part in ascending order.

    Raises:
        InputError: There are too few cases.
    """
    order = list(range(count))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(count).tolist()
        if strata is not None:
            sizes, places = Counter(strata), Counter[Any]()
            shares: dict[int, float] = {}
            for case in order:
                places[strata[case]] += 1
                shares[case] = places[strata[case]] / (sizes[strata[case]] + 1)
            order.sort(key=shares.__getitem__)
    testing = _number("test", test, count)
    rest, tested = order[: count - testing], order[count - testing :]
    if folds is None:
        validating = _number("val", val, count)
        if validating > len(rest):
            raise InputError(
                f"There are {count} cases, and {validating} for validation and {testing} for test "
                "are more; lower val or test."
            )
        trained, validated = (
            rest[: len(rest) - validating],
            rest[len(rest) - validating :],
        )
    elif folds > len(rest):
        raise InputError(f"There are {len(rest)} cases for {folds} folds; make fewer folds.")
    else:
        validated = rest[fold::folds]
        trained = [index for index in rest if index not in set(validated)]
    return Split(*(tuple(sorted(part)) for part in (trained, validated, tested)))


def read_split(path: str | Path, names: Sequence[str]) -> Split:
    """Read which cases train, validate and test.

    Args:
        path: JSON file `{"train": [...], "val": [...], "test": [...]}` of case names.
        names: Names of all cases.

    Returns:
        Their indices, in the order of the file.

    Raises:
        InputError: The file is unreadable, names an unknown case, or names one twice.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = [list(content.get(role, ())) for role in ("train", "val", "test")]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f'{path} cannot be read as {{"train": [...], "val": [...], "test": [...]}} ({error}); '
            "correct it."
        ) from error
    numbers = {name: index for index, name in enumerate(names)}
    listed = [name for part in parts for name in part]
    for name in listed:
        if name not in numbers:
            raise InputError(
                f"{path} names the case {name!r} and there is none of this name; the first ones "
                f"are {', '.join(names[:3])}."
            )
    name, times = Counter(listed).most_common(1)[0] if listed else ("", 0)
    if times > 1:
        raise InputError(f"{path} names the case {name!r} {times} times; name it once.")
    return Split(*(tuple(numbers[name] for name in part) for part in parts))


def choose_labelled(
    cases: Sequence[int],
    labelled: Amount | None,
    seed: int = 0,
    strata: Sequence[Any] | None = None,
) -> tuple[int, ...]:
    """Choose some of the training cases.

    Args:
        cases: Indices of the training cases.
        labelled: How many, or which share, to choose; None: all.
        seed: Of the choice. A smaller choice of the same seed is part of a larger one.
        strata: Class of every case that there is: the classes take turns.

    Returns:
        The chosen ones in ascending order.

    Raises:
        InputError: There are fewer.
    """
    if labelled is None:
        return tuple(cases)
    number = _number("labelled", labelled, len(cases))
    order = np.random.default_rng(seed).permutation(len(cases))
    chosen = [cases[place] for place in order]
    if strata is not None:
        turns: Counter[Any] = Counter()
        keyed = []
        for place, case in enumerate(chosen):
            keyed.append((turns[strata[case]], place, case))
            turns[strata[case]] += 1
        chosen = [case for _, _, case in sorted(keyed)]
    return tuple(sorted(chosen[:number]))


def _number(name: str, amount: Amount, count: int) -> int:
    """How many of `count` an amount is; a share above 0 is at least one."""
    if 0 <= amount < 1:
        return max(round(amount * count), int(amount > 0 and count > 0))
    if not (0 <= amount <= count and amount == int(amount)):
        raise InputError(
            f"{name} is {amount:g} and there are {count} cases; give a share below 1 or a whole "
            f"number up to {count}."
        )
    return int(amount)
