"""Streams of prepared volumes: which pairs come, in which order, on which rank, after a stop."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from gvsl_lightning.data.crop import crop
from gvsl_lightning.data.prepared import PreparedFolder
from gvsl_lightning.datamodules import PretrainDataModule, StreamDataModule
from gvsl_lightning.datamodules.stream import write_stream
from gvsl_lightning.errors import InputError
from gvsl_lightning.tools.prepare import main

COUNT = 13
PATCH = (4, 5, 6)
Pairs = list[tuple[str, str, int, float]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen volumes, originals beside the prepared ones and the stream of them."""
    pytest.importorskip("litdata")
    folder = tmp_path_factory.mktemp("stream")
    (folder / "originals").mkdir()
    random = np.random.default_rng(0)
    for index in range(COUNT):
        np.save(folder / "originals" / f"{index}.npy", random.random((6 + index % 3, 7, 9)))
    main(
        [
            *("--data.root", str(folder / "originals"), "--workers=1"),
            *("--out", str(folder / "prepared"), "--stream", str(folder / "stream")),
        ]
    )
    return folder / "stream"


def module(root: Path | str, **options: Any) -> StreamDataModule:
    return StreamDataModule(str(root), **{"patch_size": PATCH, "batch_size": 2, **options})


def pairs(batches: Any) -> Pairs:
    return [
        (fixed, moving, int(seed), float(volume.sum()))
        for batch in batches
        for fixed, moving, seed, volume in zip(
            batch["fixed_name"], batch["moving_name"], batch["seed"], batch["fixed"], strict=True
        )
    ]


def names(found: Pairs) -> list[str]:
    return [name for fixed, moving, *_ in found for name in (fixed, moving)]


def test_batches_are_crops_of_different_prepared_volumes(stream: Path) -> None:
    volumes = PreparedFolder(stream.parent / "prepared").volumes({})
    arrays = {volume.name: np.load(volume.image) for volume in volumes}
    batches = list(module(stream).train_dataloader())
    assert len(batches) == COUNT // 4 == len(module(stream).train_dataloader())
    for batch in batches:
        assert batch["fixed"].shape == (2, 1, *PATCH)
        assert batch["fixed"].dtype == torch.float32
        for role in ("fixed", "moving"):
            for name, seed, patch in zip(
                batch[f"{role}_name"], batch["seed"], batch[role], strict=True
            ):
                position = np.random.default_rng(int(seed)).random(3)
                assert torch.equal(patch, crop(arrays[name], PATCH, position))
    seen = names(pairs(batches))
    assert len(set(seen)) == len(seen) == 12  # each one in a single pair


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_from_the_seed_and_differ(stream: Path, workers: int) -> None:
    def epochs(**options: Any) -> list[Pairs]:
        loader = module(stream, num_workers=workers, **options).train_dataloader()
        return [pairs(loader) for _ in range(3)]

    first = epochs()
    assert first == epochs()
    assert first != epochs(seed=1)
    assert len({tuple(names(epoch)) for epoch in first}) == 3
    seeds = [seed for epoch in first for _, _, seed, _ in epoch]
    assert len(set(seeds)) == len(seeds)


def test_partners_are_any_two(stream: Path) -> None:
    loader = module(stream, batch_size=1).train_dataloader()
    partners = {frozenset(pair[:2]) for _ in range(80) for pair in pairs(loader)}
    assert len(partners) == COUNT * (COUNT - 1) // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_an_epoch(stream: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for rank in range(3):
        monkeypatch.setenv("GLOBAL_RANK", str(rank))
        made = module(stream, batch_size=1, num_workers=workers)
        assert len(made.training_volumes()) == COUNT
        loader = made.train_dataloader()
        seen.append(names(pairs(loader)))
        assert len(seen[-1]) == 4 == 2 * len(loader)
    assert len({name for part in seen for name in part}) == 12


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: Pairs = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen += [
            (*pair[:2], batch["seed"], pair[3]) for pair in pairs([{**batch, "seed": [0]}])
        ]
        return self.weight * batch["moving"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_inside_an_epoch_equals_not_having_stopped(
    stream: Path, tmp_path: Path, workers: int
) -> None:
    def run(steps: int, resume: Path | None = None) -> Pairs:
        task = Recorder()
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ModelCheckpoint(
                    tmp_path,
                    "{step}",
                    save_top_k=-1,
                    every_n_train_steps=1,
                    enable_version_counter=False,
                )
            ],
        )
        trainer.fit(task, module(stream, batch_size=1, num_workers=workers), ckpt_path=resume)
        return task.seen

    unbroken = run(14)  # two epochs of six and a third one
    assert len({pair[2] for pair in unbroken}) == 14
    for stop in (2, 6, 9):
        assert run(14, tmp_path / f"step={stop}.ckpt") == unbroken[stop:]


def test_a_remote_stream_is_read_by_way_of_the_cache_folder(stream: Path, tmp_path: Path) -> None:
    remote = module(f"local:{stream}", cache_folder=str(tmp_path / "cache")).train_dataloader()
    assert pairs(remote) == pairs(module(stream).train_dataloader())
    assert list((tmp_path / "cache").rglob("*.json"))


def test_validation_volumes_come_from_a_folder(stream: Path) -> None:
    made = module(f"file://{stream}", val_root=str(stream.parent / "prepared"), val_pairs=3)
    assert len(list(made.val_dataloader())) == 2
    assert module(stream).val_dataloader() == []
    item = module(stream).training_volumes()[COUNT - 1]
    assert item["image"].shape == (1, *PATCH)


def test_what_is_wrong_is_said(stream: Path, tmp_path: Path) -> None:
    for made, sentence in (
        (module(tmp_path), "cannot be read as a stream"),
        (module(tmp_path / "nowhere"), "nowhere cannot be read as a stream"),
        (
            module(stream, modality="mri"),
            'with modality "none" and .* with modality "mri"; set modality to "none"',
        ),
        (StreamDataModule(), "root is missing"),
        (module(stream, batch_size=7), "too few volumes for a batch of 7 pairs"),
    ):
        with pytest.raises(InputError, match=sentence) as raised:
            made.train_dataloader()
        assert len(str(raised.value).splitlines()) == 1
    prepared = PreparedFolder(stream.parent / "prepared")
    with pytest.raises(InputError, match=r"cannot be written as a stream .* give an empty folder"):
        write_stream(prepared, str(stream))
    with pytest.raises(InputError, match="holds no volume"):
        PretrainDataModule(str(stream)).setup()


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(InputError, match=r'pip install "gvsl-lightning\[stream\]"') as raised:
        module("s3://bucket/stream").setup()
    assert len(str(raised.value).splitlines()) == 1
