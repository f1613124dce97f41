"""Pre-training on 100,000 volumes: what grows with their number, and how they are shuffled."""

import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.data import datasets
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.datamodules import PairSampler, PretrainDataModule, pretrain
from gvsl_lightning.datamodules.loading import loader_options
from gvsl_lightning.datamodules.pairs import validation_pairs
from gvsl_lightning.errors import InputError
from scale import SIZE, name_of, private, write_originals, write_prepared

OPENMIND = 115_000
"""Volumes of the largest public collection of brain MR."""


WARM, STEPS, WORKERS = 1000, 2000, 4


@pytest.mark.slow
def test_cost_of_a_run_by_number_of_volumes(capfd: pytest.CaptureFixture[str]) -> None:
    table = ["| root | volumes | start-up | first batch | memory | growth | pairs |"]
    table.append("|---|---:|---:|---:|---:|---:|---:|")
    failures = []
    for kind, write in (("prepared", write_prepared), ("original", write_originals)):
        for count in (1000, 10_000, OPENMIND):
            with TemporaryDirectory() as folder:
                write(Path(folder, "volumes"), count)
                began = time.time()
                moments = run(Path(folder))
            start, first, warm, end = (moments[at] for at in ("start", "0", str(WARM), "end"))
            most = max(memory for _, _, memory in moments.values())
            growth = most / warm[2] - 1
            table.append(
                f"| {kind} | {count:,} | {start[0] - began:.1f} s ({start[1]:.1f}) "
                f"| {first[0] - began:.1f} s ({first[1]:.1f}) | {most:.0f} MiB | {growth:.1%} "
                f"| {2 * STEPS / (end[1] - warm[1]):.0f}/s |"
            )
            if start[1] > 15 or first[1] > 20 or most > 1024 or growth > 0.02:
                failures.append(table[-1])
    with capfd.disabled():
        print("", *table, sep="\n")
    assert not failures


def run(folder: Path) -> dict[str, tuple[float, float, float]]:
    """Pre-train in a process of its own: all of a run, but a tiny network."""
    root = Path(__file__).parents[1]
    record = folder / "record.json"
    words = {
        "config": root / "configs/pretrain/gvsl.yaml",
        "data.init_args.root": folder / "volumes",
        "data.init_args.modality": "none",
        "data.init_args.spacing": "null",
        "data.init_args.patch_size": list(SIZE),
        "data.init_args.num_workers": WORKERS,
        "model.init_args.corruption": "false",
        "model.init_args.spatial": "false",
        "model.init_args.backbone_options": "{channels: [8, 16]}",
        "model.init_args.affine_channels": 8,
        "model.init_args.deformable_channels": 8,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": WARM + STEPS,
        "trainer.val_check_interval": WARM // 4,
        "trainer.logger.init_args.save_dir": folder / "runs",
        "trainer.callbacks+": "scale.Recorder",
        "trainer.callbacks.path": record,
        "trainer.callbacks.every": WARM // 8,
    }
    command = [sys.executable, "-m", "gvsl_lightning", "fit"]
    paths = [str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command + [f"--{key}={value}" for key, value in words.items()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    moments: dict[str, tuple[float, float, float]] = json.loads(record.read_text())
    return moments


def test_an_epoch_fixes_each_volume_once_in_a_uniform_order() -> None:
    fixed, _, seeds = PairSampler(OPENMIND).draw(np.random.default_rng((0, 0)))
    assert np.array_equal(np.sort(fixed), np.arange(OPENMIND))
    assert len(set(seeds.tolist())) == OPENMIND
    # where in the epoch, by where in the list: a shuffle in shards or of a buffer has empty cells
    parts = 10
    cells = np.histogram2d(np.arange(OPENMIND), fixed, bins=parts)[0]
    assert chi_square(cells) < 130  # 81 degrees of freedom, p = 0.0005


@pytest.mark.parametrize("ranks", [1, 8])
def test_partners_are_uniform_over_all_other_volumes(ranks: int) -> None:
    drawn = [
        (fixed, moving)
        for rank in range(ranks)
        for fixed, moving, _ in PairSampler(OPENMIND, num_replicas=ranks, rank=rank)
    ]
    fixed, moving = np.array(drawn).T
    assert len(set(fixed.tolist())) == OPENMIND == len(fixed)
    assert (moving >= 0).all()
    assert (moving < OPENMIND).all()
    distance = (moving - fixed) % OPENMIND
    assert distance.min() > 0
    for values in (moving, distance):
        counts = np.histogram(values, bins=100)[0]
        assert chi_square(counts) < 155  # 99 degrees of freedom, p = 0.0003
    # as many volumes are never drawn as with independent draws, a share of 1/e
    assert len(set(moving.tolist())) / OPENMIND == pytest.approx(1 - np.exp(-1), abs=0.005)


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic of counts that are expected to be alike."""
    return float(((counts - counts.mean()) ** 2).sum() / counts.mean())


def test_validation_pairs_of_many_volumes_are_not_all_made() -> None:
    tracemalloc.start()
    pairs = validation_pairs(3000, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 20
    assert peak < 2e6  # nine million pairs take a gigabyte


def test_a_search_takes_time_in_proportion_to_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(count: int) -> float:
        files = [f"case_{index:06d}.nii.gz" for index in range(count)]
        monkeypatch.setattr(os, "walk", lambda root, **_: [(root, [], files)])
        gc.collect()
        gc.disable()  # it would count all objects of the tests before
        try:
            began = time.thread_time()
            assert len(find_volumes(str(Path(__file__).parent))) == count
            return time.thread_time() - began
        finally:
            gc.enable()

    assert seconds(20_000) / seconds(2500) < 20  # 64 if every file is compared with every other


def test_headers_of_a_thousand_files_are_checked_and_every_file_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(pretrain, "CHECKED", 20)
    monkeypatch.setattr(pretrain, "check_volume", lambda source, *_: seen.append(source))
    write_originals(tmp_path, 100)
    module = PretrainDataModule(str(tmp_path), val_fraction=0, patch_size=(8, 8, 8))
    module.setup()
    numbers = [int(Path(source).stem.removeprefix("case_")) for source in seen]
    assert numbers[0] == 0
    assert numbers[-1] == 99
    assert set(np.diff(numbers)) == {5, 6}
    assert len(numbers) == 20
    damaged = tmp_path / f"{name_of(7)}.nii"
    damaged.write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"case_000007.nii cannot be read .* leave it out"):
        module.train_pairs[7, 8, 0]


def test_a_loader_process_shares_what_it_knows_of_the_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 20_000
    files = [
        VolumeFile(f"/data/archive/{name_of(index)}.nii.gz", name_of(index))
        for index in range(count)
    ]
    assert growth_of_a_process(files) > 2.5  # a list is copied, or this test shows nothing
    monkeypatch.setattr(pretrain, "check_volume", lambda *_: None)

    class Found(PretrainDataModule):
        def configure_files(self) -> Any:
            return files, []

    write_prepared(tmp_path / "prepared", 8, names=count)
    for module in (Found(), PretrainDataModule(str(tmp_path / "prepared"), val_fraction=0)):
        module.setup()
        assert len(module.train_pairs) == count
        assert growth_of_a_process(module.train_pairs.volumes) < 1


class RandomNumbers(Dataset[float]):
    """Random numbers that a transform of a user draws."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        return float(torch.rand(()))


class FrozenObjects(Dataset[int]):
    """How many objects garbage collection leaves alone, and so does not write to."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return gc.get_freeze_count()


def test_loader_processes_collect_nothing_that_they_inherit() -> None:
    loader = DataLoader(FrozenObjects(), batch_size=None, **loader_options(1))
    assert min(loader) > gc.get_freeze_count() + 10_000


def test_loader_processes_of_two_ranks_draw_different_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        torch.manual_seed(0)
        drawn.append(list(DataLoader(RandomNumbers(), batch_size=None, **loader_options(1))))
    assert not set(drawn[0]) & set(drawn[1])


def growth_of_a_process(items: Any) -> float:
    """MiB that a forked process comes to hold of its own by looking at all items once."""

    def look(sender: Any) -> None:
        datasets.read_case = np.load = fail  # type: ignore[assignment]
        look_at(items, 100)
        before = private()
        look_at(items, len(items))
        sender.send(private() - before)

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=look, args=(sender,))
    process.start()
    grown: float = receiver.recv()
    process.join()
    return grown


def look_at(items: Any, count: int) -> None:
    for index in range(count):
        with suppress(InputError):
            assert items[index].name


def fail(*_: Any, **__: Any) -> Any:
    raise InputError("Nothing is read here.")
