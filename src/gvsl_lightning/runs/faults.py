"""Signals, full memory and killed processes: the cause and the command that resumes the run."""

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

from gvsl_lightning.errors import InputError, causes
from gvsl_lightning.runs.checkpoints import newest_whole
from gvsl_lightning.runs.loggers import finish_runs
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
    if is_follower() and (_received or _LOST_CONNECTION.search(str(error))):
        return RunError("")
    if _received or isinstance(error, KeyboardInterrupt):
        number = _received[0] if _received else signal.SIGINT
        cause, status = f"Interrupted by {number.name}{_step(trainer)}", 128 + number
    elif fault := _cause(error, trainer):
        cause, status = fault, 1
    else:
        return None
    return RunError(f"{cause}; {_resume(words, trainer)}", status)


def _cause(error: BaseException, trainer: pl.Trainer | None) -> str | None:
    if any(isinstance(one, InputError) for one in causes(error)):
        return None
    if trainer is not None and (dead := _dead_rank(trainer)):
        return f"{dead}{_step(trainer)}, which ended the run"
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"The memory of the GPU is full{_step(trainer)}; {_smaller(trainer)}"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(message):
        option = "num_workers" if trainer else "--workers"
        full = f"The memory of the machine is full{_step(trainer)}"
        return f"{full}; lower {option}, or {_smaller(trainer)}"
    if worker := _DEAD_WORKER.search(message):
        is_shared = "Bus error" in message or "shared memory" in message
        full = "shared memory (/dev/shm)" if is_shared else "perhaps the machine's memory"
        cause = f"{full} is full"
        return (
            f"A process that loads data was killed{_step(trainer)} (process {worker[1]}): {cause}; "
            "lower --data.num_workers, batch_size or patch_size"
        )
    return None


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end a command at once, like Ctrl-C; a second signal changes nothing.

    A SLURM job or a trial of a W&B sweep finishes its step instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if "WANDB_SWEEP_ID" in os.environ or SLURMEnvironment.detect():
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _end_unless_stopping)
        try:
            yield
        finally:
            _stopping.clear()
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _received.clear()
    _take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


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
        if _interrupt in map(signal.getsignal, _SIGNALS) or is_follower():
            _take_signals()

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
        if _received:
            raise KeyboardInterrupt

    on_validation_batch_start = on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start


_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_received: list[signal.Signals] = []
"""The signal that ends this process."""

_stopping = threading.Event()
"""Set once Lightning has received SIGTERM of a job or trial, which it ends after the step."""

_PATIENCE = 10.0
"""Seconds for a run to end by itself after a rank has died."""

_NO_MEMORY = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|(?<!OutOf)MemoryError")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_LOST_CONNECTION = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|remote process")


def _end_unless_stopping(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM of a job or trial before, during and after Lightning's own handler.

    Lightning's handler calls this one and restores it at the end; a second signal then changes
    nothing.
    """
    if signal.getsignal(number) is not _end_unless_stopping:
        _stopping.set()
    elif not _stopping.is_set():
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _take_signals() -> None:
    if is_follower():  # Ctrl-C reaches all processes of a terminal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _received:
        _received.append(signal.Signals(number))
        raise KeyboardInterrupt


def _observe(trainer: pl.Trainer, processes: Sequence[Popen[bytes]], words: Sequence[str]) -> None:
    """End the run if one of its processes dies and the run does not end by itself."""
    while not any(process.poll() for process in processes):
        if all(process.returncode == 0 for process in processes):
            return
        time.sleep(0.5)
    time.sleep(_PATIENCE)
    if not _received:
        sentence = f"{_dead_rank(trainer)}{_step(trainer)}, which ended the run"
        print(f"error: {sentence}; {_resume(words, trainer)}", file=sys.stderr)
    for process in processes:
        process.kill()
    closing = threading.Thread(target=finish_runs, args=(1,), daemon=True)
    closing.start()
    closing.join(2 * _PATIENCE)
    sys.stderr.flush()
    os._exit(1)


def _dead_rank(trainer: pl.Trainer) -> str | None:
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


def _step(trainer: pl.Trainer | None) -> str:
    is_training = trainer is not None and trainer.state.fn == "fit"
    return f" after step {trainer.global_step}" if trainer and is_training else ""


def _resume(words: Sequence[str], trainer: pl.Trainer | None) -> str:
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
