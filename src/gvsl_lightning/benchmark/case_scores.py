"""What the table of a test's cases tells: intervals, and whether two methods differ."""

import csv
import math
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
"""A row of ``test_cases.csv``: texts ``name`` and ``label``, numbers where they are defined."""


def read_cases(path: Path) -> list[Case]:
    """Rows of a test's table; none if there is no table."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {
                name: cell_text(value) if name in _TEXTS else float(value)
                for name, value in row.items()
                if value or name in _TEXTS
            }
            for row in csv.DictReader(file)
        ]


def interval(metric: str, cases: Sequence[Case]) -> tuple[float, float]:
    """95 % bootstrap interval over the cases of a test's metric, such as ``test/dice_liver``.

    That of a classification is the one that its test reports.

    Returns:
        Lower and upper limit, NaN if the cases do not tell this metric.
    """
    score, structure = parts_of(metric)
    if _is_classification(cases):
        classes = _classes(cases)
        chosen = [structure] if structure else classes
        if score not in ("auroc", "ap", "f1") or not set(chosen) <= set(classes):
            return math.nan, math.nan
        probabilities, truth = (torch.from_numpy(a) for a in _predictions(cases, classes))
        if score == "f1":
            several = bool((truth.sum(dim=1) != 1).any())
            best = torch.eye(len(classes), dtype=torch.float64)[probabilities.argmax(dim=1)]
            probabilities = (probabilities > 0.5).double() if several else best
        places = [classes.index(name) for name in chosen]

        def mean_of_classes(predictions: Tensor, targets: Tensor) -> float:
            return mean_defined(
                [score_class(score, predictions[:, i], targets[:, i]) for i in places]
            )

        found = bootstrap(mean_of_classes, probabilities.float(), truth.long())
    else:
        columns = _columns(score, structure, cases)
        if not columns:
            return math.nan, math.nan
        values = torch.tensor([[case.get(name, math.nan) for name in columns] for case in cases])

        def mean_of_structures(drawn: Tensor, _: Tensor) -> float:
            return float(drawn.nanmean(dim=0).nanmean())

        found = bootstrap(mean_of_structures, values, values)
    return found.low, found.high


def parts_of(metric: str) -> tuple[str, str]:
    """``test/hd95_mm_liver`` -> score and structure, which is empty for the mean of all."""
    name = metric.partition("/")[2]
    for score in (
        "absolute_volume_error_mm3",
        "volume_error_mm3",
        "surface_distance_mm",
        "hd95_mm",
    ):
        if name == score or name.startswith(f"{score}_"):
            return score, name[len(score) + 1 :]
    score, _, structure = name.partition("_")
    return score, structure


def p_value(metric: str, one: Sequence[Sequence[Case]], other: Sequence[Sequence[Case]]) -> float:
    """Whether two methods differ on the test cases that both have in common.

    Segmentation: Wilcoxon's signed-rank test on the score of each case, averaged over the seeds.
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
        return difference_p(
            *(
                np.mean([_resampled(cases, structure) for cases in seeds], axis=0)
                for seeds in aligned
            )
        )
    means = []
    for seeds in aligned:
        scores = [[_case_score(score, structure, case) for case in cases] for cases in seeds]
        means.append(np.array([mean_defined(values) for values in zip(*scores, strict=True)]))
    return signed_rank_p(*means)


_TEXTS = ("name", "label")


def _is_classification(cases: Sequence[Case]) -> bool:
    return bool(cases) and "label" in cases[0]


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
    classes = _classes(cases)
    probabilities, truth = _predictions(cases, classes)
    chosen = [place for place, name in enumerate(classes) if structure in ("", name)]
    return resampled_auroc(probabilities[:, chosen], truth[:, chosen])
