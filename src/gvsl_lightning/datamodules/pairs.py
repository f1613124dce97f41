"""Pairs of different volumes: the sampler, the dataset and the data module of pre-training."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.data.crop import crop
from gvsl_lightning.data.datasets import Mapped
from gvsl_lightning.datamodules.loading import SeededSampler, loader_options, ranks
from gvsl_lightning.datamodules.volume_data import VolumeDataModule, check_size
from gvsl_lightning.errors import InputError, check_range

PairIndex = tuple[int, int, int | None]
"""Index of the fixed volume, index of the moving volume, seed of the crop (None: the centre)."""


class PairDataModule(VolumeDataModule, ABC):
    """Base of all pre-training data: a subclass supplies whole volumes, this class the pairs.

    A training batch holds clean volumes, `fixed` and `moving` (`(N, C, *patch_size)`, float32),
    `fixed_name`, `moving_name` and `seed`, from which a task draws its views. A validation batch
    holds the same without `seed` and, where the volumes have labels, `fixed_label` and
    `moving_label` (`(N, 1, *val_patch_size)`): always the same pairs, cropped at the centre.

    Everything random follows from (seed, epoch, position in the epoch). A run does not depend on
    `num_workers`, and a run that is resumed, at the end or in the middle of an epoch, gets exactly
    the batches of the unbroken run. Pairs and crops do not depend on the number of processes that
    share a step, as long as the sum of their batch sizes is the same and divides the epoch. Views
    do: a task draws them for the batch of a process as a whole, from the seed of its first pair.

    Args:
        patch_size: Size (D, H, W) in voxels of the network's input. Smaller volumes are padded
            with zeros on both sides.
        val_patch_size: The same for validation; None: `patch_size`.
        batch_size: Pairs per batch and device.
        seed: Seed of pairs, crops and views, 0 or greater.
        val_pairs: Number of validation pairs, at most all ordered pairs there are. Every
            validation volume is the fixed one once before any is fixed again. The choice does not
            depend on `seed`, which keeps runs comparable.
        drop_last: Leave out the last pairs of an epoch where they do not fill a batch, unless they
            are all there is.
        **options: see `gvsl_lightning.datamodules.volume_data.VolumeDataModule`.
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (96, 96, 96),
        val_patch_size: tuple[int, int, int] | None = None,
        batch_size: int = 2,
        seed: int = 0,
        val_pairs: int = 20,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        val_patch_size = val_patch_size or patch_size
        check_size("patch_size", patch_size)
        check_size("val_patch_size", val_patch_size)
        check_range("seed", seed, 0)
        check_range("batch_size", batch_size, 1)
        self.patch_size = patch_size
        self.val_patch_size = val_patch_size
        self.batch_size = batch_size
        self.seed = seed
        self.val_pairs = val_pairs
        self.drop_last = drop_last
        self.train_pairs: PairDataset | None = None
        self.validation_pairs: PairDataset | None = None

    @abstractmethod
    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Make the training and the validation volumes; the hook that every subclass overrides.

        Returns:
            Two map-style datasets with a length, the second one possibly empty. Their items have
            `image` (float32, (C, D, H, W), range [0, 1]), `name` (str) and optionally `label`
            (integers, (1, D, H, W)), which only validation uses. Volumes may be NumPy arrays that
            are mapped from files.
        """

    def setup(self, stage: str | None = None) -> None:
        """Build the pairs once, whichever stages follow.

        Raises:
            InputError: There are fewer than two training volumes, or a single validation volume.
        """
        if self.train_pairs is not None:
            return
        training, validation = self.configure_datasets()
        _require_two(_size(training), "training")
        self.train_pairs = PairDataset(training, self.patch_size)
        pairs = validation_pairs(_size(validation), self.val_pairs, self.validation_subjects())
        self.validation_pairs = PairDataset(validation, self.val_patch_size, pairs)

    def validation_subjects(self) -> Sequence[str] | None:
        """Subject of every validation volume, if no pair may be of one; a hook to override."""
        return None

    def volume_datasets(self) -> list[Dataset[dict[str, Any]]]:
        """The volumes that `configure_datasets` made; none before `setup`."""
        pairs = (self.train_pairs, self.validation_pairs)
        return [dataset.volumes for dataset in pairs if dataset is not None]

    def training_volumes(self) -> Dataset[dict[str, Any]]:
        """Training volumes one by one: `image` `(C, *patch_size)`, the centre, and `name`."""
        self.setup("fit")
        assert self.train_pairs is not None
        return Mapped(self.train_pairs.volumes, partial(_centre, patch_size=self.patch_size))

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Loader of training pairs; with a trainer it starts where that starts or resumes."""
        self.setup("fit")
        assert self.train_pairs is not None
        sampler = PairSampler(len(self.train_pairs), seed=self.seed, **ranks(self.trainer))
        return self.resumable_loader(
            self.train_pairs, sampler, drop_last=self.drop_last, **self._loader_options()
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Loader of the validation pairs; an empty list where there are no validation volumes."""
        self.setup("validate")
        if not self.validation_pairs:
            return []
        return DataLoader(self.validation_pairs, shuffle=False, **self._loader_options())

    def test_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """The validation pairs: pre-training has nothing else to test on."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """The validation pairs."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Reduce the pairs' seeds to one Python number while they are still on the host.

        Read on the device instead, the number would make every step wait for the device.
        """
        if "seed" in batch:
            return {**batch, "seed": int(batch["seed"][0])}
        return batch

    def _loader_options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, **loader_options(self.num_workers)}


class PairSampler(SeededSampler):
    """Draw (fixed, moving, seed): each volume is fixed once per epoch, its partner at random.

    A volume that is fixed once more, to give all ranks as many, gets a partner drawn anew.

    Args:
        count: Number of volumes, two or more.
        **options: see `SeededSampler`.
    """

    def __init__(self, count: int, **options: int) -> None:
        _require_two(count, "training")
        super().__init__(count, **options)

    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Fixed volumes, moving volumes, seeds."""
        fixed = np.resize(random.permutation(self.count), self.total_size)
        moving = random.integers(self.count - 1, size=self.total_size)
        moving += moving >= fixed
        return fixed, moving, random.integers(2**63 - 1, size=self.total_size)


class PairDataset(Dataset[dict[str, Any]]):
    """Load two volumes and crop them at the same relative position.

    The position is relative to the free range of the crop, so that the first, central and last
    crops of two volumes of different sizes correspond; along an axis shorter than the patch, the
    volume is padded with zeros on both sides, the odd voxel at the end.

    Args:
        volumes: Items as `PairDataModule.configure_datasets` describes them.
        patch_size: Size (D, H, W) of the crops in voxels.
        pairs: The pairs behind whole-number indices; a `PairSampler` asks for its own instead.
            None: each volume and the next one, for loaders without a sampler such as
            `overfit_batches` makes.
    """

    def __init__(
        self,
        volumes: Dataset[dict[str, Any]],
        patch_size: Sequence[int],
        pairs: Sequence[PairIndex] | None = None,
    ) -> None:
        self.volumes = volumes
        self.patch_size = patch_size
        self.pairs = pairs

    def __len__(self) -> int:
        return _size(self.volumes) if self.pairs is None else len(self.pairs)

    def __getitem__(self, index: int | PairIndex) -> dict[str, Any]:
        """Load one pair.

        Args:
            index: Position in `pairs`, or (fixed, moving, seed).

        Returns:
            `fixed`, `moving`: plain float32 tensors `(C, *patch_size)`; `fixed_name`,
            `moving_name`; with a seed `seed`, without one `fixed_label` and `moving_label` where
            both volumes have labels.
        """
        fixed, moving, seed = index if isinstance(index, tuple) else self._pair(index)
        position = np.full(3, 0.5) if seed is None else np.random.default_rng(seed).random(3)
        volumes = {"fixed": self.volumes[fixed], "moving": self.volumes[moving]}
        pair: dict[str, Any] = {} if seed is None else {"seed": seed}
        with_labels = seed is None and all("label" in volume for volume in volumes.values())
        for role, volume in volumes.items():
            pair[role] = crop(volume["image"], self.patch_size, position)
            pair[f"{role}_name"] = volume["name"]
            if with_labels:
                pair[f"{role}_label"] = crop(volume["label"], self.patch_size, position)
        return pair

    def _pair(self, index: int) -> PairIndex:
        if self.pairs is None:
            return index, (index + 1) % _size(self.volumes), index
        return self.pairs[index]


def _centre(volume: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    return {"image": crop(volume["image"], patch_size), "name": volume["name"]}


def validation_pairs(
    count: int, number: int, subjects: Sequence[str] | None = None
) -> list[PairIndex]:
    """Choose different ordered pairs, each volume fixed once before any is fixed again.

    Args:
        count: Number of volumes: none, or two or more.
        number: Number of pairs wanted.
        subjects: Subject of every volume: no pair is of one subject.

    Returns:
        At most count * (count - 1) triples (fixed, moving, None), always the same ones.
    """
    if count == 0 or number < 1:
        return []
    _require_two(count, "validation")
    random = np.random.default_rng(0)
    order = random.permutation(count).tolist()
    distances = (random.permutation(count - 1) + 1).tolist()
    # lazily: all pairs of 10,000 volumes would fill the memory
    pairs: Iterator[PairIndex] = (
        (order[place], order[(place + distance) % count], None)
        for distance in distances
        for place in range(count)
    )
    if subjects is not None:
        pairs = (pair for pair in pairs if subjects[pair[0]] != subjects[pair[1]])
    return list(islice(pairs, number))


def _size(dataset: Dataset[dict[str, Any]]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _require_two(count: int, role: str) -> None:
    if count < 2:
        raise InputError(
            f"A pair needs at least two {role} volumes and there is {count or 'none'}; "
            "add volumes or change how they are split into training and validation."
        )
