import itertools
import math

import pytest
import torch

from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import VoCo
from gvsl_lightning.tasks.voco import overlaps


def tiny(**options: object) -> VoCo:
    torch.manual_seed(0)
    defaults = {"backbone_options": {"channels": [8, 16]}, "projection_channels": 16}
    return VoCo(**{**defaults, **options})  # type: ignore[arg-type]


def test_crops_and_shares_are_right() -> None:
    task = tiny(grid=(2, 3, 1), crops=5)
    volumes = torch.rand(2, 1, 9, 12, 8)  # the last plane of the first axis is in no base crop
    views = task.make_views(volumes, torch.Generator().manual_seed(1))
    edges = (4, 4, 8)
    assert views["bases"].shape == (2, 6, 1, *edges)
    assert views["crops"].shape == (2, 5, 1, *edges)
    for sample in range(2):
        for number, (i, j) in enumerate(itertools.product(range(2), range(3))):
            expected = volumes[sample, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            assert torch.equal(views["bases"][sample, number], expected)
        for number in range(5):
            # every voxel has a value of its own, so the share can be counted
            inside = set(views["crops"][sample, number].flatten().tolist())
            for base in range(6):
                common = inside & set(views["bases"][sample, base].flatten().tolist())
                share = len(common) / math.prod(edges)
                assert float(views["shares"][sample, number, base]) == pytest.approx(share)
    torch.testing.assert_close(views["shares"].sum(dim=2), torch.ones(2, 5))
    assert len(views["shares"].flatten(0, 1).unique(dim=0)) > 5


def test_overlap_of_one_axis_apart() -> None:
    place, corners = torch.tensor([[1, 0, 0]]), torch.tensor([[0, 0, 0], [4, 0, 0], [8, 0, 0]])
    shares = overlaps(place, corners, torch.tensor([4, 2, 2]))
    assert shares.tolist() == [[0.75, 0.25, 0.0]]


def test_losses_are_those_of_the_paper() -> None:
    task = tiny(grid=(2, 1, 1), crops=3, weight_regularization=0.5).eval()
    views = task.make_views(torch.rand(2, 1, 8, 8, 8), torch.Generator().manual_seed(0))
    vectors = [
        [task.projection_head(task.embed_standardised(cut[None]))[0] for cut in row]
        for row in torch.cat([views["bases"], views["crops"]], dim=1)
    ]

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    prediction, among = [], []
    for sample, row in enumerate(vectors):
        bases, crops = row[:2], row[2:]
        among.append(abs(cosine(*bases)))
        for number, crop in enumerate(crops):
            for index, base in enumerate(bases):
                likeness = max(cosine(crop, base), 0)
                share = float(views["shares"][sample, number, index])
                prediction.append(-math.log(max(1 - abs(share - likeness), 1e-6)))
    losses = task.compute_losses(views)
    expected = sum(prediction) / len(prediction)
    assert float(losses["prediction"]) == pytest.approx(expected, rel=1e-3)
    assert float(losses["regularization"]) == pytest.approx(sum(among) / 2, rel=1e-4)
    assert float(losses["total"]) == pytest.approx(
        float(losses["prediction"] + 0.5 * losses["regularization"])
    )


@pytest.mark.parametrize("options", [{"grid": (1, 1, 1)}, {"grid": (0, 2, 2)}, {"crops": 0}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))} "):
        tiny(**options)


def test_volume_smaller_than_the_grid() -> None:
    with pytest.raises(InputError, match="grid"):
        tiny(grid=(9, 1, 1)).views_of({"image": torch.rand(1, 1, 8, 8, 8)})
