"""Commands that are started and then meet a fault; what is shared by the tests of these."""

import csv
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

_CONTEXT = multiprocessing.get_context("forkserver")


class Command:
    """A command of gvsl_lightning in a process, and a session, of its own.

    Args:
        words: of the command line.
        folder: to work in.
        **environment: variables of the process.
    """

    def __init__(self, words: Sequence[str], folder: Path, **environment: str) -> None:
        self.folder = folder
        self._log = folder / "printed.txt"
        self._log.write_bytes(b"")
        self.process: BaseProcess = _CONTEXT.Process(
            target=_run, args=(list(words), folder, self._log, environment)
        )
        self.process.start()
        self._seen: set[int] = set()

    def wait_for(self, condition: Callable[[], Any], seconds: float = 300) -> None:
        """Until the command has come so far, or ended."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.is_alive():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.005)

    def has_run(self) -> bool:
        """Whether it has made the folder of a run, just before it trains."""
        return any(self.folder.glob("runs/*/*/config.yaml"))

    def send(self, number: int, pid: int | None = None) -> None:
        self._seen |= set(self.pids())
        with suppress(ProcessLookupError):
            os.kill(pid or self.process.pid, number)

    def status(self, seconds: float = 300) -> int:
        """Exit status, once nothing of the command is left."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
        assert status is not None, f"it goes on: {self.printed()}"
        deadline = time.monotonic() + 20
        while left := self.pids():
            assert time.monotonic() < deadline, f"orphans: {[_name(pid) for pid in left]}"
            time.sleep(0.05)
        shared = [
            name for pid in self._seen for name in os.listdir("/dev/shm") if f"_{pid}_" in name
        ]
        assert not shared
        return status

    def pids(self) -> list[int]:
        """Whatever works in the folder: loader processes, other ranks, W&B's service."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdecimal() and Path(f"/proc/{entry}/cwd").readlink() == self.folder:
                    found.append(int(entry))
            except OSError:
                continue
        return [pid for pid in found if _state(pid) != "Z"]

    def printed(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def sentence(self) -> str:
        """The one on stderr, of a command that printed no traceback."""
        printed = self.printed()
        assert "Traceback" not in printed, printed
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        return line


def losses(folder: Path) -> dict[int, set[float]]:
    """Values that the runs in a folder logged at each step, in the order of the steps."""
    found: dict[int, set[float]] = {}
    for path in folder.rglob("metrics.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    found.setdefault(int(row["step"]), set()).add(float(row["train/loss"]))
    return dict(sorted(found.items()))


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.suffix == ".partial" or ".nii" in path.name]


class Fail(pl.Callback):
    """Meets a fault when a step begins.

    Args:
        step: the steps that are done.
        fault: ``memory``, ``gpu``, ``kill`` (this process), ``worker`` (a loader process), ``nan``,
            ``error`` or ``terms`` (SIGTERM, and once more when Lightning gives the signal back).
        rank: of the process.
    """

    def __init__(self, step: int, fault: str, rank: int = 0) -> None:
        self.step = step
        self.fault = fault
        self.rank = rank

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # before a validation, and not a step, finds out
        if trainer.global_step == self.step and self.fault == "nan":
            next(pl_module.parameters()).data.fill_(float("nan"))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if (trainer.global_step, trainer.global_rank) != (self.step, self.rank):
            return
        if self.fault == "memory":
            raise MemoryError
        if self.fault == "gpu":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.fault == "error":
            raise ZeroDivisionError("something is wrong")
        if self.fault == "terms":
            connector = trainer._signal_connector
            give_back = connector.teardown
            connector.teardown = lambda: (give_back(), signal.raise_signal(signal.SIGTERM))
            signal.raise_signal(signal.SIGTERM)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "worker":
            (worker, *_others) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(60)  # PyTorch finds out in this step


def _run(words: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    import gvsl_lightning.__main__
    from gvsl_lightning.cli.main import main
    from gvsl_lightning.runs.processes import end_with_starter

    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.setsid()
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [gvsl_lightning.__main__.__file__, *words]  # of which ranks are made
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    known = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(known)  # for ranks, which import this file
    os.environ.pop("WANDB_SERVICE", None)  # of tests in this process; killed runs live on in it
    end_with_starter()
    main(words)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "ended"
