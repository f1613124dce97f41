"""Written registrations: opened with nibabel and SimpleITK, measured, kept, reported."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import SimpleITK
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import Tensor

from checkpoints import registration_checkpoint
from gvsl_lightning.callbacks import RegistrationWriter
from gvsl_lightning.callbacks.registration_table import measure_labels
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import Phantom, RegistrationDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.heads import Matching
from gvsl_lightning.tasks import GVSL

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
TINY: dict[str, Any] = {"backbone_options": {"channels": [8, 16]}, "affine_channels": 8}


class Bent(GVSL):
    """Finds the same affine and smooth map for every pair, given relative to the size."""

    def match(self, fixed: Tensor, moving: Tensor) -> Matching:
        shape = fixed.shape[2:]
        random = torch.Generator().manual_seed(1)
        coarse = 2 * torch.rand(1, 3, 4, 3, 4, generator=random) - 1
        rotation, scale, shear, shift = (
            torch.rand(1, count, generator=random) - 0.5 for count in (3, 3, 6, 3)
        )
        affine = geometry.affine_matrix(0.4 * rotation, 1 + 0.3 * scale, 0.2 * shear, 3 * shift)
        return Matching(affine, F.interpolate(coarse, shape, mode="trilinear", align_corners=True))


class Shifted(GVSL):
    """Moves the content by two voxels towards index 0 of axis 1."""

    def match(self, fixed: Tensor, moving: Tensor) -> Matching:
        affine = geometry.identity_affine(1).clone()
        affine[0, 1, 3] = 2
        return Matching(affine, fixed.new_zeros(1, 3, *fixed.shape[2:]))


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def smooth(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    coarse = torch.rand(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, shape, mode="trilinear", align_corners=True)
    return (1000 * fine[0, 0]).numpy().astype(np.int16)


def oblique(seed: int, mirrored: bool) -> np.ndarray:
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    rotation[:, 0] *= np.sign(np.linalg.det(rotation)) * (-1 if mirrored else 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation * random.uniform(0.6, 3.0, 3)
    affine[:3, 3] = random.uniform(-100, 100, 3)
    return affine


def axes(codes: str, seed: int) -> np.ndarray:
    """An affine with these axes, unequal voxels and some origin."""
    random = np.random.default_rng(seed)
    affine = np.eye(4)
    directions = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine[:3, :3] = 0
    for column, code in enumerate(codes):
        row, sign = directions[code]
        affine[row, column] = sign * random.uniform(0.7, 2.5)
    affine[:3, 3] = random.uniform(-100, 100, 3)
    return affine


def predict(
    task: GVSL, folder: Path, callbacks: list[Callback] | None = None, **data: Any
) -> dict[str, dict[str, str]]:
    """Register, and read the table by the pairs' names."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks or [RegistrationWriter(str(folder))],
    )
    assert trainer.predict(task, datamodule=RegistrationDataModule(**data)) is None
    return rows(folder)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "registration.csv").open(newline="") as file:
        return {row["pair"]: row for row in csv.DictReader(file)}


def one_pair(tmp_path: Path, **row: str) -> str:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row]))
    return str(path)


def array_of(image: SimpleITK.Image) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(image)


def read_itk(path: str) -> SimpleITK.Image:
    if Path(path).is_dir():
        slices = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(path)
        return SimpleITK.ReadImage(slices, SimpleITK.sitkFloat32)
    return SimpleITK.ReadImage(path, SimpleITK.sitkFloat32)


def agrees_with_simpleitk(folder: Path, fixed: str, moving: str, label: str | None = None) -> None:
    """The files lie on the fixed grid, and SimpleITK makes the same with the field."""
    grid, image = read_itk(fixed), read_itk(moving)
    field = SimpleITK.ReadImage(str(folder / "displacement.nii.gz"), SimpleITK.sitkVectorFloat64)
    warped = SimpleITK.ReadImage(str(folder / "warped.nii.gz"))
    for written in (field, warped):
        assert written.GetSize() == grid.GetSize()
        assert np.allclose(written.GetSpacing(), grid.GetSpacing(), atol=1e-5)
        assert np.allclose(written.GetDirection(), grid.GetDirection(), atol=1e-5)
        assert np.allclose(written.GetOrigin(), grid.GetOrigin(), atol=1e-4)
    transform = SimpleITK.DisplacementFieldTransform(field)
    resampled = array_of(SimpleITK.Resample(image, grid, transform, SimpleITK.sitkLinear))
    scale = np.ptp(array_of(image))
    assert resampled.std() > 0.05 * scale
    assert np.abs(resampled - array_of(warped)).max() < 1e-3 * scale
    if label is not None:
        written = SimpleITK.ReadImage(str(folder / "warped_label.nii.gz"))
        transform = SimpleITK.DisplacementFieldTransform(
            SimpleITK.ReadImage(str(folder / "displacement.nii.gz"), SimpleITK.sitkVectorFloat64)
        )
        expected = SimpleITK.Resample(
            read_itk(label), grid, transform, SimpleITK.sitkNearestNeighbor
        )
        assert written.GetPixelID() == SimpleITK.sitkUInt8
        assert (array_of(expected) != array_of(written)).mean() < 1e-3
        assert len(np.unique(array_of(written))) == 4


AFFINES = {
    "RAS": lambda seed: axes("RAS", seed),
    "LPS": lambda seed: axes("LPS", seed),
    "LAS": lambda seed: axes("LAS", seed),
    "IPR": lambda seed: axes("IPR", seed),
    "oblique": lambda seed: oblique(seed, mirrored=False),
    "oblique and mirrored": lambda seed: oblique(seed, mirrored=True),
}


@pytest.mark.parametrize("spacing", [None, (1.3, 1.1, 1.7)])
@pytest.mark.parametrize("order", ["displacement_first", "affine_first"])
@pytest.mark.parametrize(
    ("fixed", "moving"),
    [
        ("RAS", "LPS"),
        ("LAS", "oblique"),
        ("oblique", "oblique and mirrored"),
        ("oblique and mirrored", "IPR"),
        ("IPR", "RAS"),
    ],
)
def test_simpleitk_makes_the_same_from_the_written_field(
    tmp_path: Path, fixed: str, moving: str, order: str, spacing: Any
) -> None:
    fixed_path = save(tmp_path / "a.nii.gz", smooth(1, (17, 14, 15)), AFFINES[fixed](11))
    moving_image = smooth(2, (14, 16, 18))
    moving_path = save(tmp_path / "b.nii.gz", moving_image, AFFINES[moving](12))
    label = np.digitize(moving_image, [300, 500, 700]).astype(np.int16)
    label_path = save(tmp_path / "l.nii.gz", label, AFFINES[moving](12))
    table = one_pair(tmp_path, fixed=fixed_path, moving=moving_path, moving_label=label_path)
    out = tmp_path / "out"
    predict(Bent(composition=order, **TINY), out, pairs=table, spacing=spacing)
    agrees_with_simpleitk(out / "b_onto_a", fixed_path, moving_path, label_path)
    field = nibabel.load(out / "b_onto_a/displacement.nii.gz")
    assert field.shape == (17, 14, 15, 1, 3)
    assert field.header["intent_code"] == 1007
    warped = nibabel.load(out / "b_onto_a/warped.nii.gz")
    assert np.array_equal(warped.affine, nibabel.load(fixed_path).affine)


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SRA"])
def test_the_storage_order_of_either_volume_changes_nothing(tmp_path: Path, codes: str) -> None:
    """A volume stored along other axes is the same volume, and so is the result."""
    images = {
        "fixed": nibabel.Nifti1Image(smooth(1, (12, 14, 15)), axes("RAS", 1)),
        "moving": nibabel.Nifti1Image(smooth(2, (14, 12, 16)), axes("RAS", 2)),
    }
    ras, other = map(nibabel.orientations.axcodes2ornt, ("RAS", codes))
    turn = nibabel.orientations.ornt_transform(ras, other)
    results = []
    for turned in (None, "fixed", "moving"):
        paths = {}
        for role, image in images.items():
            paths[role] = str(tmp_path / f"{turned}_{role}.nii.gz")
            nibabel.save(image.as_reoriented(turn) if role == turned else image, paths[role])
        out = tmp_path / f"out_{turned}"
        (name,) = predict(Bent(**TINY), out, pairs=one_pair(tmp_path, **paths))
        warped = nibabel.load(out / name / "warped.nii.gz")
        assert nibabel.aff2axcodes(warped.affine) == tuple(codes if turned == "fixed" else "RAS")
        results.append(nibabel.as_closest_canonical(warped).get_fdata())
    assert np.ptp(results[0]) > 300
    for result in results[1:]:
        # a point on the volume's very edge may fall to either side of it
        assert (np.abs(result - results[0]) > 1e-2).mean() < 1e-3


def save_dicom(folder: Path, array: np.ndarray, affine: np.ndarray) -> str:
    """A DICOM series; `affine` leads to mm in the LPS system, as DICOM has it."""
    folder.mkdir(parents=True)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    for index in range(array.shape[2]):
        image = SimpleITK.GetImageFromArray(array[:, :, index].T)
        image.SetSpacing(steps[:2].tolist())
        position = affine[:3, 3] + index * affine[:3, 2]
        directions = [*(affine[:3, 0] / steps[0]), *(affine[:3, 1] / steps[1])]
        for tag, value in {
            "0008|0060": "CT",
            "0008|0018": f"1.2.3.{index + 1}",
            "0020|000e": "1.2.3",
            "0020|0013": str(index),
            "0020|0032": "\\".join(f"{number:.8f}" for number in position),
            "0020|0037": "\\".join(f"{number:.10f}" for number in directions),
        }.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{index}.dcm"))
        writer.Execute(image)
    return str(folder)


def test_dicom_series_of_an_oblique_scan(tmp_path: Path) -> None:
    series = save_dicom(tmp_path / "scan", smooth(1, (15, 17, 12)), oblique(4, mirrored=False))
    volume = save(tmp_path / "b.nii.gz", smooth(2, (14, 16, 13)), axes("LAS", 3))
    for fixed, moving in ((series, volume), (volume, series)):
        out = tmp_path / f"onto_{Path(fixed).name}"
        (name,) = predict(Bent(**TINY), out, pairs=one_pair(tmp_path, fixed=fixed, moving=moving))
        agrees_with_simpleitk(out / name, fixed, moving)


def test_real_ct_and_dicom_series(data_root: Path, tmp_path: Path) -> None:
    series, torso = str(data_root / "ct_dicom_series"), str(data_root / "ct_torso_3mm.nii.gz")
    options: dict[str, Any] = {"modality": "ct", "spacing": (6.0, 6.0, 6.0)}
    table = one_pair(tmp_path, fixed=torso, moving=series)
    writer = RegistrationWriter(str(tmp_path / "out"), outside=-1024.0)
    task = Bent(**TINY)
    (name,) = predict(task, tmp_path / "out", [writer], pairs=table, **options)
    folder = tmp_path / "out" / name
    warped = nibabel.load(folder / "warped.nii.gz")
    assert warped.get_fdata().min() == -1024
    field = SimpleITK.ReadImage(str(folder / "displacement.nii.gz"), SimpleITK.sitkVectorFloat64)
    resampled = SimpleITK.Resample(
        read_itk(series),
        read_itk(torso),
        SimpleITK.DisplacementFieldTransform(field),
        SimpleITK.sitkLinear,
        -1024.0,
    )
    expected = array_of(resampled).transpose(2, 1, 0)
    assert (expected > -1000).mean() > 0.02
    assert np.abs(expected - warped.get_fdata()).max() < 1e-3 * 2048


def boxes(*corners: tuple[int, int, int]) -> np.ndarray:
    """Label maps with boxes of 4 x 4 x 4 voxels, numbered from 1."""
    label = np.zeros((16, 16, 16), np.int16)
    for number, (x, y, z) in enumerate(corners, 1):
        label[x : x + 4, y : y + 4, z : z + 4] = number
    return label


def test_measures_of_a_known_shift(tmp_path: Path) -> None:
    """The found shift of two voxels brings the structures into place; 3 mm a voxel there."""
    affine = np.diag([1.0, 3.0, 2.0, 1.0])
    image = smooth(3, (16, 16, 16))
    paths = {
        "fixed": save(tmp_path / "a.nii.gz", image, affine),
        "moving": save(tmp_path / "b.nii.gz", np.roll(image, 2, axis=1), affine),
        "fixed_label": save(tmp_path / "la.nii.gz", boxes((1, 4, 2), (8, 5, 9)), affine),
        "moving_label": save(tmp_path / "lb.nii.gz", boxes((1, 6, 2), (8, 7, 9)), affine),
    }
    table = one_pair(tmp_path, **paths)
    row = predict(Shifted(**TINY), tmp_path / "out", pairs=table)["b_onto_a"]
    measured = {
        key: float(value) for key, value in row.items() if key[0] in "ndhf" and "/" not in value
    }
    assert measured["dice_before"] == measured["dice_before_1"] == 0.5
    assert measured["dice_after"] == measured["dice_after_2"] == 1
    assert measured["hd95_mm_before"] == measured["hd95_mm_before_2"] == 6
    assert measured["hd95_mm_after"] == measured["hd95_mm_after_1"] == 0
    assert measured["folded"] == 0
    assert measured["ncc_after"] > 2 * measured["ncc_before"]
    assert row["fixed"] == paths["fixed"]
    warped = nibabel.load(tmp_path / "out/b_onto_a/warped.nii.gz").get_fdata()
    assert np.array_equal(warped[:, :-2], image[:, :-2])
    assert (warped[:, -2:] == 0).all()


def test_the_middle_of_a_larger_moving_volume_is_the_start(tmp_path: Path) -> None:
    image = smooth(3, (16, 16, 16))
    larger = np.pad(image, ((3, 3), (0, 0), (2, 3)))[:, 2:-2]
    paths = {
        "fixed": save(tmp_path / "a.nii.gz", image),
        "moving": save(tmp_path / "b.nii.gz", larger, np.diag([2.0, 2.0, 2.0, 1.0])),
        "fixed_label": save(
            tmp_path / "la.nii.gz", np.digitize(image, [400, 600]).astype(np.uint8)
        ),
    }
    row = predict(GVSL(**TINY), tmp_path / "out", pairs=one_pair(tmp_path, **paths))["b_onto_a"]
    warped = nibabel.load(tmp_path / "out/b_onto_a/warped.nii.gz").get_fdata()
    assert np.abs(warped[:, 2:-2] - image[:, 2:-2]).max() < 1  # an untrained head moves nothing
    assert float(row["ncc_before"]) == pytest.approx(float(row["ncc_after"]), abs=1e-3)
    assert not any(key.startswith("dice") for key in row)
    assert not (tmp_path / "out/b_onto_a/warped_label.nii.gz").exists()


def test_an_undefined_distance_is_no_number_and_enters_no_mean() -> None:
    fixed = boxes((1, 4, 2), (8, 5, 9), (12, 12, 12))
    before = boxes((1, 6, 2), (8, 5, 9))
    after = boxes((1, 4, 2))
    columns = measure_labels(fixed, before, after, (1.0, 3.0, 2.0))
    assert [columns[f"dice_before_{k}"] for k in (1, 2, 3)] == [0.5, 1, 0]
    assert [columns[f"dice_after_{k}"] for k in (1, 2, 3)] == [1, 0, 0]
    assert columns["dice_after"] == pytest.approx(1 / 3)
    assert columns["hd95_mm_before_2"] == 0
    undefined = [key for key, value in columns.items() if np.isnan(value)]
    assert undefined == ["hd95_mm_after_2", "hd95_mm_before_3", "hd95_mm_after_3"]
    assert (columns["hd95_mm_before"], columns["hd95_mm_after"]) == (6, 0)
    nothing = measure_labels(np.zeros_like(fixed), before, after, (1.0, 1.0, 1.0))
    assert np.isnan(list(nothing.values())).all()


@pytest.mark.parametrize("largest", [255, 256, 70000])
def test_labels_get_the_smallest_type_that_holds_them(tmp_path: Path, largest: int) -> None:
    label = np.zeros((10, 10, 10), np.int32)
    label[2:8, 2:8, 2:8] = largest
    image = save(tmp_path / "a.nii.gz", smooth(1, (10, 10, 10)))
    table = one_pair(
        tmp_path,
        fixed=image,
        moving=image,
        moving_label=save(tmp_path / "l.nii.gz", label),
    )
    (name,) = predict(GVSL(**TINY), tmp_path / "out", pairs=table)
    written = nibabel.load(tmp_path / "out" / name / "warped_label.nii.gz")
    assert written.get_data_dtype() == {255: "u1", 256: "u2", 70000: "u4"}[largest]
    assert np.array_equal(written.dataobj, label)


@pytest.mark.parametrize(("sform", "qform"), [(2, 0), (0, 1), (4, 1), (0, 0)])
def test_both_forms_of_the_fixed_file_are_kept(tmp_path: Path, sform: int, qform: int) -> None:
    image = nibabel.Nifti1Image(smooth(1, (10, 11, 12)), None)
    image.set_qform(oblique(1, mirrored=True), qform)
    image.set_sform(oblique(2, mirrored=True), sform)  # another voxel size than pixdim's
    nibabel.save(image, tmp_path / "a.nii")
    moving = save(tmp_path / "b.nii.gz", smooth(2, (10, 11, 12)))
    table = one_pair(tmp_path, fixed=str(tmp_path / "a.nii"), moving=moving)
    predict(GVSL(**TINY), tmp_path / "out", pairs=table)
    stored = nibabel.load(tmp_path / "a.nii")
    for file in ("warped.nii.gz", "displacement.nii.gz"):
        written = nibabel.load(tmp_path / "out/b_onto_a" / file)
        assert np.allclose(written.affine, stored.affine, atol=1e-5)
        if (sform, qform) == (0, 0):  # an explicit form, for readers that guess otherwise
            assert written.header["sform_code"] == 1
            continue
        for get in ("get_sform", "get_qform"):
            form, code = getattr(written, get)(coded=True)
            expected, expected_code = getattr(stored, get)(coded=True)
            assert code == expected_code
            assert (form is None) == (expected is None)
            assert form is None or np.array_equal(form, expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An atlas with labels and three labelled volumes."""
    for index in range(3):
        save(tmp_path / f"images/case_{index}.nii.gz", smooth(index, (16, 16, 16)))
        save(tmp_path / f"labels/case_{index}.nii.gz", boxes((1, 4 + index, 2)))
    save(tmp_path / "atlas.nii.gz", smooth(7, (16, 16, 16)))
    save(tmp_path / "atlas_label.nii.gz", boxes((2, 4, 2)))
    return tmp_path


def atlas(folder: Path) -> dict[str, Any]:
    return {
        "root": str(folder / "images"),
        "label_root": str(folder / "labels"),
        "atlas": str(folder / "atlas.nii.gz"),
        "atlas_label": str(folder / "atlas_label.nii.gz"),
    }


def test_finished_pairs_are_kept_and_others_finished(folder: Path, capsys: Any) -> None:
    out, task = folder / "out", GVSL(**TINY)
    first = predict(task, out, **atlas(folder))
    assert list(first) == [f"atlas_onto_case_{index}" for index in range(3)]
    assert "3 pairs registered (0 kept, 0 failed)" in capsys.readouterr().out

    mark = out / "atlas_onto_case_0/warped.nii.gz"
    mark.write_bytes(b"mine")
    (out / "atlas_onto_case_1/displacement.nii.gz").unlink()
    (out / "atlas_onto_case_2/warped_label.nii.gz").write_bytes(b"half")
    lines = (out / "registration.csv").read_text().splitlines(keepends=True)
    (out / "registration.csv").write_text("".join(lines[:-1]))  # stopped before the last row
    assert predict(task, out, **atlas(folder)) == first
    assert "3 pairs registered (1 kept, 0 failed)" in capsys.readouterr().out
    assert mark.read_bytes() == b"mine"
    assert (out / "atlas_onto_case_1/displacement.nii.gz").is_file()
    assert nibabel.load(out / "atlas_onto_case_2/warped_label.nii.gz").shape == (16, 16, 16)

    predict(task, out, **atlas(folder))
    printed = capsys.readouterr().out
    assert "3 pairs registered (3 kept, 0 failed)" in printed
    dice = np.mean([float(row["dice_before"]) for row in first.values()])
    assert f"Dice {dice:.3f} -> " in printed
    assert "(3 pairs)" in printed

    writer = RegistrationWriter(str(out), overwrite=True)
    assert predict(Bent(**TINY), out, [writer], **atlas(folder)) != first
    assert nibabel.load(mark).shape == (16, 16, 16)


def test_a_row_goes_with_its_files(folder: Path) -> None:
    out, task = folder / "out", GVSL(**TINY)
    predict(task, out, **atlas(folder))
    shutil.rmtree(out / "atlas_onto_case_1")
    (folder / "images/case_1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"1 of 3 pairs"):
        predict(task, out, **atlas(folder))
    assert list(rows(out)) == ["atlas_onto_case_0", "atlas_onto_case_2"]


def test_rows_of_other_pairs_stay(folder: Path) -> None:
    out, task = folder / "out", GVSL(**TINY)
    predict(task, out, **atlas(folder))
    table = one_pair(folder, fixed="images/case_0.nii.gz", moving="images/case_1.nii.gz")
    writer = RegistrationWriter(str(out), overwrite=True)
    found = predict(task, out, [writer], pairs=table)
    assert list(found) == [*(f"atlas_onto_case_{k}" for k in range(3)), "case_1_onto_case_0"]
    assert found["case_1_onto_case_0"]["dice_before"] == ""
    assert found["atlas_onto_case_0"]["dice_before"] != ""


def test_a_broken_file_is_named_at_the_end_and_the_rest_is_done(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    broken = folder / "images/case_0.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    words = ["predict", "--config", QUICKSTART, "--data=RegistrationDataModule"]
    words += [f"--data.{name}={value}" for name, value in atlas(folder).items()]
    words += [f"--model.{name}={json.dumps(value)}" for name, value in TINY.items()]
    words += ["--trainer.callbacks+=RegistrationWriter", "--out=out"]
    words += [f"--ckpt_path={registration_checkpoint(folder / 'task.ckpt', **TINY)}"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 3 pairs could not be registered, the others are in out: ")
    assert f"[atlas_onto_case_0] {broken} cannot be read" in last
    assert "2 pairs registered (0 kept, 1 failed) in out: NCC" in printed.out
    assert list(rows(folder / "out")) == ["atlas_onto_case_1", "atlas_onto_case_2"]

    broken.write_bytes(whole)
    main(words)
    assert "3 pairs registered (2 kept, 0 failed) in out: NCC" in capsys.readouterr().out
    assert len(rows(folder / "out")) == 3


def test_nothing_left_fails_as_long_as_a_file_is_broken(folder: Path) -> None:
    for index in range(3):
        (folder / f"images/case_{index}.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError, match=r"3 of 3 pairs .*the first one: .*case_0"):
        predict(GVSL(**TINY), folder / "out", **atlas(folder))


def test_what_it_cannot_be_used_with(folder: Path) -> None:
    def fails(sentence: str, task: pl.LightningModule, data: pl.LightningDataModule) -> None:
        writer = RegistrationWriter(str(folder / "out"))
        trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[writer])
        with pytest.raises(InputError, match=sentence):
            trainer.predict(task, datamodule=data)

    data = RegistrationDataModule(**atlas(folder))
    fails("this is BoringModel", BoringModel(), data)
    fails("needs a GVSL task with z_matching", GVSL(z_matching=False, **TINY), data)
    phantom = Phantom(size=(16, 16, 16), num_train=2, num_val=2)
    fails("the data is a Phantom", GVSL(**TINY), phantom)
    (folder / "out").mkdir()
    (folder / "out/registration.csv").write_text("a,b\n1,2\n")
    fails("registration.csv is another table", GVSL(**TINY), data)
