from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import layouts
from gvsl_lightning.datamodules import CANDI
from gvsl_lightning.datamodules.published.candi import STRUCTURES
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.prediction import labels_on_original_grid

CROP = (12, 16, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.candi(tmp_path_factory.mktemp("candi"))


def module(folder: Path, **options: Any) -> CANDI:
    given = {"val": 4, "test": 4, "crop": CROP, "patch_size": (12, 10, 16)}
    return CANDI(str(folder), **(given | options))


def stored(folder: Path, name: str) -> tuple[Any, Any]:
    image = next(folder.rglob(f"{name}_procimg.nii.gz"))
    label = next(path for path in image.parent.glob("*seg.nii.gz"))
    return nibabel.load(image), nibabel.load(label)


def test_there_are_28_structures_twelve_of_them_on_both_sides(folder: Path) -> None:
    assert len(STRUCTURES) == len(set(STRUCTURES.values())) == 28
    sides = {
        side: {name.removeprefix(side) for name in STRUCTURES.values() if name.startswith(side)}
        for side in ("left ", "right ")
    }
    assert sides["left "] == sides["right "]
    assert len(sides["left "]) == 12
    assert module(folder).class_names == ["background", *STRUCTURES.values()]


def test_every_group_in_every_part(folder: Path) -> None:
    data = module(folder)
    data.setup("fit")
    assert len(data.files) == 12
    groups = [file.name.split("_")[0] for file in data.files]
    assert data.split is not None
    for part in (data.split.train, data.split.val, data.split.test):
        assert sorted(groups[index] for index in part) == ["BPDwPsy", "BPDwoPsy", "HC", "SS"]
    below = module(folder / "SchizBull_2008" / "HC", val=1, test=1)
    below.setup("fit")
    assert [file.name for file in below.files] == ["HC_001", "HC_002", "HC_003"]


def test_the_split_of_the_paper(tmp_path: Path) -> None:
    for number in range(1, 104):
        name = f"HC_{number:03d}"
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_procimg.nii.gz").touch()
    data = CANDI(str(tmp_path))
    data.check_cases = lambda indices: None  # type: ignore[method-assign]
    data.setup("fit")
    assert data.split is not None
    assert [len(data.split.train), len(data.split.val), len(data.split.test)] == [40, 20, 43]


def test_crop_intensities_and_labels_against_a_slow_reference(folder: Path) -> None:
    batch = next(iter(module(folder).val_dataloader()))
    image, label = stored(folder, batch["name"][0])
    array, classes = np.asarray(image.dataobj), np.asarray(label.dataobj)
    # the brain begins at 4, 3, 6 and has the size 10, 14, 8
    box = tuple(
        slice(start - 1, start - 1 + size) for start, size in zip((4, 3, 6), CROP, strict=True)
    )
    low, high = array[box].min(), array[box].max()
    assert batch["image"].shape == (1, 1, 12, 10, 16)
    inverse = np.linalg.inv(image.affine)
    values = list(STRUCTURES)
    seen = set()
    for voxel in np.ndindex(12, 10, 16):
        mm = batch["affine"][0] @ [*voxel, 1]
        place = tuple(int(i) for i in np.rint(inverse @ mm)[:3])
        seen.add(place)
        expected = (array[place] - low) / (high - low)
        assert float(batch["image"][(0, 0, *voxel)]) == pytest.approx(expected, abs=1e-5)
        value = classes[place]
        expected_class = values.index(value) + 1 if value in values else 0
        assert int(batch["label"][(0, 0, *voxel)]) == expected_class
    assert seen == {tuple(np.add(voxel, (3, 2, 5))) for voxel in np.ndindex(*CROP)}
    assert {5, 26, 77} <= set(np.unique(classes).tolist())


def test_prediction_is_cropped_about_the_centre_and_comes_back_right(folder: Path) -> None:
    batches = list(module(folder).predict_dataloader())
    assert len(batches) == 12
    batch = batches[0]
    assert batch["image"].shape == (1, 1, 12, 10, 16)
    assert "label" not in batch
    _, label = stored(folder, batch["name"][0])
    classes = np.asarray(label.dataobj)
    start = [(length - size) // 2 for length, size in zip(layouts.SHAPE, CROP, strict=True)]
    known = torch.zeros(256, 12, 10, 16)
    inverse = np.linalg.inv(label.affine)
    for voxel in np.ndindex(12, 10, 16):
        place = np.rint(inverse @ batch["affine"][0] @ [*voxel, 1]).astype(int)[:3]
        known[(int(classes[tuple(place)]), *voxel)] = 1
    got = labels_on_original_grid(
        known, batch["affine"][0], batch["original_affine"][0], batch["original_shape"][0].tolist()
    )
    inside = tuple(slice(s, s + size) for s, size in zip(start, CROP, strict=True))
    assert np.array_equal(got.numpy()[inside], classes[inside])
    around = np.zeros(layouts.SHAPE, bool)
    around[
        tuple(slice(max(s - 1, 0), s + size + 1) for s, size in zip(start, CROP, strict=True))
    ] = True
    assert not got.numpy()[~around].any()


def test_prediction_of_any_other_folder_and_a_small_volume(tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.random.default_rng(0).random((8, 9, 30)), np.eye(4)),
        tmp_path / "patient.nii.gz",
    )
    (batch,) = module(tmp_path).predict_dataloader()
    assert batch["name"] == ["patient"]
    assert batch["image"].shape == (1, 1, 8, 9, 10)


def test_headers_with_a_quaternion_that_is_a_little_too_long_are_read(tmp_path: Path) -> None:
    layouts.candi(tmp_path, count=1)
    for path in tmp_path.rglob("HC_001/*.nii.gz"):
        image: Any = nibabel.load(path)
        header = image.header
        header["sform_code"], header["qform_code"] = 0, 1
        half = np.sqrt(0.5)
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = 0, half, half + 4e-7
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, header), path)
    (batch,) = module(tmp_path / "SchizBull_2008" / "HC").predict_dataloader()
    assert "error" not in batch
    np.testing.assert_allclose(np.abs(batch["original_affine"][0][0, 0]), 1, atol=1e-5)


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "away"):
        with pytest.raises(InputError, match=r"no volume of CANDI; download CANDI from .*nitrc"):
            module(root).setup("fit")
    with pytest.raises(InputError, match="test is 43 and there are 12 cases"):
        CANDI(str(folder)).setup("fit")
    with pytest.raises(InputError, match="crop is"):
        module(folder, crop=(0, 1, 2))
    layouts.candi(tmp_path, count=1)
    next(tmp_path.rglob("HC_001_seg.nii.gz")).unlink()
    with pytest.raises(InputError, match=r"HC_001_procimg.nii.gz has no label map; add it"):
        module(tmp_path, val=1, test=1).setup("fit")
