"""Signals that end a command: at once, or after the step in a job and a trial."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

from gvsl_lightning.runs.processes import is_follower

SIGNALS = (signal.SIGINT, signal.SIGTERM)

received: list[signal.Signals] = []
"""The signal that ends this process."""

_stopping = threading.Event()
"""Set once Lightning has received SIGTERM of a job or trial, which it ends after the step."""


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
    before = {number: signal.getsignal(number) for number in SIGNALS}
    received.clear()
    take_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        received.clear()


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


def take_signals() -> None:
    """Handle SIGINT and SIGTERM in this process, unless another process of the run does."""
    if is_follower():  # Ctrl-C reaches all processes of a terminal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    for number in SIGNALS:
        signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Note the first signal and end the command by an exception."""
    if not received:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt
