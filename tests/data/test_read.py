import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.read import check_volume, read_label, read_volume, write_volume
from gvsl_lightning.errors import InputError
from small_volumes import SHAPE, save, values


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
    SimpleITK.WriteImage(vector, str(tmp_path / "c.mha"))
    for name in ("a.nii.gz", "b.npy", "c.mha"):
        volume = read_volume(str(tmp_path / name), channels=2)
        assert np.array_equal(volume.numpy(), np.moveaxis(array, -1, 0))


def test_a_trailing_axis_of_one_is_no_channel_axis(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", shape=(*SHAPE, 1))
    assert read_volume(str(path)).shape == (1, *SHAPE)


@pytest.mark.parametrize("name", ["bad.nii.gz", "bad.nii", "bad.nrrd", "bad.mha", "bad.npy"])
def test_garbage_is_found_by_its_header(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no volume at all" * 40)
    with pytest.raises(InputError, match=name):
        check_volume(str(tmp_path / name))


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (6, 7, 8, 3)])
def test_wrong_dimensions_are_found_in_the_header(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / "bad.nii.gz", shape=shape)
    with pytest.raises(InputError, match=r"bad.nii.gz .*\(6, 7"):
        check_volume(str(path))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = save(tmp_path / "bad.nii.gz", shape=(30, 30, 30))
    packed = path.read_bytes()
    for damaged in (
        packed[: len(packed) // 2],
        gzip.compress(gzip.decompress(packed)[:5000]),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad.nii.gz"):
            read_volume(str(path))


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_values_that_are_not_finite(tmp_path: Path, value: float, kind: str) -> None:
    array = values(0).astype(np.float32)
    array[1, 2, 3] = value
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(InputError, match=f"bad.npy .*1 {kind} .*336"):
        read_volume(str(tmp_path / "bad.npy"))


@pytest.mark.parametrize("array", [np.full(SHAPE, "a"), np.ones(SHAPE, complex)])
def test_voxels_that_are_no_real_numbers(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(InputError, match=r"bad.npy"):
        read_volume(str(tmp_path / "bad.npy"))


@pytest.mark.parametrize(("unit", "size", "mm"), [("micron", 50, 0.05), ("meter", 0.02, 20.0)])
def test_units_of_a_header_become_mm_on_reading_and_writing(
    tmp_path: Path, unit: str, size: float, mm: float
) -> None:
    image = nibabel.Nifti1Image(values(0), np.diag([size, size, size, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(str(tmp_path / "a.nii.gz"))
    assert np.allclose(np.diag(volume.affine), [mm, mm, mm, 1])
    array = volume[0].numpy()
    write_volume(tmp_path / "b.nii.gz", array, str(tmp_path / "a.nii.gz"), volume.affine.numpy())
    assert np.allclose(read_volume(str(tmp_path / "b.nii.gz")).affine, volume.affine)
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert written.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(written.header.get_zooms(), mm)


def test_label_values_beyond_float32_survive_reading_and_resampling(tmp_path: Path) -> None:
    array = np.zeros((6, 6, 6), np.int64)
    array[2:4], array[4:] = 2**24 + 1, 2**40 + 3
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4), dtype="int64"), tmp_path / "label.nii.gz")
    label = read_label(str(tmp_path / "label.nii.gz"))
    assert np.array_equal(label[0].numpy(), array)
    image = MetaTensor(torch.rand(1, 6, 6, 6), affine=torch.eye(4, dtype=torch.float64))
    item = {"image": image, "label": label}
    prepared = Preparation(spacing=(0.5, 0.5, 0.5))(item, "a.nii.gz")["label"]
    assert prepared.unique().tolist() == [0, 2**24 + 1, 2**40 + 3]


@pytest.mark.parametrize("name", ["freesurfer_aparc_aseg_LIA.mgz", "freesurfer_norm_LIA.mgz"])
def test_volumes_of_freesurfer(data_root: Path, name: str) -> None:
    path = data_root / "awkward" / name
    image = nibabel.load(path)
    volume = read_volume(str(path))
    assert np.allclose(volume[0].numpy(), image.get_fdata())
    assert np.allclose(volume.affine, image.affine)
