"""Order of the runs of a plan, their GPUs, and an interruption."""

import time
from pathlib import Path
from typing import Any

import pytest

from gvsl_lightning.benchmark.execution import Schedule
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.training import Run
from plans import finish, write


def test_no_run_begins_before_its_pretraining_and_jobs_share_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Run] = []
    devices: list[str] = []
    running: list[int] = []

    def execute(run: Run, environment: dict[str, str], locks: Any) -> None:
        assert run.needs is None or run.needs in ended
        devices.append(environment["CUDA_VISIBLE_DEVICES"])
        running.append(1)
        assert len(running) <= 2
        time.sleep(0.02)
        finish(run, [0.5])
        running.pop()
        ended.append(run)

    monkeypatch.setattr(Run, "execute", execute)
    schedule = Schedule(Plan.read(write(tmp_path, seeds=[0, 1, 2])).runs(tmp_path / "out", []))
    schedule.execute(2, ["4", "7"], [])
    assert (schedule.failed, schedule.blocked, len(schedule.done), len(ended)) == ({}, [], 15, 15)
    assert set(devices) == {"4", "7"}


def test_after_an_interruption_no_further_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Run] = []

    def execute(run: Run, environment: Any, locks: Any) -> None:
        began.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", execute)
    schedule = Schedule(Plan.read(write(tmp_path)).runs(tmp_path / "out", []))
    with pytest.raises(KeyboardInterrupt):
        schedule.execute(1, [], [])
    assert len(began) == 1
