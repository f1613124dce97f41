"""The command ``benchmark``: what is run, what is refused, and small comparisons end to end."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from rich.progress import Progress

from gvsl_lightning.benchmark import runner as benchmark
from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from plans import TASK, finish, write

CONFIGS = Path(__file__).parents[2] / "configs"

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Stands in for training: a run scores 0.5 + seed / 10."""
    ran: list[Run] = []

    def execute(run: Run, environment: Any, locks: Any) -> None:
        ran.append(run)
        finish(run, [0.4 + run.seed / 10, 0.6 + run.seed / 10])

    monkeypatch.setattr(Run, "execute", execute)
    monkeypatch.setenv("COLUMNS", "200")
    return ran


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return ["--config", str(write(tmp_path)), "--out", str(tmp_path / "out")]


def test_finished_runs_are_not_run_again(
    words: list[str], executed: list[Run], tmp_path: Path, capsys: Capture
) -> None:
    benchmark.main(words)
    assert len(executed) == len(set(executed)) == 10
    executed.clear()
    benchmark.main(words)
    assert not executed
    assert "10 of 10 runs" in capsys.readouterr().out
    benchmark.main([*words, "--a=1"])
    assert len(executed) == 10
    assert len(list((tmp_path / "out").rglob("result.json"))) == 10


def test_a_failed_run_is_named_and_the_others_are_reported(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def execute(run: Run, environment: Any, locks: Any) -> None:
        if not run.task and run.seed == 1:
            raise InputError("volumes are missing.")
        finish(run, [0.5])

    monkeypatch.setattr(Run, "execute", execute)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(InputError, match=r"^1 of 10 runs .* 2 .*volumes are missing"):
        benchmark.main([*words, "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "GVSL, pre-training, seed 1: volumes are missing." in printed
    assert "GVSL, linear, hearts, seed 1" in printed
    assert "7 of 10 runs" in printed
    assert "1 of 2 seeds" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 7
    assert [row["seed"] for row in rows if row["mode"] == "pre-training"] == ["0"]


def test_a_metric_that_no_run_reports_is_named_at_once_and_loses_nothing(
    words: list[str], executed: list[Run], tmp_path: Path, capsys: Capture
) -> None:
    write(tmp_path, tasks={"hearts": TASK | {"monitor": "val/dise"}})
    with pytest.raises(InputError, match=r"hearts .*val/dise.*monitor") as refused:
        benchmark.main(words)
    assert capsys.readouterr().out.count(str(refused.value)) == 1
    executed.clear()
    write(tmp_path)
    benchmark.main(words)
    assert not executed


def test_two_benchmarks_in_one_folder_are_refused(
    words: list[str], executed: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_PATIENCE", 2)
    out = tmp_path / "out"
    with benchmark.locked(out):
        for more in ([], ["--only", "1"]):
            with pytest.raises(InputError, match=str(out)):
                benchmark.main([*words, *more])
    with benchmark.locked(out, shared=True):
        with pytest.raises(InputError, match=str(out)):
            benchmark.main(words)
        benchmark.main([*words, "--only", "1"])  # runs of an array share the folder
    assert [str(run) for run in executed] == ["Scratch, linear, hearts, seed 0"]


def test_single_runs(words: list[str], executed: list[Run], capsys: Capture) -> None:
    with pytest.raises(InputError, match=r"Run 2 \(GVSL, linear.* run 0 "):
        benchmark.main([*words, "--only", "2"])
    for index in (0, 2, 2):
        benchmark.main([*words, "--only", str(index)])
    assert [run.task for run in executed] == ["", "hearts"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Run 0 of 10 (GVSL, pre-training, seed 0), 60 s"
    assert printed[1] == "Run 2 of 10 (GVSL, linear, hearts, seed 0), 60 s: test/dice 0.5000"
    with pytest.raises(InputError, match="--only is 10"):
        benchmark.main([*words, "--only", "10"])
    benchmark.main(words)
    assert len(executed) == 10


@pytest.mark.parametrize(("kind", "first"), [("slurm", "sbatch"), ("sweep", "program:")])
def test_printing_runs_nothing(
    kind: str, first: str, words: list[str], executed: list[Run], capsys: Capture
) -> None:
    benchmark.main([*words, "--print", kind, "--root=a"])
    printed = capsys.readouterr().out
    assert first in printed
    assert "--root=a" in printed
    assert not executed


OUTSIDER = """
from torch.nn import functional as F
from gvsl_lightning.tasks.base import BaseTask


class Averages(BaseTask):
    def __init__(self, **base):
        super().__init__(**base)

    def configure_models(self):
        self.backbone = self.configure_backbone()

    def loss(self, batch):
        volume = batch["fixed"]
        found = self(volume).local_features.mean(dim=1, keepdim=True)
        return F.mse_loss(found, F.avg_pool3d(volume, 3, 1, 1))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=len(batch["fixed"]))
"""


def shortened(folder: Path, **changes: Any) -> Path:
    """The smoke test's plan with one seed and mode, 16 voxels a side and few steps."""
    content = yaml.safe_load(
        (CONFIGS / "benchmark" / "phantom_smoke.yaml").read_text(encoding="utf-8")
    )
    size = {"data.init_args.size": [16, 16, 16]}
    counts = {"data.count": 10, "data.val": 2, "data.test": 3}
    for part in (*content["methods"].values(), *content["tasks"].values()):
        if "config" in part:
            part["config"] = str(CONFIGS / "benchmark" / part["config"])
    content["tasks"]["hearts"]["changes"] |= counts
    for task in content["tasks"].values():
        task["changes"] |= size
    content["pretrain"] |= size | {"data.init_args.patch_size": [16, 16, 16]}
    content["pretrain"] |= {"trainer.max_steps": 4, "trainer.val_check_interval": 2}
    content["modes"] = {"linear": content["modes"]["linear"]}
    content["modes"]["linear"] |= {"trainer.max_steps": 6, "trainer.val_check_interval": 3}
    content["seeds"] = [0]
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def run_here(command: Sequence[str], environment: Any, stdout: IO[str], **options: Any) -> int:
    """Stands in for :func:`gvsl_lightning.runs.processes.run`, without a process."""
    words = list(command)[list(command).index("gvsl_lightning") + 1 :]
    with redirect_stdout(stdout), redirect_stderr(stdout):
        try:
            main(words)
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def test_a_comparison_with_a_method_of_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("gvsl_lightning.runs.processes.run", run_here)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # works in the main thread alone
    progress = partial(Progress, console=Console())  # a fit clears the bars of the common console
    monkeypatch.setattr("gvsl_lightning.benchmark.execution.Progress", progress)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "outsider.py").write_text(OUTSIDER)
    config = yaml.safe_load(
        (CONFIGS / "pretrain" / "without_z_matching.yaml").read_text(encoding="utf-8")
    )
    config["trainer"]["callbacks"] = ["BackboneExporter"]
    config["model"] = {"class_path": "outsider.Averages", "init_args": {}}
    (tmp_path / "outsider.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "broken.safetensors").write_text("no weights")
    methods = {
        "Averages": {"config": "outsider.yaml"},
        "broken": {"weights": str(tmp_path / "broken.safetensors")},
    }
    path = shortened(tmp_path, methods=methods, baseline="Averages", figures={})
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    del plan["tasks"]["lesions"]
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--config", str(path), "--out", str(out)])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "1 of 3 runs failed, the first one with: " in printed.err
    assert "broken.safetensors" in printed.err
    assert "2 of 3 runs" in printed.out

    folder = out / "averages"
    pretrained = json.loads((folder / "pretrain" / "0" / "result.json").read_text(encoding="utf-8"))
    assert pretrained["steps"] == 4
    assert [row["step"] for row in pretrained["validations"]] == [1, 3]
    transfer = folder / "linear" / "hearts" / "0"
    result = json.loads((transfer / "result.json").read_text(encoding="utf-8"))
    assert len(result["cases"]) == 3
    low, high = result["interval"]
    assert low <= result["scores"]["test/dice"] <= high
    (report,) = transfer.rglob("test_cases.csv")
    assert report.parent.name == "run"
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["method"], row["mode"], row["steps"]) for row in rows] == [
        ("Averages", "pre-training", "4"),
        ("Averages", "linear", "6"),
    ]


@pytest.mark.slow
def test_a_benchmark_that_is_killed_and_restarted_gives_the_same_table(tmp_path: Path) -> None:
    path = shortened(tmp_path)
    tables = {}
    random = np.random.default_rng()
    for name, kills in (("whole", ()), ("broken", (0, 1, 4))):
        out = tmp_path / name
        words = ["--config", str(path), "--out", str(out), "--jobs", "2"]
        program = [sys.executable, "-m", "gvsl_lightning", "benchmark", *words]
        for done in kills:
            process = subprocess.Popen(program)
            # so many runs are done, and another one has begun to write
            while not (
                len(list(out.rglob("result.json"))) >= done
                and any(
                    not (log.parent / "result.json").exists() and log.stat().st_size
                    for log in out.rglob("fit.log")
                )
            ):
                assert process.poll() is None
                time.sleep(0.1)
            moment = random.uniform(0, 3)
            print(f"killed {moment:.2f} s after {done} runs were done")
            time.sleep(moment)
            process.kill()
            process.wait()
        subprocess.run(program, check=True)
        rows = list(csv.DictReader((out / "results.csv").open()))
        # weights lie elsewhere, and time passes differently
        tables[name] = [{**row, "seconds": "", "config": ""} for row in rows]
        assert len(rows) == len(list(out.rglob("result.json"))) == 8
        tables[f"{name}.md"] = (out / "table.md").read_text(encoding="utf-8")
    assert tables["whole"] == tables["broken"]
    assert tables["whole.md"] == tables["broken.md"]
