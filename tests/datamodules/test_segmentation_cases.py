import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gvsl_lightning.datamodules import PhantomSegmentation, SegmentationDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.prediction import labels_on_original_grid

SHAPE = (9, 10, 11)
NAMES = ["background", "left", "right"]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def label_of(index: int, values: tuple[int, int] = (1, 2)) -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8 if max(values) < 256 else np.int16)
    label[1:3, 2:5, 3 : 5 + index % 3] = values[0]
    label[6:8, 2:5, 3:7] = values[1]
    return label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        image = np.random.default_rng(index).uniform(0, 100, SHAPE).astype(np.float32)
        save(tmp_path / "images" / f"case_{index}.nii.gz", image + 100 * label_of(index))
        save(tmp_path / "labels" / f"case_{index}.nii.gz", label_of(index))
    return tmp_path


def module(folder: Path, **options: Any) -> SegmentationDataModule:
    given = {
        "root": str(folder / "images"),
        "label_root": str(folder / "labels"),
        "class_names": NAMES,
        "patch_size": (6, 8, 12),
        "split_by": "name",
        "val": 1,
        "test": 2,
    }
    return SegmentationDataModule(**(given | options))


def test_batches(folder: Path) -> None:
    data = module(folder)
    (train,) = list(data.train_dataloader())[:1]
    assert train["image"].shape == train["label"].shape == (2, 1, 6, 8, 12)
    assert train["image"].dtype == torch.float32
    assert train["label"].dtype == torch.int64
    (val,) = list(data.val_dataloader())
    assert val["name"] == ["case_3"]
    assert val["image"].shape == (1, 1, *SHAPE)
    assert torch.equal(val["label"][0, 0], torch.from_numpy(label_of(3)).long())
    assert val["image"].min() == 0
    assert val["image"].max() == pytest.approx(1)
    assert [batch["name"] for batch in data.test_dataloader()] == [["case_4"], ["case_5"]]
    for key in ("affine", "original_affine"):  # in NumPy, which Lightning leaves alone
        assert isinstance(val[key], np.ndarray)
        assert val[key].dtype == np.float64
        assert np.array_equal(val[key], np.eye(4)[None])
    assert np.array_equal(val["original_shape"], [SHAPE])


def test_a_foreground_crop_keeps_the_place_of_the_voxels(folder: Path) -> None:
    data = module(folder, crop_foreground=0.35)
    (val,), (test, _) = list(data.val_dataloader()), list(data.test_dataloader())
    whole, cropped = label_of(3), val["label"][0, 0].numpy()
    assert cropped.shape == val["image"].shape[2:] != SHAPE
    start = val["affine"][0, :3, 3].astype(int)
    box = tuple(slice(a, a + size) for a, size in zip(start, cropped.shape, strict=True))
    assert np.array_equal(cropped, whole[box])
    assert np.array_equal(test["label"][0, 0], label_of(4))  # on the grid of the file
    classes = F.one_hot(val["label"][0, 0]).permute(3, 0, 1, 2).float()
    on_file = labels_on_original_grid(classes, val["affine"][0], val["original_affine"][0], SHAPE)
    assert np.array_equal(on_file[box], cropped)


def test_image_and_label_move_together(folder: Path) -> None:
    data = module(folder, batch_size=3, labelled=3, modality="none")
    for _ in range(3):
        for batch in data.train_dataloader():
            image, label = batch["image"], batch["label"]
            assert image[label == 2].mean() > image[label == 1].mean() > image[label == 0].mean()


def test_balanced_patches_show_all_classes(tmp_path: Path) -> None:
    for index in range(2):
        label = np.zeros((40, 40, 40), np.uint8)
        label[5, 5, 5], label[35, 30, 20] = 1, 2
        save(tmp_path / "images" / f"{index}.nii.gz", label.astype(np.float32))
        save(tmp_path / "labels" / f"{index}.nii.gz", label)
    seen = {True: 0, False: 0}
    for balanced in seen:
        data = module(
            tmp_path,
            patch_size=(8, 8, 8),
            balanced=balanced,
            val=0,
            test=0,
            augmentation=False,
            batch_size=1,
        )
        for epoch in range(15):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            seen[balanced] += sum(bool((batch["label"] > 0).any()) for batch in loader)
    assert seen[True] > 12
    assert seen[False] < 4


def test_labels_are_remapped_and_ignored_voxels_stay(folder: Path) -> None:
    values = {205: 2, 420: 1}
    for index in range(6):
        label = label_of(index, (205, 420))
        label[0] = 255
        save(folder / "labels" / f"case_{index}.nii.gz", label)
    data = module(folder, label_values=values, ignore_index=255)
    (batch,) = list(data.val_dataloader())
    expected = torch.from_numpy(label_of(3, (2, 1))).long()
    expected[0] = 255
    assert torch.equal(batch["label"][0, 0], expected)


def test_test_labels_lie_on_the_original_grid_and_validation_labels_on_the_prepared_one(
    folder: Path,
) -> None:
    affine = np.diag([-2.0, 1.0, 1.0, 1.0])
    for index in range(6):
        for kind in ("images", "labels"):
            path = folder / kind / f"case_{index}.nii.gz"
            save(path, np.asarray(nibabel.load(path).dataobj), affine)
    data = module(folder, spacing=(1.0, 1.0, 1.0))
    (val,) = list(data.val_dataloader())
    assert val["image"].shape[2:] == val["label"].shape[2:]
    assert val["image"].shape[2] in (17, 18)
    test = next(iter(data.test_dataloader()))
    assert torch.equal(test["label"][0, 0], torch.from_numpy(label_of(4)).long())
    assert np.array_equal(test["original_affine"][0], affine)
    assert test["affine"][0, 0, 0] == 1


@settings(max_examples=48)
@given(
    shape=st.tuples(*[st.integers(2, 7)] * 3),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    oblique=st.booleans(),
    label_values=st.dictionaries(
        st.integers(-(2**15), 2**15 - 1).filter(bool), st.integers(0, 4), min_size=1, max_size=8
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_remapped_labels_lie_over_a_volume_of_any_orientation(
    shape: tuple[int, ...],
    axes: list[int],
    signs: tuple[int, ...],
    oblique: bool,
    label_values: dict[int, int],
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[axes] * signs * random.uniform(0.5, 4, 3)
    affine[:3, 3] = random.uniform(-200, 200, 3)
    if oblique:
        affine[:3, :3] = np.linalg.qr(random.normal(size=(3, 3)))[0] @ affine[:3, :3]
    values = np.array([0, *label_values], dtype=np.int16)
    label = values[random.integers(len(values), size=shape)]
    expected = np.vectorize({0: 0, **label_values}.get)(label)
    with tempfile.TemporaryDirectory() as folder:
        for kind, array in (("images", random.random(shape)), ("labels", label)):
            for name in "abc":
                save(Path(folder) / kind / f"{name}.nii", array, affine)
        data = module(
            Path(folder),
            class_names=["0", "1", "2", "3", "4"],
            label_values=label_values,
            val=1,
            test=1,
        )
        (prepared,), (original,) = data.val_dataloader(), data.test_dataloader()
    assert np.array_equal(original["label"][0, 0], expected)
    # a perfect prediction on the prepared grid is the label map of the file
    predicted = F.one_hot(prepared["label"][0, 0], 5).movedim(-1, 0).float()
    geometry = [prepared[key][0] for key in ("affine", "original_affine", "original_shape")]
    assert np.array_equal(labels_on_original_grid(predicted, *geometry), expected)


def fails(data: SegmentationDataModule, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        data.setup("fit")
    assert "\n" not in str(raised.value)


def test_label_of_another_shape(folder: Path) -> None:
    save(folder / "labels" / "case_2.nii.gz", label_of(2)[:-1])
    fails(module(folder), r"labels/case_2.nii.gz has the shape \(8, 10, 11\) and its image")


@pytest.mark.parametrize("change", ["shift", "flip", "spacing"])
def test_label_of_another_place(folder: Path, change: str) -> None:
    affine = np.eye(4)
    if change == "shift":
        affine[1, 3] = 0.5
    else:
        affine[2, 2] = -1 if change == "flip" else 1.1
    save(folder / "labels" / "case_1.nii.gz", label_of(1), affine)
    fails(module(folder), r"labels/case_1.nii.gz lies up to [\d.]+ mm away from its image")


def test_rounding_of_the_affine_is_no_error(folder: Path) -> None:
    save(folder / "labels" / "case_1.nii.gz", label_of(1), np.eye(4) * [1, 1.0001, 1, 1])
    module(folder).setup("fit")


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "3, which is none of 0, 1"), (1.5, "1.5, which is no whole number")]
)
def test_unknown_label_value(folder: Path, value: float, kind: str) -> None:
    label = label_of(0).astype(np.float32)
    label[5, 5, 5] = value
    save(folder / "labels" / "case_5.nii.gz", label)
    fails(module(folder), f"labels/case_5.nii.gz holds the value {kind}")


def test_missing_label_and_case_listed_twice(folder: Path) -> None:
    (folder / "labels" / "case_0.nii.gz").unlink()
    fails(module(folder), "images/case_0.nii.gz has no label map")
    path = str(folder / "images" / "case_1.nii.gz")
    fails(module(folder, root=[path, path]), "case_1.nii.gz is listed twice; list it once")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_case_under_two_names_is_an_error_and_predicted_under_both(
    folder: Path, link: Any
) -> None:
    link(folder / "images" / "case_1.nii.gz", folder / "images" / "same.nii.gz")
    link(folder / "labels" / "case_1.nii.gz", folder / "labels" / "same.nii.gz")
    fails(module(folder), "same.nii.gz is listed twice, also as .*images/case_1.nii.gz")
    names = [batch["name"][0] for batch in module(folder).predict_dataloader()]
    assert names == [*(f"case_{i}" for i in range(6)), "same"]


def test_cases_may_share_a_label_map(folder: Path) -> None:
    (folder / "labels" / "case_0.nii.gz").unlink()
    os.symlink(folder / "labels" / "case_3.nii.gz", folder / "labels" / "case_0.nii.gz")
    module(folder, root=str(folder)).setup("fit")


def test_a_damaged_dicom_file_stops_training_and_no_other_prediction(folder: Path) -> None:
    (folder / "images" / "junk.dcm").write_bytes(b"nonsense")
    fails(module(folder), "junk.dcm cannot be read")
    batches = list(module(folder).predict_dataloader())
    assert [batch["name"][0] for batch in batches if "error" not in batch] == [
        f"case_{i}" for i in range(6)
    ]
    (broken,) = (batch for batch in batches if "error" in batch)
    assert "junk.dcm cannot be read" in broken["error"][0]


def test_an_unused_case_needs_no_label(folder: Path) -> None:
    (folder / "labels" / "case_2.nii.gz").unlink()
    data = module(folder, labelled=2, labelled_seed=1)
    data.setup("fit")
    assert 2 not in data.split.train


@pytest.mark.parametrize(
    "options",
    [
        {"class_names": ["one"]},
        {"class_names": ["a", "a"]},
        {"patch_size": (0, 1, 1)},
        {"ignore_index": 1},
        {"label_values": {7: 3}},
        {"spacing": (1, 0, 1)},
        {"root": None},
    ],
)
def test_wrong_options(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        module(folder, **options)


def test_prediction_takes_all_volumes_and_names_those_that_are_broken(folder: Path) -> None:
    (folder / "images" / "case_1.nii.gz").write_bytes(b"nonsense")
    data = module(folder)
    data.is_predicted = lambda file: file.name == "case_2"
    batches = list(data.predict_dataloader())
    assert [batch["name"][0] for batch in batches] == [f"case_{i}" for i in (0, 1, 3, 4, 5)]
    assert "case_1.nii.gz cannot be read" in batches[1]["error"][0]
    assert batches[0]["source"] == [str(folder / "images" / "case_0.nii.gz")]
    assert "label" not in batches[0]


def test_label_maps_below_the_root_are_not_segmented(folder: Path) -> None:
    data = module(folder, root=str(folder))
    assert len(list(data.predict_dataloader())) == 6


def test_no_batch_has_what_a_device_without_float64_refuses(folder: Path) -> None:
    phantom = PhantomSegmentation("cardiac_ct", size=(16, 16, 16), count=5, val=1, test=1)
    for data in (module(folder), phantom):
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            tensors = [v for v in next(iter(loader)).values() if isinstance(v, torch.Tensor)]
            assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}


def test_phantoms_have_the_scene_s_classes() -> None:
    data = PhantomSegmentation("cardiac_ct", size=(16, 16, 16), count=5, val=1, test=1)
    assert data.class_names[0] == "background"
    assert len(data.class_names) == 8
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["label"].shape == (2, 1, 16, 16, 16)
    assert batch["label"].max() < 8
    assert next(iter(data.test_dataloader()))["label"].shape == (1, 1, 16, 16, 16)
    with pytest.raises(InputError, match="has 2 names and cardiac_ct the classes"):
        PhantomSegmentation("cardiac_ct", class_names=["a", "b"])


def test_hippocampus(data_root: Path) -> None:
    data = SegmentationDataModule(
        root=str(data_root / "Task04_Hippocampus"),
        class_names=["background", "anterior", "posterior"],
        modality="mri",
        patch_size=(32, 48, 32),
        split_by="name",
        val=20,
        test=40,
        labelled=5,
    )
    batch = next(iter(data.train_dataloader()))
    assert set(batch["label"].unique().tolist()) == {0, 1, 2}
    assert [len(part) for part in (data.split.train, data.split.val, data.split.test)] == [
        5,
        20,
        40,
    ]
