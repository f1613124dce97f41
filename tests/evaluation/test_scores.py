"""Scores of segmentations and classifiers against slow references and other libraries."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice
from scipy.stats import rankdata, wilcoxon
from torch import Tensor

from gvsl_lightning.evaluation.scores import (
    SEGMENTATION_SCORES,
    Summary,
    bootstrap,
    dice_scores,
    difference_p,
    mean_defined,
    resampled_auroc,
    score_class,
    score_segmentation,
    segmentation_table,
    signed_rank_p,
    summarise_segmentation,
)

NAMES = ["background", "a", "b"]


def box(*edges: tuple[int, int], value: int = 1, shape: tuple[int, int, int] = (20, 20, 20)):
    volume = torch.zeros(shape, dtype=torch.uint8)
    volume[tuple(slice(*edge) for edge in edges)] = value
    return volume


def surface(mask: Tensor, spacing: tuple[float, float, float]) -> np.ndarray:
    """Points in mm of the voxels with a face towards the outside."""
    padded = torch.nn.functional.pad(mask, (1,) * 6)
    inner = torch.ones_like(mask)
    for axis, step in product(range(3), (-1, 1)):
        inner &= padded.roll(step, dims=axis)[1:-1, 1:-1, 1:-1]
    return (mask & ~inner).nonzero().numpy() * np.array(spacing)


class TestDice:
    @pytest.fixture
    def maps(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(5, (2, 3, 1, 6, 5, 4), generator=generator)

    def test_equals_monai(self, maps):
        hot = [torch.nn.functional.one_hot(x[:, 0], 5).movedim(-1, 1) for x in maps]
        expected = compute_dice(*hot, include_background=True).double()
        torch.testing.assert_close(dice_scores(*maps, range(5)), expected)
        torch.testing.assert_close(dice_scores(*maps.to(torch.uint8), (3, 1)), expected[:, [3, 1]])

    def test_values_far_apart_and_above_the_wanted_ones(self, maps):
        spread = torch.tensor([0, 2000, 7, 41, 2035])[maps]
        expected = dice_scores(*maps, (2, 1))
        torch.testing.assert_close(dice_scores(*spread, (7, 2000)), expected)
        torch.testing.assert_close(dice_scores(*spread, (7,)), expected[:, :1])

    def test_absent_classes(self):
        label = torch.tensor([[0, 1, 1, 0], [2, 2, 2, 2]])
        prediction = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]])
        nan, found = math.nan, dice_scores(prediction, label, (1, 2, 3))
        torch.testing.assert_close(
            found.float(), torch.tensor([[2 / 3, 0, nan], [nan, 0, nan]]), equal_nan=True
        )
        in_label = dice_scores(prediction, label, (1, 2, 3), in_label=True)
        torch.testing.assert_close(
            in_label.float(), torch.tensor([[2 / 3, nan, nan], [nan, 0, nan]]), equal_nan=True
        )
        assert dice_scores(prediction, label, ()).shape == (2, 0)


def test_scores_against_a_slow_reference():
    spacing = (0.8, 1.5, 2.0)
    one = box((3, 9), (4, 12), (5, 15)) + box((12, 20), (0, 6), (0, 9), value=2)  # at the border
    other = box((4, 10), (4, 11), (5, 16)) + box((11, 17), (4, 8), (3, 9), value=2)
    scores = score_segmentation(one, other, spacing, NAMES)
    for index, name in ((1, "a"), (2, "b")):
        found, true = one == index, other == index
        both = int((found & true).sum())
        assert scores[f"dice {name}"] == pytest.approx(2 * both / int(found.sum() + true.sum()))
        volume = int(found.sum()) - int(true.sum())
        assert scores[f"volume_error_mm3 {name}"] == pytest.approx(volume * 0.8 * 1.5 * 2.0)
        absolute = scores[f"absolute_volume_error_mm3 {name}"]
        assert absolute == pytest.approx(abs(volume) * 0.8 * 1.5 * 2.0)
        first, second = surface(found, spacing), surface(true, spacing)
        distances = np.linalg.norm(first[:, None] - second[None], axis=2)
        there, back = distances.min(axis=1), distances.min(axis=0)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        assert scores[f"hd95_mm {name}"] == pytest.approx(hd95, rel=1e-5)
        mean = (there.sum() + back.sum()) / (len(there) + len(back))
        assert scores[f"surface_distance_mm {name}"] == pytest.approx(mean, rel=1e-5)


def test_undefined_scores_are_nan_and_an_invented_structure_is_dice_zero():
    label = box((2, 5), (2, 5), (2, 5))
    scores = score_segmentation(box((9, 12), (9, 12), (9, 12), value=2), label, (1, 1, 1), NAMES)
    assert scores["dice a"] == scores["dice b"] == 0
    assert math.isnan(scores["hd95_mm a"])
    assert math.isnan(scores["surface_distance_mm b"])
    assert (scores["volume_error_mm3 a"], scores["volume_error_mm3 b"]) == (-27, 27)
    scores = score_segmentation(label, label, (1, 1, 1), NAMES)
    assert (scores["dice a"], scores["hd95_mm a"]) == (1, 0)
    assert math.isnan(scores["dice b"])


def test_summary_counts_what_is_undefined():
    summary = Summary.of([1.0, math.nan, 3.0, math.inf])
    assert (summary.mean, summary.defined, summary.undefined) == (2.0, 2, 2)
    assert summary.spread == pytest.approx(math.sqrt(2))
    assert math.isnan(Summary.of([math.nan]).mean)


def test_mean_over_the_classes_weighs_them_equally():
    cases = []
    for dice_a, dice_b in ((0.2, 0.8), (0.4, math.nan)):
        case = {f"{score} {name}": 0.0 for name in NAMES[1:] for score in SEGMENTATION_SCORES}
        cases.append({**case, "dice a": dice_a, "dice b": dice_b})
    summaries = summarise_segmentation(cases, NAMES)
    assert summaries["dice a"].mean == pytest.approx(0.3)
    assert summaries["dice b"].mean == pytest.approx(0.8)
    assert summaries["dice mean"].mean == pytest.approx(0.55)
    assert (summaries["dice mean"].defined, summaries["dice mean"].undefined) == (3, 1)


def test_the_table_has_a_column_for_every_score():
    label = box((2, 5), (2, 5), (2, 5))
    cases = [score_segmentation(label, label, (1, 1, 1), NAMES)] * 2
    table = segmentation_table(summarise_segmentation(cases, NAMES), NAMES, 2)
    headers = [str(column.header).replace(" ", "_") for column in table.columns]
    assert headers == ["class", *SEGMENTATION_SCORES]
    row = [next(iter(column.cells)) for column in table.columns]
    assert row == ["a", "1.000", *["0.000"] * 4]


def test_scores_of_a_class():
    predictions, targets = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert score_class("auroc", predictions, targets) == pytest.approx(0.75)
    assert score_class("ap", predictions, targets) == pytest.approx(0.8333, abs=1e-4)
    found = (predictions > 0.3).float()
    assert score_class("f1", found, targets) == pytest.approx(0.8)
    for score in ("auroc", "ap", "f1"):
        assert math.isnan(score_class(score, predictions, torch.zeros(4)))
    assert math.isnan(score_class("auroc", predictions, torch.ones(4)))


class TestBootstrap:
    def test_subjects_are_resampled_with_all_of_their_cases(self):
        values = torch.randn(40, 1).repeat_interleave(5, dim=0)  # five equal cases of each subject
        subjects = [str(case // 5) for case in range(200)]
        options = {"predictions": values, "targets": values, "resamples": 400}
        grouped = bootstrap(lambda drawn, _: float(drawn.mean()), **options, subjects=subjects)
        single = bootstrap(lambda drawn, _: float(drawn.mean()), **options)
        ratio = (grouped.high - grouped.low) / (single.high - single.low)
        assert ratio == pytest.approx(5**0.5, rel=0.2)

    def test_interval_of_a_mean_is_the_normal_one(self):
        values = torch.randn(400, generator=torch.Generator().manual_seed(1))
        interval = bootstrap(lambda p, t: float(p.mean()), values, values, resamples=2000)
        half = 1.96 * float(values.std()) / 20
        assert interval.value == pytest.approx(float(values.mean()), abs=1e-6)
        assert interval.low == pytest.approx(interval.value - half, abs=0.015)
        assert interval.high == pytest.approx(interval.value + half, abs=0.015)
        assert interval.undefined == 0

    def test_cases_are_drawn_with_their_own_targets(self):
        values = torch.rand(30)
        interval = bootstrap(lambda p, t: float((p - t).abs().max()), values, values, 50)
        assert (interval.low, interval.high) == (0, 0)

    def test_undefined_resamples_are_counted(self):
        predictions, targets = torch.rand(3), torch.tensor([0, 0, 1])
        interval = bootstrap(lambda p, t: score_class("auroc", p, t), predictions, targets, 500)
        # all three draws from one kind: (2/3)^3 + (1/3)^3
        assert interval.undefined == pytest.approx(1 / 3, abs=0.07)
        assert "resamples undefined" in str(interval)
        nothing = bootstrap(lambda p, t: math.nan, predictions, targets, 5)
        assert str(nothing) == "undefined"


class TestDifferences:
    def test_signed_ranks_by_all_sign_flips(self):
        random = np.random.default_rng(3)
        one, other = random.random((2, 9))
        ranks = rankdata(np.abs(one - other))
        found = ranks[one > other].sum()
        middle = ranks.sum() / 2
        sums = [ranks[np.array(signs)].sum() for signs in product([False, True], repeat=9)]
        extreme = [abs(value - middle) >= abs(found - middle) - 1e-9 for value in sums]
        assert signed_rank_p(one, other) == pytest.approx(np.mean(extreme))

    def test_ranks_and_mean_must_agree(self):
        random = np.random.default_rng(0)
        one = random.random(20)
        other = one + 0.01 + 0.001 * random.random(20)  # better in nearly every case
        assert signed_rank_p(one, other) < 0.001
        other[:2] -= 0.6  # and worse in the mean
        assert wilcoxon(one - other).pvalue < 0.05
        assert signed_rank_p(one, other) == signed_rank_p(other, one) == 1

    def test_undefined_pairs_are_left_out(self):
        one, other = np.array([0.1, 0.2, 0.3, math.nan]), np.array([0.2, 0.4, 0.6, 0.1])
        assert signed_rank_p(one, other) == signed_rank_p(one[:3], other[:3])
        assert signed_rank_p(other[:3], other[:3]) == 1
        assert math.isnan(signed_rank_p(one[3:], other[3:]))

    def test_resampled_auroc_is_that_of_the_drawn_cases(self):
        random = np.random.default_rng(0)
        predictions, truth = random.random((25, 3)).round(1), np.eye(3)[np.arange(25) % 3]
        found = resampled_auroc(predictions, truth, resamples=20, seed=4)
        drawn = np.random.default_rng(4).integers(25, size=(20, 25))
        for value, places in zip(found, drawn, strict=True):
            slow = [
                score_class("auroc", *torch.tensor(np.stack((predictions, truth)))[:, places, i])
                for i in range(3)
            ]
            assert value == pytest.approx(mean_defined(slow), abs=1e-5)
        lone = resampled_auroc(predictions[:1], truth[:1], resamples=3)
        assert np.isnan(lone).all()

    def test_a_paired_bootstrap_is_right_as_often_as_it_says(self):
        random = np.random.default_rng(1)
        truth = np.eye(2)[np.arange(60) % 2]
        p = []
        for _ in range(60):
            pair = (random.random((60, 2)) for _ in range(2))
            p.append(difference_p(*(resampled_auroc(one, truth, 200) for one in pair)))
        assert 0.35 < np.mean(p) < 0.65
        assert np.mean(np.array(p) < 0.1) < 0.25
        assert difference_p(np.ones(99), np.zeros(99)) == pytest.approx(2 / 100)
