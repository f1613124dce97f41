import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import check_volume, read_volume
from gvsl_lightning.errors import InputError
from small_volumes import save_dicom, values


def test_dicom_series_of_one_folder_are_apart_and_sorted_by_position(tmp_path: Path) -> None:
    save_dicom(tmp_path / "patient", "1.2.3", seed=1, slices=6)
    save_dicom(tmp_path / "patient", "1.2.4", seed=2, slices=4)
    save_dicom(tmp_path / "patient", "1.2.5", seed=3, slices=1)
    with pytest.warns(UserWarning, match="1 single slice"):
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
    with pytest.warns(UserWarning, match=r"1 RTSTRUCT .*contours.dcm"):
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
    with pytest.raises(InputError, match=r"1.2.3-0.dcm"):
        read_volume(file.image)


def test_missing_and_repeated_dicom_slices(tmp_path: Path) -> None:
    save_dicom(tmp_path / "one", "1.2.4", 0, 5)
    path = tmp_path / "one/1.2.4-4.dcm"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"/one/.*2.5 and 5 mm"):
        read_volume(find_volumes(str(tmp_path))[0].image)
    path.write_bytes(whole)
    shutil.copy(path, tmp_path / "one/again.dcm")
    with pytest.raises(InputError, match=r"/one/.* mm"):
        read_volume(find_volumes(str(tmp_path))[0].image)


def test_every_frame_has_its_own_rescaling_and_display_flags_change_nothing(tmp_path: Path) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 5)
    (file,) = find_volumes(str(tmp_path))
    before = read_volume(file.image)[0].numpy()
    slopes = 1 + 0.25 * np.arange(5)
    for path in file.image:
        header = pydicom.dcmread(path)
        header.RescaleSlope = slopes[round(header.ImagePositionPatient[2] / 2.5)]
        header.RescaleIntercept = -3
        header.PhotometricInterpretation = "MONOCHROME1"
        header.save_as(path)
    assert np.allclose(read_volume(file.image)[0].numpy(), before * slopes - 3)


def test_compressed_slices_hold_the_same_values(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 64, 80)).astype(np.int16)
    for number, values_of_slice in enumerate(array):
        image = SimpleITK.GetImageFromArray(values_of_slice[None])
        for tag, value in {
            "0020|000e": "1.2.3",
            "0020|0032": f"0\\0\\{2 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-24",
            "0028|1053": "1",
            "0008|0060": "CT",
        }.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()  # JPEG 2000
        writer.SetFileName(str(tmp_path / f"{number}.dcm"))
        writer.Execute(image)
    syntax = pydicom.dcmread(tmp_path / "0.dcm").file_meta.TransferSyntaxUID
    assert syntax.is_encapsulated
    (file,) = find_volumes(str(tmp_path))
    assert np.array_equal(read_volume(file.image)[0].numpy(), array.T)


def _changed(path: Path, **values: Any) -> None:
    header = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(header, name, value)
    header.save_as(path)


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"Modality": "SEG"}, "SEG"),
        ({"Modality": "RTDOSE"}, "RTDOSE"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "single slice"),
    ],
)
def test_other_objects_of_the_same_series_are_left_out_and_counted(
    tmp_path: Path, changes: dict[str, Any], counted: str
) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 6)
    _changed(tmp_path / "1.2.3-0.dcm", **changes)
    with pytest.warns(UserWarning, match=rf"1 {counted} .*1.2.3-0.dcm"):
        (file,) = find_volumes(str(tmp_path))
    assert read_volume(file.image).shape[-1] == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"TemporalPositionIdentifier": 2},
        {"FrameOfReferenceUID": "1.2.9"},
        {"ImageType": ["ORIGINAL", "PRIMARY", "M", "FFE"]},
        {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    ],
)
def test_one_series_of_two_volumes_is_split(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 8)
    turned = "ImageOrientationPatient" in changes
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        position = [number, 0, 0] if turned and number > 3 else [0, 0, number]
        _changed(path, ImagePositionPatient=position, **(changes if number > 3 else {}))
    files = find_volumes(str(tmp_path))
    assert [read_volume(file.image).shape[-1] for file in files] == [4, 4]


def test_a_series_in_two_folders_is_one_volume_but_copies_are_two(tmp_path: Path) -> None:
    save_dicom(tmp_path / "s" / "a", "1.2.3", 0, 6)
    (expected,) = find_volumes(str(tmp_path))
    whole = read_volume(expected.image)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    assert len(find_volumes(str(tmp_path))) == 2
    shutil.rmtree(tmp_path / "copy")
    (tmp_path / "s" / "b").mkdir()
    for path in sorted((tmp_path / "s" / "a").iterdir())[3:]:
        path.rename(tmp_path / "s" / "b" / path.name)
    (file,) = find_volumes(str(tmp_path))
    assert file.name == "s"
    assert bool((read_volume(file.image) == whole).all())


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_without_a_place_are_refused(tmp_path: Path, tag: str) -> None:
    save_dicom(tmp_path, "1.2.3", 0, 4)
    for path in tmp_path.iterdir():
        header = pydicom.dcmread(path)
        delattr(header, tag)
        header.save_as(path)
    (file,) = find_volumes(str(tmp_path))
    for read in (check_volume, read_volume):
        with pytest.raises(InputError, match=r"1.2.3-\d.dcm"):
            read(file.image)
