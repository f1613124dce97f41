"""Prepared volumes as a stream: written to and read from object storage by litdata.

One volume per chunk, so that litdata can shuffle fully.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.datamodules.pairs import PairDataset
from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.privacy import pseudonyms


def write_stream(folder: PreparedFolder, out: str, workers: int = 1) -> None:
    """Write prepared volumes as a stream.

    Args:
        folder: The volumes; their label maps are left out.
        out: An empty folder, or a URL that litdata can write to (`s3://`, `gs://`, ...).
        workers: Processes.

    Raises:
        InputError: The extra is missing, the folder is not prepared to its end, or the stream
            cannot be written.
    """
    litdata = _litdata()
    volumes = folder.volumes({})
    try:
        litdata.optimize(
            partial(_read, volumes, json.dumps(folder.settings)),
            list(range(len(volumes))),
            _path(out),
            chunk_size=1,
            num_workers=min(workers, len(volumes)),
            start_method="fork",
            keep_data_ordered=True,
            verbose=False,
        )
    except Exception as error:  # of litdata and of the packages it writes with
        raise InputError(
            f"{out} cannot be written as a stream ({cause_of(error)}); give an empty folder or the "
            "URL of one, and check your credentials."
        ) from error


class StreamDataModule(PretrainDataModule):
    """Pairs from a stream, for volumes in object storage that no local disk holds.

    Each volume is downloaded once per epoch, ahead of its use. The volumes come in an order drawn
    anew for each epoch and are dealt out to ranks and loader processes; of those that one process
    gets, the first and the second are a pair, the third and the fourth, and so on. So a volume is
    in one pair per epoch, fixed or moving, its partner any other one, and an epoch has half as many
    pairs as in `PretrainDataModule`. Volumes that do not fill a batch on every rank are
    left out, others in each epoch. On a local path on a parallel file system litdata draws from a
    window of 16 volumes alone; read the prepared folder itself with `PretrainDataModule` there.

    The order depends on `num_workers` and the number of ranks. Resuming inside an epoch equals not
    having stopped where they are the same.

    Needs the extra `stream`.

    Args:
        root: Folder or URL (`s3://`, `gs://`, `azure://`, ...; see litdata) that `write_stream`
            wrote. The options that prepare a volume must be the same as in `prepare`.
        val_root: Validation volumes, as in `PretrainDataModule`: a folder of volumes or of prepared
            ones, or the URL of one. None: no validation; `val_count` and `val_fraction` have
            no effect.
        cache_folder: Where the stream is kept while it is read; None: litdata's own choice. Volumes
            that were read are removed when space is needed.
        **options: see `PretrainDataModule`; `drop_last` has no effect.
    """

    def __init__(
        self,
        root: str | None = None,
        val_root: str | list[str] | None = None,
        cache_folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, val_root=val_root, cache_folder=cache_folder, **options)

    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Open the stream, check how it was prepared, and find the validation volumes."""
        _, validation = super().configure_datasets()
        stream = self._open()
        stored = json.loads(stream[0]["settings"])
        for name, value in self.preparation_settings().items():
            if stored.get(name) != value:
                old, new = json.dumps(stored.get(name)), json.dumps(value)
                raise InputError(
                    f"{self.root} was prepared with {name} {old} and is to be read with {name} "
                    f"{new}; set {name} to {old}."
                )
        return _Streamed(stream), validation

    def configure_files(self) -> tuple[list[VolumeFile], list[VolumeFile]]:
        """No training files, and those of `val_root`."""
        return [], [] if self.val_root is None else self._find(self.val_root)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Litdata's loader, which brings its state to checkpoints, with batches of pairs."""
        self.setup("fit")
        stream = self._open()
        loader: DataLoader[dict[str, Any]] = _litdata().StreamingDataLoader(
            stream,
            batch_size=2 * self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_Pairs(stream, self.patch_size, self.seed, self.anonymise),
        )
        if len(loader) < 1:
            raise InputError(
                f"{self.root} holds too few volumes for a batch of {self.batch_size} pairs on each "
                "rank; lower batch_size or add volumes."
            )
        return loader

    def _open(self) -> Any:
        if not isinstance(self.root, str):
            raise InputError("root is missing; add --data.root=URL of one stream.")
        litdata = _litdata()
        try:
            stream = litdata.StreamingDataset(
                _path(self.root),
                cache_dir=self.cache_folder,
                shuffle=True,
                drop_last=True,
                seed=self.seed,
                serializers={name: _Refusal() for name in ("pickle", "graph")},
            )
            stream[0]  # errors show here, not in a loader process
        except Exception as error:  # of litdata and of the packages it reads with
            raise InputError(
                f"{self.root} cannot be read as a stream ({cause_of(error)}); give the "
                "stream that `prepare --stream` wrote, and check your credentials and the network."
            ) from error
        return stream


class _Streamed(Dataset[dict[str, Any]]):
    """All volumes of a stream by their numbers."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return sum(end - begin for _, begin, end, _ in self.stream.cache.get_chunk_intervals())

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.stream[index]
        return item


class _Refusal:
    """In the place of those of litdata's serializers that would run code of a stream."""

    def setup(self, metadata: Any) -> None:
        pass

    def deserialize(self, data: bytes) -> Any:
        raise ValueError("it holds pickled Python objects, which could run code")


class _Pairs:
    """Make pairs of the volumes of a batch; the stream knows the epoch in each loader process."""

    def __init__(
        self, stream: Any, patch_size: Sequence[int], seed: int, anonymise: bool = False
    ) -> None:
        self.stream = stream
        self.patch_size = patch_size
        self.seed = seed
        self.anonymise = anonymise

    def __call__(self, volumes: Any) -> Any:
        if self.anonymise:
            names = pseudonyms(volume["name"] for volume in volumes)
            volumes = [
                {**volume, "name": name} for volume, name in zip(volumes, names, strict=True)
            ]
        pairs = PairDataset(volumes, self.patch_size, [])
        return default_collate(
            [
                pairs[(place, place + 1, self._draw(volumes[place]))]
                for place in range(0, len(volumes), 2)
            ]
        )

    def _draw(self, fixed: dict[str, Any]) -> int:
        text = f"{self.seed} {self.stream.current_epoch} {fixed['name']}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _read(volumes: Sequence[PreparedVolume], settings: str, index: int) -> dict[str, Any]:
    volume = volumes[index]
    assert isinstance(volume.image, str)
    return {
        "name": volume.name,
        "settings": settings,
        "image": np.load(volume.image, allow_pickle=False),
    }


def _path(url: str) -> str:
    return url.removeprefix("file://")


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise InputError(
            "Streams need the package litdata, which is missing: "
            'pip install "gvsl-lightning[stream]".'
        ) from error
    return litdata
