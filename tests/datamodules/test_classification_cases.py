import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from gvsl_lightning.datamodules import ClassificationDataModule, PhantomClassification
from gvsl_lightning.errors import InputError

CLASSES = ["healthy", "ill"]


def save(path: Path, seed: int, shape: tuple[int, int, int] = (8, 10, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).uniform(0, 100, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        save(tmp_path / CLASSES[index % 2] / f"case_{index}.nii.gz", index)
    return tmp_path


def write(folder: Path, name: str, rows: list[tuple[str, Any]]) -> str:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps([{"path": case, "label": label} for case, label in rows]))
    else:
        lines = [f'"{case}","{label}"' for case, label in rows]
        path.write_text("\n".join(["path,label", *lines]), encoding="utf-8-sig")
    return str(path)


def targets(root: str, **options: Any) -> dict[str, Any]:
    given = {"class_names": CLASSES, "size": (8, 8, 8), "val": 0, "augmentation": False}
    data = ClassificationDataModule(root, **(given | options))
    batches = list(data.train_dataloader())
    return {
        name: target.tolist()
        for batch in batches
        for name, target in zip(batch["name"], batch["target"], strict=True)
    }


def test_folders_tables_and_lists_agree(folder: Path) -> None:
    expected = {f"{CLASSES[index % 2]}/case_{index}.nii.gz": index % 2 for index in range(6)}
    assert targets(str(folder)) == expected
    names = [(name, CLASSES[target]) for name, target in expected.items()]
    assert targets(write(folder, "names.csv", names)) == expected
    assert targets(write(folder, "list.json", list(expected.items()))) == expected


def test_several_labels(folder: Path) -> None:
    rows = [("healthy/case_0.nii.gz", ""), ("ill/case_1.nii.gz", "ill; 0")]
    expected = {"healthy/case_0.nii.gz": [0.0, 0.0], "ill/case_1.nii.gz": [1.0, 1.0]}
    assert targets(write(folder, "table.csv", rows), multi_label=True) == expected
    lists = [("healthy/case_0.nii.gz", []), ("ill/case_1.nii.gz", ["healthy", 1])]
    assert targets(write(folder, "list.json", lists), multi_label=True) == expected


@pytest.mark.parametrize(
    ("resize", "size", "content"), [(False, (8, 12, 6), 480), (True, (4, 5, 6), 120)]
)
def test_volumes_are_brought_to_size(folder: Path, resize: bool, size: Any, content: int) -> None:
    data = ClassificationDataModule(str(folder), CLASSES, size=size, resize=resize, val=2)
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 1, *size)
    assert batch["target"].dtype == torch.int64
    assert (batch["image"] > 0).sum() >= content - 2
    train = next(iter(data.train_dataloader()))
    assert train["image"].shape == (2, 1, *size)
    assert train["image"].dtype == torch.float32


def test_foreground_crop(folder: Path) -> None:
    array = np.zeros((8, 10, 12), np.float32)
    array[2:4, 3:5, 4:6] = 7
    array[2, 3, 4] = 8
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "ill" / "case_1.nii.gz")
    data = ClassificationDataModule(
        str(folder), CLASSES, size=(2, 2, 2), crop_foreground=0.5, split_by="name", val=3
    )
    images = {batch["name"][0]: batch["image"] for batch in data.val_dataloader()}
    assert (images["ill/case_1.nii.gz"] >= 7 / 8).all()


def test_few_labels_are_spread_over_the_classes(folder: Path) -> None:
    for seed in range(4):
        chosen = targets(str(folder), labelled=2, labelled_seed=seed)
        assert sorted(chosen.values()) == [0, 1]


def test_prediction_takes_any_folder(folder: Path) -> None:
    data = ClassificationDataModule(str(folder), CLASSES, size=(8, 8, 8))
    batches = list(data.predict_dataloader())
    assert len(batches) == 6
    assert set(batches[0]) == {"image", "name"}
    paths = ["healthy/case_0.nii.gz", {"path": "ill/case_1.nii.gz"}]
    (folder / "paths.json").write_text(json.dumps(paths))
    data = ClassificationDataModule(str(folder / "paths.json"), CLASSES, size=(8, 8, 8))
    assert len(list(data.predict_dataloader())) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_prediction_names_what_is_broken(folder: Path, workers: int) -> None:
    (folder / "ill" / "case_1.nii.gz").write_bytes(b"nonsense")
    data = ClassificationDataModule(str(folder), CLASSES, size=(8, 8, 8), num_workers=workers)
    batches = {batch["name"][0]: batch for batch in data.predict_dataloader()}
    broken = batches.pop("ill/case_1")
    assert set(broken) == {"name", "error"}
    assert "ill/case_1.nii.gz cannot be read" in broken["error"][0]
    assert len(batches) == 5
    assert all(batch["image"].shape == (1, 1, 8, 8, 8) for batch in batches.values())


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([("ill/case_1.nii.gz", "dead")], "has the label 'dead' and the classes are healthy, ill"),
        ([("ill/case_1.nii.gz", "2")], "has the label '2'"),
        ([("ill/case_1.nii.gz", "")], "has 0 labels; give it one, or set multi_label"),
        ([("ill/case_1.nii.gz", "0;1")], "has 2 labels"),
        ([("ill/case_1.nii.gz", "1"), ("ill/../ill/case_1.nii.gz", "1")], "listed twice"),
        ([("ill/case_9.nii.gz", "1")], "case_9.nii.gz does not exist"),
        ([("ill", "1")], r"ill holds 3 volumes \(.*case_1.nii.gz, .*\); give the path of one"),
        ([], "lists no volume"),
    ],
)
def test_wrong_tables(folder: Path, rows: list[tuple[str, Any]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        targets(write(folder, "table.csv", rows))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_case_under_two_names_is_an_error(folder: Path, link: Any) -> None:
    link(folder / "ill" / "case_1.nii.gz", folder / "healthy" / "same.nii.gz")
    sentence = (
        r"ill/case_1.nii.gz is listed twice, also as .*healthy/same.nii.gz, which is the same"
    )
    with pytest.raises(InputError, match=sentence):
        targets(str(folder))
    rows = [("healthy/same.nii.gz", "0"), ("ill/case_1.nii.gz", "1")]
    with pytest.raises(InputError, match=sentence):
        targets(write(folder, "table.csv", rows))


def test_names_do_not_change_with_volumes_elsewhere(folder: Path) -> None:
    shutil.rmtree(folder / "ill")
    save(folder / "healthy" / "deep" / "case_0.nii.gz", 7)
    expected = [*(f"healthy/case_{i}.nii.gz" for i in (0, 2, 4)), "healthy/deep/case_0.nii.gz"]
    assert sorted(targets(str(folder))) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", "{"),
        ("t.json", "[3]"),
        ("t.json", '[{"path": 3, "label": 0}]'),
        ("t.csv", "a,b\n1,2"),
    ],
)
def test_unreadable_tables(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=name):
        targets(str(folder / name))


@pytest.mark.parametrize("options", [{"class_names": ["a"]}, {"size": (0, 1, 1)}, {"root": None}])
def test_wrong_options(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ClassificationDataModule(**({"root": str(folder), "class_names": CLASSES} | options))


def test_a_damaged_dicom_file_is_named(folder: Path) -> None:
    (folder / "ill" / "junk.dcm").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"ill/junk.dcm cannot be read"):
        targets(str(folder))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no folder of volumes for each class"):
        targets(str(tmp_path))


def test_phantom_chests() -> None:
    data = PhantomClassification(size=(16, 16, 16), count=8, val=2)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 1, 16, 16, 16)
    assert set(batch["target"].tolist()) <= {0, 1}
    with pytest.raises(InputError, match="two classes"):
        PhantomClassification(class_names=["a", "b", "c"])
