"""Generated subjects as a dataset, and pairs of them for pre-training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import check_range
from gvsl_lightning.phantom.scenes import check_subject, generate_phantom


class PhantomDataset(Dataset[dict[str, Any]]):
    """Generated subjects as items of a map-style dataset.

    Args:
        scene: A name in ``gvsl_lightning.phantom.SCENES``.
        length: Number of subjects.
        size: Voxels per axis (D, H, W).
        seed: Chooses the population.
        start: Index of the first subject.

    Items have ``image`` (float32 tensor (1, D, H, W), range [0, 1]), ``label`` (uint8 tensor
    (1, D, H, W)), ``class`` (int) and ``name`` (str). An item is generated when it is asked for.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        scene: str,
        length: int,
        size: Sequence[int] = (64, 64, 64),
        seed: int = 0,
        start: int = 0,
    ) -> None:
        check_range("length", length, 0)
        check_subject(scene, start, size, seed)
        self.scene = scene
        self.length = length
        self.size = tuple(size)
        self.seed = seed
        self.start = start

    @property
    def names(self) -> list[str]:
        """Name of every subject."""
        numbers = range(self.start, self.start + self.length)
        return [f"{self.scene}-{number:05d}" for number in numbers]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Generate subject ``start + index``."""
        if not 0 <= index < self.length:
            raise IndexError(f"subject {index} of {self.length}")
        number = self.start + index
        subject = generate_phantom(self.scene, number, self.size, self.seed)
        return {
            "image": torch.from_numpy(subject["image"])[None],
            "label": torch.from_numpy(subject["label"])[None],
            "class": subject["class"],
            "name": self.names[index],
        }


class Phantom(PairDataModule):
    """Pairs of generated subjects: pre-training data that needs no download.

    The subjects are always the same ones, whatever the ``seed`` of the pairs: the first
    ``num_val`` of the scene for validation, the ``num_train`` after them for training.

    Args:
        scene: ``cardiac_ct``, ``coronary_ct``, ``brain_mr`` or ``chest_ct``.
        size: Voxels per axis of the generated volumes.
        num_train: Number of training subjects.
        num_val: Number of validation subjects.
        patch_size: Size of the network's input; by default the whole volume.
        **options: see ``PairDataModule``.
    """

    def __init__(
        self,
        scene: str = "cardiac_ct",
        size: tuple[int, int, int] = (64, 64, 64),
        num_train: int = 200,
        num_val: int = 20,
        patch_size: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(patch_size=size if patch_size is None else patch_size, **options)
        self.validation = PhantomDataset(scene, num_val, size)
        self.training = PhantomDataset(scene, num_train, size, start=num_val)

    def configure_datasets(self) -> tuple[PhantomDataset, PhantomDataset]:
        """Training and validation subjects; no subject is in both."""
        return self.training, self.validation
