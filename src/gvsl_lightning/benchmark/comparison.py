"""Tables of the finished runs of a plan: scores, significance and steps."""

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
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.evaluation.scores import Summary, mean_defined
from gvsl_lightning.runs.files import write_csv, write_text

LEVEL = 0.05
"""Significance level of two-sided tests, not corrected for their number."""


@dataclass(frozen=True)
class Entry:
    """Score of one method in one task and mode.

    Attributes:
        summary: of the metric over the seeds.
        gain: mean difference from the baseline over the seeds that both have; NaN for the baseline.
        paper: the paper's score in %.
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

    Attributes:
        results: run -> its result.
        column: function of task and mode that returns the entry of each method.
    """

    def __init__(self, plan: Plan, runs: Sequence[Run]) -> None:
        self.plan = plan
        self.results: dict[Run, dict[str, Any]] = {run: run.result() for run in runs}
        # three tables show the entries, and the tests of significance take time
        self.column = cache(self._column)

    def of(self, method: str, task: str = "", mode: str = "") -> dict[int, dict[str, Any]]:
        """Results by seed: of a transfer or, without task and mode, of the pre-trainings."""
        return {
            run.seed: result
            for run, result in self.results.items()
            if (run.method, run.task, run.mode) == (method, task, mode)
        }

    def _column(self, task: str, mode: str) -> dict[str, Entry]:
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

        def gain(one: str, other: str) -> float:
            return math.nan if one == other else _gain(metric, results[one], results[other])

        def differ(one: str, other: str) -> bool:
            return one != other and _p(metric, results[one], results[other]) < LEVEL

        def is_best(method: str) -> bool:
            if len(ranked) < 2 or method != ranked[0]:
                return False
            return differ(method, ranked[1]) and sign * gain(method, ranked[1]) > 0

        return {
            method: Entry(
                summary=summary,
                gain=gain(method, plan.baseline),
                paper=paper_score(method, reported, plan.is_linear(mode)) if reported else None,
                best=is_best(method),
                differs=differ(method, plan.baseline),
            )
            for method, summary in summaries.items()
        }

    def steps(self, method: str, task: str, mode: str) -> Summary:
        """Steps until a method validates as well as the baseline's best of the same seed.

        Seeds in which the baseline learned nothing (its first validation is its best) are left out.
        """
        baseline = self.of(self.plan.baseline, task, mode)
        monitor = self.plan.tasks[task].monitor
        return Summary.of(
            [
                _steps_to_reach(result, baseline[seed], monitor)
                for seed, result in self.of(method, task, mode).items()
                if seed in baseline and _learned(baseline[seed], monitor)
            ]
        )

    def cost(self, method: str) -> tuple[Summary, float, float]:
        """Steps of a method's pre-trainings, and hours of all its pre-trainings and transfers."""
        runs = [(run, result) for run, result in self.results.items() if run.method == method]
        steps = Summary.of([float(result["steps"]) for run, result in runs if not run.task])
        hours = [
            sum(float(result["seconds"]) for run, result in runs if bool(run.task) is transfer)
            / 3600
            for transfer in (False, True)
        ]
        return steps, hours[0], hours[1]

    def cases(self, task: str) -> int:
        """Number of test cases of a task."""
        tested = [len(result["cases"]) for run, result in self.results.items() if run.task == task]
        return max(tested, default=0)

    def unreported_sentence(self) -> str:
        """Sentence about a metric of the plan that no finished run reports; else empty."""
        for name, task in self.plan.tasks.items():
            results = [result for run, result in self.results.items() if run.task == name]
            validations = [row for result in results for row in result["validations"]]
            for key, metric, reported in (
                ("metric", task.metric, [result["scores"] for result in results]),
                ("monitor", task.monitor, validations),
            ):
                names = {one for row in reported for one in row} - {"epoch", "step"}
                if results and metric not in names:
                    return (
                        f"No finished run of {name} reports {metric}, and they report "
                        f"{', '.join(sorted(names)) or 'nothing'}: correct {key} in the plan, the "
                        "finished runs are kept."
                    )
        return ""


class Cell(NamedTuple):
    """Words of a cell: a part that may be bold, and the rest."""

    text: str
    bold: bool = False
    rest: str = ""


Cells = Callable[[Comparison, str, str], Mapping[str, Cell]]
"""Comparison, task and mode -> method -> cell."""


def score_cells(comparison: Comparison, task: str, mode: str) -> dict[str, Cell]:
    """Cells of the table of scores."""
    plan = comparison.plan
    share = is_share(plan.tasks[task].metric)
    entries = comparison.column(task, mode)
    return {name: _score_cell(entry, share, len(plan.seeds)) for name, entry in entries.items()}


def step_cells(comparison: Comparison, task: str, mode: str) -> dict[str, Cell]:
    """Cells of the table of steps."""
    methods = comparison.plan.methods
    return {method: _step_cell(comparison.steps(method, task, mode)) for method in methods}


def budget(comparison: Comparison) -> dict[str, list[str]]:
    """Method -> the cells below :data:`BUDGET`."""
    cells = {}
    for method in comparison.plan.methods:
        steps, pretraining, transfers = comparison.cost(method)
        mean = f"{steps.mean:.0f}" if steps.defined else "-"
        cells[method] = [mean, f"{pretraining:.2f}", f"{transfers:.2f}"]
    return cells


BUDGET = ("steps of a pre-training", "hours of pre-training", "hours of transfer")
"""Headings of the table of costs."""


def rows(
    comparison: Comparison, cells: Cells, modes: Iterable[str] | None = None
) -> dict[str, list[Cell]]:
    """Method -> its cells in all tasks of some modes, all by default."""
    plan = comparison.plan
    columns = [cells(comparison, task, mode) for mode in modes or plan.modes for task in plan.tasks]
    return {method: [column[method] for column in columns] for method in plan.methods}


def headings(plan: Plan) -> list[str]:
    """Headings of the columns of a mode."""
    return [
        f"{name} ({task.metric.removeprefix('test/')}{' %' if is_share(task.metric) else ''})"
        for name, task in plan.tasks.items()
    ]


def printed_tables(comparison: Comparison) -> list[Table]:
    """For each mode a table of the scores and one of the steps."""
    plan, tables = comparison.plan, []
    paper = " [paper]" if any(task.paper for task in plan.tasks.values()) else ""
    scores = f"{_mean(plan)} (gain over {plan.baseline}){paper}"
    for mode in plan.modes:
        for cells, title in ((score_cells, scores), (step_cells, steps_title(plan))):
            table = Table(title=escape(f"{mode}: {title}"), title_justify="left")
            table.add_column("method")
            for heading in headings(plan):
                table.add_column(escape(heading), justify="right")
            for method, row in rows(comparison, cells, [mode]).items():
                texts = [Text.assemble((c.text, "bold" if c.bold else ""), c.rest) for c in row]
                table.add_row(Text(method), *texts)
            tables.append(table)
    return tables


def caption(plan: Plan) -> str:
    """Sentences that explain the table of scores."""
    paper = any(task.paper for task in plan.tasks.values())
    return (
        f"{_mean(plan)}, Dice, AUROC, AP and F1 in %; in "
        f"parentheses the gain over {plan.baseline}"
        f"{'; in brackets the score in the paper' if paper else ''}. Bold: the best, where it is "
        f"significantly better than the second best; *: significantly different from "
        f"{plan.baseline} (two-sided p < {LEVEL}, not corrected for the number of tests; of "
        "segmentations Wilcoxon's signed-rank test on the score of each test case averaged over "
        "the seeds; of AUROC a paired bootstrap over the test cases of the mean over the seeds)."
    )


def sizes(comparison: Comparison) -> str:
    """Sentence with the plan, its tasks' test cases and its seeds."""
    plan = comparison.plan
    tested = ", ".join(f"{name} {comparison.cases(name)}" for name in plan.tasks)
    seeds = ", ".join(map(str, plan.seeds))
    return f"Plan: {plan.title}. Test cases: {tested}. Seeds: {seeds}."


def steps_title(plan: Plan) -> str:
    """Title of the table of steps."""
    return (
        f"Steps until validation reaches the best of {plan.baseline} of the same seed (number of "
        f"seeds; -: {plan.baseline} learned nothing)"
    )


def write_tables(comparison: Comparison, out: Path) -> None:
    """Write ``results.csv`` (all runs), ``scores.csv`` (every score) and ``table.md``."""
    results, scores = [], []
    for run, result in comparison.results.items():
        names = {"method": run.method, "task": run.task, "mode": run.mode, "seed": run.seed}
        measured = result.get("scores", {})
        low, high = (
            "" if math.isnan(end) else end for end in result.get("interval", (math.nan, math.nan))
        )
        row = {**names, "mode": run.mode or "pre-training", "metric": run.metric}
        results.append(
            result | row | {"value": measured.get(run.metric, ""), "low": low, "high": high}
        )
        for name, score in sorted(measured.items()):
            scores.append({**names, "score": name, "value": score})
    columns = ("method", "task", "mode", "seed")
    measures = ("metric", "value", "low", "high", "steps", "seconds", "config", "version")
    write_csv(out / "results.csv", (*columns, *measures), results)
    write_csv(out / "scores.csv", (*columns, "score", "value"), scores)
    plan = comparison.plan
    lines = [
        *_markdown(comparison, score_cells),
        "",
        _escaped(caption(plan)),
        "",
        f"{steps_title(plan)}:",
        "",
        *_markdown(comparison, step_cells),
        "",
        _escaped(f"{sizes(comparison)} Cost of all seeds together:"),
        "",
        *_lines(["method", *BUDGET], budget(comparison)),
    ]
    write_text(out / "table.md", "\n".join(lines) + "\n")


def is_error(metric: str) -> bool:
    """Whether less is better."""
    errors = ("loss", "absolute_volume_error_mm3", "surface_distance_mm", "hd95_mm")
    return parts_of(metric)[0] in errors


def is_share(metric: str) -> bool:
    """Whether a metric lies in [0, 1] and is shown in %."""
    return parts_of(metric)[0] in ("dice", "auroc", "ap", "f1")


Results = Mapping[int, dict[str, Any]]
"""Seed -> result of the run."""


def _p(metric: str, one: Results, other: Results) -> float:
    """Significance of a difference, by the seeds that both have."""
    seeds = sorted(one.keys() & other.keys())
    cases = ([results[seed]["cases"] for seed in seeds] for results in (one, other))
    return p_value(metric, *cases)


def _gain(metric: str, results: Results, baseline: Results) -> float:
    """Mean difference of the scores, by the seeds that both have."""
    one, other = (
        [seeds[seed]["scores"].get(metric, math.nan) for seed in results.keys() & baseline.keys()]
        for seeds in (results, baseline)
    )
    return mean_defined([a - b for a, b in zip(one, other, strict=True)])


def _mean(plan: Plan) -> str:
    """The statistic of the table: one seed has no standard deviation."""
    count = len(plan.seeds)
    return f"Mean ± standard deviation over {count} seeds" if count > 1 else "Score of one seed"


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


def _learned(baseline: Mapping[str, Any], monitor: str) -> bool:
    """Whether a later validation is better than the first one."""
    sign = -1 if is_error(monitor) else 1
    scores = [sign * row[monitor] for row in baseline["validations"] if monitor in row]
    return len(scores) < 2 or max(scores) > scores[0]


def _lines(heading: Sequence[str], cells: Mapping[str, Sequence[str]]) -> list[str]:
    """A table in Markdown with a row for each method."""
    lines = [heading, ["---", *("---:" for _ in heading[1:])]]
    lines += [[_escaped(method), *row] for method, row in cells.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def _markdown(comparison: Comparison, cells: Cells) -> list[str]:
    """A table in the form of the paper's: methods, and a group of columns for each mode."""
    plan = comparison.plan
    columns = [
        f"{_escaped(mode)}<br>{_escaped(task)}" for mode in plan.modes for task in headings(plan)
    ]
    texts = {
        method: [f"{f'**{c.text}**' if c.bold else c.text}{_escaped(c.rest)}" for c in row]
        for method, row in rows(comparison, cells).items()
    }
    return _lines(["method", *columns], texts)


def _escaped(text: str) -> str:
    """Text of a cell of Markdown."""
    for sign in "\\|*_<[`":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
