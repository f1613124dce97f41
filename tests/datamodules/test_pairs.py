from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from gvsl_lightning.data.crop import crop
from gvsl_lightning.datamodules import PairDataModule, PairDataset, PairSampler
from gvsl_lightning.datamodules.pairs import validation_pairs
from gvsl_lightning.errors import InputError


class Coordinates(Dataset):
    """Volumes whose three channels hold each voxel's own index."""

    def __init__(self, *shapes: tuple[int, int, int]) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        axes = [torch.arange(size, dtype=torch.float32) for size in self.shapes[index]]
        image = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return {"image": image, "label": image.sum(0, keepdim=True).int(), "name": f"v{index}"}


class Noise(Dataset):
    def __init__(self, count: int, broken: int | None = None) -> None:
        self.count = count
        self.broken = broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.broken:
            raise InputError("a.nii cannot be read; leave it out.")
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.rand(1, 10, 12, 14, generator=generator), "name": f"v{index}"}


class Pairs(PairDataModule):
    def __init__(
        self, training: int = 9, validation: int = 3, broken: int | None = None, **options: Any
    ) -> None:
        super().__init__(**({"patch_size": (8, 8, 8), "val_pairs": 3} | options))
        self.volumes = Noise(training, broken), Noise(validation)

    def configure_datasets(self) -> tuple[Dataset, Dataset]:
        return self.volumes


def train_batches(module: PairDataModule, epoch: int = 0) -> list[dict[str, Any]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [module.on_before_batch_transfer(batch, 0) for batch in loader]


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_volume_is_fixed_once_per_epoch_with_another_as_partner(count: int) -> None:
    sampler = PairSampler(count, seed=3)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert sorted(fixed for fixed, _, _ in pairs) == list(range(count))
        assert all(fixed != moving and 0 <= moving < count for fixed, moving, _ in pairs)
        assert len(sampler) == count


def test_all_partners_are_equally_likely() -> None:
    sampler = PairSampler(4)
    counts: Counter[tuple[int, int]] = Counter()
    for epoch in range(3000):
        sampler.set_epoch(epoch)
        counts.update((fixed, moving) for fixed, moving, _ in sampler)
    assert len(counts) == 12
    # 3000 draws with probability 1/3 each: the standard deviation is 26.
    assert all(abs(count - 1000) < 110 for count in counts.values())


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def draw(seed: int, epoch: int) -> list[Any]:
        sampler = PairSampler(6, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    draws = [draw(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert draws == [draw(seed, epoch) for seed in range(3) for epoch in range(3)]
    crop_seeds = [crop_seed for pairs in draws for _, _, crop_seed in pairs]
    assert len(set(crop_seeds)) == len(crop_seeds)
    orders = {tuple(fixed for fixed, _, _ in pairs) for pairs in draws}
    assert len(orders) > 6


@pytest.mark.parametrize(("count", "ranks"), [(8, 2), (9, 3), (7, 2), (3, 5)])
def test_ranks_share_an_epoch(count: int, ranks: int) -> None:
    samplers = [PairSampler(count, seed=1, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {-(-count // ranks)}
    fixed = Counter(pair[0] for part in parts for pair in part)
    repeats = -count % ranks
    assert set(fixed) == set(range(count))
    assert sum(fixed.values()) == count + repeats
    seeds = [pair[2] for part in parts for pair in part]
    assert len(set(seeds)) == len(seeds)
    interleaved = [part[turn] for turn in range(len(parts[0])) for part in parts]
    if repeats == 0:
        assert interleaved == list(PairSampler(count, seed=1))


def test_crops_lie_at_the_same_relative_position() -> None:
    shapes = (20, 31, 40), (50, 24, 33)
    patch = (12, 14, 16)
    pairs = PairDataset(Coordinates(*shapes), patch, [])
    starts = []
    for seed in range(60):
        pair = pairs[0, 1, seed]
        relative = []
        for role, shape in zip(("fixed", "moving"), shapes, strict=True):
            crop = pair[role]
            assert crop.shape == (3, *patch)
            start = crop[:, 0, 0, 0]
            for axis in range(3):
                line = crop[axis].movedim(axis, 0)[:, 0, 0]
                assert torch.equal(line, start[axis] + torch.arange(patch[axis]))
            relative.append(start / (torch.tensor(shape) - torch.tensor(patch)))
        # Each start is rounded to a voxel.
        tolerance = sum(0.5 / (torch.tensor(shape) - torch.tensor(patch)) for shape in shapes)
        assert ((relative[0] - relative[1]).abs() <= tolerance + 1e-6).all()
        starts.append(relative[0])
    spread = torch.stack(starts)
    assert (spread.amin(0) < 0.1).all()
    assert (spread.amax(0) > 0.9).all()
    assert spread.T.corrcoef().fill_diagonal_(0).abs().max() < 0.5


def test_small_volumes_are_padded_on_both_sides() -> None:
    class Ones(Coordinates):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.ones(1, *self.shapes[index]), "name": ""}

    pair = PairDataset(Ones((5, 20, 6), (9, 9, 9)), (8, 8, 8), [])[0, 1, 0]
    expected = torch.zeros(1, 8, 8, 8)
    expected[:, 1:6, :, 1:7] = 1
    assert torch.equal(pair["fixed"], expected)
    assert torch.equal(pair["moving"], torch.ones(1, 8, 8, 8))


def test_validation_takes_the_centre_and_the_labels_of_the_same_place() -> None:
    shapes = (20, 21, 22), (30, 12, 16)
    pair = PairDataset(Coordinates(*shapes), (10, 10, 10), [(0, 1, None)])[0]
    assert pair["fixed"][:, 0, 0, 0].tolist() == [5, 6, 6]
    assert pair["moving"][:, 0, 0, 0].tolist() == [10, 1, 3]
    assert torch.equal(pair["fixed_label"][0], pair["fixed"].sum(0).int())
    assert torch.equal(pair["moving_label"][0], pair["moving"].sum(0).int())
    assert (pair["fixed_name"], pair["moving_name"]) == ("v0", "v1")
    assert "seed" not in pair


def test_training_items_are_plain_and_without_labels() -> None:
    from monai.data import MetaTensor

    class Meta(Coordinates):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return item | {"image": MetaTensor(item["image"])}

    pair = PairDataset(Meta((9, 9, 9), (9, 9, 9)), (8, 8, 8), [])[0, 1, 5]
    assert set(pair) == {"fixed", "moving", "fixed_name", "moving_name", "seed"}
    assert type(pair["fixed"]) is Tensor


@pytest.mark.parametrize(("count", "number"), [(2, 20), (5, 3), (5, 12), (20, 20)])
def test_validation_pairs_fix_every_volume_before_any_again(count: int, number: int) -> None:
    pairs = validation_pairs(count, number)
    assert pairs == validation_pairs(count, number)
    assert len(pairs) == len(set(pairs)) == min(number, count * (count - 1))
    assert all(fixed != moving and seed is None for fixed, moving, seed in pairs)
    for first in range(0, len(pairs) - count + 1, count):
        block = pairs[first : first + count]
        assert {fixed for fixed, _, _ in block} == set(range(count))
        assert {moving for _, moving, _ in block} == set(range(count))


def test_no_validation_volumes_means_no_validation() -> None:
    assert Pairs(validation=0).val_dataloader() == []
    assert Pairs(val_pairs=0).val_dataloader() == []


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    without, with_two = (train_batches(Pairs(num_workers=number), epoch=2) for number in (0, 2))
    assert len(without) == len(with_two) == 5
    for first, second in zip(without, with_two, strict=True):
        names = {"fixed", "moving", "fixed_name", "moving_name", "seed"}
        assert set(first) == names
        assert first["seed"] == second["seed"]
        assert all(same(first[key], second[key]) for key in first)


def test_an_epoch_ends_with_the_remainder_unless_it_is_dropped() -> None:
    sizes = [len(batch["fixed"]) for batch in train_batches(Pairs())]
    assert sizes == [2, 2, 2, 2, 1]
    assert len(train_batches(Pairs(drop_last=True))) == 4
    assert len(train_batches(Pairs(drop_last=True, batch_size=10))) == 1


def test_seed_is_a_python_number_before_the_batch_reaches_the_device() -> None:
    module = Pairs()
    batch = next(iter(module.train_dataloader()))
    prepared = module.on_before_batch_transfer(batch, 0)
    assert type(prepared["seed"]) is int
    assert prepared["seed"] == batch["seed"][0]


def test_validation_pairs_have_no_seed_and_stay_the_same() -> None:
    module = Pairs()
    first, second = (next(iter(module.val_dataloader())) for _ in range(2))
    assert set(first) == {"fixed", "moving", "fixed_name", "moving_name"}
    assert all(same(first[key], value) for key, value in second.items())


def test_validation_may_have_a_size_of_its_own() -> None:
    module = Pairs(patch_size=(4, 6, 5), val_patch_size=(12, 8, 10))
    assert next(iter(module.train_dataloader()))["fixed"].shape[2:] == (4, 6, 5)
    assert next(iter(module.val_dataloader()))["fixed"].shape[2:] == (12, 8, 10)


class TestProperties:
    @given(
        count=st.integers(2, 50),
        ranks=st.integers(1, 6),
        seed=st.integers(0, 2**63),
        epoch=st.integers(0, 10**6),
        start=st.integers(0, 60),
    )
    def test_pairs(self, count: int, ranks: int, seed: int, epoch: int, start: int) -> None:
        def draw(replicas: int, rank: int, at: tuple[int, int]) -> list[tuple[int, int, int]]:
            sampler = PairSampler(count, seed=seed, num_replicas=replicas, rank=rank)
            sampler.position = lambda: at
            return list(sampler)

        parts = [draw(ranks, rank, (epoch, 0)) for rank in range(ranks)]
        together = [pair for turn in zip(*parts, strict=True) for pair in turn]
        assert len(together) == -(-count // ranks) * ranks
        assert all(0 <= moving < count and moving != fixed for fixed, moving, _ in together)
        fixed = [pair[0] for pair in together]
        assert sorted(fixed[:count]) == list(range(count))
        assert max(Counter(fixed).values()) - min(Counter(fixed).values()) <= 1
        assert len({seed for _, _, seed in together}) == len(together)
        for rank, part in enumerate(parts):
            assert draw(ranks, rank, (epoch, 0)) == part
            assert draw(ranks, rank, (epoch, start)) == part[start:]
        assert draw(ranks, 0, (epoch + 1, 0)) != parts[0]

    @given(count=st.integers(2, 40), number=st.integers(1, 400))
    def test_validation_pairs(self, count: int, number: int) -> None:
        pairs = validation_pairs(count, number)
        assert len(pairs) == len(set(pairs)) == min(number, count * (count - 1))
        assert all(fixed != moving for fixed, moving, _ in pairs)
        for role in (0, 1):
            times = [sum(pair[role] == volume for pair in pairs) for volume in range(count)]
            assert max(times) - min(times) <= 1
        assert pairs == validation_pairs(count, number + 1)[: len(pairs)]

    @given(
        shape=st.tuples(*[st.integers(1, 12)] * 3),
        patch=st.tuples(*[st.integers(1, 12)] * 3),
        position=st.tuples(*[st.floats(0, 1)] * 3),
    )
    def test_crops(
        self, shape: tuple[int, ...], patch: tuple[int, ...], position: tuple[float, ...]
    ) -> None:
        """One voxel shows where all lie: each is its own place plus one, and padding is zero."""
        places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) + 1
        for volume in (places, torch.from_numpy(places)):
            cropped = crop(volume, patch, np.array(position))
            assert cropped.shape == (3, *patch)
            for axis, (size, wanted) in enumerate(zip(shape, patch, strict=True)):
                line = cropped[axis].movedim(axis, 0).flatten(1).amax(dim=1).tolist()
                before = max(wanted - size, 0) // 2
                after = max(wanted - size, 0) - before
                inside = line[before : wanted - after]
                assert line == [0] * before + inside + [0] * after
                assert inside == list(range(inside[0], inside[0] + min(size, wanted)))
                assert abs(inside[0] - 1 - position[axis] * max(size - wanted, 0)) <= 0.5


class Recorder(pl.LightningModule):
    """One weight, a loss that shows pairs, crops, seeds and optimiser state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.losses: list[float] = []
        self.fixed: list[list[str]] = []

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        generator = torch.Generator().manual_seed(batch["seed"])
        drawn = torch.rand((), generator=generator)
        target = (batch["fixed"] - 2 * batch["moving"]).std() + drawn
        loss = (self.weight - target) ** 2
        self.losses.append(loss.item())
        self.fixed.append(batch["fixed_name"])
        return loss

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.log("val", batch["fixed"].mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(
    module: PairDataModule, checkpoint: Path | None = None, callbacks: Any = (), **options: Any
) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **({"max_epochs": 3} | options),
    )
    trainer.fit(recorder, module, ckpt_path=checkpoint, weights_only=True)
    return recorder


EVERY_STEP = {"every_n_train_steps": 1}
TRAINING_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
VALIDATION_END = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.filterwarnings("error:.*not resumable")
@pytest.mark.parametrize(
    ("step", "saved", "workers", "options"),
    [
        (3, EVERY_STEP, 0, {}),
        (3, EVERY_STEP, 2, {}),
        (8, EVERY_STEP, 2, {"max_steps": 15, "max_epochs": -1}),
        (5, EVERY_STEP, 2, {}),
        (5, TRAINING_END, 0, {}),
        (10, TRAINING_END, 2, {"max_steps": 15, "max_epochs": -1}),
        (5, TRAINING_END, 0, {"max_steps": 15, "max_epochs": -1, "limit_val_batches": 0}),
        (5, VALIDATION_END, 0, {"max_steps": 15, "max_epochs": -1}),
        (4, EVERY_STEP, 0, {"limit_train_batches": 3}),
    ],
)
def test_a_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, step: int, saved: dict[str, Any], workers: int, options: dict[str, Any]
) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saved)
    whole = fit(Pairs(num_workers=workers), callbacks=[checkpoints], **options)
    resumed = fit(Pairs(num_workers=workers), tmp_path / f"step={step}.ckpt", **options)
    assert len(set(whole.losses)) == len(whole.losses)
    assert resumed.losses == whole.losses[step:]


def test_lightning_moves_on_from_epoch_to_epoch() -> None:
    recorder = fit(Pairs())
    epochs = [recorder.fixed[first : first + 5] for first in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(chain(*epoch)) == [f"v{index}" for index in range(9)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [batch["fixed_name"] for batch in train_batches(Pairs())]
    assert epochs[2] == [batch["fixed_name"] for batch in train_batches(Pairs(), 2)]


def test_overfitting_on_one_batch_repeats_it() -> None:
    recorder = fit(Pairs(), overfit_batches=1)
    assert recorder.fixed == [["v0", "v1"]] * 3


def test_checkpoint_rebuilds_the_data_module(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    options = {"training": 6, "seed": 3, "patch_size": (8, 8, 8)}
    fit(Pairs(**options), callbacks=[saver], max_epochs=1)
    loaded = Pairs.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert {key: loaded.hparams[key] for key in options} == options
    assert loaded.seed == 3


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": (8, 0, 8)},
        {"patch_size": (8, 8)},
        {"val_patch_size": (8, 8, -1)},
        {"seed": -1},
        {"batch_size": 0},
        {"num_workers": -1},
    ],
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} "):
        Pairs(**options)


def test_too_few_volumes() -> None:
    for options, word in (
        ({"training": 1}, "training.* 1"),
        ({"training": 0}, "training.* none"),
        ({"validation": 1}, "validation.* 1"),
    ):
        with pytest.raises(InputError, match=word):
            Pairs(**options).setup()


@pytest.mark.parametrize("workers", [0, 1])
def test_input_errors_arrive_from_the_workers(workers: int) -> None:
    module = Pairs(broken=2, num_workers=workers)
    with pytest.raises(InputError) as raised:
        list(module.train_dataloader())
    assert str(raised.value).strip().endswith("a.nii cannot be read; leave it out.")
