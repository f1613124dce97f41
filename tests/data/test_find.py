import json
import os
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.errors import InputError
from small_volumes import names, save, save_dicom, values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        save(tmp_path / "data" / f"case_{index}.nii.gz", index)
    return tmp_path / "data"


def test_a_folder_is_searched_recursively(tmp_path: Path) -> None:
    save(tmp_path / "a/ct.nii.gz", 1)
    save(tmp_path / "a/deep/er/mr.nii", 2)
    save(tmp_path / "b/ct.npy", 3)
    save(tmp_path / "imagesTr/x.nii.gz", 4)
    save(tmp_path / "labelsTr/x.nii.gz", 5)
    save(tmp_path / ".cache/y.nii.gz", 6)
    save(tmp_path / "elsewhere/outside.nii.gz", 7)
    (tmp_path / "a/._ct.nii.gz").write_bytes(b"\0" * 200)
    (tmp_path / "a/readme").write_text("short")
    (tmp_path / "a/table.csv").write_text("a" * 500)
    shutil.move(tmp_path / "elsewhere", tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "c").symlink_to(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    assert names(str(tmp_path)) == ["a/ct", "a/deep/er/mr", "b/ct", "c/outside", "imagesTr/x"]


def test_names_do_not_change_with_volumes_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    save(root / "a/deep/ct.nii.gz", 1)
    assert names(str(root)) == names(f"{root}/") == ["a/deep/ct"]
    save(root / "b.nii.gz", 2)
    assert names(str(root)) == ["a/deep/ct", "b"]
    save_dicom(root / "c", "1.2.3", seed=1, slices=3)
    assert names(str(root / "c")) == ["c"]
    assert names(str(root)) == ["a/deep/ct", "b", "c"]


def test_no_two_volumes_have_one_name(tmp_path: Path) -> None:
    save_dicom(tmp_path / "a", "1.2.3", seed=1, slices=3)
    save_dicom(tmp_path / "a", "1.2.4", seed=1, slices=3)
    for name in ("a_2.nii.gz", "a_3.npy", "a.nii", "a.nii.gz", "a_2.npy"):
        save(tmp_path / name)
    found = find_volumes(str(tmp_path))
    expected = ["a", "a_2", "a_2_2", "a_3", "a_4", "a_5", "a_6"]
    assert [file.name for file in found] == expected
    own = {file.name: file.image for file in found}
    assert own["a_2"] == str(tmp_path / "a_2.nii.gz")
    assert own["a_3"] == str(tmp_path / "a_3.npy")


def test_patterns_lists_and_paths_name_the_same_volumes(folder: Path) -> None:
    expected = ["case_0", "case_3"]
    chosen = [str(folder / f"{name}.nii.gz") for name in expected]
    assert names(str(folder / "case_[03].nii.gz")) == expected
    assert names(str(folder.parent / "**/case_[03].*")) == expected
    assert names(chosen) == expected
    text = folder / "list.txt"
    text.write_text("# a comment\ncase_3.nii.gz  # the last\n\n./case_0.nii.gz\ncase_3.nii.gz\n")
    assert names(str(text)) == expected
    listing = folder.parent / "list.json"
    listing.write_text(json.dumps(["data/case_0.nii.gz", {"image": chosen[1]}]))
    assert names(str(listing)) == expected
    assert names([str(text), str(folder / "case_1.nii.gz")]) == ["case_0", "case_1", "case_3"]


def test_decathlon_folder_gives_training_images_with_their_labels(tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / f"imagesTr/c_{index}.nii.gz", index)
        save(tmp_path / f"labelsTr/c_{index}.nii.gz", 10 + index)
    save(tmp_path / "imagesTs/t_0.nii.gz", 20)
    pairs = [
        {"image": f"./imagesTr/c_{index}.nii.gz", "label": f"./labelsTr/c_{index}.nii.gz"}
        for index in range(3)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": pairs, "test": ["x"]}))
    for root in (tmp_path, tmp_path / "dataset.json"):
        files = find_volumes(str(root))
        assert [file.name for file in files] == ["c_0", "c_1", "c_2"]
        assert [Path(file.label).parent.name for file in files] == ["labelsTr"] * 3


def test_label_maps_inside_the_root_are_no_images(folder: Path) -> None:
    for index in range(6):
        save(folder / "labels" / f"case_{index}.nii.gz", 20 + index)
    files = find_volumes(str(folder), label_root=str(folder / "labels"))
    assert [file.name for file in files] == [f"case_{index}" for index in range(6)]
    assert all(file.label.startswith(str(folder / "labels")) for file in files)


def test_paths_with_a_hash_and_a_byte_order_mark(tmp_path: Path) -> None:
    save(tmp_path / "h#1" / "v.nii.gz")
    listing = tmp_path / "list.txt"
    listing.write_text("h#1/v.nii.gz # first\n", encoding="utf-8-sig")
    assert names(str(listing)) == ["v"]


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", folder / "nothing*.nii", tmp_path / "empty"):
        with pytest.raises(InputError, match=re.escape(str(path))):
            find_volumes(str(path))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("list.txt", b"case_0.nii.gz\ncase_9.nii.gz\n", r"case_9.nii.gz.*list.txt"),
        ("list.txt", b"case_0.nii.gz\nlist.txt.bak\n", "list.txt.bak"),
        ("list.txt", "case_é.nii.gz".encode("latin-1"), "list.txt"),
        ("list.json", b"[", "list.json"),
        ("list.json", b'{"train": []}', "list.json"),
        ("list.json", b'[{"img": "case_0.nii.gz"}]', "list.json.*img"),
        ("list.json", b"[3]", "list.json.* 3"),
        ("list.json", b"[]", "list.json"),
    ],
)
def test_wrong_lists(folder: Path, name: str, content: bytes, match: str) -> None:
    (folder / "list.txt.bak").write_text("")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        find_volumes(str(folder / name))


def test_a_dataset_json_of_something_else_is_no_list(folder: Path) -> None:
    (folder / "dataset.json").write_text("5")
    assert len(names(str(folder))) == 6


def test_a_label_map_of_another_folder_is_none_of_a_volume(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path / f"images/p{number}/t1.nii.gz", number)
        if number < 3:
            save(tmp_path / f"labels/p{number}/t1.nii.gz", number)
    save(tmp_path / "images/p3/only.nii.gz")
    save(tmp_path / "labels/else/where/only.nii.gz")
    files = find_volumes(str(tmp_path / "images"), str(tmp_path / "labels"))
    found = {file.name: file.label and os.path.relpath(file.label, tmp_path) for file in files}
    assert found == {
        "p1/t1": "labels/p1/t1.nii.gz",
        "p2/t1": "labels/p2/t1.nii.gz",
        "p3/t1": None,
        "p3/only": "labels/else/where/only.nii.gz",
    }


@pytest.mark.parametrize("folder", ["labels", "Masks", "seg_manual", "truth"])
def test_folders_of_label_maps_beside_images_are_left_out(tmp_path: Path, folder: str) -> None:
    for number in range(3):
        save(tmp_path / f"images/{number}.nii.gz", number)
        array = (values(number) > 500).astype(np.uint8)
        (tmp_path / folder).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{folder}/{number}.nii.gz")
    with pytest.warns(UserWarning, match=rf"images \(3\).*{folder} \(3\)"):
        assert names(str(tmp_path)) == ["images/0", "images/1", "images/2"]
    assert names(str(tmp_path / folder)) == ["0", "1", "2"]


def test_two_contrasts_on_one_grid_are_both_images(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"t1/{number}.nii.gz", number)
        save(tmp_path / f"t2/{number}.nii.gz", 10 + number)
    assert len(names(str(tmp_path))) == 6
