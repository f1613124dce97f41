"""Tables of a comparison: scores, gains, marks and steps."""

import csv
from pathlib import Path

import numpy as np
import pytest

from gvsl_lightning.benchmark.comparison import (
    Comparison,
    is_error,
    printed_tables,
    score_cells,
    step_cells,
    write_tables,
)
from gvsl_lightning.benchmark.paper import paper_score
from gvsl_lightning.benchmark.plan import Plan
from plans import TASK, finish, write


def finished(tmp_path: Path, scores: dict[str, list[list[float]]]) -> Comparison:
    """Comparison in one mode of methods with scores of two seeds."""
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


def test_scores_gains_marks_and_the_paper(tmp_path: Path) -> None:
    base = np.linspace(0.2, 0.4, 12)
    worse, better = base - 0.1, base + np.linspace(0.2, 0.3, 12)
    comparison = finished(
        tmp_path,
        {
            "Scratch": [base.tolist(), (base + 0.02).tolist()],
            "GVSL": [better.tolist(), better.tolist()],
            "own": [worse.tolist(), worse.tolist()],
        },
    )
    assert score_cells(comparison, "hearts", "linear") == {
        "Scratch": ("31.0 ± 1.4", False, " [21.9]"),
        "GVSL": ("55.0 ± 0.0", True, "* (+24.0) [68.4]"),
        "own": ("20.0 ± 0.0", False, "* (-11.0)"),
    }
    write_tables(comparison, tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["| method | linear<br>hearts (dice %) |", "| --- | ---: |"]
    assert lines[3] == r"| GVSL | **55.0 ± 0.0**\* (+24.0) \[68.4] |"
    assert any("Wilcoxon" in line and "p \\< 0.05" in line for line in lines)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    row = next(row for row in rows if (row["method"], row["seed"]) == ("GVSL", "1"))
    assert float(row["value"]) == pytest.approx(better.mean())
    assert float(row["low"]) < better.mean() < float(row["high"])
    assert (row["metric"], row["steps"], row["seconds"]) == ("test/dice", "20", "60.0")
    assert len(row["config"]) == 12
    assert sum(1 for _ in (tmp_path / "scores.csv").open()) == 7


def test_the_best_is_bold_only_if_it_is_significantly_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    base = random.random(12)
    noisy = base + 0.3 * random.standard_normal(12)
    noisy += base.mean() + 0.001 - noisy.mean()
    comparison = finished(tmp_path, {"Scratch": [base.tolist()] * 2, "GVSL": [noisy.tolist()] * 2})
    scratch, gvsl = score_cells(comparison, "hearts", "linear").values()
    assert float(gvsl.text.split()[0]) > float(scratch.text.split()[0])
    assert not gvsl.bold
    assert not gvsl.rest.startswith("*")


def test_methods_are_compared_by_the_seeds_that_both_have(tmp_path: Path) -> None:
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


def test_steps_to_the_baseline_s_best(tmp_path: Path) -> None:
    comparison = finished(tmp_path, {"Scratch": [[0.5]] * 2, "GVSL": [[0.5]] * 2})
    curves = {
        ("Scratch", 0): (0.1, 0.5, 0.4),
        ("Scratch", 1): (0.3, 0.2, 0.6),
        ("GVSL", 0): (0.5, 0.6, 0.6),
        ("GVSL", 1): (0.1, 0.2, 0.3),
    }
    for run in comparison.results:
        finish(run, [0.5], curves[run.method, run.seed])
    comparison = Comparison(comparison.plan, list(comparison.results))
    cells = step_cells(comparison, "hearts", "linear").values()
    assert [cell.text for cell in cells] == ["25 ± 7 (2)", "10 (1), 1 never"]
    assert len(printed_tables(comparison)) == 2


def test_less_is_better_of_losses_and_distances_alone() -> None:
    less = {"val/loss", "val/loss_dice", "test/hd95_mm", "test/surface_distance_mm_loss"}
    more = {"val/dice", "test/dice_distance", "test/auroc", "val/ncc_after"}
    assert {metric for metric in less | more if is_error(metric)} == less


def test_the_paper_s_table() -> None:
    assert paper_score("gvsl", "SBM", linear=True) == 79.9
    assert paper_score("without affine head", "SAC", linear=False) == 82.3
    assert paper_score("Models Genesis", "CCC", linear=False) == 80.7
    assert paper_score("ours", "SHC", linear=True) is None
