"""Scores of segmentations and classifiers, with their uncertainty."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.utils import get_edge_surface_distance
from rich.table import Table
from scipy import stats
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
)

Floats = npt.NDArray[np.float64]

SEGMENTATION_SCORES = (
    "dice",
    "hd95_mm",
    "surface_distance_mm",
    "volume_error_mm3",
    "absolute_volume_error_mm3",
)
"""Scores of one class in one case."""


def dice_scores(
    prediction: Tensor, label: Tensor, classes: Sequence[int], in_label: bool = False
) -> Tensor:
    """Dice of structures in batches of label maps.

    Args:
        prediction: (N, ...) integers from 0 on, such as (N, 1, D, H, W).
        label: the same shape.
        classes: label values to compare; others are ignored.
        in_label: score only the classes that the label map of the item has.

    Returns:
        (N, len(classes)) float64 in [0, 1] on the CPU; NaN for a class that neither map of the item
        has and, with ``in_label``, for every class that its label map lacks.
    """
    items, size = len(label), max(classes, default=0) + 1
    # classes above the largest wanted one share the last bin
    found, true = (maps.to(label.device).flatten(1).long() for maps in (prediction, label))
    agreed = found.where(found == true, size)

    def count(maps: Tensor) -> Tensor:
        offsets = torch.arange(items, device=maps.device)[:, None] * (size + 1)
        bins = (maps.clamp(max=size) + offsets).flatten()
        voxels = bins.bincount(minlength=items * (size + 1)).cpu().double()
        return voxels.reshape(items, size + 1)[:, list(classes)]

    labelled = count(true)
    dice = 2 * count(agreed) / (count(found) + labelled)
    return dice.masked_fill(labelled == 0, math.nan) if in_label else dice


def score_segmentation(
    prediction: Tensor, label: Tensor, spacing: Sequence[float], class_names: Sequence[str]
) -> dict[str, float]:
    """Compare a segmented volume with its label map.

    Args:
        prediction: (D, H, W) class indices.
        label: (D, H, W) class indices.
        spacing: voxel size in mm.
        class_names: name of every class, the background first, which is not scored.

    Returns:
        ``score class`` -> value: Dice in [0, 1], NaN if neither map has the class;
        :func:`surface_distances`; the volume error, positive if the prediction is too large, whose
        mean over cases shows a bias, and its absolute value.
    """
    scores: dict[str, float] = {}
    voxel = math.prod(spacing)
    dice = dice_scores(prediction[None], label[None], range(1, len(class_names)))[0].tolist()
    for index, name in enumerate(class_names[1:], start=1):
        found, true = prediction == index, label == index
        hd95, distance = surface_distances(found, true, spacing)
        error = (float(found.sum()) - float(true.sum())) * voxel
        values = (dice[index - 1], hd95, distance, error, abs(error))
        for score, value in zip(SEGMENTATION_SCORES, values, strict=True):
            scores[f"{score} {name}"] = value
    return scores


def surface_distances(
    one: Tensor, other: Tensor, spacing: Sequence[float] | np.ndarray
) -> tuple[float, float]:
    """Distances in mm between the surfaces of two masks (D, H, W), in both directions (MONAI's).

    Returns:
        The larger 95th percentile of the two directions, and the mean of both directions; NaN if a
        mask is empty.
    """
    if not (one.any() and other.any()):
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of a deprecated argument
        _, distances, _ = get_edge_surface_distance(
            one, other, spacing=[float(edge) for edge in spacing], symmetric=True
        )
    hd95 = max(float(direction.quantile(0.95)) for direction in distances)
    return hd95, float(torch.cat(distances).mean())


@dataclass(frozen=True)
class Summary:
    """Mean and spread (standard deviation, n - 1) of the defined values; NaN for too few."""

    mean: float
    spread: float
    defined: int
    undefined: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarise values; NaN is undefined."""
        defined = [value for value in values if math.isfinite(value)]
        spread = float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan
        return cls(mean_defined(values), spread, len(defined), len(values) - len(defined))


def summarise_segmentation(
    cases: Sequence[Mapping[str, float]], class_names: Sequence[str]
) -> dict[str, Summary]:
    """Summarise the scores of cases, see :func:`score_segmentation`.

    Returns:
        ``score class`` -> summary over the cases; ``score mean`` -> summary over the means of the
        classes.
    """
    summaries: dict[str, Summary] = {}
    for score in SEGMENTATION_SCORES:
        named = [f"{score} {name}" for name in class_names[1:]]
        for name in named:
            summaries[name] = Summary.of([case[name] for case in cases])
        means = Summary.of([summaries[name].mean for name in named])
        undefined = sum(summaries[name].undefined for name in named)
        defined = sum(summaries[name].defined for name in named)
        summaries[f"{score} mean"] = Summary(means.mean, means.spread, defined, undefined)
    return summaries


def segmentation_table(
    summaries: Mapping[str, Summary], class_names: Sequence[str], cases: int
) -> Table:
    """Table of a test: mean of each class over the cases, and the number of undefined cases."""
    table = Table(title=f"Test, {cases} cases, mean (cases where undefined)", title_justify="left")
    table.add_column("class")
    for score in SEGMENTATION_SCORES:
        table.add_column(score.replace("_", " "), justify="right")  # wraps in a narrow terminal
    for name in (*class_names[1:], "mean"):
        cells = [_cell(summaries[f"{score} {name}"]) for score in SEGMENTATION_SCORES]
        table.add_row(name, *cells, end_section=name == class_names[-1])
    return table


@dataclass(frozen=True)
class Interval:
    """A score with its bootstrap interval.

    Attributes:
        value: score of all cases; NaN if undefined, such as AUROC with a single class.
        low: 2.5th percentile of the resamples.
        high: 97.5th percentile.
        undefined: share of resamples with an undefined score; they are left out.
    """

    value: float
    low: float
    high: float
    undefined: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        interval = f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        undefined = f", {self.undefined:.0%} of resamples undefined" if self.undefined else ""
        return interval + undefined


def score_class(score: str, predictions: Tensor, targets: Tensor) -> float:
    """AUROC, average precision or F1 of one class against the rest (torchmetrics).

    Args:
        score: ``auroc``, ``ap`` or ``f1``.
        predictions: (cases,) probabilities, for F1 0 or 1.
        targets: (cases,) 0 or 1.

    Returns:
        In [0, 1]; NaN without a case of the class, and for AUROC without a case of the others.
    """
    positive = int(targets.sum())
    if positive == 0 or (score == "auroc" and positive == len(targets)):
        return math.nan
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "auroc": binary_auroc,
        "ap": binary_average_precision,
        "f1": binary_f1_score,
    }
    return float(functions[score](predictions, targets.long()))


def mean_defined(values: Sequence[float]) -> float:
    """Mean of the numbers that are not NaN; NaN if there are none."""
    defined = [value for value in values if math.isfinite(value)]
    return sum(defined) / len(defined) if defined else math.nan


def bootstrap(
    score: Callable[[Tensor, Tensor], float],
    predictions: Tensor,
    targets: Tensor,
    resamples: int = 1000,
    seed: int = 0,
    subjects: Sequence[str] | None = None,
) -> Interval:
    """95 % interval of a score by resampling the cases with replacement (percentile bootstrap).

    ``score`` is a function of predictions (cases, ...) and targets (cases, ...), NaN if undefined.
    With the subject of every case, subjects are resampled, each with all of its cases.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = _cases_by_subject(len(targets) if subjects is None else subjects)
    values = []
    for _ in range(resamples):
        chosen = torch.randint(len(cases), (len(cases),), generator=generator).tolist()
        drawn = torch.cat([cases[subject] for subject in chosen])
        values.append(score(predictions[drawn], targets[drawn]))
    defined = [value for value in values if math.isfinite(value)]
    low, high = np.percentile(defined, (2.5, 97.5)) if defined else (math.nan, math.nan)
    undefined = 1 - len(defined) / resamples
    return Interval(score(predictions, targets), float(low), float(high), undefined)


def _cases_by_subject(subjects: int | Sequence[str]) -> list[Tensor]:
    """Indices of the cases of each subject; of a number of subjects with one case each."""
    if isinstance(subjects, int):
        return list(torch.arange(subjects)[:, None])
    members: dict[str, list[int]] = {}
    for case, subject in enumerate(subjects):
        members.setdefault(subject, []).append(case)
    return [torch.tensor(cases) for cases in members.values()]


def signed_rank_p(one: Floats, other: Floats) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on paired scores (cases,), NaN where undefined.

    Returns:
        p; 1 if no pair differs, or if ranks and mean disagree about the better one; NaN if no pair
        is defined.
    """
    differences = _defined(one - other)
    if not len(differences):
        return math.nan
    if not differences.any():
        return 1.0
    ranked_higher = stats.wilcoxon(differences, alternative="greater").pvalue < 0.5
    agree = ranked_higher == (differences.mean() > 0)
    return float(stats.wilcoxon(differences).pvalue) if agree else 1.0


def resampled_auroc(
    predictions: Floats, truth: Floats, resamples: int = 2000, seed: int = 0
) -> Floats:
    """Mean AUROC of the classes in resamples of the cases with replacement.

    Args:
        predictions: (cases, classes) probabilities.
        truth: (cases, classes) 0 or 1.
        resamples: number of resamples.
        seed: the same seed and number of cases give the same resamples.

    Returns:
        (resamples,) means over the classes that have positive and negative cases; NaN if none has.
    """
    count = len(truth)
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    aurocs = []
    for scores, positive in zip(predictions.T, truth.T, strict=True):
        # AUROC from the rank sum of the positive cases (Mann and Whitney's U)
        positives = positive[drawn].sum(axis=1)
        ranks = (stats.rankdata(scores[drawn], axis=1) * positive[drawn]).sum(axis=1)
        pairs = positives * (count - positives)
        with np.errstate(invalid="ignore", divide="ignore"):
            aurocs.append((ranks - positives * (positives + 1) / 2) / pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no class is defined
        means: Floats = np.nanmean(aurocs, axis=0)
    return means


def difference_p(one: Floats, other: Floats) -> float:
    """Two-sided p of a paired bootstrap, from the share of resampled differences of each sign.

    Takes the scores of the same resamples, NaN where undefined. Returns at least
    2 / (resamples + 1); NaN if no resample is defined.
    """
    differences = _defined(one - other)
    if not len(differences):
        return math.nan
    fewer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (fewer + 1) / (len(differences) + 1)))


def _defined(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _cell(summary: Summary) -> str:
    if summary.defined == 0:
        return "undefined"
    digits = 3 if abs(summary.mean) < 100 else 0
    mean = f"{summary.mean:.{digits}f}"
    return f"{mean} ({summary.undefined})" if summary.undefined else mean
