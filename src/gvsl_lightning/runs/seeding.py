"""Random numbers of a step that depend on seed and step alone."""

import os
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


class BatchSeeding(pl.Callback):
    """Seeds PyTorch's global generator, from which dropout draws, for each batch of a seeded run.

    The seed follows from ``seed_everything``, the process and the number of batches trained on.
    The numbers drawn then depend neither on a resume nor on ``num_workers``; data loaders draw from
    the same generator. Every task of this package has this callback.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            trained: Any = trainer.fit_loop.epoch_loop.batch_progress.total
            numbers = (int(seed), trainer.global_rank, trained.processed)
            sequence = np.random.SeedSequence(numbers)
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
