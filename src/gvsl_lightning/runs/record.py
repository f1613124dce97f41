"""What a run is known by later: revision of the code, seed, hash of the data, machine."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from gvsl_lightning.data.volumes import VolumeFile, files_of, is_url
from gvsl_lightning.weights import package_versions

_HASHED_FILES, _HASHED_SLICES, _HASHED_ITEMS = 1000, 3, 4

_SAMPLE = 4096  # bytes


def record_run(trainer: pl.Trainer) -> dict[str, Any]:
    """What the results of a run depend on beside its configuration; call it from ``setup`` on.

    Args:
        trainer: with its task and data.

    Returns:
        ``git_revision`` and ``versions``; ``seed``, None without ``seed_everything``; ``data_hash``
        of what it trains on; ``weights_hash`` of the file that it starts from; ``device``,
        ``processes`` and, of each, ``threads``, by which sums are rounded.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    task = trainer.lightning_module
    path = getattr(task, "weights_file", None) or Path(str(task.hparams.get("weights") or ""))
    weights = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
    device = trainer.strategy.root_device
    return {
        "git_revision": git_revision(),
        "versions": package_versions(),
        "seed": None if seed is None else int(seed),
        "data_hash": data_hash(datamodule),
        "weights_hash": weights,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def git_revision() -> str | None:
    """Commit of this package's own code, with ``+`` if it was changed since; None outside git."""
    folder = Path(__file__).parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a package that is installed inside somebody else's repository is no part of it
        if not ask("ls-files", Path(__file__).name):
            return None
        return ask("rev-parse", "HEAD") + ("+" if ask("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def data_hash(datamodule: pl.LightningDataModule | None) -> str | None:
    """Short SHA-256 of the volumes of a data module that is set up, wherever they lie.

    Of files, it covers their number and, for 1,000 of them in even steps, name, size and what is
    at the beginning, in the middle and at the end, where ``.nii.gz`` has the checksum of all that
    it holds; of a DICOM series, three slices. Of generated volumes and those kept in memory it
    covers number, and names and voxels of four.

    Args:
        datamodule: one of this package.

    Returns:
        16 hexadecimal digits; None for other data modules.
    """
    datasets: list[Any] | None = getattr(datamodule, "volume_datasets", list)()
    if not datasets:
        return None
    digest = hashlib.sha256()
    for dataset in datasets:
        for part in _describe(dataset):
            digest.update(part)
    return digest.hexdigest()[:16]


def _describe(dataset: Any) -> Iterator[bytes]:
    """What the hash is made of."""
    yield f"{len(dataset)} volumes".encode()
    files = getattr(dataset, "files", getattr(dataset, "volumes", None))
    for index in _even_steps(len(dataset), _HASHED_ITEMS if files is None else _HASHED_FILES):
        if files is None:
            item = dataset[index]
            yield item["name"].encode()
            yield np.asarray(item["image"], dtype=np.float32).tobytes()
            continue
        file = files[index]
        name, image = (file.name, file.image) if isinstance(file, VolumeFile) else file
        yield name.encode()
        paths = files_of(image)
        paths = [paths[place] for place in _even_steps(len(paths), _HASHED_SLICES)]
        for path in (*paths, getattr(file, "label", None)):
            if path is not None and not is_url(path):
                yield from _samples(Path(path))


def _even_steps(count: int, most: int) -> list[int]:
    return [int(place) for place in np.linspace(0, count - 1, min(count, most)).round()]


def _samples(path: Path) -> Iterator[bytes]:
    """Size of a file, and what stands at three places in it."""
    with suppress(OSError), path.open("rb") as file:  # whoever reads the volume says what is wrong
        size = os.fstat(file.fileno()).st_size
        yield str(size).encode()
        for place in (0, size // 2, size - _SAMPLE):
            file.seek(max(0, place))
            yield file.read(_SAMPLE)
