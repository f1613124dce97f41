"""Tables of a plan's finished runs: scores, significance, and how fast the methods learn."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gvsl_lightning.benchmark.case_scores import p_value, parts_of
from gvsl_lightning.benchmark.paper import paper_score
from gvsl_lightning.benchmark.plan import Plan, Run
from gvsl_lightning.evaluation.scores import Summary, mean_defined
from gvsl_lightning.runs.files import csv_lines, write_text

LEVEL = 0.05
"""Of the tests of significance, two-sided, not corrected for their number."""


@dataclass(frozen=True)
class Entry:
    """What one method reaches in one task and mode.

    Attributes:
        summary: of the metric over the seeds.
        gain: mean difference from the baseline over the seeds that both have; NaN for the
            baseline itself.
        paper: the paper's score in %, if there is one.
        best: significantly better than the second best.
        differs: significantly different from the baseline.
    """

    summary: Summary
    gain: float
    paper: float | None
    best: bool
    differs: bool


class Comparison:
    """The finished runs of a plan.

    Args:
        plan: what was compared.
        runs: those that are done.

    Attributes:
        plan: as given.
        results: what each run left.
        column: task and mode -> what each method reaches, computed once.
    """

    def __init__(self, plan: Plan, runs: Sequence[Run]) -> None:
        self.plan = plan
        self.results: dict[Run, dict[str, Any]] = {run: run.result() for run in runs}
        # three tables show them, and the tests of significance take time
        self.column = cache(self._column)

    def of(self, method: str, task: str = "", mode: str = "") -> dict[int, dict[str, Any]]:
        """Results by seed: of a transfer or, without task and mode, of the pre-trainings."""
        return {
            run.seed: result
            for run, result in self.results.items()
            if (run.method, run.task, run.mode) == (method, task, mode)
        }

    def _column(self, task: str, mode: str) -> dict[str, Entry]:
        """What the methods reach in a task and mode, with the tests of significance."""
        plan, metric = self.plan, self.plan.tasks[task].metric
        results = {method: self.of(method, task, mode) for method in plan.methods}
        summaries = {
            method: Summary.of([one["scores"].get(metric, math.nan) for one in seeds.values()])
            for method, seeds in results.items()
        }
        scored = [method for method, summary in summaries.items() if summary.defined]
        sign = -1 if is_error(metric) else 1
        ranked = sorted(scored, key=lambda method: -sign * summaries[method].mean)
        reported = plan.tasks[task].paper

        def differ(one: str, other: str) -> bool:
            return one != other and _p(metric, results[one], results[other]) < LEVEL

        return {
            method: Entry(
                summary=summary,
                gain=_gain(metric, results[method], results[plan.baseline])
                if method != plan.baseline
                else math.nan,
                paper=paper_score(method, reported, plan.is_linear(mode)) if reported else None,
                best=len(ranked) > 1
                and method == ranked[0]
                and differ(method, ranked[1])
                and sign * _gain(metric, results[method], results[ranked[1]]) > 0,
                differs=differ(method, plan.baseline),
            )
            for method, summary in summaries.items()
        }

    def steps(self, method: str, task: str, mode: str) -> Summary:
        """Steps until a method validates as well as the baseline's best of the same seed."""
        baseline = self.of(self.plan.baseline, task, mode)
        monitor = self.plan.tasks[task].monitor
        return Summary.of(
            [
                _steps_to_reach(result, baseline[seed], monitor)
                for seed, result in self.of(method, task, mode).items()
                if seed in baseline
            ]
        )

    def unreported(self) -> str:
        """One sentence on what the plan compares and no finished run reports; or nothing."""
        for name, task in self.plan.tasks.items():
            results = [result for run, result in self.results.items() if run.task == name]
            scores = {key for result in results for key in result["scores"]}
            validations = {
                key
                for result in results
                for row in result["validations"]
                for key in row
                if key.startswith("val/")
            }
            for key, wanted, there in (
                ("metric", task.metric, scores),
                ("monitor", task.monitor, validations),
            ):
                if results and wanted not in there:
                    return (
                        f"No finished run of {name} reports {wanted}, and they report "
                        f"{', '.join(sorted(there)) or 'nothing'}: correct {key} in the plan, the "
                        "finished runs are kept."
                    )
        return ""


class Cell(NamedTuple):
    """Text of a cell: what may be bold, and what follows it."""

    text: str
    bold: bool = False
    rest: str = ""


Cells = Callable[[Comparison, str], list[list[Cell]]]


def score_cells(comparison: Comparison, mode: str) -> list[list[Cell]]:
    """Of a mode's table of scores: a row for each method, a cell for each task."""
    plan = comparison.plan
    columns = [
        [
            _score_cell(entry, is_share(options.metric), len(plan.seeds))
            for entry in comparison.column(task, mode).values()
        ]
        for task, options in plan.tasks.items()
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def step_cells(comparison: Comparison, mode: str) -> list[list[Cell]]:
    """The same of the table of steps."""
    plan = comparison.plan
    return [
        [_step_cell(comparison.steps(method, task, mode)) for task in plan.tasks]
        for method in plan.methods
    ]


def headings(plan: Plan) -> list[str]:
    """Of the columns of a mode."""
    return [
        f"{name} ({task.metric.removeprefix('test/')}{' %' if is_share(task.metric) else ''})"
        for name, task in plan.tasks.items()
    ]


def printed_tables(comparison: Comparison) -> list[Table]:
    """For each mode a table of the scores and one of the steps."""
    plan, made = comparison.plan, []
    for mode in plan.modes:
        for cells, title in (
            (score_cells(comparison, mode), scores_title(plan)),
            (step_cells(comparison, mode), steps_title(plan)),
        ):
            table = Table(title=escape(f"{mode}: {title}"), title_justify="left")
            table.add_column("method")
            for heading in headings(plan):
                table.add_column(escape(heading), justify="right")
            for method, row in zip(plan.methods, cells, strict=True):
                texts = [Text.assemble((c.text, "bold" if c.bold else ""), c.rest) for c in row]
                table.add_row(Text(method), *texts)
            made.append(table)
    return made


def scores_title(plan: Plan) -> str:
    """What a cell of the table of scores holds, in short."""
    paper = " [paper]" if any(task.paper for task in plan.tasks.values()) else ""
    return f"Mean ± standard deviation of {_seeds(plan)} (gain over {plan.baseline}){paper}"


def caption(plan: Plan) -> str:
    """What the table of scores holds."""
    kinds = {task.metric for task in plan.tasks.values()}
    tested = []
    if any("auroc" not in kind for kind in kinds):
        tested.append(
            "Wilcoxon's signed-rank test on the score of each test case averaged over the seeds"
        )
    if any("auroc" in kind for kind in kinds):
        tested.append("for AUROC a paired bootstrap over the test cases of the mean over the seeds")
    if any(parts_of(kind)[0] in ("ap", "f1") for kind in kinds):
        tested.append("none for AP and F1")
    paper = any(task.paper for task in plan.tasks.values())
    return (
        f"Mean ± standard deviation over {_seeds(plan)}, Dice, AUROC, AP and F1 in %; in "
        f"parentheses the gain over {plan.baseline}"
        f"{'; in brackets what the paper reports' if paper else ''}. Bold: the best, where it is "
        f"significantly better than the second best; *: significantly different from "
        f"{plan.baseline} (two-sided p < {LEVEL}, not corrected for the number of tests: "
        f"{'; '.join(tested)})."
    )


def steps_title(plan: Plan) -> str:
    """What the table of steps holds."""
    return f"Steps until validation reaches the best of {plan.baseline} of the same seed"


def write_tables(comparison: Comparison, out: Path) -> None:
    """Write ``results.csv`` (all runs), ``scores.csv`` (every score) and ``table.md``."""
    transfers = {run: result for run, result in comparison.results.items() if run.task}
    write_text(
        out / "results.csv",
        _csv(
            (
                *("method", "task", "mode", "seed", "metric", "value", "low", "high"),
                *("steps", "seconds", "config", "version"),
            ),
            (
                [
                    *(run.method, run.task, run.mode or "pre-training", run.seed, run.metric),
                    result.get("scores", {}).get(run.metric, ""),
                    *("" if math.isnan(end) else end for end in result.get("interval", _UNKNOWN)),
                    *(result[key] for key in ("steps", "seconds", "config", "version")),
                ]
                for run, result in comparison.results.items()
            ),
        ),
    )
    write_text(
        out / "scores.csv",
        _csv(
            ("method", "task", "mode", "seed", "score", "value"),
            (
                [run.method, run.task, run.mode, run.seed, name, value]
                for run, result in transfers.items()
                for name, value in sorted(result["scores"].items())
            ),
        ),
    )
    plan = comparison.plan
    parts = [
        *_markdown(comparison, score_cells),
        "",
        _escaped(caption(plan)),
        "",
        f"{steps_title(plan)}, mean ± standard deviation over the seeds that do:",
        "",
        *_markdown(comparison, step_cells),
    ]
    write_text(out / "table.md", "\n".join(parts) + "\n")


_UNKNOWN = (math.nan, math.nan)


def is_error(metric: str) -> bool:
    """Whether less is better."""
    errors = ("loss", "absolute_volume_error_mm3", "surface_distance_mm", "hd95_mm")
    return parts_of(metric)[0] in errors


def is_share(metric: str) -> bool:
    """Whether a metric lies in [0, 1] and is shown in %."""
    return parts_of(metric)[0] in ("dice", "auroc", "ap", "f1")


Results = Mapping[int, dict[str, Any]]
"""Seed -> what the run left."""


def _p(metric: str, one: Results, other: Results) -> float:
    """Significance of a difference, by the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    return p_value(
        metric, *([results[seed]["cases"] for seed in seeds] for results in (one, other))
    )


def _gain(metric: str, results: Results, baseline: Results) -> float:
    """Mean difference of the scores, by the seeds that both have."""
    return mean_defined(
        [
            results[seed]["scores"].get(metric, math.nan)
            - baseline[seed]["scores"].get(metric, math.nan)
            for seed in results.keys() & baseline.keys()
        ]
    )


def _seeds(plan: Plan) -> str:
    return f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"


def _score_cell(entry: Entry, share: bool, seeds: int) -> Cell:
    summary, factor, digits = entry.summary, 100 if share else 1, 1 if share else 3
    paper = "" if entry.paper is None else f" [{entry.paper:.1f}]"
    if not summary.defined:
        return Cell("-", rest=paper)
    text = f"{factor * summary.mean:.{digits}f}"
    if math.isfinite(summary.spread):
        text += f" ± {factor * summary.spread:.{digits}f}"
    rest = "*" if entry.differs else ""
    if math.isfinite(entry.gain):
        rest += f" ({factor * entry.gain:+.{digits}f})"
    rest += paper
    if summary.defined < seeds:
        rest += f", {summary.defined} of {seeds} seeds"
    return Cell(text, entry.best, rest)


def _step_cell(summary: Summary) -> Cell:
    missed = f"{summary.undefined} never" if summary.undefined else ""
    if not summary.defined:
        return Cell(missed or "-")
    spread = "" if math.isnan(summary.spread) else f" ± {summary.spread:.0f}"
    return Cell(f"{summary.mean:.0f}{spread} ({summary.defined}){', ' if missed else ''}{missed}")


def _steps_to_reach(result: Mapping[str, Any], baseline: Mapping[str, Any], monitor: str) -> float:
    """Step of the first validation as good as the baseline's best one; NaN if there is none."""
    sign = -1 if is_error(monitor) else 1
    best = max(
        (sign * row[monitor] for row in baseline["validations"] if monitor in row),
        default=math.inf,
    )
    for row in result["validations"]:
        if sign * row.get(monitor, -sign * math.inf) >= best:
            return float(row["step"]) + 1
    return math.nan


def _markdown(comparison: Comparison, cells: Cells) -> list[str]:
    """A table in the form of the paper's: methods, and a group of columns for each mode."""
    plan = comparison.plan
    heading = [
        f"{_escaped(mode)}<br>{_escaped(task)}" for mode in plan.modes for task in headings(plan)
    ]
    groups = [cells(comparison, mode) for mode in plan.modes]
    lines = [["method", *heading]]
    for method, *parts in zip(plan.methods, *groups, strict=True):
        texts = [
            f"{f'**{cell.text}**' if cell.bold else cell.text}{_escaped(cell.rest)}"
            for part in parts
            for cell in part
        ]
        lines.append([_escaped(method), *texts])
    written = [f"| {' | '.join(line)} |" for line in lines]
    return [written[0], "|---" + "|---:" * len(heading) + "|", *written[1:]]


def _escaped(text: str) -> str:
    """For a cell of Markdown."""
    for sign in "\\|*_<[`":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _csv(heading: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    return csv_lines([heading, *lines], end="\n")
