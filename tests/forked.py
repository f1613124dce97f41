"""Ranks on the CPU that begin as forks of a process which has imported everything."""

from itertools import chain

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy


def strategy() -> DDPStrategy:
    """Strategy; give the trainer :class:`Forked` as well."""
    return DDPStrategy(start_method="forkserver", process_group_backend="gloo")


class Forked(pl.Callback):
    """One thread and weights of its own for each rank; Lightning does so where it spawns them."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        torch.set_num_threads(1)
        for tensor in chain(pl_module.parameters(), pl_module.buffers()):
            tensor.data = tensor.data.clone()
