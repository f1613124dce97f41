"""Hours of pre-training from a prepared folder: does memory, open files or time of a step grow?

    python tests/soak.py --hours 2 --out FOLDER

generates volumes, prepares them, pre-trains with two loader processes and everything that
``configs/pretrain/gvsl.yaml`` logs, looks once a minute, and leaves ``soak.csv``, ``soak.png`` and
the run in FOLDER. The last line compares the first and the last tenth of the time after warming up.
"""

import argparse
import csv
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pytorch_lightning as pl

from gvsl_lightning.datamodules import Phantom
from scale import consumed, family, resident

WARM = 1000
"""Steps that count as warming up: up to the second validation, whose processes then stay."""


class Look(pl.Callback):
    """Writes a row from time to time.

    Args:
        path: CSV file.
        every: Seconds between two looks.
    """

    def __init__(self, path: str, every: float) -> None:
        self.path = Path(path)
        self.every = every
        self.began = self.last = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.began = time.time()
        self.path.write_text("seconds,step,cpu_seconds,memory_mib,open_files,shared_memory\n")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.time() - self.last < self.every:
            return
        self.last = time.time()
        row = [
            round(self.last - self.began, 2),
            trainer.global_step,
            round(consumed(), 2),
            round(resident(), 2),
            sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family()),
            len(os.listdir("/dev/shm")),
        ]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)


def write_volumes(folder: Path, count: int) -> None:
    """Generated hearts as NIfTI files, in Hounsfield units."""
    data = Phantom(scene="cardiac_ct", size=(56, 56, 56), num_train=count, num_val=2)
    data.setup("fit")
    folder.mkdir(parents=True)
    for index in range(count):
        item = data.volume_datasets()[0][index]
        image = np.asarray(item["image"][0]) * 2048 - 1024
        nibabel.Nifti1Image(image.astype(np.int16), np.eye(4)).to_filename(
            folder / f"case_{index:03d}.nii.gz"
        )


def read(path: Path) -> dict[str, np.ndarray]:
    """Columns of the CSV file; of time, seconds for each step since the look before."""
    table = np.genfromtxt(path, delimiter=",", names=True)
    steps = np.diff(table["step"])
    names = ("step", "memory_mib", "open_files", "shared_memory")
    columns = {name: table[name][1:] for name in names}
    columns["hours"] = table["seconds"][1:] / 3600
    columns["cpu"] = np.diff(table["cpu_seconds"]) / steps
    columns["wall"] = np.diff(table["seconds"]) / steps
    return columns


def compare(columns: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Median of each column in the first and in the last tenth after warming up."""
    warm = columns["step"] >= WARM
    tenth = max(1, int(warm.sum()) // 10)
    return {
        name: (float(np.median(values[warm][:tenth])), float(np.median(values[warm][-tenth:])))
        for name, values in columns.items()
        if name not in ("hours", "step")
    }


def draw(columns: dict[str, np.ndarray], path: Path) -> None:
    """Three panels over the hours."""
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 6), layout="constrained")
    panels = (
        ("memory_mib", "memory, MiB"),
        ("open_files", "open files"),
        ("cpu", "seconds of CPU for a step"),
    )
    for axis, (name, title) in zip(axes, panels, strict=True):
        axis.plot(columns["hours"], columns[name], linewidth=1)
        axis.axvspan(0, columns["hours"][columns["step"] >= WARM][0], color="0.9")
        axis.set_ylim(0, 1.2 * columns[name].max())
        axis.set_ylabel(title)
    axes[-1].set_xlabel("hours (grey: warming up)")
    figure.savefig(path, dpi=100)


def run(*words: str) -> None:
    """Run ``python -m gvsl_lightning`` in this process."""
    sys.argv[1:] = words
    runpy.run_module("gvsl_lightning", run_name="__main__")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    matplotlib.use("agg")
    out = options.out.resolve()
    write_volumes(out / "volumes", 24)
    config = Path(__file__).parents[1] / "configs/pretrain/gvsl.yaml"
    # fmt: off
    run("prepare", f"--config={config}", f"--data.root={out / 'volumes'}",
          f"--out={out / 'prepared'}", "--data.patch_size=[32,32,32]")
    minutes = round(60 * options.hours)
    run("fit", f"--config={config}", f"--data.root={out / 'prepared'}",
          "--data.patch_size=[32,32,32]", "--data.num_workers=2",
          "--model.backbone_options.channels=[8,16,32]",
          "--model.affine_channels=32", "--model.schedule=constant",
          "--trainer.accelerator=cpu", "--trainer.max_steps=-1",
          f"--trainer.max_time=00:{minutes // 60:02d}:{minutes % 60:02d}:00",
          f"--trainer.logger.init_args.save_dir={out / 'runs'}",
          "--trainer.callbacks+=soak.Look", f"--trainer.callbacks.path={out / 'soak.csv'}",
          f"--trainer.callbacks.every={options.every}")
    # fmt: on
    columns = read(out / "soak.csv")
    draw(columns, out / "soak.png")
    changes = compare(columns)
    text = (
        f"{name} {old:.4g} -> {new:.4g} ({new / old - 1:+.1%})"
        for name, (old, new) in changes.items()
        if old
    )
    print(f"{options.hours} hours, {len(columns['hours'])} looks: {'; '.join(text)}")
