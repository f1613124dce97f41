"""The cause that ended a command, and the command that resumes the run."""

import re
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch

from gvsl_lightning.errors import InputError, causes
from gvsl_lightning.runs.checkpoints import newest_whole
from gvsl_lightning.runs.interruption import received
from gvsl_lightning.runs.processes import describe_exit, is_follower


class RunError(Exception):
    """A fault that ended a command, in one sentence; empty if another process reports it.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


def explain(
    error: BaseException, words: Sequence[str], trainer: pl.Trainer | None = None
) -> RunError | None:
    """Name the cause that ended a command and the command that resumes it.

    Args:
        error: raised by the command.
        words: of the command line.
        trainer: of the run; None if there was no run.

    Returns:
        None for an error of another kind.
    """
    if isinstance(error, RunError):
        return error
    if is_follower() and (received or _LOST_CONNECTION.search(str(error))):
        return RunError("")
    if received or isinstance(error, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        cause, status = f"Interrupted by {number.name}{name_step(trainer)}", 128 + number
    elif fault := _cause(error, trainer):
        cause, status = fault, 1
    else:
        return None
    return RunError(f"{cause}; {resume_advice(words, trainer)}", status)


def _cause(error: BaseException, trainer: pl.Trainer | None) -> str | None:
    if any(isinstance(one, InputError) for one in causes(error)):
        return None
    if trainer is not None and (dead := dead_rank(trainer)):
        return f"{dead}{name_step(trainer)}, which ended the run"
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"The memory of the GPU is full{name_step(trainer)}; {_smaller(trainer)}"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(message):
        option = "num_workers" if trainer else "--workers"
        full = f"The memory of the machine is full{name_step(trainer)}"
        return f"{full}; lower {option}, or {_smaller(trainer)}"
    if worker := _DEAD_WORKER.search(message):
        is_shared = "Bus error" in message or "shared memory" in message
        full = "shared memory (/dev/shm)" if is_shared else "perhaps the machine's memory"
        cause = f"{full} is full"
        killed = f"A process that loads data was killed{name_step(trainer)} (process {worker[1]})"
        return f"{killed}: {cause}; lower --data.num_workers, batch_size or patch_size"
    return None


_NO_MEMORY = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|(?<!OutOf)MemoryError")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_LOST_CONNECTION = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|remote process")


def dead_rank(trainer: pl.Trainer) -> str | None:
    """Name a process of a higher rank that died; None if there is none."""
    processes = list(getattr(trainer.strategy.launcher, "procs", ()))
    deadline = time.monotonic() + 2 * bool(processes)
    while True:
        for rank, process in enumerate(processes, start=1):
            if status := process.poll():
                hint = ", as it says above," if status > 0 else ""
                return f"The process of rank {rank} {describe_exit(status)}{hint}"
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def name_step(trainer: pl.Trainer | None) -> str:
    """Words for the step in which a training ended; empty outside of training."""
    is_training = trainer is not None and trainer.state.fn == "fit"
    return f" after step {trainer.global_step}" if trainer and is_training else ""


def resume_advice(words: Sequence[str], trainer: pl.Trainer | None) -> str:
    """The command that goes on where the run ended."""
    if trainer is None or not words or words[0] != "fit":
        return "give the same command again."
    folders = (getattr(one, "dirpath", None) for one in trainer.checkpoint_callbacks)
    found = [path for folder in folders if folder and (path := newest_whole(Path(folder)))]
    if not found:
        return "no checkpoint was written yet: give the same command again."
    kept = list(words)
    for place, word in enumerate(words):
        if word.partition("=")[0] == "--ckpt_path":
            kept[place : place + 1 + ("=" not in word)] = []
            break
    path = max(found, key=lambda path: path.stat().st_mtime)
    command = shlex.join(["python", "-m", "gvsl_lightning", *kept, f"--ckpt_path={path}"])
    return f"go on with: {command}"


def _smaller(trainer: pl.Trainer | None) -> str:
    """Advice on settings that need less memory."""
    if trainer is None:
        return "give smaller volumes"
    if trainer.state.fn != "fit":
        return "lower patch_size or window_size, or give --trainer.precision=bf16-mixed"
    return (
        "lower patch_size, batch_size (accumulate_grad_batches keeps its effect), give "
        "--trainer.precision=bf16-mixed or backbone_options.activation_checkpointing=true"
    )
