"""Draws, commands and tables of a sweep; the trials are a small program instead of a training."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gvsl_lightning.benchmark.runner import locked
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from gvsl_lightning.tools.sweep import Sweep, quantile

TRIAL = """
import os, sys
from pathlib import Path
options = dict(word[2:].split("=") for word in sys.argv[1:])
assert os.environ["WANDB_MODE"] == "offline"
with open("calls", "a") as file:
    file.write(options["a"] + " ")
if options["a"] == "3":
    sys.exit("Traceback ...\\nerror: three is too much.")
run = Path(options["trainer.logger.save_dir"], "name", "version_0")
run.mkdir(parents=True)
scores = {"0": ("0.1", "nan", "0.2"), "1": ("0.4", "0.5", "0.3"), "2": ("nan", "nan", "nan")}
lines = [f"{step},{score}," for step, score in zip((9, 19, 29), scores[options["a"]])]
(run / "metrics.csv").write_text("\\n".join(["step,val/dice,train/loss", "4,,0.5", *lines]))
"""
SWEEP: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "val/dice", "goal": "maximize"},
    "command": [sys.executable, "trial.py", "${args}"],
    "parameters": {"a": {"values": [0, 1, 2]}},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trial.py").write_text(TRIAL)


def write(**changes: Any) -> str:
    Path("sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
    return "sweep.yaml"


def rows() -> list[dict[str, str]]:
    with open("out/trials.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def calls() -> str:
    return Path("calls").read_text().strip()


class TestQuantile:
    @pytest.mark.parametrize(
        ("spec", "low", "middle", "high"),
        [
            ({"value": "x"}, "x", "x", "x"),
            ({"values": [True, "null", [1, 2]]}, True, "null", [1, 2]),
            ({"values": [1, 2, 3], "probabilities": [0.1, 0.1, 0.8]}, 1, 3, 3),
            ({"min": 1, "max": 3}, 1, 2, 3),
            ({"min": 1, "max": 3.0}, 1.0, 2.0, 3.0),
            ({"distribution": "uniform", "min": 1, "max": 3}, 1.0, 2.0, 3.0),
            ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 2}, 0, 4, 10),
            ({"distribution": "log_uniform", "min": 0, "max": 2}, 1.0, np.e, np.e**2),
            ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-4, 1e-3, 1e-2),
            ({"distribution": "q_log_uniform_values", "min": 4, "max": 64, "q": 4}, 4, 16, 64),
        ],
    )
    def test_ends_and_middle(self, spec: dict, low: Any, middle: Any, high: Any) -> None:
        drawn = [quantile("a", spec, chance) for chance in (0.0, 0.5, 1.0)]
        expected = [low, middle, high]
        if isinstance(low, float):
            assert drawn == pytest.approx(expected, rel=1e-12)
        else:
            assert drawn == expected
        assert [type(value) for value in drawn] == [type(value) for value in expected]

    def test_normal(self) -> None:
        spec = {"distribution": "normal", "mu": 2, "sigma": 3}
        assert quantile("a", spec, 0.5) == 2
        assert quantile("a", spec, 0.841344746) == pytest.approx(5)
        assert quantile("a", spec | {"distribution": "log_normal"}, 0.5) == pytest.approx(np.e**2)

    def test_whole_numbers_are_equally_likely(self) -> None:
        drawn = [quantile("a", {"min": 0, "max": 3}, chance) for chance in np.arange(0, 1, 0.01)]
        assert [drawn.count(value) for value in range(4)] == [25] * 4

    def test_unknown_distribution_is_named(self) -> None:
        with pytest.raises(InputError, match=r"lr has the distribution beta.*choose int_uniform"):
            quantile("lr", {"distribution": "beta", "a": 1, "b": 2}, 0.5)


class TestSweep:
    def test_random_draws_are_the_same_however_many(self) -> None:
        parameters = {"a": {"min": 0.0, "max": 1.0}, "b": {"values": list(range(100))}}
        sweep = Sweep.read(write(method="random", parameters=parameters))
        four, two = sweep.draw(4), sweep.draw(2)
        assert four[:2] == two
        assert len({(one["a"], one["b"]) for one in four}) == 4
        assert sweep.draw(2, seed=1) != two

    def test_grid_is_every_combination(self) -> None:
        parameters = {
            "a": {"min": 1, "max": 2},
            "b": {"values": ["x", "y"]},
            "c": {"value": 5},
            "d": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.5},
        }
        sets = Sweep.read(write(parameters=parameters)).draw(None)
        assert [tuple(one.values()) for one in sets] == [
            (a, b, 5, d) for a in (1, 2) for b in "xy" for d in (0.0, 0.5)
        ]

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"parameters": {"a": {"value": None}}}, 'a null.*"null" in quotes'),
            ({"parameters": {"a": {"values": [1, None]}}}, 'a null.*"null" in quotes'),
            ({"parameters": {"a": {"distribution": "uniform"}}}, "lacks 'min'"),
            ({"parameters": {"a": 3}}, "cannot be read as a sweep"),
            ({"metric": None}, "cannot be read as a sweep"),
            ({"method": "annealing"}, "random, grid or bayes"),
        ],
    )
    def test_wrong_file_is_explained(self, changes: dict, sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            Sweep.read(write(**changes))

    def test_number_of_trials_must_be_known(self) -> None:
        parameters = {"a": {"min": 0.0, "max": 1.0}}
        with pytest.raises(InputError, match="no run_cap; give --count"):
            Sweep.read(write(method="random", parameters=parameters)).draw(None)
        assert len(Sweep.read(write(method="random", run_cap=3)).draw(None)) == 3
        with pytest.raises(InputError, match="--count is 0"):
            Sweep.read(write()).draw(0)
        with pytest.raises(InputError, match=r"no steps for a.*uniform"):
            Sweep.read(write(parameters=parameters)).draw(None)

    def test_macro_that_the_agent_would_drop_is_refused(self) -> None:
        sweep = Sweep.read(write(command=["python", "${arguments}"]))
        with pytest.raises(InputError, match=r"\$\{arguments\} in its command.*args_json"):
            sweep.words({"a": 1})

    def test_command_without_one_is_wandbs(self) -> None:
        content = {key: value for key, value in SWEEP.items() if key != "command"}
        Path("sweep.yaml").write_text(yaml.safe_dump(content | {"program": "train.py"}))
        words = Sweep.read("sweep.yaml").words({"a": 1})
        assert words == ["/usr/bin/env", "python", "train.py", "--a=1"]


class TestMain:
    def test_best_trial_is_first_and_nothing_runs_twice(self, capsys: Any) -> None:
        words = ["sweep", "--config", write(), "--out", "out"]
        main([*words, "--count", "2"])
        assert calls() == "0 1"
        main(words)
        assert calls() == "0 1 2"
        assert [(row["trial"], row["val/dice"], row["step"]) for row in rows()] == [
            ("1", "0.5", "19"),
            ("0", "0.2", "29"),
            ("2", "nan", "9"),
        ]
        assert rows()[0]["folder"] == "out/001/name/version_0"
        assert "3 of 3 trials: out/trials.csv" in capsys.readouterr().out
        # another program, and another word for all trials, are other trials
        Path("trial.py").write_text(TRIAL + "\n")
        main([*words, "--count", "1"])
        main([*words, "--count", "1", "--more=1"])
        assert calls() == "0 1 2 0 0"

    def test_less_is_better_without_a_goal(self) -> None:
        main(["sweep", "--config", write(metric={"name": "val/dice"}), "--out", "out"])
        assert [(row["trial"], row["val/dice"]) for row in rows()] == [
            ("0", "0.1"),
            ("1", "0.3"),
            ("2", "nan"),
        ]

    def test_failed_trial_is_last_said_and_run_again(self, capsys: Any) -> None:
        parameters = {"a": {"values": [3, 1]}}
        for _ in range(2):
            with pytest.raises(SystemExit) as stopped:
                main(["sweep", "--config", write(parameters=parameters), "--out", "out"])
            assert stopped.value.code == 2
            told = capsys.readouterr()
            assert "1 of 2 trials failed" in told.err
            assert "three is too much. (out/000/trial.log)" in told.err
            assert [(row["trial"], row["status"], row["val/dice"]) for row in rows()] == [
                ("1", "0", "0.5"),
                ("0", "1", ""),
            ]
            assert "1 of 2 trials: out/trials.csv" in told.out
        assert calls() == "3 1 3"

    def test_metric_that_is_not_logged_stops_after_the_first_trial(self, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            main(["sweep", "--config", write(metric={"name": "val/dicee"}), "--out", "out"])
        assert "val/dicee, the metric of sweep.yaml; choose one of train/loss, val/dice." in (
            capsys.readouterr().err
        )
        assert calls() == "0"
        Path("silent.py").touch()
        with pytest.raises(SystemExit):
            main(
                ["sweep", "--config", write(command=[sys.executable, "silent.py"]), "--out", "out"]
            )
        assert "out/000 has no val/dice, the metric of sweep.yaml" in capsys.readouterr().err

    def test_program_that_does_not_exist(self, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            main(["sweep", "--config", write(command=["nowhere", "${args}"]), "--out", "out"])
        assert "The command of sweep.yaml cannot start nowhere" in capsys.readouterr().err

    def test_folder_of_another_command_is_refused(self, capsys: Any) -> None:
        config = write()
        with locked(Path("out")), pytest.raises(SystemExit):
            main(["sweep", "--config", config, "--out", "out"])
        assert "Another command works in out" in capsys.readouterr().err

    def test_what_the_server_would_do_is_said(self, capsys: Any) -> None:
        config = write(method="bayes", early_terminate={"type": "hyperband", "min_iter": 2})
        main(["sweep", "--config", config, "--out", "out", "--count", "1"])
        told = capsys.readouterr().out
        assert "drawn at random instead of by bayes" in told
        assert "every trial runs to its end" in told
