"""Volumes, label maps and DICOM series with one fault each, for the tests of bad input."""

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (12, 14, 10)
AFFINE = np.array([[-1.5, 0, 0, 9], [0, 1.5, 0, -14], [0, 0, 2, 11], [0, 0, 0, 1]])
DICOM_AFFINE = np.diag([-1.5, -1.5, 2.0, 1.0])
"""Of what `series` writes."""


def intensities(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def labels(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Background and two structures."""
    array = np.zeros(shape, np.uint8)
    array[2:6, 2:6, 2:5] = 1
    array[6:10, 7:12, 4:9] = 2
    return array


def folder(root: Path, names: str = "abcd") -> Path:
    """Good volumes in `images` and their label maps in `labels`."""
    for number, name in enumerate(names):
        write(root / "images" / f"{name}.nii.gz", intensities(number))
        write(root / "labels" / f"{name}.nii.gz", labels())
    return root


def write(
    path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, version: int = 1, **fields: Any
) -> Path:
    """A NIfTI file; fields of its header say what is given, whether that is true or not."""
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(array, affine, dtype=array.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    size = image.header.template_dtype.itemsize
    header = type(image.header)(content[:size], check=False)
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + content[size:]
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_itk(path: Path, replaced: bytes = b"", by: bytes = b"", cut: int = 0) -> Path:
    """A NRRD or MetaImage file, its header changed and its end cut off."""
    image = SimpleITK.GetImageFromArray(intensities().transpose(2, 1, 0))
    image.SetSpacing((1.5, 1.5, 2.0))
    SimpleITK.WriteImage(image, str(path))
    content = path.read_bytes()
    assert replaced in content
    content = content.replace(replaced, by, 1)
    path.write_bytes(content[: len(content) - cut])
    return path


def write_npy(path: Path, array: np.ndarray, replaced: bytes = b"", by: bytes = b"") -> Path:
    """A NumPy file, its header changed."""
    np.save(path, array, allow_pickle=True)
    content = path.read_bytes()
    assert replaced in content
    path.write_bytes(content.replace(replaced, by, 1))
    return path


def cut(path: Path, count: int) -> Path:
    """The file without its last bytes."""
    path.write_bytes(path.read_bytes()[:-count])
    return path


def series(
    root: Path,
    positions: list[float] | None = None,
    tilt: float = 0.0,
    pixels: bool = True,
    prefix: str = "slice",
) -> Path:
    """A CT series of axial slices in a folder, which may hold another one.

    Args:
        root: The folder.
        positions: Of the slices along the table in mm; 2 mm apart if None.
        tilt: Of the gantry in degrees, by which each slice is shifted along its columns.
        pixels: Whether there are any.
        prefix: Of the names of the files.
    """
    root.mkdir(parents=True, exist_ok=True)
    identifier = generate_uid()
    for number, position in enumerate(positions or [2.0 * n for n in range(SHAPE[2])]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = root / f"{prefix}{number:03d}.dcm"
        made = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
        made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        made.SeriesInstanceUID, made.StudyInstanceUID = identifier, identifier
        made.Modality, made.PatientID, made.InstanceNumber = "CT", "nobody", number + 1
        shift = position * float(np.tan(np.radians(tilt)))
        made.ImagePositionPatient = [0, round(shift, 4), position]
        made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        made.PixelSpacing, made.SliceThickness = [1.5, 1.5], 2
        made.Rows, made.Columns = SHAPE[1], SHAPE[0]
        made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
        made.RescaleSlope, made.RescaleIntercept = 1, -1024
        if pixels:
            made.PixelData = (slices()[:, :, number % SHAPE[2]].T).tobytes()
        made.save_as(path, enforce_file_format=True)
    return root


def slices() -> np.ndarray:
    """Stored values of a series."""
    return np.random.default_rng(7).integers(0, 2000, size=SHAPE).astype(np.int16)
