"""Made for tests of scale: a callback that records what a run costs, and many volumes."""

import json
import os
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytorch_lightning as pl

from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume
from gvsl_lightning.datamodules import PretrainDataModule

SIZE = (16, 16, 16)


class Recorder(pl.Callback):
    """Writes, at the end of training, what it has cost until when.

    Args:
        path: JSON file: at each moment, wall time, seconds of CPU of all processes, MiB they hold.
        every: Steps between two looks.
    """

    def __init__(self, path: str, every: int) -> None:
        self.path = path
        self.every = every
        self.moments: dict[str, tuple[float, float, float]] = {}

    def on_train_start(self, *_: Any) -> None:
        self._look("start")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._look(str(trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:  # while there are loader processes still
            self._look("end")

    def on_train_end(self, *_: Any) -> None:
        Path(self.path).write_text(json.dumps(self.moments))

    def _look(self, moment: str) -> None:
        self.moments[moment] = time.time(), consumed(), resident()


def consumed() -> float:
    """Seconds of CPU of this process and its loader processes since they began."""
    ticks = 0
    for pid in family():
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident() -> float:
    """MiB that this process and its loader processes hold, what they share counted once.

    Of what other programs share, pages of files, nothing is deducted.
    """
    files = _fields(f"/proc/{os.getpid()}/status")["RssFile"]
    rollups = [_fields(f"/proc/{pid}/smaps_rollup") for pid in family()]
    return (files + sum(one["Pss_Anon"] + one["Pss_Shmem"] for one in rollups)) / 1024


def private() -> float:
    """MiB that this process has to itself."""
    fields = _fields("/proc/self/smaps_rollup")
    return (fields["Private_Dirty"] + fields["Private_Clean"]) / 1024


def family() -> list[int]:
    """This process and its loader processes."""
    return [os.getpid(), *(child.pid for child in active_children() if child.pid)]


def _fields(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if words[-1] == "kB"}


def write_originals(folder: Path, count: int) -> None:
    """Write NIfTI files, each with an inode and a hole of its own."""
    empty = nibabel.Nifti1Image(np.zeros(SIZE, np.uint8), np.eye(4)).to_bytes()
    header = empty[: len(empty) - int(np.prod(SIZE))]
    for index in range(count):
        path = folder / name_of(index)
        if index % 1000 == 0:
            path.parent.mkdir(parents=True)
        with open(f"{path}.nii", "wb") as file:
            file.write(header + (index + 1).to_bytes(4, "little"))
            file.truncate(len(empty))


def write_prepared(folder: Path, count: int, names: int = 0) -> None:
    """Write a folder of prepared volumes, all but a few of them links.

    Args:
        folder: Where to.
        count: Volumes that are there.
        names: Volumes that the index names if more.
    """
    prepared = PreparedFolder(folder)
    prepared.claim({**PretrainDataModule().preparation_settings(), "label_root": None})
    random = np.random.default_rng(0)
    for index in range(count):
        path = Path(prepared.files(name_of(index))[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        if index < 8:
            np.save(path, random.random((1, *SIZE)).astype(np.float16))
        else:
            os.link(prepared.files(name_of(index % 8))[0], path)
    shape = (1, *SIZE)
    prepared.write_index(
        [
            PreparedVolume("", name_of(index), None, shape, f"/data/{name_of(index)}.nii.gz")
            for index in range(max(count, names))
        ]
    )


def name_of(index: int) -> str:
    """Name of a volume; a thousand in a folder."""
    return f"site_{index // 1000:03d}/case_{index:06d}"
