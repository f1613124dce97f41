"""One run of a comparison: when it is done, and its process."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.training import Run, digest
from gvsl_lightning.errors import InputError
from plans import find, finish, write


def test_a_run_is_done_while_all_that_it_depends_on_is_the_same(tmp_path: Path) -> None:
    runs = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])
    pretraining = find(runs, "GVSL", "", "", 0)
    transfer = find(runs, "GVSL", "hearts", "linear", 0)
    other = find(runs, "GVSL", "hearts", "linear", 1)
    scratch = find(runs, "Scratch", "hearts", "linear", 0)
    for run in runs:
        finish(run, [0.5])
    assert all(run.is_done() for run in runs)

    backbone = pretraining.backbone.read_bytes()
    pretraining.backbone.unlink()
    states = [run.is_done() for run in (pretraining, transfer, other, scratch)]
    assert states == [False, False, True, True]
    pretraining.backbone.write_bytes(backbone + b"changed")
    result = pretraining.folder / "result.json"
    content = json.loads(result.read_text(encoding="utf-8"))
    result.write_text(json.dumps(content | {"backbone": digest(pretraining.backbone)}))
    assert pretraining.is_done()
    assert not transfer.is_done()
    finish(pretraining, [])  # the same backbone again
    assert transfer.is_done()

    config = tmp_path / "pretrain.yaml"
    config.write_text("trainer: {}\n")
    assert not any(run.is_done() for run in (pretraining, transfer, other))
    assert scratch.is_done()
    config.write_text("trainer: null\n")
    assert transfer.is_done()

    more = Plan.read(write(tmp_path, pretrain={"a": 1})).runs(tmp_path / "out", [])
    assert {run.method for run in more if run.is_done()} == {"Scratch"}

    half = (scratch.folder / "result.json").read_text(encoding="utf-8")[:-20]
    (scratch.folder / "result.json").write_text(half)
    assert not scratch.is_done()


def test_files_of_an_interrupted_run_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Run, environment: Any, locks: Any) -> None:
        assert [path.name for path in run.folder.iterdir()] == []
        raise KeyboardInterrupt

    run = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])[1]
    finish(run, [0.5])
    (run.folder / "half.ckpt").write_text("")
    monkeypatch.setattr(Run, "_train", train)
    with pytest.raises(KeyboardInterrupt):
        run.execute({}, [])
    assert not run.is_done()


@pytest.mark.parametrize(
    ("place", "metrics", "named"),
    [
        (1, "step,train/loss,val/dice\n4,0.5,\n9,,0.3\n", "test"),
        (0, "step,train/loss\n4,0.5\n", r"backbone\.safetensors.*BackboneExporter.*GVSL"),
        (0, None, r"metrics\.csv.*CSVLogger"),
    ],
)
def test_a_run_without_what_a_comparison_needs_has_failed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    metrics: str | None,
    named: str,
) -> None:
    def train(run: Run, environment: Any, locks: Any) -> None:
        run.log_folder.mkdir(parents=True)
        if metrics is not None:
            (run.log_folder / "metrics.csv").write_text(metrics)

    monkeypatch.setattr(Run, "_train", train)
    run = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])[place]
    with pytest.raises(InputError, match=named):
        run.execute({}, [])
    assert not run.is_done()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_benchmark_takes_its_runs_along_and_leaves_no_lock(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    script = f"""
import fcntl, os, sys
from gvsl_lightning.runs import processes
file = open({str(tmp_path / "lock")!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
code = "from gvsl_lightning.runs.processes import end_with_starter; end_with_starter(); "
code += "import time; open({str(begun)!r}, 'w'); time.sleep(60)"
processes.run([sys.executable, "-c", code], os.environ, pass_fds=[file.fileno()])
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with open(tmp_path / "lock") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        parent.kill()
        parent.wait()
        while True:  # the run holds the lock too, so that a free lock means that it has ended
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the run lives on"
                time.sleep(0.05)
