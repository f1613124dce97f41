from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import layouts
from gvsl_lightning.datamodules import MMWHS
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.prediction import labels_on_original_grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.mmwhs(tmp_path_factory.mktemp("mmwhs"))


def module(folder: Path, **options: Any) -> MMWHS:
    return MMWHS(str(folder), **({"val": 2, "patch_size": (16, 16, 16), "margin": 3.0} | options))


def names(data: MMWHS) -> list[list[str]]:
    data.setup("fit")
    assert data.split is not None
    found = [file.name for file in data.files]
    return [
        [found[index] for index in part]
        for part in (data.split.train, data.split.val, data.split.test)
    ]


def test_scans_of_ct_test_test(folder: Path) -> None:
    train, val, test = names(module(folder))
    assert train == [f"ct_train_{number}" for number in range(1001, 1005)]
    assert val == ["ct_train_1005", "ct_train_1006"]
    assert test == ["ct_test_2001", "ct_test_2002"]
    train, val, test = names(module(folder, split_by="random", split_seed=3))
    assert (len(train), len(val)) == (4, 2)
    assert test == ["ct_test_2001", "ct_test_2002"]


def test_the_split_of_the_paper(tmp_path: Path) -> None:
    for group, first, count in (("train", 1001, 20), ("test", 2001, 40)):
        (tmp_path / f"ct_{group}").mkdir()
        for number in range(first, first + count):
            for kind in ("image", "label"):
                (tmp_path / f"ct_{group}" / f"ct_{group}_{number}_{kind}.nii.gz").touch()
    data = MMWHS(str(tmp_path))
    data.check_cases = lambda indices: None  # type: ignore[method-assign]
    assert [len(part) for part in names(data)] == [15, 5, 40]


def test_without_labels_for_ct_test(tmp_path: Path) -> None:
    data = module(layouts.mmwhs(tmp_path, labelled_tests=0))
    assert [len(part) for part in names(data)] == [4, 2, 0]
    with pytest.raises(InputError, match="There are no test cases; set test"):
        data.test_dataloader()
    train, val, test = names(module(tmp_path, val=1, test=2))
    assert (len(train), val, test) == (3, ["ct_train_1004"], ["ct_train_1005", "ct_train_1006"])
    assert len(list(data.predict_dataloader())) == 8


def test_labels_are_mapped_421_too(tmp_path: Path) -> None:
    layouts.mmwhs(tmp_path, train=3, test=0)
    path = tmp_path / "ct_train" / "ct_train_1003_label.nii.gz"
    stored: Any = nibabel.load(path)
    label = np.asarray(stored.dataobj).copy()
    atrium = label == 420
    label[atrium & (np.arange(label.shape[0]) % 2 == 0)[:, None, None]] = 421
    nibabel.save(nibabel.Nifti1Image(label, stored.affine), path)
    batch = next(iter(module(tmp_path, val=1, test=1).test_dataloader()))
    got = batch["label"][0, 0].numpy()
    assert np.array_equal(got == 2, atrium)
    for index, value in enumerate((205, 420, 500, 550, 600, 820, 850), 1):
        assert value == 420 or np.array_equal(got == index, label == value)
    label[0, 0, 0] = 422
    nibabel.save(nibabel.Nifti1Image(label, stored.affine), path)
    with pytest.raises(InputError, match=r"1003_label.nii.gz holds the value 422, which is none"):
        module(tmp_path, val=1, test=1).setup("fit")


def test_crop_and_intensities_against_a_slow_reference(folder: Path) -> None:
    batch = next(iter(module(folder, spacing=None).val_dataloader()))
    base = folder / "ct_train" / "ct_train_1005"
    image, label = (nibabel.load(f"{base}_{kind}.nii.gz") for kind in ("image", "label"))
    array, classes = (np.asarray(stored.dataobj) for stored in (image, label))
    inverse = np.linalg.inv(image.affine)
    seen = np.zeros(array.shape, bool)
    for voxel in np.ndindex(*batch["image"].shape[2:]):
        mm = batch["affine"][0] @ [*voxel, 1]
        place = tuple(np.rint(inverse @ mm).astype(int)[:3])
        seen[place] = True
        expected = min(max(array[place] + 1024, 0), 2048) / 2048
        assert float(batch["image"][(0, 0, *voxel)]) == pytest.approx(expected, abs=1e-6)
        assert layouts.HEART[int(batch["label"][(0, 0, *voxel)])] == classes[place]
    labelled, cropped = np.argwhere(classes), np.argwhere(seen)
    last = np.array(array.shape) - 1
    assert np.array_equal(cropped.min(0), np.maximum(labelled.min(0) - 2, 0))  # 3 mm of 1.5
    assert np.array_equal(cropped.max(0), np.minimum(labelled.max(0) + 2, last))
    assert seen.sum() < array.size


def test_voxels_become_1_mm_where_they_were(folder: Path) -> None:
    batch = next(iter(module(folder).val_dataloader()))
    affine = batch["affine"][0]
    np.testing.assert_allclose(affine[:3, :3], np.eye(3), atol=1e-6)
    label: Any = nibabel.load(folder / "ct_train" / "ct_train_1005_label.nii.gz")
    there = affine @ [*torch.nonzero(batch["label"][0, 0] == 3).double().mean(0).tolist(), 1]
    where = label.affine @ [*np.argwhere(np.asarray(label.dataobj) == 500).mean(0), 1]
    np.testing.assert_allclose(there, where, atol=0.4)


def test_what_is_predicted_in_a_crop_lies_right_in_the_whole_scan(folder: Path) -> None:
    data = module(folder, margin=0.0, spacing=None)
    batch = next(iter(data.test_dataloader()))
    assert batch["label"].shape[2:] == layouts.SHAPE
    assert batch["image"].shape[2:] != layouts.SHAPE
    data.configure_region = lambda: None  # type: ignore[method-assign]
    data._datasets.clear()
    whole = next(iter(data.test_dataloader()))
    assert whole["image"].shape[2:] == layouts.SHAPE

    # a network that knows: probabilities of the crop made from the label
    ras = whole["label"].flip(2)  # stored from right to left
    place = np.rint(np.linalg.inv(whole["affine"][0]) @ batch["affine"][0][:, 3]).astype(int)
    size = batch["image"].shape[2:]
    parts = tuple(slice(low, low + extent) for low, extent in zip(place[:3], size, strict=True))
    known = torch.nn.functional.one_hot(ras[0, 0][parts], 8).movedim(-1, 0).float()
    got = labels_on_original_grid(
        known, batch["affine"][0], batch["original_affine"][0], batch["original_shape"][0].tolist()
    )
    expected = batch["label"][0, 0]
    inside = expected > 0
    assert torch.equal(got.long()[inside], expected[inside])
    near = torch.zeros_like(inside)
    ends = zip(*torch.nonzero(inside).aminmax(dim=0), strict=True)
    near[tuple(slice(max(int(low) - 1, 0), int(high) + 2) for low, high in ends)] = True
    assert not near.all()
    assert not got[~near].any()


def test_prediction_takes_whole_scans_and_no_label_map(folder: Path) -> None:
    batches = list(module(folder, spacing=None).predict_dataloader())
    assert [batch["name"][0] for batch in batches] == [
        *(f"ct_train_{number}" for number in range(1001, 1007)),
        *(f"ct_test_{number}" for number in (2001, 2002)),
    ]
    assert all(batch["image"].shape[2:] == layouts.SHAPE for batch in batches)
    assert not any("label" in batch or "error" in batch for batch in batches)


def test_prediction_of_any_other_folder(folder: Path, tmp_path: Path) -> None:
    image = nibabel.load(folder / "ct_test" / "ct_test_2001_image.nii.gz")
    nibabel.save(image, tmp_path / "patient.nii")
    (batch,) = module(tmp_path).predict_dataloader()
    assert batch["name"] == ["patient"]


def test_a_folder_of_another_layout(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "away"):
        with pytest.raises(
            InputError, match=r"holds no volume of MMWHS; register .*github\.io"
        ) as e:
            module(root).setup("fit")
        assert "\n" not in str(e.value)
        assert "ct_train/ct_train_1001_label.nii.gz" in str(e.value)


def test_a_scan_without_label_map_and_one_that_is_there_twice(tmp_path: Path) -> None:
    layouts.mmwhs(tmp_path, train=4, test=0)
    (tmp_path / "ct_train" / "ct_train_1002_label.nii.gz").unlink()
    with pytest.raises(InputError, match=r"ct_train_1002_image.nii.gz has no label map"):
        module(tmp_path, val=1).setup("fit")
    (tmp_path / "ct_train" / "ct_train_1001_image.nii").touch()
    with pytest.raises(InputError, match="are both the case ct_train_1001; leave out one"):
        module(tmp_path, val=1).setup("fit")
