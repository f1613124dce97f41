"""Loaders and samplers of training items, by which a resumed run equals an unbroken one."""

import gc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import pl_worker_init_function
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class SeededSampler(DistributedSampler[Any], ABC):
    """Draw an epoch's items, with the seeds of their views, in the main process.

    All draws follow from (seed, epoch), so that they do not depend on the number of workers. The
    ranks of a distributed run share the epoch's order and take turns; where the number of items is
    not a multiple of the number of ranks, some are drawn once more. Lightning leaves a
    `DistributedSampler` in place and calls its `set_epoch`.

    Args:
        count: Number of items.
        seed: 0 or greater.
        num_replicas: Number of ranks.
        rank: Number of this rank.
    """

    position: Callable[[], tuple[int, int]] | None = None
    """Where to start, asked at the beginning of every iteration: the epoch, and how many of this
    rank's items to leave out. None: at the beginning of the epoch that `set_epoch` names."""

    def __init__(self, count: int, *, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        items: Any = range(count)
        super().__init__(items, num_replicas=num_replicas, rank=rank, seed=seed)
        self.count = count

    @abstractmethod
    def draw(self, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draw one epoch of all ranks: arrays of `total_size` whose columns are the items."""

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.position() if self.position else (self.epoch, 0)
        turns = slice(self.rank + start * self.num_replicas, None, self.num_replicas)
        drawn = self.draw(np.random.default_rng((self.seed, epoch)))
        return zip(*(values[turns].tolist() for values in drawn), strict=True)


class ResumableDataLoader(DataLoader[dict[str, Any]]):
    """Training loader that starts where the trainer starts or resumes.

    Lightning resumes inside an epoch without skipping what was trained, calls `set_epoch` after
    loader processes have begun to fetch, and counts an epoch twice when it resumes a run with
    `max_steps` from a checkpoint written at an epoch's end. The count of batches, which is part of
    every checkpoint, is right in all these cases: the position follows from it. If batches or
    epochs had another size before, a whole epoch begins.

    Args:
        dataset: Items.
        sampler: Their order.
        trainer: That resumes.
        stored: `sizes` of the loader before; empty if nothing is resumed.
        **options: Options of PyTorch's loader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sampler: SeededSampler,
        trainer: pl.Trainer | None = None,
        stored: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self._trainer = trainer
        self._stored = stored
        self._origin = tuple(
            stored.get("origin", (0, 0))
        )  # batches before an epoch, and its number
        if trainer is not None:
            sampler.position = self._position

    def sizes(self) -> dict[str, Any]:
        """Everything that turns a number of batches into a position, for a checkpoint."""
        assert self._trainer is not None
        limit, batches = self._trainer.limit_train_batches, len(self)
        return {
            "batch_size": self.batch_size,
            "processes": self._trainer.world_size,
            "batches": min(batches, limit) if isinstance(limit, int) else int(batches * limit),
            "origin": list(self._origin),
        }

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning, with the next method, that resuming inside an epoch is exact."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _position(self) -> tuple[int, int]:
        """Epoch, and how many items of it this process has trained."""
        assert self._trainer is not None
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        counted, first = self._origin
        sizes = self.sizes()
        if self._stored and self._stored != sizes:
            # a part of an epoch counts as a whole one
            first += -(-(progress.total.processed - counted) // max(self._stored["batches"], 1))
            counted = progress.total.processed
            self._origin = (counted, first)
            progress.current.reset()
            rank_zero_warn(
                "The checkpoint was written with another batch size, number of processes or of "
                "volumes: a whole epoch begins."
            )
        self._stored = {}
        epoch, batch = divmod(progress.total.processed - counted, max(sizes["batches"], 1))
        return first + epoch, batch * sizes["batch_size"]


def ranks(trainer: pl.Trainer | None) -> dict[str, int]:
    """`num_replicas` and `rank` of a sampler under a trainer, or without one."""
    if trainer is None:
        return {"num_replicas": 1, "rank": 0}
    return {"num_replicas": trainer.world_size, "rank": trainer.global_rank}


def loader_options(num_workers: int) -> dict[str, Any]:
    """Of a loader whose processes stay from epoch to epoch, and share what they inherit."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _start_worker,
        "pin_memory": torch.cuda.is_available(),
    }


def _start_worker(number: int) -> None:
    gc.freeze()  # or garbage collection copies all that this process shares with its parent
    # Lightning's own function, which it uses where a loader has none
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(number)
