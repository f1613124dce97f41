"""``python -m gvsl_lightning benchmark``: many runs by one plan, and one table of what they reach.

Every run is an ordinary ``fit`` and ``test`` in processes of their own. A run that is finished is
not run again, so that the same command goes on where it was stopped, and prints the table at once
when nothing is left to do.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from yaml import YAMLError

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation import Summary

RESULT = "result.json"
"""Written into a run's folder when all of the run is done."""


def main(args: Sequence[str]) -> None:
    """Run what is left of a plan and print its table.

    Args:
        args: the words after ``benchmark``:

            - ``--config``: the plan, a YAML file, see :class:`Plan`.
            - ``--out``: folder of the runs and of ``benchmark.csv``.
            - ``--jobs``: runs at a time, which share the CPU threads.
            - all further words go to every ``fit`` and ``test``.

    Raises:
        InputError: if the plan is wrong, or, after all others are done, a run failed or none
            reports what the plan compares.
    """
    parser = argparse.ArgumentParser("python -m gvsl_lightning benchmark", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the plan, a YAML file")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options, words = parser.parse_known_args(args)
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}; give 1 or more.")
    plan = Plan.read(options.config)
    runs = plan.runs(Path(options.out), words)
    errors = execute(plan, runs, options.jobs)
    done = [run for run in runs if run.is_done()]
    console = Console()
    for table in tables(plan, done):
        console.print(table)
    if done:
        path = Path(options.out) / "benchmark.csv"
        write_csv(path, done)
        print(f"{len(done)} of {len(runs)} runs: {path}")
    if errors:
        raise InputError(
            f"{len(errors)} of {len(runs)} runs failed, the first one with: {errors[0]} Correct it "
            "and give the same command again."
        )
    if sentence := unreported(plan, done):
        raise InputError(sentence)


@dataclass(frozen=True)
class Run:
    """One training and its test.

    Attributes:
        folder: where both leave what they leave.
        arm: what is compared, the table's rows.
        column: the varied value, the table's columns.
        seed: of everything random.
        words: of the command line, the same for ``fit`` and ``test``.
    """

    folder: Path
    arm: str
    column: str
    seed: int
    words: tuple[str, ...]

    def is_done(self) -> bool:
        """Whether it has a result that these very words, and the files in them, gave."""
        result = self.result()
        return result.get("words") == list(self.words) and result.get("files") == self.files()

    def files(self) -> dict[str, str]:
        """SHA-256 of the files that the words name: the configuration, weights."""
        paths = (word.partition("=")[2] for word in self.words)
        return {
            path: _digest(path, os.path.getmtime(path)) for path in paths if os.path.isfile(path)
        }

    def result(self) -> dict[str, Any]:
        """``words``, ``files``, ``scores`` (of the test) and ``validations``, or nothing."""
        try:
            content = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def execute(self, threads: int) -> None:
        """Train and test; whatever an interrupted try left is removed first.

        Raises:
            InputError: if one of the two fails; the sentence is the process's own.
        """
        files = self.files()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._process("fit", [], threads)
        checkpoint = self.folder / "fit" / "run" / "checkpoints" / "best.ckpt"
        if not checkpoint.is_file():
            raise InputError(f"{self.folder} has no best.ckpt: let ModelCheckpoint write it.")
        self._process("test", [f"--ckpt_path={checkpoint}"], threads)
        (scores,) = _metrics(self.folder / "test" / "run" / "metrics.csv", "test/")[-1:] or [{}]
        content = {
            "words": list(self.words),
            "files": files,
            "scores": scores,
            "validations": _metrics(self.folder / "fit" / "run" / "metrics.csv", "val/"),
        }
        partial = self.folder / f".{RESULT}"
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self.folder / RESULT)

    def _process(self, command: str, words: Sequence[str], threads: int) -> None:
        logger = "--trainer.logger.init_args"
        places = [f"{logger}.save_dir={self.folder}", f"{logger}.name={command}"]
        program = [sys.executable, "-m", "gvsl_lightning", command]
        log = self.folder / f"{command}.log"
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(
                [*program, *self.words, *places, f"{logger}.version=run", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                check=False,
            ).returncode
        if code:
            lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was printed"]
            raise InputError(f"{lines[-1].removeprefix('error: ')} ({log})")


@dataclass(frozen=True)
class Plan:
    """What to run: every arm with every column and seed.

    Attributes:
        config: configuration of ``fit`` and ``test``, relative to the plan's file.
        arms: name of each arm -> what it changes in the configuration.
        vary: the one key that makes the columns.
        values: its values.
        seeds: of ``seed_everything``.
        metrics: of the test, a table for each.
        monitor: of the validation, to compare how fast the arms learn.
        baseline: the arm whose best validation the others are to reach.
    """

    config: Path
    arms: Mapping[str, Mapping[str, Any]]
    vary: str
    values: tuple[Any, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    monitor: str
    baseline: str

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """Read a plan with the attributes' names as keys.

        Raises:
            InputError: if it is unreadable, incomplete or contradicts itself.
        """
        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(path))
            plan = cls(
                config=(Path(path).parent / content.pop("config")).resolve(),
                arms={str(name): dict(changes) for name, changes in content.pop("arms").items()},
                vary=str(content.pop("vary")),
                values=tuple(content.pop("values")),
                seeds=tuple(content.pop("seeds")),
                metrics=tuple(content.pop("metrics")),
                monitor=str(content.pop("monitor")),
                baseline=str(content.pop("baseline")),
            )
        except KeyError as error:
            raise InputError(f"{path} lacks {error}; see configs/benchmark for a plan.") from error
        except (
            OSError,
            OmegaConfBaseException,
            YAMLError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{path} cannot be read as a plan ({reason}); correct it.") from error
        if content:
            raise InputError(f"{path} has the unknown key {next(iter(content))}; remove it.")
        if not plan.config.is_file():
            raise InputError(f"{plan.config}, named in {path}, does not exist; correct config.")
        if plan.baseline not in plan.arms:
            raise InputError(
                f"{path} has the baseline {plan.baseline} and the arms {', '.join(plan.arms)}; "
                "choose one of them."
            )
        for name, prefix in (*((name, "test/") for name in plan.metrics), (plan.monitor, "val/")):
            if not name.startswith(prefix):
                raise InputError(
                    f"{path} compares {name}; give metrics that begin with test/ and a monitor "
                    "that begins with val/."
                )
        return plan

    def runs(self, out: Path, words: Sequence[str]) -> list[Run]:
        """All runs; the first seed of everything comes first."""
        return [
            Run(
                folder=out.resolve() / arm / f"{self.vary.rpartition('.')[2]}={value}" / str(seed),
                arm=arm,
                column=_text(value),
                seed=seed,
                words=(
                    f"--config={self.config}",
                    f"--seed_everything={seed}",
                    f"--{self.vary}={_text(value)}",
                    *(f"--{key}={_text(change)}" for key, change in changes.items()),
                    *words,
                ),
            )
            for seed in self.seeds
            for value in self.values
            for arm, changes in self.arms.items()
        ]


def execute(plan: Plan, runs: Sequence[Run], jobs: int) -> list[str]:
    """Run what is not done, some at a time, with a progress bar.

    Once the first run is done, it is said if it does not report what the plan compares.

    Returns:
        The sentences of those that failed.
    """
    left = [run for run in runs if not run.is_done()]
    if not left:
        return []
    done = [run for run in runs if run not in left]
    threads = max(1, torch.get_num_threads() // jobs)
    errors: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:

        def say(sentence: str) -> None:
            progress.console.print(sentence, style="red", highlight=False, soft_wrap=True)

        if sentence := unreported(plan, done):
            say(sentence)
        bar = progress.add_task("runs", total=len(left))
        try:
            futures = {pool.submit(run.execute, threads): run for run in left}
            for future in as_completed(futures):
                try:
                    future.result()
                except InputError as error:
                    errors.append(str(error))
                    say(f"failed: {error}")
                else:
                    done.append(futures[future])
                    if len(done) == 1 and (sentence := unreported(plan, done)):
                        say(sentence)
                progress.advance(bar)
        finally:
            # after Ctrl-C, only what runs already is waited for
            pool.shutdown(cancel_futures=True)
    return errors


def unreported(plan: Plan, runs: Sequence[Run]) -> str:
    """One sentence on what the plan compares and none of the finished runs reports; or nothing."""
    scores, validations = _reported(runs)
    for key, wanted, there in (
        ("metrics", plan.metrics, scores),
        ("monitor", (plan.monitor,), validations),
    ):
        unknown = [name for name in wanted if name not in there]
        if runs and unknown:
            return (
                f"No finished run reports {', '.join(unknown)}, and the runs report "
                f"{', '.join(sorted(there)) or 'nothing'}: correct {key} in the plan, the finished "
                "runs are kept."
            )
    return ""


def tables(plan: Plan, runs: Sequence[Run]) -> list[Table]:
    """A table for each metric, and one of how many steps it takes to reach the baseline's best.

    What no run reports has none, see :func:`unreported`.
    """
    made = []
    scores, validations = _reported(runs)
    for metric in plan.metrics:
        if metric not in scores:
            continue
        table = _table(plan, f"{metric}, mean ± standard deviation of the seeds (their number)")
        for arm in plan.arms:
            cells = []
            for value in plan.values:
                values = [
                    run.result()["scores"].get(metric, math.nan)
                    for run in _of(runs, arm, _text(value))
                ]
                cells.append(_cell(Summary.of(values), 3))
            table.add_row(arm, *cells)
        made.append(table)
    if plan.monitor not in validations:
        return made
    table = _table(
        plan, f"steps until {plan.monitor} reaches the best of {plan.baseline} of the same seed"
    )
    for arm in plan.arms:
        cells = []
        for value in plan.values:
            steps = [
                _steps_to_reach(run, baseline, plan.monitor)
                for run in _of(runs, arm, _text(value))
                for baseline in _of(runs, plan.baseline, _text(value))
                if run.seed == baseline.seed
            ]
            summary = Summary.of(steps)
            missed = f", {summary.undefined} never" if summary.undefined else ""
            cells.append(_cell(summary, 0) + missed)
        table.add_row(arm, *cells)
    return [*made, table]


def write_csv(path: Path, runs: Sequence[Run]) -> None:
    """Write a row for each run: arm, column, seed and all scores of its test."""
    results = [run.result()["scores"] for run in runs]
    names = sorted({name for scores in results for name in scores})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "column", "seed", *names])
        for run, scores in zip(runs, results, strict=True):
            writer.writerow(
                [run.arm, run.column, run.seed, *(scores.get(name, "") for name in names)]
            )


@lru_cache
def _digest(path: str, modified: float) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _reported(runs: Sequence[Run]) -> tuple[set[str], set[str]]:
    """Names of what the tests and the validations of some runs report."""
    results = [run.result() for run in runs]
    scores = {name for result in results for name in result["scores"]}
    validations = {name for result in results for row in result["validations"] for name in row}
    return (
        {name for name in scores if name.startswith("test/")},
        {name for name in validations if name.startswith("val/")},
    )


def _of(runs: Sequence[Run], arm: str, column: str) -> list[Run]:
    return [run for run in runs if (run.arm, run.column) == (arm, column)]


def _steps_to_reach(run: Run, baseline: Run, monitor: str) -> float:
    """Step of the first validation as good as the baseline's best one; NaN if there is none."""
    best = max(
        (row[monitor] for row in baseline.result()["validations"] if monitor in row),
        default=math.inf,
    )
    for row in run.result()["validations"]:
        if row.get(monitor, -math.inf) >= best:
            return float(row["step"]) + 1
    return math.nan


def _metrics(path: Path, prefix: str) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv`` that hold metrics of a prefix: these, and the step."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in rows
        if any(value for name, value in row.items() if name.startswith(prefix))
    ]


def _table(plan: Plan, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(plan.vary.rpartition(".")[2])
    for value in plan.values:
        table.add_column(_text(value), justify="right")
    return table


def _cell(summary: Summary, digits: int) -> str:
    if summary.defined == 0:
        return "-"
    spread = "" if math.isnan(summary.spread) else f" ± {summary.spread:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread} ({summary.defined})"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
