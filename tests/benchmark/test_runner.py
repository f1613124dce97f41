"""Plans, runs, their order and their tables; and a small comparison from end to end."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import wilcoxon

from gvsl_lightning.benchmark import plan as plans
from gvsl_lightning.benchmark import runner as benchmark
from gvsl_lightning.benchmark.case_scores import interval, p_value
from gvsl_lightning.benchmark.comparison import (
    Comparison,
    is_error,
    printed_tables,
    score_cells,
    step_cells,
    write_tables,
)
from gvsl_lightning.benchmark.paper import paper_score
from gvsl_lightning.benchmark.plan import Plan, Run
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.weights import save_backbone

CONFIGS = Path(__file__).parents[2] / "configs"

TASK: dict[str, Any] = {"config": "task.yaml", "metric": "test/dice", "monitor": "val/dice"}
PLAN: dict[str, Any] = {
    "methods": {"Scratch": {}, "GVSL": {"config": "pretrain.yaml"}},
    "tasks": {"hearts": TASK},
    "modes": {
        "linear": {"model.init_args.mode": "linear"},
        "fine-tuned": {"model.init_args.mode": "finetune"},
    },
    "seeds": [0, 1],
    "baseline": "Scratch",
}


def write(folder: Path, **changes: Any) -> Path:
    for name in ("task.yaml", "pretrain.yaml"):
        (folder / name).write_text("trainer: null\n")
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes, sort_keys=False))
    return path


def cases_of(scores: list[float]) -> list[dict[str, Any]]:
    return [{"name": f"{i:03d}", "dice mean": v, "dice a": v} for i, v in enumerate(scores)]


def finish(run: Run, scores: list[float], validations: list[float] = [0.1, 0.4]) -> None:  # noqa: B006
    run.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 9 + 10 * i, "val/dice": value} for i, value in enumerate(validations)]
    content: dict[str, Any] = {
        "words": list(run.words),
        "files": run.files(),
        "config": run.fingerprint(),
        "version": "0",
        "seconds": 60.0,
        "steps": 20,
        "validations": rows,
    }
    if run.task:
        cases = cases_of(scores)
        bounds = interval("test/dice", cases)
        score = {"test/dice": float(np.mean(scores))}
        content |= {"scores": score, "cases": cases, "interval": bounds}
    else:
        run.backbone.parent.mkdir(parents=True, exist_ok=True)
        run.backbone.write_bytes(f"{run.method} {run.seed}".encode())
        content["backbone"] = plans.digest(run.backbone)
    (run.folder / "result.json").write_text(json.dumps(content))


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Stands in for training: a run scores 0.5 + seed / 10."""
    ran: list[Run] = []

    def execute(run: Run, environment: Any, locks: Any) -> None:
        ran.append(run)
        finish(run, [0.4 + run.seed / 10, 0.6 + run.seed / 10])

    monkeypatch.setattr(Run, "execute", execute)
    return ran


def find(runs: list[Run], *identity: Any) -> Run:
    (run,) = [run for run in runs if (run.method, run.task, run.mode, run.seed) == identity]
    return run


class TestPlan:
    def test_every_method_is_pretrained_once_and_transferred_everywhere(
        self, tmp_path: Path
    ) -> None:
        runs = Plan.read(write(tmp_path)).runs(tmp_path / "out", ["--extra=1"])
        assert len({run.folder for run in runs}) == len(runs) == 10
        for seed in (0, 1):
            pretraining = find(runs, "GVSL", "", "", seed)
            assert pretraining.words == (
                f"--config={tmp_path / 'pretrain.yaml'}",
                f"--seed_everything={seed}",
                "--extra=1",
            )
            for mode in ("linear", "fine-tuned"):
                assert find(runs, "Scratch", "hearts", mode, seed).needs is None
                run = find(runs, "GVSL", "hearts", mode, seed)
                assert run.needs is pretraining
                assert runs.index(pretraining) < runs.index(run)
                assert f"--model.init_args.weights={pretraining.backbone}" in run.words
        assert [run.seed for run in runs] == [0] * 5 + [1] * 5

    def test_changes_of_the_task_then_the_mode_then_the_method_then_the_words(
        self, tmp_path: Path
    ) -> None:
        path = write(
            tmp_path,
            methods={
                "GVSL": {
                    "config": "pretrain.yaml",
                    "pretrain": {"a": 2, "data": "Mine"},
                    "transfer": {"linear": {"a": 3, "b": None}},
                }
            },
            tasks={"hearts": {**TASK, "changes": {"a": 1, "c": {"x": [1]}}}},
            modes={"linear": {"a": 2}, "tuned": {}},
            pretrain={"a": 1, "b": "text"},
            seeds=[7],
            baseline="GVSL",
        )
        pretraining, linear, tuned = Plan.read(path).runs(tmp_path / "out", ["--a=9"])
        assert pretraining.words[1:] == (
            *("--seed_everything=7", "--a=1", "--b=text", "--a=2", "--data=Mine", "--a=9"),
        )
        weights = f"--model.init_args.weights={pretraining.backbone}"
        assert linear.words[1:] == (
            "--seed_everything=7",
            *("--a=1", '--c={"x": [1]}', "--a=2", "--a=3", "--b=null", weights, "--a=9"),
        )
        assert tuned.words[2:] == ("--a=1", '--c={"x": [1]}', weights, "--a=9")

    @pytest.mark.parametrize("configured", [None, "finetune"])
    def test_without_weights_fine_tuning_is_training_from_scratch(
        self, tmp_path: Path, configured: str | None
    ) -> None:
        decay = {"model.init_args.layer_decay": 0.8, "a": 1}
        modes = {"linear": {"model.init_args.mode": "linear"}, "tuned": decay}
        released = {"weights": "owner/name"}
        path = write(tmp_path, modes=modes, methods={"Scratch": None, "Released": released})
        if configured:
            model = {"init_args": {"mode": configured}}
            (tmp_path / "task.yaml").write_text(yaml.safe_dump({"model": model}))
        runs = Plan.read(path).runs(tmp_path / "out", [])
        assert find(runs, "Scratch", "hearts", "linear", 0).words[2:] == (
            *("--model.init_args.mode=linear", "--model.init_args.weights=null"),
        )
        assert find(runs, "Scratch", "hearts", "tuned", 0).words[2:] == (
            *("--a=1", "--model.init_args.mode=scratch", "--model.init_args.weights=null"),
        )
        assert find(runs, "Released", "hearts", "tuned", 0).words[2:] == (
            *("--model.init_args.layer_decay=0.8", "--a=1"),
            "--model.init_args.weights=owner/name",
        )

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"baseline": "BYOL"}, "has the baseline BYOL and the methods Scratch, GVSL"),
            (
                {"tasks": {"a": {**TASK, "config": "no.yaml"}}},
                "no.yaml, named in .*plan.yaml, does",
            ),
            ({"budget": 3}, "budget in .*plan.yaml is no option of a plan"),
            ({"methods": ["Scratch"]}, "methods in .* give lines of the form NAME: VALUE"),
            (
                {"methods": {"Scratch": {"wheights": "a"}}},
                "Scratch.wheights in .* did you mean methods.Scratch.weights",
            ),
            ({"seeds": None}, "lacks seeds"),
            ({"seeds": [1, 1]}, "has a seed twice"),
            ({"modes": {}}, "has no task, mode or seed"),
            ({"tasks": {"a": {**TASK, "metric": "val/dice"}}}, "a metric that begins with test/"),
            ({"tasks": {"a": {**TASK, "monitor": "dice"}}}, "a monitor that begins with val/"),
            ({"tasks": {"a": {**TASK, "paper": "XYZ"}}}, "paper's task XYZ; choose one of SHC"),
            ({"tasks": {"a b": TASK, "a/b": TASK}}, "names that give one folder: a b, a/b"),
            ({"figures": {"tsne": ["BYOL"]}}, "draws tsne of BYOL; choose of the figures"),
            ({"figures": {"pie": ["GVSL"]}}, "draws pie of GVSL; choose of the figures"),
            (
                {"methods": {"Scratch": {"weights": "a", "config": "pretrain.yaml"}}},
                "gives Scratch a config and weights",
            ),
            (
                {"methods": {"Scratch": {"transfer": {"probe": {}}}}},
                "changes the mode probe of Scratch and has the modes linear, fine-tuned",
            ),
        ],
    )
    def test_wrong_plans(self, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
        with pytest.raises(InputError, match=sentence):
            Plan.read(write(tmp_path, **changes))

    def test_missing_and_unreadable_plans(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.yaml"
        for text in ("a: [", "3", "methods: {}"):
            path.write_text(text)
            with pytest.raises(InputError, match=r"plan\.yaml"):
                Plan.read(path)
        with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
            Plan.read(tmp_path / "none.yaml")

    def test_one_pretraining_may_serve_all_seeds(self, tmp_path: Path) -> None:
        runs = Plan.read(write(tmp_path, pretrain_seed=7)).runs(tmp_path / "out", [])
        assert len({run.folder for run in runs}) == len(runs) == 9
        (pretraining,) = [run for run in runs if not run.task]
        assert runs[0] == pretraining
        assert "--seed_everything=7" in pretraining.words
        transfers = [run for run in runs if run.method == "GVSL" and run.task]
        assert {run.seed for run in transfers} == {0, 1}
        assert {run.needs for run in transfers} == {pretraining}
        for run in transfers:
            assert f"--model.init_args.weights={pretraining.backbone}" in run.words


class TestResults:
    def test_what_a_run_depends_on_is_part_of_it(self, tmp_path: Path) -> None:
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
        assert [run.is_done() for run in (pretraining, transfer, other, scratch)] == [
            *(False, False, True, True)
        ]
        pretraining.backbone.write_bytes(backbone + b"changed")
        finish_as_found = json.loads(
            (pretraining.folder / "result.json").read_text(encoding="utf-8")
        )
        finish_as_found["backbone"] = plans.digest(pretraining.backbone)
        (pretraining.folder / "result.json").write_text(json.dumps(finish_as_found))
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

    def test_a_half_written_result_is_no_result(self, tmp_path: Path) -> None:
        run = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])[1]
        finish(run, [0.5])
        assert run.is_done()
        path = run.folder / "result.json"
        path.write_text(path.read_text(encoding="utf-8")[:-20])
        assert not run.is_done()


class TestExecution:
    def test_finished_runs_are_not_run_again(
        self, tmp_path: Path, executed: list[Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--config", str(write(tmp_path)), "--out", str(tmp_path / "out")]
        benchmark.main(words)
        assert len(executed) == len(set(executed)) == 10
        executed.clear()
        benchmark.main(words)
        assert not executed
        assert "10 of 10 runs" in capsys.readouterr().out
        benchmark.main([*words, "--a=1"])
        assert len(executed) == 10
        assert len(list((tmp_path / "out").rglob("result.json"))) == 10

    def test_a_transfer_that_was_not_tested_is_not_done(self, tmp_path: Path) -> None:
        run = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])[1]
        folder = run.folder / "fit" / "run"
        folder.mkdir(parents=True)
        assert run.task
        (folder / "metrics.csv").write_text("step,train/loss,val/dice\n4,0.5,\n9,,0.3\n")
        with pytest.raises(InputError, match=r"run was not tested: it was ended early"):
            run._measured()

    def test_a_failed_run_stops_only_what_needs_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def execute(run: Run, environment: Any, locks: Any) -> None:
            if not run.task and run.seed == 1:
                raise InputError("volumes are missing.")
            finish(run, [0.5])

        monkeypatch.setattr(Run, "execute", execute)
        monkeypatch.setenv("COLUMNS", "200")
        words = ["--config", str(write(tmp_path)), "--out", str(tmp_path / "out"), "--jobs", "2"]
        with pytest.raises(InputError, match=r"^1 of 10 runs failed and 2 had to wait for a pre-t"):
            benchmark.main(words)
        printed = capsys.readouterr().out
        assert "failed: GVSL, pre-training, seed 1: volumes are missing." in printed
        assert "not run: GVSL, linear, hearts, seed 1, whose pre-training failed" in printed
        assert "7 of 10 runs" in printed
        assert "1 of 2 seeds" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
        rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
        assert len(rows) == 7
        assert [row["seed"] for row in rows if row["mode"] == "pre-training"] == ["0"]

    def test_no_run_begins_before_its_pretraining_and_jobs_share_gpus(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        plan = Plan.read(write(tmp_path, seeds=[0, 1, 2]))
        outcome = benchmark.execute(plan, plan.runs(tmp_path / "out", []), 2, ["4", "7"], [])
        assert (outcome.failed, outcome.waiting, len(ended)) == ([], [], 15)
        assert set(devices) == {"4", "7"}

    def test_after_an_interruption_no_further_run_begins(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        began: list[Run] = []

        def execute(run: Run, environment: Any, locks: Any) -> None:
            began.append(run)
            raise KeyboardInterrupt

        monkeypatch.setattr(Run, "execute", execute)
        plan = Plan.read(write(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            benchmark.execute(plan, plan.runs(tmp_path / "out", []), 1, [], [])
        assert len(began) == 1

    def test_what_is_left_of_a_broken_run_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def train(run: Run, environment: Any, locks: Any) -> None:
            assert [path.name for path in run.folder.iterdir()] == []
            raise KeyboardInterrupt

        run = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])[1]
        finish(run, [0.5])
        (run.folder / "half.ckpt").write_text("")
        monkeypatch.setattr(Run, "_process", train)
        with pytest.raises(KeyboardInterrupt):
            run.execute({}, [])
        assert not run.is_done()

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (
                {"metric": "test/dise"},
                "No finished run of hearts reports test/dise, and they report test/dice: correct",
            ),
            (
                {"monitor": "val/dise"},
                "No finished run of hearts reports val/dise, and they report val/dice: correct",
            ),
        ],
    )
    def test_what_no_run_reports_is_said_at_once_and_loses_nothing(
        self,
        tmp_path: Path,
        executed: list[Run],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        change: dict[str, str],
        sentence: str,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        path = write(tmp_path, tasks={"hearts": TASK | change})
        words = ["--config", str(path), "--out", str(tmp_path / "out")]
        with pytest.raises(InputError, match=sentence):
            benchmark.main(words)
        assert capsys.readouterr().out.count(sentence) == 1
        executed.clear()
        benchmark.main(["--config", str(write(tmp_path)), *words[2:]])
        assert not executed

    def test_two_benchmarks_in_one_folder_are_refused(
        self, tmp_path: Path, executed: list[Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark, "_PATIENCE", 2)
        out = tmp_path / "out"
        words = ["--config", str(write(tmp_path)), "--out", str(out)]
        with benchmark.locked(out):
            for more in ([], ["--only", "1"]):
                with pytest.raises(InputError, match=r"Another command works in .*out"):
                    benchmark.main([*words, *more])
        with benchmark.locked(out, shared=True):
            with pytest.raises(InputError, match="Another command works"):
                benchmark.main(words)
            benchmark.main([*words, "--only", "1"])  # runs of an array share the folder
        assert [str(run) for run in executed] == ["Scratch, linear, hearts, seed 0"]

    @pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
    def test_a_killed_benchmark_takes_its_runs_along_and_leaves_no_lock(
        self, tmp_path: Path
    ) -> None:
        script = f"""
import fcntl, os, sys
from gvsl_lightning.runs import processes
file = open({str(tmp_path / "lock")!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
code = "from gvsl_lightning.runs.processes import end_with_starter; end_with_starter(); "
code += "import os, time; "
code += "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
processes.run([sys.executable, "-c", code], os.environ, pass_fds=[file.fileno()])
"""
        parent = subprocess.Popen([sys.executable, "-c", script])
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int((tmp_path / "pid").read_text(encoding="utf-8"))
        with open(tmp_path / "lock") as file:
            with pytest.raises(OSError, match="unavailable"):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            parent.send_signal(signal.SIGKILL)
            parent.wait()
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                pytest.fail("the run lives on")
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text(encoding="utf-8").split()[2] == "Z"

    def test_single_runs(
        self, tmp_path: Path, executed: list[Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--config", str(write(tmp_path)), "--out", str(tmp_path / "out")]
        with pytest.raises(InputError, match=r"Run 2 \(GVSL, linear.* needs the backbone of run 0"):
            benchmark.main([*words, "--only", "2"])
        for index in (0, 2, 2):
            benchmark.main([*words, "--only", str(index)])
        assert [run.task for run in executed] == ["", "hearts"]
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "Run 0 of 10 (GVSL, pre-training, seed 0), 60 s"
        assert printed[1] == "Run 2 of 10 (GVSL, linear, hearts, seed 0), 60 s: test/dice 0.5000"
        with pytest.raises(InputError, match="--only is 10 and the plan has the runs 0 to 9"):
            benchmark.main([*words, "--only", "10"])
        benchmark.main(words)
        assert len(executed) == 10

    def test_lines_for_slurm(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write(tmp_path)
        words = ["--config", str(path), "--out", "my out", "--print", "slurm", "--root=a b"]
        benchmark.main(words)
        first, second, _ = capsys.readouterr().out.splitlines()
        # what the shell makes of them, with a stand-in for sbatch
        sbatch = """sbatch() { printf '%s\\n' "$@" >&2; echo 17; }"""
        shown = subprocess.run(
            ["bash", "-c", "\n".join((sbatch, first, second))],
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        ).stderr.splitlines()
        command = f"python -m gvsl_lightning benchmark --config {path} --out 'my out'"
        wrap = f"--wrap={command} --only $SLURM_ARRAY_TASK_ID '--root=a b'"
        assert shown == [
            *("--parsable", "--array=0,5", wrap),
            *("--dependency=afterany:17", "--array=1-4,6-9", wrap),
        ]

    def test_sweep_as_the_agent_reads_it(
        self, tmp_path: Path, executed: list[Run], capsys: pytest.CaptureFixture[str]
    ) -> None:
        from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

        path, out = write(tmp_path), tmp_path / "out"
        words = ["--config", str(path), "--out", str(out)]
        benchmark.main([*words, "--print", "sweep", "--root=a"])
        sweep = yaml.safe_load(capsys.readouterr().out)
        assert sweep["parameters"] == {"only": {"values": [0, 5]}}
        given = create_sweep_command_args({"args": {"only": {"value": 5}}})
        command = create_sweep_command(sweep["command"])
        place = command.index("${args}")
        command[place : place + 1] = given["args"]
        assert command[:4] == ["python", "-m", "gvsl_lightning", "benchmark"]
        benchmark.main(command[4:])
        assert [(run.seed, run.words[-1]) for run in executed] == [(1, "--root=a")]
        benchmark.main([*words, "--only", "0", "--root=a"])
        capsys.readouterr()
        benchmark.main([*words, "--print", "sweep", "--root=a"])
        sweep = yaml.safe_load(capsys.readouterr().out)
        assert sweep["parameters"]["only"]["values"] == [1, 2, 3, 4, 6, 7, 8, 9]


def classified(probabilities: Any, labels: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{index:03d}",
            "label": ("no", "yes")[int(label)],
            "probability no": 1 - float(value),
            "probability yes": float(value),
        }
        for index, (value, label) in enumerate(zip(probabilities, labels, strict=True))
    ]


def test_less_is_better_of_losses_and_distances_alone() -> None:
    less = {"val/loss", "val/loss_dice", "test/hd95_mm", "test/surface_distance_mm_loss"}
    more = {"val/dice", "test/dice_distance", "test/auroc", "val/ncc_after"}
    assert {metric for metric in less | more if is_error(metric)} == less


class TestSignificance:
    def test_segmentation_is_wilcoxon_s_test_of_the_means_over_seeds(self) -> None:
        random = np.random.default_rng(0)
        one, other = random.random((2, 2, 12))
        tests = {
            "one": [cases_of(scores) for scores in one.tolist()],
            # in another order, and with a case that the other has not
            "other": [[*cases_of(scores)[::-1], {"name": "x"}] for scores in other.tolist()],
        }
        expected = wilcoxon(one.mean(axis=0), other.mean(axis=0)).pvalue
        for pair in (("one", "other"), ("other", "one")):
            assert p_value("test/dice", *map(tests.get, pair)) == pytest.approx(expected)
        assert p_value("test/dice", tests["one"], tests["one"]) == 1
        assert np.isnan(p_value("test/hd95_mm", tests["one"], tests["other"]))
        assert np.isnan(p_value("test/dice", [], []))

    def test_methods_are_compared_by_the_seeds_that_both_have(self, tmp_path: Path) -> None:
        plan = Plan.read(write(tmp_path))
        runs = plan.runs(tmp_path / "out", [])
        equal = list(np.linspace(0.4, 0.6, 12))
        better = [score + 0.1 for score in equal]
        for run in runs:
            if run.seed == 0 or run.method == "GVSL":
                finish(run, equal if run.seed == 0 else better)
        column = Comparison(plan, [run for run in runs if run.is_done()]).column("hearts", "linear")
        assert column["GVSL"].summary.mean == pytest.approx(0.55)
        assert column["GVSL"].gain == 0
        assert not column["GVSL"].differs
        assert not column["GVSL"].best

    def test_classification_is_a_paired_bootstrap(self) -> None:
        random = np.random.default_rng(0)
        labels = np.arange(40) % 2
        good, bad = labels + 0.8 * random.standard_normal(40), random.standard_normal(40)
        tests = {
            "good": [classified(good, labels)],
            "good too": [classified(good + 1e-9 * bad, labels)],
            "bad": [classified(bad, labels), classified(bad, labels)],
        }
        p = p_value("test/auroc", tests["good"], tests["bad"])
        assert p == p_value("test/auroc", tests["bad"], tests["good"]) < 0.01
        assert p_value("test/auroc", tests["good"], tests["good too"]) == 1
        assert np.isnan(p_value("test/ap", tests["good"], tests["bad"]))

    def test_interval_is_that_of_the_mean_of_the_structures(self) -> None:
        cases = [
            {"name": "a", "dice mean": 0.3, "dice x": 0.2, "dice y": 0.4},
            {"name": "b", "dice mean": 0.8, "dice x": 0.8},
        ]
        low, high = interval("test/dice", cases)
        assert (low, high) == pytest.approx((0.3, 0.8))
        assert interval("test/dice_x", cases) == pytest.approx((0.2, 0.8))
        assert np.isnan(interval("test/dice_z", cases)).all()


class TestTables:
    def finished(self, tmp_path: Path, scores: dict[str, list[list[float]]]) -> Comparison:
        """Comparison in one mode of what methods score with two seeds."""
        path = write(
            tmp_path,
            methods={method: {} for method in scores},
            tasks={"hearts": {**TASK, "paper": "SHC"}},
            modes={"linear": {"model.init_args.mode": "linear"}},
            baseline=next(iter(scores)),
        )
        plan = Plan.read(path)
        runs = plan.runs(tmp_path / "out", [])
        for run in runs:
            finish(run, scores[run.method][run.seed])
        return Comparison(plan, runs)

    def test_scores_gains_marks_and_the_paper(self, tmp_path: Path) -> None:
        base = np.linspace(0.2, 0.4, 12)
        worse, better = base - 0.1, base + np.linspace(0.2, 0.3, 12)
        comparison = self.finished(
            tmp_path,
            {
                "Scratch": [base.tolist(), (base + 0.02).tolist()],
                "GVSL": [better.tolist(), better.tolist()],
                "own": [worse.tolist(), worse.tolist()],
            },
        )
        cells = [row[0] for row in score_cells(comparison, "linear")]
        assert cells[0] == ("31.0 ± 1.4", False, " [21.9]")
        assert cells[1] == ("55.0 ± 0.0", True, "* (+24.0) [68.4]")
        assert cells[2] == ("20.0 ± 0.0", False, "* (-11.0)")
        write_tables(comparison, tmp_path)
        lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
        assert lines[:2] == ["| method | linear<br>hearts (dice %) |", "|---|---:|"]
        assert lines[3] == r"| GVSL | **55.0 ± 0.0**\* (+24.0) \[68.4] |"
        assert any("Wilcoxon" in line and "p \\< 0.05" in line for line in lines)
        rows = list(csv.DictReader((tmp_path / "results.csv").open()))
        row = next(row for row in rows if (row["method"], row["seed"]) == ("GVSL", "1"))
        assert float(row["value"]) == pytest.approx(better.mean())
        assert float(row["low"]) < better.mean() < float(row["high"])
        assert (row["metric"], row["steps"], row["seconds"]) == ("test/dice", "20", "60.0")
        assert len(row["config"]) == 12
        assert sum(1 for _ in (tmp_path / "scores.csv").open()) == 7

    def test_the_best_is_bold_only_if_it_is_significantly_better(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        base = random.random(12)
        noisy = base + 0.3 * random.standard_normal(12)
        noisy += base.mean() + 0.001 - noisy.mean()
        comparison = self.finished(
            tmp_path, {"Scratch": [base.tolist()] * 2, "GVSL": [noisy.tolist()] * 2}
        )
        (scratch,), (gvsl,) = score_cells(comparison, "linear")
        assert float(gvsl.text.split()[0]) > float(scratch.text.split()[0])
        assert not gvsl.bold
        assert not gvsl.rest.startswith("*")

    def test_steps_to_the_baseline_s_best(self, tmp_path: Path) -> None:
        comparison = self.finished(tmp_path, {"Scratch": [[0.5]] * 2, "GVSL": [[0.5]] * 2})
        curves = {
            ("Scratch", 0): [0.1, 0.5, 0.4],
            ("Scratch", 1): [0.3, 0.2, 0.6],
            ("GVSL", 0): [0.5, 0.6, 0.6],
            ("GVSL", 1): [0.1, 0.2, 0.3],
        }
        for run in comparison.results:
            finish(run, [0.5], curves[run.method, run.seed])
        comparison = Comparison(comparison.plan, list(comparison.results))
        cells = step_cells(comparison, "linear")
        assert [row[0].text for row in cells] == ["25 ± 7 (2)", "10 (1), 1 never"]
        assert len(printed_tables(comparison)) == 2

    def test_the_paper_s_table(self) -> None:
        assert paper_score("gvsl", "SBM", linear=True) == 79.9
        assert paper_score("without affine head", "SAC", linear=False) == 82.3
        assert paper_score("Models Genesis", "CCC", linear=False) == 80.7
        assert paper_score("ours", "SHC", linear=True) is None


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
    for part in (*content["methods"].values(), *content["tasks"].values()):
        if "config" in part:
            part["config"] = str(CONFIGS / "benchmark" / part["config"])
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


def test_a_comparison_with_a_method_of_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "outsider").mkdir()
    (tmp_path / "outsider" / "__init__.py").write_text(OUTSIDER)
    known = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, known)))
    config = yaml.safe_load(
        (CONFIGS / "pretrain" / "without_z_matching.yaml").read_text(encoding="utf-8")
    )
    drop = ("MatchingFigure", "GradientNorms")
    callbacks = [one for one in config["trainer"]["callbacks"] if one["class_path"] not in drop]
    config["trainer"]["callbacks"] = callbacks
    config["model"] = {"class_path": "outsider.Averages", "init_args": {}}
    (tmp_path / "outsider.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "broken.safetensors").write_text("no weights")
    methods = {
        "Scratch": {},
        "Averages": {"config": "outsider.yaml"},
        "broken": {"weights": str(tmp_path / "broken.safetensors")},
    }
    path = shortened(tmp_path, methods=methods, figures={"tsne": ["Scratch", "Averages"]})
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    del plan["tasks"]["lesions"]
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--config", str(path), "--out", str(out), "--jobs", "2"])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert "1 of 4 runs failed, the first one with: " in printed.err
    assert "broken.safetensors" in printed.err
    assert "3 of 4 runs" in printed.out

    folder = out / "averages"
    pretrained = json.loads((folder / "pretrain" / "0" / "result.json").read_text(encoding="utf-8"))
    assert pretrained["steps"] == 4
    assert [row["step"] for row in pretrained["validations"]] == [1, 3]
    result = json.loads(
        (folder / "linear" / "hearts" / "0" / "result.json").read_text(encoding="utf-8")
    )
    assert len(result["cases"]) == 6
    low, high = result["interval"]
    assert low <= result["scores"]["test/dice"] <= high
    (report,) = (folder / "linear" / "hearts" / "0").rglob("test_cases.csv")
    assert report.parent.name == "run"
    assert (out / "tsne.png").is_file()
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["method"], row["mode"], row["steps"]) for row in rows] == [
        ("Averages", "pre-training", "4"),
        ("Scratch", "linear", "6"),
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


def test_weights_that_are_ready_are_used(tmp_path: Path) -> None:
    weights = save_backbone(
        build_backbone("unet", channels=[8, 16]), tmp_path / "b.safetensors", {}
    )
    path = write(tmp_path, methods={"Scratch": {}, "Released": {"weights": str(weights)}})
    run = find(Plan.read(path).runs(tmp_path / "out", []), "Released", "hearts", "linear", 0)
    assert run.files() == {
        str(tmp_path / "task.yaml"): plans.digest(tmp_path / "task.yaml"),
        str(weights): plans.digest(weights),
    }
