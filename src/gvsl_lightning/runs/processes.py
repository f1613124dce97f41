"""Processes that a command starts: none outlives it, however it ends."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STARTER = "GVSL_STARTER"
"""Environment variable: id of the process of this package that started this one."""


def end_with_starter() -> None:
    """Let this process be killed with the one of this package that started it, if one did.

    Linux alone. Whatever the process starts learns who did.
    """
    starter = os.environ.get(STARTER, "")
    if sys.platform == "linux" and starter.isdecimal():
        if int(starter) == os.getppid():
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # it ended before it could be watched; in a container its id means nothing
        if os.getppid() == 1 and not os.path.exists(f"/proc/{starter}"):
            sys.exit("error: The process that started this one has ended.")
    os.environ[STARTER] = str(os.getpid())


_PR_SET_PDEATHSIG = 1  # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html


def is_follower() -> bool:
    """Whether this is a process of rank 1 or more, which the one of rank 0 started."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and _has_starter


_has_starter = STARTER in os.environ


def run(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> int:
    """Run a command to its end; an interruption ends it too.

    Args:
        command: its words.
        environment: all variables.
        **options: of ``subprocess.Popen``.

    Returns:
        Its exit status; that of a signal that killed it is negative.
    """
    environment = {**environment, STARTER: str(os.getpid())}
    with subprocess.Popen(command, env=environment, **options) as process:
        _running.append(process)
        try:
            return process.wait()
        except BaseException:
            end_running()
            raise
        finally:
            _running.remove(process)


def end_running() -> None:
    """Ask what :func:`run` runs, in all threads, to end; kill what does not within 20 s."""
    processes = list(_running)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


_running: list[subprocess.Popen[bytes]] = []


def described(status: int) -> str:
    """How a process ended, such as ``was killed by SIGKILL, perhaps for want of memory``."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}{', perhaps for want of memory' * (name == 'SIGKILL')}"


def last_words(status: int, log: Path) -> str:
    """Sentence about a process that failed: the last line that it printed.

    Args:
        status: its exit status.
        log: what it printed.
    """
    if status < 0:
        return f"The process {described(status)} ({log})"
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"]
    return f"{lines[-1].removeprefix('error: ')} ({log})"
