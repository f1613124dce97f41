import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import read_volume
from gvsl_lightning.datamodules import PairDataModule, PretrainDataModule
from gvsl_lightning.errors import InputError
from small_volumes import SHAPE, save, values


def volumes(root: Any, **options: Any) -> list[dict[str, Any]]:
    module = PretrainDataModule(root, **({"val_fraction": 0.0} | options))
    module.setup()
    dataset = module.train_pairs.volumes
    return [dataset[index] for index in range(len(dataset))]


def min_max(array: np.ndarray) -> Tensor:
    array = array.astype(np.float32)
    return torch.from_numpy((array - array.min()) / (array.max() - array.min()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(6):
        save(tmp_path / "data" / f"case_{index}.nii.gz", index)
    return tmp_path / "data"


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
            transforms:
            - class_path: monai.transforms.ScaleIntensityd
              init_args: {{keys: image}}
        """
    )
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(PairDataModule, "data")
    arguments = ["--config", str(config), "--data.batch_size", "1"]
    module = parser.instantiate_classes(parser.parse_args(arguments)).data
    batch = next(iter(module.train_dataloader()))
    assert batch["fixed"].shape == (1, 1, 8, 8, 8)
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


def test_three_volumes_all_train(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"{index}.npy", index)
    assert [len(part) for part in split(tmp_path)] == [3, 0]


def fails(sentence: str, root: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        list(PretrainDataModule(root, patch_size=(4, 4, 4), **options).train_dataloader())
    assert len(str(raised.value).splitlines()) == 1


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


def test_too_few_volumes(folder: Path) -> None:
    fails("case_1.nii.gz", str(folder / "case_1.nii.gz"))
    fails("val_count", str(folder), val_count=5)
    fails("validation", str(folder), val_count=1)


def test_headers_are_checked_before_training_starts(folder: Path) -> None:
    save(folder / "bad.nii.gz", shape=(6, 7))
    with pytest.raises(InputError, match=r"bad.nii.gz"):
        PretrainDataModule(str(folder)).setup()
