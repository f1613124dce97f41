"""``python -m gvsl_lightning sweep``: the trials of a W&B sweep, here and without an account.

It stands in for ``wandb sweep`` and ``wandb agent``: it draws the parameters, builds the commands
as the agent does, runs one after the other with the logger offline, and compares what they logged.
"""

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import norm
from wandb.sdk.launch.sweeps.utils import (
    DEFAULT_SWEEP_COMMAND,
    create_sweep_command,
    create_sweep_command_args,
)

from gvsl_lightning.benchmark.plan import digest
from gvsl_lightning.benchmark.runner import locked
from gvsl_lightning.cli.diagnosis import WordsParser, read_yaml
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs import processes
from gvsl_lightning.runs.files import csv_lines, write_text

HELP = """\
Run the trials of a W&B sweep here, without an account, and compare them.

python -m gvsl_lightning sweep --config SWEEP --out FOLDER [--KEY=VALUE ...]

A finished trial is not run again: the same command goes on, a larger --count adds trials. Without
W&B's server none is ended early, and a sweep by bayes draws at random. With it, give the file to
wandb sweep, and run the wandb agent command that it prints.

  --config FILE    the sweep, as wandb sweep takes it; some are in configs/sweep
  --out FOLDER     of the trials, 000, 001, ..., and trials.csv, the best one first
  --count 4        trials; otherwise the sweep's run_cap, or the whole grid
  --seed 1         of the draws
  --KEY=VALUE      options of fit, for every trial

Examples:
  python -m gvsl_lightning sweep --config configs/sweep/pretrain_phantom.yaml --out runs/sweep \\
    --count 4 --data.init_args.size=[32,32,32]
  python -m gvsl_lightning sweep --config configs/sweep/finetune_phantom.yaml --out runs/labels

More:
  --help=all       all options
"""
"""The page of ``--help``."""


def main(args: Sequence[str]) -> None:
    """Run the trials that are left of a sweep, print and write their table, the best one first.

    A trial that is finished is not run again, so that the same command goes on where it was
    stopped, and one with a larger ``--count`` adds trials.

    Args:
        args: the words after ``sweep``:

            - ``--config``: the sweep, a YAML file as ``wandb sweep`` takes it.
            - ``--out``: folder of the trials, ``000``, ``001``, ..., and of ``trials.csv``.
            - ``--count``: trials; by default the sweep's ``run_cap``, or the whole grid.
            - ``--seed``: of the draws.
            - all further words go to every trial.

    Raises:
        InputError: if the sweep is wrong, another command works in the folder, a trial does not log
            the sweep's metric, or, after all others are done, a trial failed.
    """
    parser = WordsParser("python -m gvsl_lightning sweep", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the sweep, a YAML file")
    parser.add_argument("--out", required=True, help="folder of the trials and their table")
    parser.add_argument("--count", type=int, help="trials; by default run_cap, or the whole grid")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options, words = parser.parse_known_args(args)
    sweep, out = Sweep.read(options.config), Path(options.out)
    drawn = sweep.draw(options.count, options.seed)
    if sweep.method == "bayes":
        print("Without W&B's server, the parameters are drawn at random instead of by bayes.")
    if sweep.ends_early:
        print("Without W&B's server, every trial runs to its end.")
    console = Console()
    trials: list[Trial] = []
    with locked(out):
        for index, parameters in enumerate(drawn):
            folder = out / f"{index:03d}"
            command = [*sweep.words(parameters), f"{_SAVE_DIR}={folder}", *words]
            with console.status(f"trial {index} of {len(drawn)}"):
                trial = Trial.finished(folder, command) or execute(
                    sweep, parameters, command, folder
                )
            trials.append(trial)
            print(f"{trial}, {trial.seconds:.0f} s")
            trials.sort(key=sweep.rank)
            write_table(sweep, trials, out)
    console.print(printed_table(sweep, trials))
    failed = [trial for trial in trials if trial.status]
    print(f"{len(trials) - len(failed)} of {len(trials)} trials: {out / 'trials.csv'}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(trials)} trials failed, the first one with: {failed[0].error} "
            "Correct it and give the same command again."
        )


@dataclass(frozen=True)
class Sweep:
    """What a sweep's file says, under W&B's names.

    Attributes:
        path: the file.
        method: ``random``, ``grid`` or ``bayes``.
        metric: name of what is logged.
        maximize: whether more of it is better.
        parameters: name -> distribution.
        command_words: with W&B's macros, such as ``${args}``.
        program: what ``${program}`` stands for.
        run_cap: number of trials.
        ends_early: whether W&B would end bad trials.
    """

    path: str
    method: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]
    command_words: Sequence[str]
    program: str
    run_cap: int | None
    ends_early: bool

    @classmethod
    def read(cls, path: str) -> "Sweep":
        """Read a file.

        Raises:
            InputError: if it is unreadable or incomplete, or W&B would not pass a value as it is.
        """
        read_yaml(path)  # says what is wrong in which line; W&B reads numbers otherwise
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            sweep = cls(
                path=path,
                method=content["method"],
                metric=content["metric"]["name"],
                maximize=content["metric"].get("goal") == "maximize",
                parameters=dict(content["parameters"]),
                command_words=list(content.get("command") or DEFAULT_SWEEP_COMMAND),
                program=str(content.get("program", "")),
                run_cap=None if content.get("run_cap") is None else int(content["run_cap"]),
                ends_early="early_terminate" in content,
            )
            for name, spec in sweep.parameters.items():
                given = spec["values"] if "values" in spec else [spec.get("value", "")]
                if None in given:
                    raise InputError(
                        f"{path} gives {name} null, which W&B passes on as the text None; write "
                        '"null" in quotes.'
                    )
                quantile(name, spec, 0.5)
        except InputError:
            raise
        except KeyError as error:
            raise InputError(f"{path} lacks {error}; see configs/sweep for some sweeps.") from error
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read as a sweep ({type(error).__name__}: {error}); see "
                "configs/sweep for some."
            ) from error
        if sweep.method not in ("random", "grid", "bayes"):
            raise InputError(f"{path} has the method {sweep.method}; give random, grid or bayes.")
        return sweep

    def draw(self, count: int | None, seed: int = 0) -> list[dict[str, Any]]:
        """Parameters of the trials; the first ones do not depend on how many are drawn.

        Args:
            count: trials; None: ``run_cap``, or all of a grid, which has no more.
            seed: of the draws.

        Raises:
            InputError: if nothing says how many, or a grid has a distribution without steps.
        """
        count = self.run_cap if count is None else count
        if count is None and self.method != "grid":
            raise InputError(f"{self.path} has no run_cap; give --count.")
        if count is not None and count < 1:
            raise InputError(f"--count is {count}; give 1 or more.")
        if self.method == "grid":
            values = [_grid_values(name, spec) for name, spec in self.parameters.items()]
            sets: Iterator[Sequence[Any]] = itertools.product(*values)
        else:
            sets = (
                [
                    quantile(name, spec, chance)
                    for (name, spec), chance in zip(
                        self.parameters.items(),
                        np.random.default_rng([seed, index]).random(len(self.parameters)),
                        strict=True,
                    )
                ]
                for index in itertools.count()
            )
        return [
            dict(zip(self.parameters, values, strict=True))
            for values in itertools.islice(sets, count)
        ]

    def words(self, parameters: Mapping[str, Any]) -> list[str]:
        """The command of a trial, as W&B's agent makes it.

        Args:
            parameters: name -> value.

        Raises:
            InputError: if it has a macro that the agent would drop without a word.
        """
        macros = {
            **create_sweep_command_args(
                {"args": {name: {"value": value} for name, value in parameters.items()}}
            ),
            "env": ["/usr/bin/env"],
            "interpreter": ["python"],
            "program": [self.program],
        }
        words: list[str] = []
        for word in map(str, create_sweep_command(list(self.command_words))):
            if not (word.startswith("${") and word.endswith("}")):
                words.append(word)
            elif (macro := word[2:-1]) in macros:
                words += macros[macro]
            else:
                raise InputError(
                    f"{self.path} has {word} in its command, which W&B does not know; choose one "
                    f"of {', '.join(macros)}."
                )
        return words

    def rank(self, trial: "Trial") -> tuple[bool, float, int]:
        """Key that sorts the best trial first, and failed and diverged ones last."""
        if trial.score is None or math.isnan(trial.score):
            return True, 0.0, trial.index
        return False, -trial.score if self.maximize else trial.score, trial.index


@dataclass(frozen=True)
class Trial:
    """What came of one trial.

    Attributes:
        folder: of the trial, named by its number.
        parameters: name -> value.
        command: its words.
        files: SHA-256 of the files that they name.
        status: that it ended with; 0: well.
        seconds: that it took.
        run: folder of its results.
        score: the best value of the metric.
        step: of this value.
        error: the last line that a failed one printed.
    """

    folder: str
    parameters: Mapping[str, Any]
    command: Sequence[str]
    files: Mapping[str, str]
    status: int
    seconds: float
    run: str = ""
    score: float | None = None
    step: int | None = None
    error: str = ""

    def __str__(self) -> str:
        told = f"failed: {self.error}" if self.status else f"{self.score:.4f} at step {self.step}"
        return f"trial {self.index}: {told}"

    @property
    def index(self) -> int:
        """Number of the trial."""
        return int(Path(self.folder).name)

    @classmethod
    def finished(cls, folder: Path, command: Sequence[str]) -> "Trial | None":
        """The trial in a folder, if these very words, and the files that they name, ended well."""
        try:
            trial = cls(**json.loads((folder / _RESULT).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError):
            return None
        same = trial.command == list(command) and trial.files == _files(command)
        return trial if same and not trial.status else None


def execute(
    sweep: Sweep, parameters: Mapping[str, Any], command: Sequence[str], folder: Path
) -> Trial:
    """Run one trial in a process of its own, and keep in its folder what it printed and scored.

    Args:
        sweep: which metric counts.
        parameters: of the trial.
        command: its words.
        folder: for what it leaves; what another trial left there is removed.

    Raises:
        InputError: if it ends well and does not log the sweep's metric.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "trial.log"
    here = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),  # where `python` is this one
        "WANDB_MODE": "offline",
    }
    environment.pop("WANDB_RUN_ID", None)  # every trial is a run of its own
    files, start = _files(command), time.monotonic()
    try:
        with open(log, "w", encoding="utf-8") as file:
            status = processes.run(
                command,
                environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    except OSError as error:
        raise InputError(
            f"The command of {sweep.path} cannot start {command[0]} ({error}); correct it."
        ) from error
    seconds = round(time.monotonic() - start, 1)
    if status:
        found: dict[str, Any] = {"error": processes.last_words(status, log)}
    else:
        found = _best(sweep, folder)
    trial = Trial(str(folder), parameters, command, files, status, seconds, **found)
    write_text(folder / _RESULT, json.dumps(asdict(trial), indent=1))
    return trial


def write_table(sweep: Sweep, trials: Sequence[Trial], out: Path) -> None:
    """Write ``trials.csv``.

    Args:
        sweep: whose trials they are.
        trials: the rows, in order.
        out: folder of the file.
    """
    rows: list[list[Any]] = [
        ["trial", *sweep.parameters, sweep.metric, "step", "status", "seconds", "folder"]
    ]
    for trial in trials:
        row = [trial.index, *trial.parameters.values(), trial.score, trial.step, trial.status]
        rows.append([*row, trial.seconds, trial.run or trial.folder])
    write_text(out / "trials.csv", csv_lines(rows, end="\n"))


def printed_table(sweep: Sweep, trials: Sequence[Trial]) -> Table:
    """The same for the screen, with short names.

    Args:
        sweep: whose trials they are.
        trials: the rows, in order.
    """
    table = Table("trial", sweep.metric, "step", "seconds", "parameters", show_lines=True)
    for trial in trials:
        score = "failed" if trial.status else f"{trial.score:.4f}"
        step = "" if trial.step is None else str(trial.step)
        parameters = [
            f"{name.rpartition('.')[2]}={f'{value:.3g}' if isinstance(value, float) else value}"
            for name, value in trial.parameters.items()
        ]
        table.add_row(
            str(trial.index), score, step, f"{trial.seconds:.0f}", escape("\n".join(parameters))
        )
    return table


def quantile(name: str, spec: Mapping[str, Any], chance: float) -> Any:
    """The value below which a parameter lies with a given chance.

    Args:
        name: of the parameter, for the sentence.
        spec: its distribution in W&B's words.
        chance: from 0 to 1.

    Returns:
        A value of the file, or a Python number.

    Raises:
        InputError: if the distribution is not one of those known here.
    """
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        values = spec["values"]
        weights = np.cumsum(spec.get("probabilities", np.full(len(values), 1 / len(values))))
        return values[min(int(np.searchsorted(weights, chance, "right")), len(values) - 1)]
    kind = _distribution(spec)
    if kind == "int_uniform":
        low, high = spec["min"], spec["max"]
        return min(low + int(chance * (high - low + 1)), high)
    shape = kind.removeprefix("q_")
    if shape not in _SHAPES:
        raise InputError(
            f"{name} has the distribution {kind}, which is not drawn here; choose int_uniform or, "
            f"with or without q_, {', '.join(_SHAPES)}."
        )
    if shape.endswith("normal"):
        number = _SHAPES[shape](spec.get("mu", 0), spec.get("sigma", 1), chance)
    else:
        number = _SHAPES[shape](spec["min"], spec["max"], chance)
    if shape == kind:
        return float(number)
    step = spec.get("q", 1)
    return round(number / step) * step


# of two limits, or mean and standard deviation, and a chance
_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "uniform": lambda low, high, chance: low + chance * (high - low),
    "log_uniform": lambda low, high, chance: math.exp(low + chance * (high - low)),
    "log_uniform_values": lambda low, high, chance: low * (high / low) ** chance,
    "normal": lambda mean, spread, chance: norm.ppf(chance, mean, spread),
    "log_normal": lambda mean, spread, chance: math.exp(norm.ppf(chance, mean, spread)),
}

_RESULT = "trial.json"
_SAVE_DIR = "--trainer.logger.save_dir"


def _distribution(spec: Mapping[str, Any]) -> str:
    """W&B's default for two limits."""
    whole = all(isinstance(spec.get(limit), int) for limit in ("min", "max"))
    return str(spec.get("distribution", "int_uniform" if whole else "uniform"))


def _grid_values(name: str, spec: Mapping[str, Any]) -> Sequence[Any]:
    if "value" in spec:
        return [spec["value"]]
    if "values" in spec:
        return list(spec["values"])
    kind = _distribution(spec)
    if kind == "int_uniform":
        return range(spec["min"], spec["max"] + 1)
    if kind == "q_uniform":
        steps = np.arange(spec["min"], spec["max"], spec.get("q", 1))
        return list(steps.tolist())
    raise InputError(
        f"A grid has no steps for {name}, which has the distribution {kind}; give values."
    )


def _files(command: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files that a command names: the configuration, weights."""
    paths = (word.partition("=")[2] or word for word in command[1:])
    return {path: found for path in paths if (found := digest(path))}


def _best(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Folder of the run in a trial's folder, and its best score."""
    run = next(folder.glob("*/*/metrics.csv"), folder / "metrics.csv").parent
    rows: list[dict[str, str]] = []
    if (run / "metrics.csv").is_file():
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    scores = [(float(row[sweep.metric]), int(row["step"])) for row in rows if row.get(sweep.metric)]
    if not scores:
        logged = {name for row in rows for name, value in row.items() if value} - {"step", "epoch"}
        choice = f"choose one of {', '.join(sorted(logged))}" if logged else "it has no metrics.csv"
        raise InputError(f"{run} has no {sweep.metric}, the metric of {sweep.path}; {choice}.")
    finite = [one for one in scores if not math.isnan(one[0])] or scores
    score, step = (max if sweep.maximize else min)(finite, key=lambda one: one[0])
    return {"run": str(run), "score": score, "step": step}
