"""Datasets of volumes: read from files, kept in memory, changed one by one."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from monai.utils.type_conversion import convert_to_tensor
from rich.progress import track
from torch.utils.data import Dataset

from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.read import read_case
from gvsl_lightning.data.regions import FindRegion, crop_to
from gvsl_lightning.data.source import PackedFiles, VolumeFile, first_file
from gvsl_lightning.errors import InputError

Items = Dataset[dict[str, Any]]


class VolumeDataset(Items):
    """Volumes that are read and prepared at each access.

    An item holds `image` (float32, (C, D, H, W)), `name`, `affine` (from its voxels to mm),
    `original_affine` and `original_shape` of the volume on disk, `source` (its first file) and, if
    wanted, `label` (int32 or int64, (1, D, H, W)).

    Args:
        files: The volumes.
        preparation: From the stored volume to the item.
        labelled: Take `label` along.
        stored_labels: Leave `label` on the grid of the file.
        find_region: Choose the part of a volume that is prepared; None: the whole volume.
    """

    def __init__(
        self,
        files: Sequence[VolumeFile],
        preparation: Preparation,
        labelled: bool = False,
        stored_labels: bool = False,
        find_region: FindRegion | None = None,
    ) -> None:
        self.files = PackedFiles(files)
        self.preparation = preparation
        self.labelled = labelled
        self.stored_labels = stored_labels
        self.find_region = find_region

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self.files[index]
        case = read_case(file, self.preparation.channels, self.labelled)
        original = case["image"]
        label = case.get("label")
        if self.stored_labels:
            case.pop("label", None)
        if self.find_region is not None:
            region = self.find_region(original, label)
            case = {key: crop_to(volume, region) for key, volume in case.items()}
        prepared = self.preparation(dict(case), file.image)
        item = {
            "image": convert_to_tensor(prepared["image"], track_meta=False).float(),
            "name": file.name,
            "affine": prepared["image"].affine.numpy(),
            "original_affine": original.affine.numpy(),
            "original_shape": np.array(original.shape[1:]),
            "source": first_file(file.image),
        }
        label = prepared.get("label", label)
        if label is not None:
            item["label"] = convert_to_tensor(label, track_meta=False)
        return item


class Mapped(Items):
    """Items of a dataset, each changed by a function, which must be picklable."""

    def __init__(self, items: Items, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.items = items
        self.change = change

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.change(self.items[index])


class InMemory(Items):
    """All items of a dataset, made once, in threads and with a progress bar."""

    def __init__(self, volumes: Items, threads: int) -> None:
        count = len(volumes)  # type: ignore[arg-type]
        with ThreadPoolExecutor(threads) as pool:
            items = pool.map(volumes.__getitem__, range(count))
            self.items = list(track(items, "Preparing volumes", total=count))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Tolerant(Items):
    """Items of a dataset; `name` and `error` for an item that cannot be read."""

    def __init__(self, items: Items, names: Sequence[str]) -> None:
        self.items = items
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.items[index]
        except InputError as error:
            return {"name": self.names[index], "error": str(error)}
