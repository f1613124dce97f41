from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from nibabel.nifti1 import Nifti1Image
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms import (
    Corruptd,
    Corruption,
    GenesisCorruption,
    InPainting,
    LocalShuffling,
    NonLinearIntensity,
    OutPainting,
)
from gvsl_lightning.transforms.corruption import bezier, box_union


def _corruptions(rate: float) -> dict[str, nn.Module]:
    return {
        "shuffling": LocalShuffling(rate),
        "nonlinear": NonLinearIntensity(rate),
        "inpainting": InPainting(rate),
        "outpainting": OutPainting(rate),
        "all": Corruption(shuffling_rate=rate, nonlinear_rate=rate, inpainting_rate=rate),
        "genesis": GenesisCorruption(rate, rate, rate),
    }


CERTAIN, NEVER = _corruptions(1.0), _corruptions(0.0)


def _seeded_generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _changed(corrupted: Tensor, volumes: Tensor) -> Tensor:
    return (corrupted != volumes).float().mean((1, 2, 3, 4))


@pytest.mark.parametrize("corruption", CERTAIN.values(), ids=CERTAIN.keys())
class TestEveryCorruption:
    def test_generator_or_global_seed_reproduces(self, corruption: nn.Module) -> None:
        volumes = torch.rand(2, 1, 20, 24, 22)
        first = corruption(volumes, _seeded_generator())
        torch.manual_seed(99)
        assert torch.equal(corruption(volumes, _seeded_generator()), first)
        assert not torch.equal(corruption(volumes, _seeded_generator(4)), first)
        torch.manual_seed(5)
        first = corruption(volumes)
        torch.manual_seed(5)
        assert torch.equal(corruption(volumes), first)

    def test_samples_of_a_batch_differ(self, corruption: nn.Module) -> None:
        corrupted = corruption(torch.rand(1, 1, 20, 24, 22).repeat(4, 1, 1, 1, 1))
        assert len(corrupted.flatten(1).unique(dim=0)) == 4

    def test_input_is_untouched_and_every_sample_changes(self, corruption: nn.Module) -> None:
        volumes = torch.rand(6, 1, 20, 24, 22)
        original = volumes.clone()
        corrupted = corruption(volumes)
        assert torch.equal(volumes, original)
        assert (_changed(corrupted, volumes) > 0).all()
        assert corrupted.shape == volumes.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_keeps_the_type(self, corruption: nn.Module, dtype: torch.dtype) -> None:
        volumes = torch.rand(1, 2, 12, 10, 14).to(dtype)
        assert corruption(volumes).dtype == dtype

    def test_autocast_and_layout_in_memory_do_not_matter(self, corruption: nn.Module) -> None:
        volumes = torch.rand(2, 3, 20, 24, 22)
        expected = corruption(volumes, _seeded_generator())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(corruption(volumes, _seeded_generator()), expected)
        last = volumes.contiguous(memory_format=torch.channels_last_3d)
        assert torch.equal(corruption(last, _seeded_generator()), expected)

    def test_tiny_and_thin_volumes(self, corruption: nn.Module) -> None:
        for shape in ((3, 4, 3), (1, 16, 16), (64, 9, 5)):
            volumes = torch.rand(2, 1, *shape)
            assert corruption(volumes).shape == volumes.shape

    def test_wrong_input_is_named(self, corruption: nn.Module) -> None:
        with pytest.raises(InputError, match=r"\(1, 8, 8, 8\)"):
            corruption(torch.rand(1, 8, 8, 8))
        with pytest.raises(InputError, match="int64"):
            corruption(torch.ones(1, 1, 8, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("corruption", NEVER.values(), ids=NEVER.keys())
def test_rate_zero_is_an_independent_copy(corruption: nn.Module) -> None:
    volumes = torch.rand(3, 1, 20, 24, 22)
    corrupted = corruption(volumes)
    assert torch.equal(corrupted, volumes)
    assert corrupted.data_ptr() != volumes.data_ptr()


@pytest.mark.parametrize("kind", [LocalShuffling, NonLinearIntensity, InPainting])
def test_rate_is_the_share_of_changed_samples(kind: type[nn.Module]) -> None:
    volumes = torch.rand(800, 1, 8, 8, 8)
    share = (_changed(kind(rate=0.3)(volumes), volumes) > 0).float().mean()
    assert share == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LocalShuffling, {"rate": 1.1}),
        (LocalShuffling, {"density": 0.0}),
        (LocalShuffling, {"edge": 0.0}),
        (LocalShuffling, {"edge": 2.0}),
        (InPainting, {"boxes": 0}),
        (InPainting, {"stop": -0.1}),
        (InPainting, {"largest": 0.05}),
        (InPainting, {"smallest": 0.0}),
        (InPainting, {"rate": 2.0}),
    ],
)
def test_impossible_options_are_named(kind: type[nn.Module], options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        kind(**options)


class TestLocalShuffling:
    def test_keeps_the_multiset_of_values(self) -> None:
        volumes = torch.rand(2, 1, 30, 26, 28)
        shuffled = CERTAIN["shuffling"](volumes)
        assert torch.equal(shuffled.flatten(1).sort().values, volumes.flatten(1).sort().values)
        assert (_changed(shuffled, volumes) > 0.2).all()

    def test_no_voxel_leaves_its_box(self) -> None:
        shape = (60, 44, 80)  # edges 3, 2, 4
        grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        moved = LocalShuffling(rate=1.0, density=3.0)(grid.unsqueeze(0).float())[0]
        distance = (moved - grid).abs().flatten(1).amax(1)
        assert distance.tolist() == [2, 1, 3]

    def test_channels_move_together(self) -> None:
        steps = torch.arange(3).view(3, 1, 1, 1)
        volumes = torch.rand(2, 1, 24, 24, 24).repeat(1, 3, 1, 1, 1) + steps
        shuffled = CERTAIN["shuffling"](volumes) - steps
        torch.testing.assert_close(shuffled[:, :1].expand(-1, 3, -1, -1, -1), shuffled)

    def test_permutes_uniformly_within_the_box(self) -> None:
        # one box as large as the volume: each voxel is read from each place equally often
        volumes = torch.arange(8.0).view(1, 1, 2, 2, 2).expand(4000, -1, -1, -1, -1)
        read = LocalShuffling(rate=1.0, density=1.0, edge=1.0)(volumes).flatten(1).long()
        counts = torch.stack([(read == value).float().mean(0) for value in range(8)])
        assert counts.sub(1 / 8).abs().max() < 0.03
        assert read.sort(1).values.eq(torch.arange(8)).all()

    def test_later_box_owns_the_overlap(self) -> None:
        # many boxes over few voxels: nothing may be lost or doubled
        volumes = torch.rand(50, 2, 5, 6, 7)
        shuffled = LocalShuffling(rate=1.0, density=40.0, edge=0.5)(volumes)
        assert torch.equal(shuffled.flatten(2).sort().values, volumes.flatten(2).sort().values)

    def test_more_boxes_change_more(self) -> None:
        volumes = torch.rand(2, 1, 40, 40, 40)
        shares = [
            _changed(LocalShuffling(1.0, density)(volumes), volumes).mean()
            for density in (0.1, 0.5, 2.0)
        ]
        assert all(low * 1.5 < high for low, high in pairwise(shares))

    def test_share_hardly_depends_on_the_size(self) -> None:
        shares = []
        for shape in ((32, 32, 32), (48, 64, 48), (64, 64, 64)):
            volumes = torch.rand(1, 1, *shape)
            shares.append(_changed(CERTAIN["shuffling"](volumes), volumes).item())
        assert max(shares) < 1.25 * min(shares)


class TestNonLinearIntensity:
    def test_bezier_matches_a_loop_over_the_definition(self) -> None:
        points, volumes = torch.rand(20, 2, 2), torch.rand(20, 1, 3, 4, 5)
        mapped = bezier(volumes, points)
        for point, volume, result in zip(points.double().numpy(), volumes, mapped, strict=True):
            expected = [_bezier_by_bisection(value, point) for value in volume.flatten().tolist()]
            assert result.flatten().tolist() == pytest.approx(expected, abs=1e-3)

    def test_bezier_with_known_answers(self) -> None:
        line = torch.linspace(0, 1, 101).view(1, -1)
        identity = torch.tensor([[[1 / 3, 1 / 3], [2 / 3, 2 / 3]]])
        torch.testing.assert_close(bezier(line, identity), line, atol=1e-6, rtol=0)
        # x(t) = t and y(t) = t**3
        cubic = torch.tensor([[[1 / 3, 0.0], [2 / 3, 0.0]]])
        torch.testing.assert_close(bezier(line, cubic), line**3, atol=1e-5, rtol=0)

    def test_bezier_increases_between_fixed_ends(self) -> None:
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 2, 2)
        points = torch.cat([torch.rand(200, 2, 2), corners])
        line = torch.linspace(0, 1, 5001).expand(len(points), -1)
        mapped = bezier(line, points)
        assert (mapped.diff(dim=1) >= -1e-6).all()
        assert (mapped[:, 0] == 0).all()
        assert (mapped[:, -1] == 1).all()

    def test_padding_stays_zero_and_order_stays(self) -> None:
        volumes = torch.rand(8, 1, 12, 12, 12)
        volumes[:, :, :4] = 0
        mapped = CERTAIN["nonlinear"](volumes)
        assert (mapped[:, :, :4] == 0).all()
        order = volumes.flatten(1).argsort(dim=1, stable=True)
        assert (mapped.flatten(1).gather(1, order).diff(dim=1) >= -1e-6).all()

    def test_channels_share_the_curve(self) -> None:
        volumes = torch.rand(3, 1, 10, 10, 10).repeat(1, 2, 1, 1, 1)
        mapped = CERTAIN["nonlinear"](volumes)
        assert torch.equal(mapped[:, 0], mapped[:, 1])

    def test_values_outside_become_the_ends(self) -> None:
        volumes = torch.tensor([-0.5, 1.5]).view(1, 1, 1, 1, 2)
        assert CERTAIN["nonlinear"](volumes).flatten().tolist() == [0, 1]

    def test_decreasing_curves_run_from_one_to_zero(self) -> None:
        ramp = torch.linspace(0, 1, 27).view(1, 1, 3, 3, 3).expand(100, -1, -1, -1, -1)
        mapped = NonLinearIntensity(1.0, decreasing=0.3)(ramp, _seeded_generator()).flatten(1)
        falling = mapped[:, 0] > mapped[:, -1]
        assert float(falling.float().mean()) == pytest.approx(0.3, abs=0.12)
        assert bool((mapped[falling].diff(dim=1) <= 1e-6).all())
        assert bool((mapped[~falling].diff(dim=1) >= -1e-6).all())
        ends = mapped[falling][:, [0, -1]]
        torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0]]).expand_as(ends))


class TestInPainting:
    def test_box_union_matches_a_loop(self) -> None:
        shape = (9, 12, 7)
        corners = torch.randint(0, 7, (4, 5, 3))
        edges = torch.randint(0, 5, (4, 5, 3))
        expected = np.zeros((4, *shape), dtype=bool)
        for n in range(4):
            for k in range(5):
                (z, y, x), (d, h, w) = corners[n, k].tolist(), edges[n, k].tolist()
                expected[n, z : z + d, y : y + h, x : x + w] |= d * h * w > 0
        assert 0.05 < expected.mean() < 0.95
        assert np.array_equal(box_union(shape, corners, edges).numpy(), expected)

    def test_one_box_has_an_edge_in_the_stated_range(self) -> None:
        volumes = torch.full((400, 1, 30, 20, 50), 2.0)
        painted = InPainting(boxes=1)(volumes)[:, 0] != 2
        for axis, (size, others) in enumerate(
            zip((30, 20, 50), ((2, 3), (1, 3), (1, 2)), strict=True)
        ):
            along = painted.any(others[1]).any(others[0])
            edges = along.sum(1)
            assert edges.min() == size // 10, axis
            assert edges.max() == size // 5 - 1, axis
            first = along.float().argmax(1)
            assert first.min() == 0
            assert (first + edges).max() == size
        inside = painted.flatten(1).sum(1)
        boxes = torch.stack([painted.any(b).any(a).sum(1) for a, b in ((2, 3), (1, 3), (1, 2))])
        assert torch.equal(inside, boxes.prod(0))

    def test_number_of_boxes_follows_the_stopping_rule(self) -> None:
        painting = InPainting(stop=0.05, boxes=30)
        _, edges = painting._boxes(torch.empty(20000, 1, 20, 20, 20), None)
        drawn = edges.prod(2) > 0
        number = drawn.sum(1)
        assert torch.equal(drawn, torch.arange(30) < number.unsqueeze(1))
        assert number.min() == 1
        assert number.max() == 30
        expected = sum(0.95**k for k in range(30))
        assert number.float().mean() == pytest.approx(expected, rel=0.02)

    def test_noise_is_uniform_and_each_channel_has_its_own(self) -> None:
        volumes = torch.full((30, 2, 40, 40, 40), 2.0)
        painted = InPainting(stop=0.0)(volumes)
        inside = painted != 2
        assert torch.equal(inside[:, 0], inside[:, 1])
        noise = painted[inside]
        assert noise.mean() == pytest.approx(0.5, abs=0.01)
        assert noise.std() == pytest.approx(12**-0.5, abs=0.01)
        both = painted.transpose(0, 1).flatten(1)[:, inside[:, 0].flatten()]
        assert torch.corrcoef(both)[0, 1].abs() < 0.02


class TestCorruption:
    def test_is_shuffling_then_curve_then_painting(self) -> None:
        volumes = torch.rand(3, 1, 24, 24, 24)
        generator = _seeded_generator()
        expected = volumes
        for part in (LocalShuffling(), NonLinearIntensity(), InPainting()):
            expected = part(expected, generator)
        assert torch.equal(Corruption()(volumes, _seeded_generator()), expected)

    def test_options_reach_their_part(self) -> None:
        volumes = torch.rand(2, 1, 24, 24, 24)
        size = {"inpainting_smallest": 0.5, "inpainting_largest": 0.5}
        half = Corruption(
            shuffling_rate=0.0, nonlinear_rate=0.0, inpainting_boxes=9, inpainting_stop=1.0, **size
        )
        torch.testing.assert_close(_changed(half(volumes), volumes), torch.full((2,), 0.125))
        only_shuffled = Corruption(
            shuffling_density=0.01, shuffling_edge=0.5, nonlinear_rate=0.0, inpainting_rate=0.0
        )
        shuffled = only_shuffled(volumes)
        assert torch.equal(shuffled.flatten(1).sort().values, volumes.flatten(1).sort().values)

    @pytest.mark.parametrize(
        ("corruption", "mean", "spread"),
        [
            (LocalShuffling(), 0.087, 0.040),
            (NonLinearIntensity(), 0.219, 0.060),
            (InPainting(), 0.035, 0.024),
            (Corruption(), 0.234, 0.059),
        ],
        ids=["shuffling", "nonlinear", "inpainting", "all"],
    )
    def test_changes_as_many_voxels_as_the_released_code(
        self, data_root: Path, corruption: nn.Module, mean: float, spread: float
    ) -> None:
        # the released code at its default rates over 200 draws, whose own spread is known to 15 %
        batch = _padded_hippocampus(data_root).repeat(4, 1, 1, 1, 1)
        changed = torch.cat([_changed(corruption(batch), batch) for _ in range(25)])
        assert changed.mean() == pytest.approx(mean, rel=0.15)
        assert changed.std() == pytest.approx(spread, rel=0.4)


def test_outpainting_keeps_boxes_and_replaces_the_rest_by_noise() -> None:
    volumes = torch.full((50, 1, 21, 28, 14), 2.0)
    painted = OutPainting(boxes=1)(volumes, _seeded_generator())
    for one in painted:
        kept = (one[0] == 2).nonzero()
        edges = (kept.amax(dim=0) - kept.amin(dim=0) + 1).tolist()
        assert len(kept) == edges[0] * edges[1] * edges[2]
        for edge, size in zip(edges, (21, 28, 14), strict=True):
            assert 3 * size // 7 <= edge <= max(3 * size // 7, 4 * size // 7 - 1)
        noise = one[one != 2]
        assert float(noise.min()) < 0.01
        assert float(noise.max()) > 0.99
        assert float(noise.mean()) == pytest.approx(0.5, abs=0.03)


class TestGenesis:
    def test_rates_are_those_given(self) -> None:
        volumes = torch.full((600, 1, 12, 12, 12), 2.0)  # no curve and no shuffling changes it
        none = {"shuffling_rate": 0.0, "nonlinear_rate": 0.0}
        corruption = GenesisCorruption(**none, painting_rate=0.9, outpainting_share=0.8)
        share = _changed(corruption(volumes, _seeded_generator()), volumes)
        assert float((share > 0).float().mean()) == pytest.approx(0.9, abs=0.04)
        # five boxes of a third of the edge cover less than a fifth, out-painting leaves no more
        # than five boxes of four sevenths
        painted = share[share > 0]
        assert float((painted > 0.25).float().mean()) == pytest.approx(0.8, abs=0.05)

    def test_painting_comes_last(self) -> None:
        corruption = GenesisCorruption(1.0, 1.0, 1.0, outpainting_share=1.0)
        volumes = torch.rand(30, 1, 14, 14, 14)
        outside = corruption.outpainting
        seen: list[Tensor] = []

        class Spy(nn.Module):
            def forward(self, given: Tensor, generator: torch.Generator | None) -> Tensor:
                seen.append(given)
                return outside(given, generator)

        corruption.outpainting = Spy()  # type: ignore[assignment]
        painted = corruption(volumes, _seeded_generator())
        (given,) = seen
        assert bool((_changed(given, volumes) > 0.9).all())
        kept = (painted == given).float().mean((1, 2, 3, 4))
        assert bool(((kept > 0.02) & (kept < 0.9)).all())


class TestCorruptd:
    def test_follows_monais_random_state(self) -> None:
        item: dict[Hashable, Any] = {"image": torch.rand(1, 16, 18, 20), "name": "a"}
        transform = Corruptd("image")
        transform.set_random_state(7)
        image = item["image"].clone()
        first = transform(item)["image"]
        assert torch.equal(item["image"], image)
        transform.set_random_state(7)
        second = transform(item)["image"]
        assert torch.equal(first, second)
        assert not torch.equal(transform(item)["image"], first)
        assert not torch.equal(first, item["image"])

    def test_keys_share_the_draw(self) -> None:
        image = torch.rand(1, 16, 18, 20)
        item = Corruptd(["a", "b"], LocalShuffling(rate=1.0))({"a": image, "b": image + 1})
        torch.testing.assert_close(item["a"], item["b"] - 1)

    def test_probability_and_missing_keys(self) -> None:
        image = torch.rand(1, 8, 8, 8)
        assert torch.equal(Corruptd("image", prob=0.0)({"image": image})["image"], image)
        assert Corruptd("other", allow_missing_keys=True)({"image": image}).keys() == {"image"}
        with pytest.raises(KeyError):
            Corruptd("other")({"image": image})

    def test_keeps_metadata_and_arrays(self) -> None:
        affine = torch.diag(torch.tensor([2.0, 3, 4, 1], dtype=torch.float64))
        image = MetaTensor(torch.rand(1, 16, 18, 20), affine=affine)
        item = Corruptd("image")({"image": image})
        assert isinstance(item["image"], MetaTensor)
        assert torch.equal(item["image"].affine, affine)
        array = np.random.default_rng(0).random((1, 16, 18, 20), dtype=np.float32)
        corrupted = Corruptd("image")({"image": array})["image"]
        assert isinstance(corrupted, np.ndarray)
        assert (corrupted != array).any()


@pytest.mark.gpu
@pytest.mark.parametrize("corruption", CERTAIN.values(), ids=CERTAIN.keys())
def test_never_waits_for_the_device(corruption: nn.Module) -> None:
    volumes = torch.rand(2, 1, 24, 24, 24, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        corrupted = corruption(volumes, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (_changed(corrupted, volumes) > 0).all()


def _bezier_by_bisection(value: float, points: np.ndarray) -> float:
    def curve(t: float, axis: int) -> float:
        inner = 3 * t * (1 - t) ** 2 * points[0, axis] + 3 * t**2 * (1 - t) * points[1, axis]
        return float(inner + t**3)

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(middle, 0) < value else (low, middle)
    return curve(low, 1)


def _padded_hippocampus(data_root: Path) -> Tensor:
    path = min((data_root / "Task04_Hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))
    image = torch.from_numpy(Nifti1Image.from_filename(path).get_fdata(dtype=np.float32))
    image = (image - image.min()) / (image.max() - image.min())
    volume = torch.zeros(1, 1, 64, 64, 64)
    d, h, w = image.shape
    volume[0, 0, 10 : 10 + d, 7 : 7 + h, 13 : 13 + w] = image
    return volume
