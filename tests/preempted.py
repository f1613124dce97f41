"""Act like SLURM before it takes the nodes of a job away.

Run it with ``PYTHONPATH=tests`` and ``--trainer.callbacks+=preempted.SignalInStep``.
"""

import os
import signal
from typing import Any

import pytorch_lightning as pl


class SignalInStep(pl.Callback):
    """Sends SIGUSR1 to one process right after the optimiser's step, before anything counts it.

    Args:
        step: the steps that are complete then.
        rank: of the process.
    """

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step = step
        self.rank = rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def send(*_: Any) -> None:
            if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
                os.kill(os.getpid(), signal.SIGUSR1)

        trainer.optimizers[0].register_step_post_hook(send)
