import math

import pytest
import torch

from gvsl_lightning.tasks.spread import Spread, effective_rank, feature_std


def test_collapse_is_seen() -> None:
    for same in (torch.ones(40, 8), torch.rand(1, 8) + 1e-6 * torch.randn(40, 8)):
        assert float(feature_std(same)) < 1e-5
        assert float(effective_rank(same)) == pytest.approx(1)
    assert effective_rank(torch.full((4, 3), torch.nan)).isnan()
    spread = torch.randn(5000, 8)
    assert float(feature_std(spread)) == pytest.approx(1, abs=0.02)
    assert float(effective_rank(spread)) == pytest.approx(8, abs=0.05)
    # two directions of equal strength
    flat = torch.eye(8)[torch.arange(100) % 2] * 3 + 5 * torch.eye(8)[7]
    plane = torch.cat([flat, torch.eye(8)[torch.arange(100) % 2] * -3 + 5 * torch.eye(8)[7]])
    assert float(effective_rank(plane)) == pytest.approx(2, abs=1e-4)


def test_feature_std_is_the_mean_of_the_entries() -> None:
    vectors = torch.randn(7, 5) + 1
    directions = [vector / vector.norm() for vector in vectors]
    entries = []
    for column in range(5):
        values = [float(direction[column]) for direction in directions]
        mean = sum(values) / 7
        entries.append(math.sqrt(sum((value - mean) ** 2 for value in values) / 7))
    expected = sum(entries) / 5 * math.sqrt(5)
    assert float(feature_std(vectors)) == pytest.approx(expected, rel=1e-5)


def test_spread_is_of_all_batches_together() -> None:
    metric, vectors = Spread(feature_std), torch.randn(9, 4)
    for part in vectors.split(4):
        metric.update(part)
    assert float(metric.compute()) == pytest.approx(float(feature_std(vectors)))
    metric.reset()
    metric.update(torch.full((2, 4), torch.nan))
    assert metric.compute().isnan()
