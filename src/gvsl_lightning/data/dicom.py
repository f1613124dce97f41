"""Series of DICOM slices: finding them in a folder, reading them as one volume."""

# mypy: allow-untyped-calls
# SimpleITK ships type information without annotations.

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from gvsl_lightning.data.source import Source, describe
from gvsl_lightning.errors import InputError

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # faults become one sentence instead

_MOST_TILTED = 1.0
"""Degrees between the normal of DICOM slices and the line through their corners."""


def is_dicom(path: str) -> bool:
    """Whether a file is DICOM by its name or its first bytes."""
    if path.lower().endswith(".dcm"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # a dangling link or a file of somebody else, and no volume by its name


def find_series(folder: str, paths: Sequence[str]) -> Iterator[Source]:
    """Series of a folder, unless its only one lacks the damaged files, and these as another one."""
    unread = dict.fromkeys(paths)
    series: list[Source] = []
    for identifier in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(folder):
        slices = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(folder, identifier)
        for path in slices:
            unread.pop(path, None)
        if len(slices) == 1 and _depth(slices[0]) == 1:
            warnings.warn(f"{slices[0]} is left out: a DICOM series of one slice.", stacklevel=2)
        else:
            series.append(slices)
    damaged = [path for path in unread if _is_damaged_dicom(path)]
    if not damaged or len(series) > 1:
        yield from series
    if damaged:
        yield damaged[0] if len(damaged) == 1 else tuple(damaged)
    for path in unread:
        if path not in damaged:
            warnings.warn(
                f"{path} is left out: a DICOM file without an image; replace it if it is damaged.",
                stacklevel=2,
            )


def _depth(path: str) -> int:
    """Number of slices in one file."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    return int(reader.GetSize()[2])


def _is_damaged_dicom(path: str) -> bool:
    """Whether a file that is in no series should be: contours, reports and indices should not."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return True
    rows = (b"\x28\x00\x10\x00", b"\x00\x28\x00\x10")  # the tag that every image has
    return content[128:132] != b"DICM" or any(tag in content for tag in rows)


def read_series(slices: tuple[str, ...]) -> Any:
    """Read a series as one SimpleITK image.

    Raises:
        InputError: Slices are missing or there twice, or they are tilted.
    """
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(slices)
    # Slices may differ in their rescale slope: the type of the first one must not decide.
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    position = "0020|0032"
    if all(reader.HasMetaDataKey(index, position) for index in range(len(slices))):
        texts = (reader.GetMetaData(index, position) for index in range(len(slices)))
        positions = np.array([[float(number) for number in text.split("\\")] for text in texts])
        steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        # An unreadable slice is skipped in silence, and time points are stacked like slices.
        if len(steps) > 1 and not (np.abs(steps / np.median(steps) - 1) < 0.5).all():
            raise InputError(
                f"{describe(slices)} has slices between {steps.min():g} and {steps.max():g} mm "
                "apart; add those that are missing, remove those that are there twice, or leave it "
                "out."
            )
        along = positions[-1] - positions[0]
        normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
        tilt = np.degrees(np.arccos(min(1.0, abs(normal @ along) / np.linalg.norm(along))))
        if tilt > _MOST_TILTED:
            raise InputError(
                f"{describe(slices)} has slices that are tilted by {tilt:.0f} degrees (gantry "
                "tilt); convert it with a tool that corrects this, such as dcm2niix, or leave it "
                "out."
            )
    return image
