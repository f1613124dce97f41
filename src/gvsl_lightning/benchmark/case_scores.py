"""Statistics of the test cases: intervals, and tests of the difference between two methods."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gvsl_lightning.evaluation.scores import (
    bootstrap,
    difference_p,
    mean_defined,
    resampled_auroc,
    score_class,
    signed_rank_p,
)
from gvsl_lightning.runs.files import cell_text

Case = Mapping[str, Any]
"""A row of ``test_cases.csv``: strings ``name`` and ``label``, numbers where they are defined."""


def read_cases(path: Path) -> list[Case]:
    """Rows of a test's table; none if there is no table."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {
                name: cell_text(value) if name in _STRINGS else float(value)
                for name, value in row.items()
                if value or name in _STRINGS
            }
            for row in csv.DictReader(file)
        ]


def interval(metric: str, cases: Sequence[Case]) -> tuple[float, float]:
    """95 % bootstrap interval over the subjects of a metric such as ``test/dice_liver``.

    Returns:
        Lower and upper limit; NaN for F1 and for metrics that the cases do not hold.
    """
    score, structure = parts_of(metric)
    if _is_classification(cases):
        classes = [structure] if structure else _classes(cases)
        if score not in ("auroc", "ap") or not set(classes) <= set(_classes(cases)):
            return math.nan, math.nan

        def mean_score(predictions: Tensor, targets: Tensor) -> float:
            pairs = zip(predictions.T, targets.T, strict=True)
            return mean_defined([score_class(score, *pair) for pair in pairs])

        probabilities, truth = map(torch.from_numpy, _predictions(cases, classes))
        measured = bootstrap(
            mean_score, probabilities.float(), truth.long(), subjects=_subjects(cases)
        )
    else:
        columns = _columns(score, structure, cases)
        if not columns:
            return math.nan, math.nan
        values = torch.tensor([[case.get(name, math.nan) for name in columns] for case in cases])
        measured = bootstrap(
            lambda drawn, _: float(drawn.nanmean(dim=0).nanmean()),
            values,
            values,
            subjects=_subjects(cases),
        )
    return measured.low, measured.high


def parts_of(metric: str) -> tuple[str, str]:
    """``test/hd95_mm_liver`` -> score and structure, which is empty for the mean of all."""
    ((score, structure),) = _METRIC.findall(metric.partition("/")[2])
    return score, structure


def p_value(metric: str, one: Sequence[Sequence[Case]], other: Sequence[Sequence[Case]]) -> float:
    """Significance of the difference between two methods on the test cases that both have.

    Segmentation: Wilcoxon's signed-rank test on the score of each subject, the mean over its cases
    and the seeds.
    Classification, ``auroc`` alone: a paired bootstrap over the cases of the mean over the seeds.

    Args:
        metric: of the tests.
        one: the cases of a method's test with each seed.
        other: those of the other method with the same seeds.

    Returns:
        Two-sided p; NaN where there is none.
    """
    names = [{case["name"] for case in cases} for cases in (*one, *other)]
    shared = sorted(set.intersection(*names)) if names else []
    if not shared:
        return math.nan
    score, structure = parts_of(metric)
    aligned = [
        [[by_name[name] for name in shared] for by_name in map(_by_name, seeds)]
        for seeds in (one, other)
    ]
    if any(_is_classification(cases) for seeds in aligned for cases in seeds):
        if score != "auroc":
            return math.nan
        resampled = [[_resampled(cases, structure) for cases in seeds] for seeds in aligned]
        return difference_p(*(np.mean(seeds, axis=0) for seeds in resampled))
    means = []
    for seeds in aligned:
        values: dict[str, list[float]] = {}
        for cases in seeds:
            for subject, case in zip(_subjects(cases), cases, strict=True):
                values.setdefault(subject, []).append(_case_score(score, structure, case))
        means.append(np.array([mean_defined(scores) for scores in values.values()]))
    return signed_rank_p(*means)


_STRINGS = ("name", "subject", "label")
_METRIC = re.compile(
    r"\A(absolute_volume_error_mm3|volume_error_mm3|surface_distance_mm|hd95_mm|[^_]*)(?:_(.*))?\Z",
    re.DOTALL,
)


def _is_classification(cases: Sequence[Case]) -> bool:
    return bool(cases) and "label" in cases[0]


def _subjects(cases: Sequence[Case]) -> list[str]:
    """Subject of every case; the case itself in a table without subjects."""
    return [case.get("subject") or case["name"] for case in cases]


def _by_name(cases: Sequence[Case]) -> dict[str, Case]:
    return {case["name"]: case for case in cases}


def _columns(score: str, structure: str, cases: Sequence[Case]) -> list[str]:
    names = dict.fromkeys(name for case in cases for name in case)
    if structure:
        return [name for name in names if name == f"{score} {structure}"]
    return [name for name in names if name.startswith(f"{score} ") and name != "dice mean"]


def _case_score(score: str, structure: str, case: Case) -> float:
    return mean_defined([case[name] for name in _columns(score, structure, [case])])


def _classes(cases: Sequence[Case]) -> list[str]:
    prefix = "probability "
    return [name.removeprefix(prefix) for name in cases[0] if name.startswith(prefix)]


def _predictions(
    cases: Sequence[Case], classes: Sequence[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Probabilities and truth, both (cases, classes)."""
    probabilities = [[case[f"probability {name}"] for name in classes] for case in cases]
    truth = [[name in case["label"].split(";") for name in classes] for case in cases]
    return np.array(probabilities, dtype=float), np.array(truth, dtype=float)


def _resampled(cases: Sequence[Case], structure: str) -> npt.NDArray[np.float64]:
    """Mean AUROC of the classes, or that of one, in each resample."""
    classes = [name for name in _classes(cases) if structure in ("", name)]
    return resampled_auroc(*_predictions(cases, classes))
