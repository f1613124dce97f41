"""Execute the runs of a plan, several at a time, each after the pre-training that it needs."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs import processes


class Schedule:
    """The runs of a plan by how far they are.

    Attributes:
        done: runs with a result.
        waiting: runs that have not begun.
        failed: run -> why it failed.
        blocked: runs whose pre-training failed.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.done = [run for run in runs if run.is_done()]
        self.waiting = [run for run in runs if run not in self.done]
        self.failed: dict[Run, str] = {}
        self.blocked: list[Run] = []

    def execute(
        self,
        jobs: int,
        devices: Sequence[str],
        locks: Sequence[int],
        check: Callable[[Sequence[Run]], str] = lambda _: "",
    ) -> None:
        """Execute all waiting runs, with a progress bar.

        Args:
            jobs: runs at a time.
            devices: GPUs that they take in turn; none: those that the process sees.
            locks: see :meth:`gvsl_lightning.benchmark.training.Run.execute`.
            check: gives a sentence about the finished runs that is printed at once, or nothing.
        """
        if not self.waiting:
            return
        environments = _environments(jobs, devices)
        running: dict[Future[None], Run] = {}
        warning = ""
        with (
            Progress(*_COLUMNS, speed_estimate_period=_WEEK) as progress,
            ThreadPoolExecutor(jobs) as pool,
        ):
            done, total = len(self.done), len(self.done) + len(self.waiting)
            bar = progress.add_task("runs", completed=done, total=total)
            try:
                while self.waiting or running:
                    while len(running) < jobs and (run := self._next()):
                        running[pool.submit(_execute, run, environments, locks)] = run
                    if not warning and (warning := check(self.done)):
                        _print(progress, warning)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._end(running.pop(future), future, progress)
                    finished = len(self.done) + len(self.failed) + len(self.blocked)
                    progress.update(bar, completed=finished)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.end_running()
                raise

    def _next(self) -> Run | None:
        """The first waiting run whose pre-training is done."""
        for run in self.waiting:
            if run.needs is None or run.needs in self.done:
                self.waiting.remove(run)
                return run
        return None

    def _end(self, run: Run, future: Future[None], progress: Progress) -> None:
        try:
            future.result()
        except (InputError, OSError) as error:  # a full disk stops no other run
            self.failed[run] = str(error)
            _print(progress, f"failed: {run}: {error}")
            for one in [one for one in self.waiting if one.needs == run]:
                _print(progress, f"not run: {one}, whose pre-training failed")
                self.waiting.remove(one)
                self.blocked.append(one)
        else:
            self.done.append(run)


_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
_WEEK = 7 * 24 * 3600
"""Seconds of finished runs that the remaining time is estimated from."""


def _execute(
    run: Run, environments: "SimpleQueue[Mapping[str, str]]", locks: Sequence[int]
) -> None:
    environment = environments.get()
    try:
        # a pre-training that was repeated may have left the same backbone
        if not run.is_done():
            run.execute(environment, locks)
    finally:
        environments.put(environment)


def _environments(jobs: int, devices: Sequence[str]) -> "SimpleQueue[Mapping[str, str]]":
    """Variables of the processes that run at a time: CPU threads and GPU of each."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    environments: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for number in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
        environments.put({**threads, **gpu})
    return environments


def _print(progress: Progress, sentence: str) -> None:
    progress.console.print(sentence, style="red", highlight=False, markup=False, soft_wrap=True)
