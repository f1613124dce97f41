"""A short hash of the volumes that a data module gives."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gvsl_lightning.data.datasets import Mapped
from gvsl_lightning.data.find import is_url
from gvsl_lightning.data.source import evenly, files_of

_MAX_FILES = 1000
_MAX_SLICES = 3
_MAX_ITEMS = 4
_SAMPLE = 4096  # bytes


def data_hash(datamodule: Any) -> str | None:
    """Short SHA-256 of the volumes of a data module that is set up; folders make no difference.

    For files, the hash covers their number and, for 1,000 of them in even steps, name, size and
    4 KB from the beginning, the middle and the end. The end of a ``.nii.gz`` file has the checksum
    of the whole content. For a DICOM series, the hash covers three slices. For generated volumes
    and volumes kept in memory, it covers their number, and names and voxels of four.

    Returns:
        16 hexadecimal digits; None for data modules of other packages, and before ``setup``.
    """
    datasets: list[Any] | None = getattr(datamodule, "volume_datasets", list)()
    if not datasets:
        return None
    digest = hashlib.sha256()
    for dataset in datasets:
        for part in _hashed_parts(dataset):
            digest.update(part)
    return digest.hexdigest()[:16]


def _hashed_parts(dataset: Any) -> Iterator[bytes]:
    yield f"{len(dataset)} volumes".encode()
    while isinstance(dataset, Mapped):
        dataset = dataset.items
    files = getattr(dataset, "files", getattr(dataset, "volumes", None))
    for index in evenly(range(len(dataset)), _MAX_ITEMS if files is None else _MAX_FILES):
        if files is None:
            item = dataset[index]
            yield item["name"].encode()
            yield np.asarray(item["image"], dtype=np.float32).tobytes()
            continue
        file = files[index]
        yield file.name.encode()
        for path in (*evenly(files_of(file.image), _MAX_SLICES), file.label):
            if path is not None and not is_url(path):
                yield from _file_samples(Path(path))


def _file_samples(path: Path) -> Iterator[bytes]:
    """Size of a file, and the bytes at three places."""
    # an unreadable file is reported where the volume is read
    with suppress(OSError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        yield str(size).encode()
        for place in (0, size // 2, size - _SAMPLE):
            file.seek(max(0, place))
            yield file.read(_SAMPLE)
