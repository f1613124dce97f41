import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import read_volume
from gvsl_lightning.errors import InputError
from small_volumes import save_dicom, values


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


@pytest.mark.parametrize("content", [b"nonsense" * 50, b"", "truncated"])
def test_a_damaged_dicom_file_is_named(tmp_path: Path, content: Any) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 5)
    damaged = tmp_path / "1.2.3-0.dcm"  # at an end, where no gap tells of it
    damaged.write_bytes(damaged.read_bytes()[:-20] if content == "truncated" else content)
    # the series that lacks it would be predicted as if it were whole
    (file,) = find_volumes(str(tmp_path))
    assert file.image == str(damaged)
    with pytest.raises(InputError, match=r"1.2.3-0.dcm"):
        read_volume(file.image)


def test_missing_and_repeated_dicom_slices(tmp_path: Path) -> None:
    save_dicom(tmp_path / "one", "1.2.4", 0, 5)
    path = tmp_path / "one/1.2.4-4.dcm"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"one .*2.5 and 5 mm"):
        read_volume(find_volumes(str(tmp_path))[0].image)
    path.write_bytes(whole)
    shutil.copy(path, tmp_path / "one/again.dcm")
    with pytest.raises(InputError, match=r"one .* mm"):
        read_volume(find_volumes(str(tmp_path))[0].image)
