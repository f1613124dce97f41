"""Ranks and commands that begin as forks of a process which has imported everything."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import IO, Any

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


def run(
    command: Sequence[str], environment: Mapping[str, str], stdout: IO[str], **options: Any
) -> int:
    """Stands in for :func:`gvsl_lightning.runs.processes.run` without its imports."""
    words = list(command)[command.index("gvsl_lightning") + 1 :]
    arguments = (words, dict(environment), stdout.name)
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _main(words: list[str], environment: dict[str, str], log: str) -> None:
    from gvsl_lightning.cli.main import main

    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    main(words)
