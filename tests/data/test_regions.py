import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor

import layouts
from gvsl_lightning.data.regions import (
    AroundLabel,
    AroundLungMask,
    AroundLungs,
    Centred,
    crop_to,
)
from gvsl_lightning.errors import InputError

TURNED = np.array([[0, 0.2, -2.0, 5], [-1.5, 0, 0, 7], [0, 0.8, 0.1, -3], [0, 0, 0, 1.0]])


def volume(array: np.ndarray, affine: np.ndarray | None = None) -> MetaTensor:
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(torch.from_numpy(array.astype(np.float32))[None], affine=affine)


def marked(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = (20, 24, 18)) -> MetaTensor:
    array = np.zeros(shape)
    for voxel in voxels:
        array[voxel] = 3
    return volume(array, TURNED)


def test_a_crop_lies_where_it_was() -> None:
    whole = volume(np.random.default_rng(0).random((5, 6, 7)), TURNED)
    cropped = crop_to(whole, (slice(1, 4), slice(2, 6), slice(3, 5)))
    assert cropped.shape == (1, 3, 4, 2)
    for voxel in np.ndindex(3, 4, 2):
        before = np.add(voxel, (1, 2, 3))
        there = cropped.affine.numpy() @ [*voxel, 1]
        np.testing.assert_allclose(there, TURNED @ [*before, 1], atol=1e-9)
        assert cropped[(0, *voxel)] == whole[(0, *before)]


def test_around_the_label_with_a_margin_in_mm() -> None:
    label = marked((8, 9, 7), (10, 12, 7))
    # voxels of 1.5, 0.82 and 2 mm
    expected = (slice(8 - 2, 11 + 2), slice(9 - 4, 13 + 4), slice(7 - 2, 8 + 2))
    assert AroundLabel(3.0)(label, label) == expected
    assert AroundLabel(0.0)(label, label) == (slice(8, 11), slice(9, 13), slice(7, 8))
    whole = (slice(0, 20), slice(0, 24), slice(0, 18))
    assert AroundLabel(100.0)(label, label) == whole
    assert AroundLabel(3.0)(label, None) == whole
    assert AroundLabel(3.0)(label, marked()) == whole


def test_centred_on_the_label_or_the_volume() -> None:
    label = marked((8, 9, 2), (10, 12, 2))
    assert Centred((6, 6, 6))(label, label) == (slice(6, 12), slice(8, 14), slice(0, 6))
    assert Centred((6, 6, 6))(label, None) == (slice(7, 13), slice(9, 15), slice(6, 12))
    assert Centred((40, 6, 6))(label, label)[0] == slice(0, 20)
    ends = marked((19, 23, 17))
    assert Centred((6, 6, 6))(ends, ends) == (slice(14, 20), slice(18, 24), slice(12, 18))


def slow_lungs(array: np.ndarray) -> np.ndarray:
    """The part of dark voxels from a seed in each lung, grown one neighbour at a time."""
    found = np.zeros(array.shape, bool)
    queue = [(9, 14, 12), (22, 14, 12)]
    while queue:
        voxel = queue.pop()
        if not found[voxel] and array[voxel] < -400:
            found[voxel] = True
            for axis in range(3):
                for step in (-1, 1):
                    near = list(voxel)
                    near[axis] += step
                    queue.append((near[0], near[1], near[2]))
    return found


def test_around_the_lungs() -> None:
    array = layouts.chest()
    found = np.argwhere(slow_lungs(array))
    box = tuple(slice(*ends) for ends in zip(found.min(0), found.max(0) + 1, strict=True))
    assert box == layouts.LUNGS
    two_mm = np.diag([-2.0, 2.0, 2.0, 1.0])
    assert AroundLungs(0.0)(volume(array, two_mm), None) == box
    assert AroundLungs(3.0)(volume(array, two_mm), None) == tuple(
        slice(part.start - 2, part.stop + 2) for part in box
    )
    # the same chest with axes in another order
    order = (2, 0, 1)
    moved = volume(array.transpose(order), two_mm[:, [*order, 3]])
    assert AroundLungs(0.0)(moved, None) == tuple(box[axis] for axis in order)


def test_lungs_of_a_fine_volume_are_not_cut() -> None:
    fine = np.kron(layouts.chest(), np.ones((4, 4, 3), np.int16))
    region = AroundLungs(0.0)(volume(fine, np.diag([0.5, 0.5, 0.66, 1.0])), None)
    for part, box, by in zip(region, layouts.LUNGS, (4, 4, 3), strict=True):
        assert box.start * by - 5 <= part.start <= box.start * by
        assert box.stop * by <= part.stop <= box.stop * by + 5


def test_no_lungs() -> None:
    whole = (slice(0, 32), slice(0, 30), slice(0, 26))
    body = np.where(layouts.chest() > -1000, 40, layouts.chest())
    for array in (body, np.full((32, 30, 26), 40), np.full((32, 30, 26), -1000)):
        array[layouts.LUNGS] = np.where(array[layouts.LUNGS] > -1000, 40, array[layouts.LUNGS])
        assert AroundLungs()(volume(array), None) == whole


def test_lungmask_gets_the_volume_as_itk_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="lungmask is not installed; run `pip install lungmask`"):
        AroundLungMask()(volume(layouts.chest()), None)

    class LMInferer:
        def apply(self, image: SimpleITK.Image) -> np.ndarray:
            assert image.TransformIndexToPhysicalPoint((0, 0, 0)) == pytest.approx((-5, -7, -3))
            assert image.TransformIndexToPhysicalPoint((2, 1, 0))[1] == pytest.approx(-4)
            return SimpleITK.GetArrayFromImage(image) == 3

    module = ModuleType("lungmask")
    vars(module).update(vars(SimpleNamespace(LMInferer=LMInferer)))
    monkeypatch.setitem(sys.modules, "lungmask", module)
    skewless = TURNED.copy()
    skewless[0, 1] = skewless[2, 2] = 0
    image = volume(marked((8, 9, 7), (10, 12, 7))[0].numpy(), skewless)
    assert AroundLungMask(0.0)(image, None) == (slice(8, 11), slice(9, 13), slice(7, 8))
    empty = volume(np.zeros((4, 5, 6)), skewless)
    assert AroundLungMask(0.0)(empty, None) == (slice(0, 4), slice(0, 5), slice(0, 6))
