"""Intervals and significance from the cases of tests."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import wilcoxon

from gvsl_lightning.benchmark.case_scores import interval, p_value
from plans import cases_of


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


def test_segmentation_is_wilcoxon_s_test_of_the_means_over_seeds() -> None:
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


def test_classification_is_a_paired_bootstrap() -> None:
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


def test_interval_is_that_of_the_mean_of_the_structures() -> None:
    cases = [
        {"name": "a", "dice mean": 0.3, "dice x": 0.2, "dice y": 0.4},
        {"name": "b", "dice mean": 0.8, "dice x": 0.8},
    ]
    assert interval("test/dice", cases) == pytest.approx((0.3, 0.8))
    assert interval("test/dice_x", cases) == pytest.approx((0.2, 0.8))
    assert np.isnan(interval("test/dice_z", cases)).all()


def test_interval_of_a_classification() -> None:
    labels = np.arange(6) % 2
    cases = classified(labels, labels)
    assert interval("test/auroc_yes", cases) == (1, 1)
    for metric in ("test/auroc_other", "test/loss", "test/f1"):
        assert np.isnan(interval(metric, cases)).all()


def test_cases_of_one_subject_count_once_in_a_test() -> None:
    def cases(gain: float) -> list[dict[str, Any]]:
        return [
            {"name": f"{k}", "subject": f"{k // 4}", "dice a": 0.5 + 0.01 * k + gain}
            for k in range(24)
        ]

    one, other = [cases(0.05)], [cases(0.0)]
    alone = [[[{**case, "subject": ""} for case in seed] for seed in x] for x in (one, other)]
    assert p_value("test/dice", *alone) < 0.001
    assert p_value("test/dice", one, other) == pytest.approx(2 / 2**6)
