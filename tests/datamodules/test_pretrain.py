import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from gvsl_lightning.data.volumes import find_volumes, read_volume
from gvsl_lightning.datamodules import PairDataModule, PretrainDataModule
from gvsl_lightning.errors import InputError

SHAPE = (6, 7, 8)
OBLIQUE = np.array([[0.0, -1.8, 0.6, 5], [1.2, 0.0, 0.0, -7], [0.0, 0.9, 1.2, 11], [0, 0, 0, 1]])


def values(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def save(path: Path, seed: int = 0, affine: np.ndarray | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = values(seed, **options)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def save_dicom(folder: Path, series: str, seed: int, slices: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    volume = values(seed, (5, 4, slices))
    for index in range(slices):
        image = SimpleITK.GetImageFromArray(volume[:, :, index].T)
        image.SetSpacing((0.5, 0.75))
        tags = {
            "0020|000e": series,
            "0020|0032": f"-3\\4\\{2.5 * index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(slices - index),
            "0008|0060": "CT",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        image.SetMetaData("0008|0018", f"{series}.{index}")
        writer.SetFileName(str(folder / f"{series}-{(index * 7) % 10}.dcm"))
        writer.Execute(image)


def volumes(root: Any, **options: Any) -> list[dict[str, Any]]:
    module = PretrainDataModule(root, **({"val_fraction": 0.0} | options))
    module.setup()
    dataset = module.train_pairs.volumes
    return [dataset[index] for index in range(len(dataset))]


def names(root: Any) -> list[str]:
    return [file.name for file in find_volumes(root)]


def min_max(array: np.ndarray) -> Tensor:
    array = array.astype(np.float32)
    return torch.from_numpy((array - array.min()) / (array.max() - array.min()))


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


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_volume_is_never_paired_with_itself(folder: Path, tmp_path: Path, link: Any) -> None:
    link(folder / "case_0.nii.gz", folder / "again.nii.gz")
    assert len(find_volumes(str(folder))) == 7
    training, validation = PretrainDataModule(str(folder), val_count=2).configure_files()
    assert len({Path(file.image).resolve().stat().st_ino for file in training + validation}) == 6
    assert len(training + validation) == 6
    (tmp_path / "val").mkdir()
    for name, index in (("x", 0), ("y", 1), ("z", 1)):
        link(folder / f"case_{index}.nii.gz", tmp_path / "val" / f"{name}.nii.gz")
    module = PretrainDataModule(str(folder), val_root=str(tmp_path / "val"))
    training, validation = module.configure_files()
    assert [file.name for file in training] == [f"case_{index}" for index in range(2, 6)]
    assert [file.name for file in validation] == ["x", "y"]


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


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_volumes_are_turned_to_ras(tmp_path: Path, codes: str) -> None:
    array = values(0)
    image = nibabel.Nifti1Image(array, np.diag([1.5, 2.0, 2.5, 1]))
    orientation = nibabel.orientations.axcodes2ornt(codes)
    nibabel.save(image.as_reoriented(orientation), tmp_path / "turned.nii.gz")
    save(tmp_path / "other.nii.gz")
    turned = volumes(str(tmp_path))[1]["image"]
    stored = nibabel.load(tmp_path / "turned.nii.gz")
    expected = nibabel.as_closest_canonical(stored).get_fdata()
    assert torch.allclose(turned[0], min_max(expected))
    if codes == "RAS":
        assert torch.allclose(turned[0], min_max(array))


def test_all_formats_agree_on_values_and_place(tmp_path: Path) -> None:
    stored = SimpleITK.GetImageFromArray(values(3))
    turn = SimpleITK.Euler3DTransform((0, 0, 0), 0.2, -0.5, 2.5)
    stored.SetDirection(turn.GetMatrix())
    stored.SetSpacing((0.7, 1.3, 2.9))
    stored.SetOrigin((-12.0, 40.0, 7.5))
    for suffix in ("nii", "nii.gz", "nrrd", "mha", "mhd"):
        SimpleITK.WriteImage(stored, str(tmp_path / f"volume.{suffix}"))
    reference = nibabel.load(tmp_path / "volume.nii")
    assert len(find_volumes(str(tmp_path))) == 5
    for suffix in ("nii.gz", "nrrd", "mha", "mhd"):
        volume = read_volume(str(tmp_path / f"volume.{suffix}"))
        assert np.array_equal(volume[0].numpy(), reference.get_fdata())
        assert np.allclose(volume.affine.numpy(), reference.affine, atol=1e-4)


def test_channels_come_first_in_every_format(tmp_path: Path) -> None:
    array = values(1, (*SHAPE, 2))
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    np.save(tmp_path / "b.npy", np.moveaxis(array, -1, 0))
    vector = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True)
    vector.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(vector, str(tmp_path / "c.mha"))
    read = [item["image"] for item in volumes(str(tmp_path), channels=2)]
    expected = torch.stack([min_max(array[..., channel]) for channel in range(2)])
    assert all(torch.allclose(image, expected) for image in read)


def test_a_trailing_axis_of_one_is_no_channel_axis(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", shape=(*SHAPE, 1))
    save(tmp_path / "b.nii.gz", shape=SHAPE)
    assert [item["image"].shape for item in volumes(str(tmp_path))] == [(1, *SHAPE)] * 2


def test_dicom_series_of_one_folder_are_apart_and_sorted_by_position(tmp_path: Path) -> None:
    save_dicom(tmp_path / "patient", "1.2.3", seed=1, slices=6)
    save_dicom(tmp_path / "patient", "1.2.4", seed=2, slices=4)
    save_dicom(tmp_path / "patient", "1.2.5", seed=3, slices=1)
    with pytest.warns(UserWarning, match="one slice"):
        files = find_volumes(str(tmp_path))
    assert [len(file.image) for file in files] == [6, 4]
    assert [file.name for file in files] == ["patient", "patient_2"]
    volume = read_volume(files[0].image)
    assert np.array_equal(volume[0].numpy(), values(1, (5, 4, 6)))
    expected = [[-0.5, 0, 0, 3], [0, -0.75, 0, -4], [0, 0, 2.5, 0], [0, 0, 0, 1]]
    assert np.allclose(volume.affine.numpy(), expected)


def test_spacing_is_in_mm_along_right_front_top(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(21.0)[:, None, None], (21, 11, 31)).astype(np.float32)
    image = nibabel.Nifti1Image(ramp, np.diag([1.0, 2.0, 3.0, 1.0]))
    nibabel.save(image, tmp_path / "a.nii.gz")
    superior_first = nibabel.orientations.axcodes2ornt("SAL")
    nibabel.save(image.as_reoriented(superior_first), tmp_path / "b.nii.gz")
    both = volumes(str(tmp_path), spacing=(2.0, 2.0, 2.0))
    assert both[0]["image"].shape == (1, 11, 11, 46)
    for item in both:
        line = item["image"][0, :, 5, 20]
        assert torch.allclose(line.diff(), torch.full((10,), 0.1), atol=1e-5)
    assert torch.allclose(both[0]["image"], both[1]["image"], atol=1e-5)


def test_foreground_crop_takes_the_label_along(tmp_path: Path) -> None:
    array = np.zeros((20, 21, 22), np.float32)
    array[4:10, 5:12, 6:14] = values(0, (6, 7, 8))
    label = (array > 500).astype(np.uint8) * 3
    for name in ("a", "b", "c", "d"):
        for kind, content in (("images", array), ("labels", label)):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.save(
                nibabel.Nifti1Image(content, np.eye(4)), tmp_path / kind / f"{name}.nii.gz"
            )
    module = PretrainDataModule(
        str(tmp_path / "images"),
        label_root=str(tmp_path / "labels"),
        crop_foreground=0.0,
        val_count=2,
    )
    module.setup()
    item = module.validation_pairs.volumes[0]
    assert item["image"].shape == (1, 6, 7, 8)
    assert torch.equal(item["label"] == 3, item["image"] > 500 / array.max())
    assert not item["label"].is_floating_point()
    assert "label" not in module.train_pairs.volumes[0]


def test_custom_transforms_take_the_place_of_the_preset(folder: Path) -> None:
    spec = {
        "class_path": "monai.transforms.ScaleIntensityRanged",
        "init_args": {"keys": "image", "a_min": 0, "a_max": 4000, "b_min": 0, "b_max": 1},
    }
    item = volumes(str(folder), transforms=[spec], modality="mri")[2]
    assert torch.allclose(item["image"][0], torch.from_numpy(values(2)) / 4000)


def test_everything_can_be_set_in_yaml(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        f"""
        data:
          class_path: PretrainDataModule
          init_args:
            root: {folder}
            modality: mri
            spacing: [1, 1, 2]
            patch_size: [8, 8, 8]
            corruption: {{shuffling_rate: 0.3}}
            spatial: false
            transforms:
            - class_path: monai.transforms.ScaleIntensityd
              init_args: {{keys: image}}
        """
    )
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PairDataModule, "data")
    arguments = ["--config", str(config), "--data.init_args.corruption.shuffling_rate", "0.4"]
    module = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert module.corruption.shuffling.rate == 0.4
    assert module.spatial is None
    batch = next(iter(module.train_dataloader()))
    assert batch["fixed"].shape == (2, 1, 8, 8, 8)
    assert batch["fixed"].unique().numel() > 100


def test_cached_volumes_equal_those_read_again(folder: Path) -> None:
    read, cached = (volumes(str(folder), modality="mri", cache=cache) for cache in (False, True))
    for first, second in zip(read, cached, strict=True):
        assert first["name"] == second["name"]
        assert torch.equal(first["image"], second["image"])
    module = PretrainDataModule(str(folder), cache=True, val_count=2)
    module.setup()
    shutil.rmtree(folder)
    assert len(list(module.train_dataloader())) == 2
    assert len(list(module.val_dataloader())) == 1


def split(root: Path, **options: Any) -> tuple[list[str], list[str]]:
    training, validation = PretrainDataModule(str(root), **options).configure_files()
    return [file.name for file in training], [file.name for file in validation]


def test_the_split_is_complete_and_follows_split_seed_alone(folder: Path) -> None:
    training, validation = split(folder, val_count=2)
    assert len(validation) == 2
    assert sorted(training + validation) == [f"case_{index}" for index in range(6)]
    assert split(folder, val_count=2, seed=5) == (training, validation)
    assert len({tuple(split(folder, val_count=2, split_seed=seed)[1]) for seed in range(9)}) > 3
    assert [len(split(folder, val_fraction=share)[1]) for share in (0, 0.1, 0.2, 0.5)] == [
        0,
        2,
        2,
        3,
    ]


def test_explicit_validation_folder(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "val/v_0.nii.gz", 50)
    save(tmp_path / "val/v_1.nii.gz", 51)
    training, validation = split(folder, val_root=str(tmp_path / "val"))
    assert len(training) == 6
    assert validation == ["v_0", "v_1"]


def test_validation_volumes_inside_the_root_do_not_train(folder: Path) -> None:
    for index in range(2):
        save(folder / "val" / f"v{index}.nii.gz", 20 + index)
    module = PretrainDataModule(str(folder), val_root=str(folder / "val"))
    training, validation = module.configure_files()
    assert [file.name for file in training] == [f"case_{index}" for index in range(6)]
    assert [file.name for file in validation] == ["v0", "v1"]


def test_label_maps_inside_the_root_are_no_images(folder: Path) -> None:
    for index in range(6):
        save(folder / "labels" / f"case_{index}.nii.gz", 20 + index)
    files = find_volumes(str(folder), label_root=str(folder / "labels"))
    assert [file.name for file in files] == [f"case_{index}" for index in range(6)]
    assert all(file.label.startswith(str(folder / "labels")) for file in files)


def test_label_folder_without_a_fitting_name(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "labels" / "other.nii.gz")
    fails(
        "holds no label map that is named like a validation volume",
        str(folder),
        label_root=str(tmp_path / "labels"),
        val_fraction=0.4,
    )


def test_four_volumes_are_enough_for_validation(tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / f"case_{index}.nii.gz", index)
    training, validation = PretrainDataModule(str(tmp_path)).configure_files()
    assert (len(training), len(validation)) == (2, 2)


def test_paths_with_a_hash_and_a_byte_order_mark(tmp_path: Path) -> None:
    save(tmp_path / "h#1" / "v.nii.gz")
    listing = tmp_path / "list.txt"
    listing.write_text("h#1/v.nii.gz # first\n", encoding="utf-8-sig")
    assert names(str(listing)) == ["v"]


def test_damaged_lists_and_arrays(folder: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_bytes("case_é.nii.gz".encode("latin-1"))
    fails("is no text in UTF-8", str(listing))
    (folder / "dataset.json").write_text("5")
    assert len(names(str(folder))) == 6
    for name, array in (("text", np.full(SHAPE, "a")), ("complex", np.ones(SHAPE, complex))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match=f"{name}.npy has voxels that are (complex|of the)"):
            read_volume(str(tmp_path / f"{name}.npy"))


def test_three_volumes_all_train(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"{index}.npy", index)
    assert [len(part) for part in split(tmp_path)] == [3, 0]


def fails(sentence: str, root: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        list(PretrainDataModule(root, patch_size=(4, 4, 4), **options).train_dataloader())
    assert len(str(raised.value).splitlines()) == 1


def test_missing_or_too_few_files(folder: Path, tmp_path: Path) -> None:
    fails("nowhere does not exist", str(tmp_path / "nowhere"))
    fails(r"nothing\*.nii does not exist", str(folder / "nothing*.nii"))
    (tmp_path / "empty").mkdir()
    fails("empty holds no volume", str(tmp_path / "empty"))
    fails(r"case_1.nii.gz holds one volume .* at least two", str(folder / "case_1.nii.gz"))
    fails("leave at least two for training", str(folder), val_count=5)
    fails("at least two validation volumes", str(folder), val_count=1)


def test_wrong_lists(folder: Path) -> None:
    text = folder / "list.txt"
    text.write_text("case_0.nii.gz\ncase_9.nii.gz\n")
    fails("case_9.nii.gz, listed in .*list.txt, does not exist", str(text))
    text.write_text("case_0.nii.gz\nlist.txt.bak\n")
    (folder / "list.txt.bak").write_text("")
    fails("list.txt.bak is of an unknown format", str(text))
    listing = folder / "list.json"
    for content, sentence in (
        ("[", "not valid JSON"),
        ('{"train": []}', 'neither a list nor a "training" list'),
        ('[{"img": "case_0.nii.gz"}]', "has the entry"),
        ("[3]", "has the entry 3"),
        ("[]", "holds no volume"),
    ):
        listing.write_text(content)
        fails(sentence, str(listing))


@pytest.mark.parametrize("name", ["bad.nii.gz", "bad.nii", "bad.nrrd", "bad.mha", "bad.npy"])
def test_garbage_is_found_before_training_starts(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"no volume at all" * 40)
    with pytest.raises(InputError, match=f"{name} cannot be read .* leave it out") as raised:
        PretrainDataModule(str(folder)).setup()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (6, 7, 8, 3)])
def test_wrong_dimensions_are_found_before_training_starts(
    folder: Path, shape: tuple[int, ...]
) -> None:
    save(folder / "bad.nii.gz", shape=shape)
    with pytest.raises(InputError, match=r"bad.nii.gz has the shape \(6, 7.* 3D volume"):
        PretrainDataModule(str(folder)).setup()


def test_truncated_file(folder: Path) -> None:
    path = save(folder / "case_0.nii.gz", shape=(30, 30, 30))
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    fails("case_0.nii.gz cannot be read", str(folder), val_count=0)
    path.write_bytes(gzip.compress(gzip.decompress(packed)[:5000]))
    fails("case_0.nii.gz cannot be read", str(folder), val_count=0)


@pytest.mark.parametrize("content", [b"nonsense" * 50, b"", "truncated"])
def test_a_damaged_dicom_file_is_named(folder: Path, content: Any) -> None:
    save_dicom(folder / "series", "1.2.3", 0, 5)
    damaged = folder / "series" / "1.2.3-0.dcm"  # at an end, where no gap tells of it
    damaged.write_bytes(damaged.read_bytes()[:-20] if content == "truncated" else content)
    # the series that lacks it would be predicted as if it were whole
    assert [file.image for file in find_volumes(str(folder / "series"))] == [str(damaged)]
    sentence = (
        r"series/1.2.3-0.dcm cannot be read \(Unable to determine .* replace the damaged file"
    )
    fails(sentence, str(folder))
    shutil.rmtree(folder / "series")
    (folder / "one.dcm").write_bytes(b"nonsense")
    fails("one.dcm cannot be read .* replace the damaged file", str(folder))


def test_a_dicom_file_without_an_image_is_left_out_with_a_warning(tmp_path: Path) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 5)
    contours = pydicom.dcmread(next(tmp_path.glob("*.dcm")))
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"):
        delattr(contours, keyword)
    contours.Modality = "RTSTRUCT"
    contours.SOPClassUID = contours.file_meta.MediaStorageSOPClassUID = (
        "1.2.840.10008.5.1.4.1.1.481.3"
    )
    contours.save_as(tmp_path / "contours.dcm")
    with pytest.warns(
        UserWarning, match=r"contours.dcm is left out: a DICOM file without an image"
    ):
        (file,) = find_volumes(str(tmp_path))
    assert len(file.image) == 5


def test_missing_and_repeated_dicom_slices(tmp_path: Path) -> None:
    save_dicom(tmp_path / "one", "1.2.3", 0, 5)
    save_dicom(tmp_path / "two", "1.2.4", 0, 5)
    truncated = tmp_path / "two/1.2.4-4.dcm"
    whole = truncated.read_bytes()
    truncated.unlink()
    fails(r"The DICOM series in .*two has slices between 2.5 and 5 mm apart", str(tmp_path))
    truncated.write_bytes(whole)
    shutil.copy(truncated, tmp_path / "two/again.dcm")
    fails(
        r"The DICOM series in .*two has slices between .* mm apart; .* there twice", str(tmp_path)
    )


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_values_that_are_not_finite(folder: Path, value: float, kind: str) -> None:
    array = values(0).astype(np.float32)
    array[1, 2, 3] = value
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "case_4.nii.gz")
    fails(f"case_4.nii.gz holds 1 {kind} values among 336", str(folder), val_count=0)


def test_an_error_in_a_worker_process_ends_in_the_same_sentence(folder: Path) -> None:
    array = np.full(SHAPE, np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / "case_4.nii.gz")
    module = PretrainDataModule(str(folder), patch_size=(4, 4, 4), val_count=0, num_workers=1)
    with pytest.raises(InputError) as raised:
        list(module.train_dataloader())
    last = str(raised.value).strip().splitlines()[-1]
    assert last.endswith("replace them by numbers or leave the file out.")
    assert "case_4.nii.gz holds 336 NaN values among 336" in last


def test_labels_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    fails("labels, the folder of labels, does not exist", str(folder), label_root=str(labels))
    for index in range(5):
        save(labels / f"case_{index}.nii.gz", index, shape=(6, 7, 9))
    for index in range(2):
        save(tmp_path / "training" / f"{index}.nii.gz", index)
    every = {"label_root": str(labels), "val_root": str(folder)}
    fails("case_5.nii.gz has no label map", str(tmp_path / "training"), **every)
    save(labels / "case_5.nii.gz", 5, shape=(6, 7, 9))
    module = PretrainDataModule(str(tmp_path / "training"), **every)
    with pytest.raises(InputError, match=r"labels/case_. *.nii.gz has the shape \(6, 7, 9\)"):
        list(module.val_dataloader())


def test_wrong_transforms(folder: Path) -> None:
    unknown = {"class_path": "monai.transforms.Nothing"}
    fails("Nothing.* cannot be made", str(folder), transforms=[unknown])
    needs_other = {
        "class_path": "monai.transforms.ScaleIntensityd",
        "init_args": {"keys": "picture"},
    }
    fails("case_. *.nii.gz cannot be prepared", str(folder), transforms=[needs_other])


def test_wrong_numbers(folder: Path) -> None:
    fails("val_fraction is 1", str(folder), val_fraction=1.0)
    fails("spacing is", str(folder), spacing=(1.0, 0.0, 1.0))


def test_torso_keeps_its_orientation_and_spacing(data_root: Path, tmp_path: Path) -> None:
    torso = nibabel.load(data_root / "ct_torso_3mm.nii.gz")
    expected = ((torso.get_fdata(dtype=np.float32) + 1024) / 2048).clip(0, 1)
    for index, codes in enumerate(("RAS", "LPI")):
        orientation = nibabel.orientations.axcodes2ornt(codes)
        nibabel.save(torso.as_reoriented(orientation), tmp_path / f"{index}.nii.gz")
    for item in volumes(str(tmp_path), modality="ct"):
        assert np.allclose(item["image"][0].numpy(), expected, atol=1e-6)
    volume = read_volume(str(tmp_path / "1.nii.gz"))
    assert not np.allclose(volume.affine.numpy(), torso.affine)
    generator = np.random.default_rng(0)
    for voxel in generator.integers(0, torso.shape, (50, 3)):
        world = torso.affine @ [*voxel, 1]
        found = np.rint(np.linalg.inv(volume.affine.numpy()) @ world)[:3].astype(int)
        assert volume[0, found[0], found[1], found[2]] == torso.dataobj[tuple(voxel)]


def test_dicom_series_lies_where_simpleitk_and_the_headers_say(data_root: Path) -> None:
    folder = data_root / "ct_dicom_series"
    (file,) = find_volumes(str(folder))
    volume = read_volume(file.image)
    affine = volume.affine.numpy()
    reference = SimpleITK.ReadImage(file.image)
    assert volume.shape == (1, *reference.GetSize())
    generator = np.random.default_rng(0)
    for voxel in generator.integers(0, volume.shape[1:], (200, 3)):
        right, front, top = (affine @ [*voxel, 1])[:3]
        index = reference.TransformPhysicalPointToIndex((-right, -front, top))
        assert volume[0, voxel[0], voxel[1], voxel[2]] == reference[index]
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    positions = sorted(
        (list(header.ImagePositionPatient) for header in headers), key=lambda p: p[2]
    )
    assert np.allclose(affine[:3, 3], np.multiply(positions[0], [-1, -1, 1]))
    assert np.allclose(np.abs(np.diag(affine))[:2], headers[0].PixelSpacing)
    assert np.isclose(affine[2, 2], positions[1][2] - positions[0][2])


def test_real_volumes_of_different_formats_make_resampled_pairs(data_root: Path) -> None:
    module = PretrainDataModule(
        [str(data_root / "ct_dicom_series"), str(data_root / "ct_torso_3mm.nii.gz")],
        modality="ct",
        spacing=(3.0, 3.0, 3.0),
        patch_size=(64, 64, 14),
        cache=True,
    )
    module.setup()
    series = module.train_pairs.volumes[0]
    stored = SimpleITK.ReadImage(find_volumes(str(data_root / "ct_dicom_series"))[0].image)
    grid = SimpleITK.Image(*series["image"].shape[1:], SimpleITK.sitkFloat32)
    grid.SetSpacing((3.0, 3.0, 3.0))
    grid.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    grid.SetOrigin(stored.TransformIndexToPhysicalPoint((511, 511, 0)))
    resampled = SimpleITK.Resample(
        SimpleITK.Cast(stored, SimpleITK.sitkFloat32),
        grid,
        SimpleITK.Transform(),
        SimpleITK.sitkLinear,
    )
    expected = SimpleITK.GetArrayFromImage(resampled).transpose(2, 1, 0)
    expected = ((expected + 1024) / 2048).clip(0, 1)
    inside = (slice(1, -1), slice(1, -1), slice(0, 13))
    assert np.allclose(series["image"][0].numpy()[inside], expected[inside], atol=1e-3)
    batch = next(iter(module.train_dataloader()))
    assert batch["fixed"].shape == (2, 1, 64, 64, 14)
    assert set(batch["fixed_name"]) == {"ct_dicom_series", "ct_torso_3mm"}
