"""Small random volumes on disk, for the tests."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from gvsl_lightning.data.find import find_volumes

SHAPE = (6, 7, 8)


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


def names(root: Any) -> list[str]:
    return [file.name for file in find_volumes(root)]
