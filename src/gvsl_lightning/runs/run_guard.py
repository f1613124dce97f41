"""A run ends after a signal, and when one of its processes dies."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from subprocess import Popen
from typing import Any

import pytorch_lightning as pl

from gvsl_lightning.runs.faults import dead_rank, name_step, resume_advice
from gvsl_lightning.runs.interruption import SIGNALS, interrupt, received, take_signals
from gvsl_lightning.runs.loggers import finish_runs
from gvsl_lightning.runs.processes import is_follower

_PATIENCE = 10.0
"""Seconds for a run to end by itself after a rank has died."""


class RunGuard(pl.Callback):
    """Ends a run after a signal, or when one of its processes dies.

    If a process of a higher rank dies, Lightning kills the first one and names no cause; this
    callback names the rank and the exit status. The higher ranks end with the first one.

    Args:
        words: of the command line.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        launcher: Any = trainer.strategy.launcher
        if processes := list(getattr(launcher, "procs", ())):
            launcher.procs.clear()  # the list that Lightning's observer watches; it ends with it
            launcher.procs = processes
            observe = threading.Thread(
                target=_observe, args=(trainer, processes, self.words), daemon=True
            )
            observe.start()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals back from Lightning, whose handler waits for the other ranks."""
        if interrupt in map(signal.getsignal, SIGNALS) or is_follower():
            take_signals()

    on_train_start = on_validation_start = on_sanity_check_start
    on_test_start = on_predict_start = on_sanity_check_start

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Raise again: Python drops an exception that a signal raises inside a destructor."""
        if received:
            raise KeyboardInterrupt

    on_validation_batch_start = on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start


def _observe(trainer: pl.Trainer, processes: Sequence[Popen[bytes]], words: Sequence[str]) -> None:
    """End the run if one of its processes dies and the run does not end by itself."""
    while not any(process.poll() for process in processes):
        if all(process.returncode == 0 for process in processes):
            return
        time.sleep(0.5)
    time.sleep(_PATIENCE)
    if not received:
        sentence = f"{dead_rank(trainer)}{name_step(trainer)}, which ended the run"
        print(f"error: {sentence}; {resume_advice(words, trainer)}", file=sys.stderr)
    for process in processes:
        process.kill()
    closing = threading.Thread(target=finish_runs, args=(1,), daemon=True)
    closing.start()
    closing.join(2 * _PATIENCE)
    sys.stderr.flush()
    os._exit(1)
