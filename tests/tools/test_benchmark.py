import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from gvsl_lightning.cli import main
from gvsl_lightning.errors import InputError
from gvsl_lightning.tools import benchmark
from gvsl_lightning.tools.benchmark import Plan, Run

PLAN: dict[str, Any] = {
    "config": "base.yaml",
    "arms": {"scratch": {"model.init_args.mode": "scratch"}, "tuned": {"model.weights": None}},
    "vary": "data.init_args.labelled",
    "values": [2, 0.5],
    "seeds": [0, 1],
    "metrics": ["test/dice"],
    "monitor": "val/dice",
    "baseline": "scratch",
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text("trainer: null\n")
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


def finish(run: Run, score: float, validations: list[float]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 9 + 10 * i, "val/dice": value} for i, value in enumerate(validations)]
    content = {
        "words": list(run.words),
        "files": run.files(),
        "scores": {"test/dice": score},
        "validations": rows,
    }
    (run.folder / "result.json").write_text(json.dumps(content))


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Stands in for training: a run scores 0.5 + seed / 10, seed 1 of `tuned` fails."""
    ran: list[Run] = []

    def execute(run: Run, threads: int) -> None:
        ran.append(run)
        if run.arm == "tuned" and run.seed == 1:
            raise InputError("labels are missing.")
        finish(run, 0.5 + run.seed / 10, [0.1, 0.4])

    monkeypatch.setattr(Run, "execute", execute)
    return ran


def test_plan_is_every_arm_with_every_value_and_seed(tmp_path: Path) -> None:
    runs = Plan.read(write(tmp_path)).runs(tmp_path / "out", ["--extra=1"])
    assert len({run.folder for run in runs}) == len(runs) == 8
    assert {(run.arm, run.column, run.seed) for run in runs} == {
        (arm, column, seed)
        for arm in ("scratch", "tuned")
        for column in ("2", "0.5")
        for seed in (0, 1)
    }
    (words,) = {run.words for run in runs if (run.arm, run.column, run.seed) == ("tuned", "2", 1)}
    assert words == (
        f"--config={tmp_path / 'base.yaml'}",
        "--seed_everything=1",
        "--data.init_args.labelled=2",
        "--model.weights=null",
        "--extra=1",
    )


def test_finished_runs_are_not_run_again_and_failed_ones_are(
    tmp_path: Path, executed: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(write(tmp_path)), "--out", str(tmp_path / "out")]
    for count in (8, 2):
        executed.clear()
        with pytest.raises(InputError, match=r"2 of 8 runs failed.*labels are missing"):
            benchmark.main(words)
        assert len(executed) == count
    executed.clear()
    with pytest.raises(InputError):
        benchmark.main([*words, "--model.init_args.learning_rate=1"])
    assert len(executed) == 8
    printed = capsys.readouterr().out
    assert "0.550 ± 0.071 (2)" in printed
    assert "0.500 (1)" in printed
    assert len((tmp_path / "out" / "benchmark.csv").read_text().splitlines()) == 7


def test_another_configuration_or_other_weights_are_run_again(tmp_path: Path) -> None:
    weights = tmp_path / "backbone.safetensors"
    weights.write_bytes(b"one")
    path = write(tmp_path, arms={"scratch": {"model.init_args.weights": str(weights)}})
    (run, *_) = Plan.read(path).runs(tmp_path / "out", [])
    finish(run, 0.5, [])
    assert run.is_done()
    for file in (weights, tmp_path / "base.yaml"):
        before = file.read_bytes()
        file.write_bytes(before + b" # changed")
        os.utime(file, (1, 1))
        assert not run.is_done()
        file.write_bytes(before)
        os.utime(file, (2, 2))
        assert run.is_done()


def test_after_an_interruption_no_further_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Run] = []

    def execute(run: Run, threads: int) -> None:
        began.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", execute)
    plan = Plan.read(write(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        benchmark.execute(plan, plan.runs(tmp_path / "out", []), 1)
    assert len(began) < 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"metrics": ["test/dise", "test/dice"]},
            "No finished run reports test/dise, and the runs report test/dice: correct metrics",
        ),
        (
            {"monitor": "val/dise"},
            "No finished run reports val/dise, and the runs report val/dice: correct monitor",
        ),
    ],
)
def test_what_no_run_reports_is_said_at_once_and_loses_nothing(
    tmp_path: Path,
    executed: list[Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--config", str(write(tmp_path, **changes)), "--out", str(tmp_path / "out")]
    for _ in range(2):  # after the first run, and before the first one that is left
        with pytest.raises(InputError, match="2 of 8 runs failed"):
            benchmark.main(words)
        assert capsys.readouterr().out.count(sentence) == 1

    monkeypatch.setattr(Run, "execute", lambda run, threads: finish(run, 0.5, [0.1, 0.4]))
    with pytest.raises(InputError, match=sentence):
        benchmark.main(words)
    printed = capsys.readouterr().out
    assert "test/dice, mean" in printed
    assert ("steps until" in printed) == ("metrics" in changes)
    assert "dise, mean" not in printed
    write(tmp_path)
    monkeypatch.setattr(Run, "execute", lambda run, threads: pytest.fail("run again"))
    benchmark.main(words)
    assert "No finished run" not in capsys.readouterr().out


def test_a_half_written_result_is_no_result(tmp_path: Path, executed: list[Run]) -> None:
    plan = Plan.read(write(tmp_path))
    (run, *_) = plan.runs(tmp_path / "out", [])
    finish(run, 0.5, [])
    assert run.is_done()
    path = run.folder / "result.json"
    path.write_text(path.read_text()[:-20])
    assert not run.is_done()


def test_steps_to_the_baseline_s_best(tmp_path: Path) -> None:
    plan = Plan.read(write(tmp_path, values=[2]))
    curves = {
        ("scratch", 0): [0.1, 0.5, 0.4],
        ("scratch", 1): [0.3, 0.2, 0.6],
        ("tuned", 0): [0.5, 0.6, 0.6],
        ("tuned", 1): [0.1, 0.2, 0.3],
    }
    runs = plan.runs(tmp_path / "out", [])
    for run in runs:
        finish(run, 0.5, curves[run.arm, run.seed])
    rows = [list(column.cells) for column in benchmark.tables(plan, runs)[-1].columns]
    assert rows[0] == ["scratch", "tuned"]
    assert rows[1] == ["25 ± 7 (2)", "10 (1), 1 never"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"baseline": "linear"}, "has the baseline linear and the arms scratch, tuned"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml, named in .*plan.yaml, does not exist"),
        ({"budget": 3}, "has the unknown key budget"),
        ({"arms": ["scratch"]}, "cannot be read as a plan"),
        ({"seeds": None}, "cannot be read as a plan"),
        ({"metrics": ["val/dice"]}, "compares val/dice; give metrics that begin with test/"),
        ({"monitor": "dice"}, "compares dice; give .* a monitor that begins with val/"),
    ],
)
def test_wrong_plans(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Plan.read(write(tmp_path, **changes))


def test_missing_and_unreadable_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for text in ("a: [", "3", "config: base.yaml"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"plan\.yaml"):
            Plan.read(path)
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        Plan.read(tmp_path / "none.yaml")


def test_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    config = {
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "val_check_interval": 1,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "pytorch_lightning.loggers.CSVLogger",
                "init_args": {"save_dir": "runs"},
            },
            "callbacks": [
                {
                    "class_path": "ResumableCheckpoint",
                    "init_args": {"monitor": "val/dice", "mode": "max", "filename": "best"},
                },
                {"class_path": "SegmentationReport"},
            ],
        },
        "model": {
            "class_path": "Segmentation",
            "init_args": {
                "class_names": ["background", "vessel"],
                "backbone_options": {"channels": [8, 16]},
                "window_size": [16, 16, 16],
            },
        },
        "data": {
            "class_path": "PhantomSegmentation",
            "init_args": {
                "scene": "coronary_ct",
                "class_names": ["background", "vessel"],
                "size": [16, 16, 16],
                "count": 5,
                "val": 1,
                "test": 2,
            },
        },
    }
    plan = write(
        tmp_path,
        arms={
            "scratch": {"model.init_args.mode": "scratch"},
            "wrong": {"model.init_args.mode": "finetune"},
        },
        values=[2],
        seeds=[3],
        metrics=["test/volume_error_mm3"],
    )
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    words = ["benchmark", "--config", str(plan), "--out", str(tmp_path / "out"), "--jobs", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "1 of 2 runs failed, the first one with: mode is finetune and needs weights" in (
        " ".join(printed.err.split())
    )
    folder = tmp_path / "out" / "scratch" / "labelled=2" / "3"
    result = json.loads((folder / "result.json").read_text())
    assert "test/volume_error_mm3" in result["scores"]
    assert [row["step"] for row in result["validations"]] == [0, 1]
    assert (folder / "test" / "run" / "test_cases.csv").is_file()
    assert "1 of 2 runs" in printed.out
