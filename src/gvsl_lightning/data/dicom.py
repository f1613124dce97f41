"""DICOM: which files of a folder make one volume, and reading them as one."""

import os
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pydicom
import SimpleITK
from pydicom.uid import ImplicitVRLittleEndian

from gvsl_lightning.data.source import Source, describe
from gvsl_lightning.errors import InputError, cause_of

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # type: ignore[no-untyped-call]

_MOST_TILTED = 1.0
"""Degrees between the normal of the slices and the line through their corners."""

_UNEVEN = 0.2
"""Distance of a slice from an even spacing, in slice distances, that is more than rounding."""

_NO_IMAGES = ("SEG", "RTDOSE", "PR", "KO", "SR", "REG", "FID", "RWV")
"""Modalities whose pixels, if they have any, are no intensities of a scan."""


class _Frame(NamedTuple):
    """One slice, or one frame of a multi-frame file.

    Attributes:
        path: of the file.
        position: of the centre of its first pixel, in mm in the LPS system.
        rows: (6,) directions along a row and along a column.
        spacing: distance of rows and of columns in mm.
        slope: of the rescaling of stored values, as `intercept`.
        number: of the frame in its file, from 0.
    """

    path: str
    position: tuple[float, ...]
    rows: tuple[float, ...]
    spacing: tuple[float, ...]
    slope: float
    intercept: float
    number: int


class _Header(NamedTuple):
    """Facts of a file that decide to which volume it belongs.

    Attributes:
        series: patient and series.
        volume: values that agree in all files of one volume.
        size: rows and columns.
        frames: number of frames.
        slices: the frames, or the fault that keeps them from being placed.
        reference: frame of reference.
        left_out: why the file is no part of a volume; empty if it is.
    """

    series: tuple[str, ...]
    volume: tuple[Any, ...]
    size: tuple[int, int]
    frames: int
    slices: tuple[_Frame, ...] | Exception
    reference: str
    left_out: str


def is_dicom(path: str) -> bool:
    """Whether a file is DICOM by its name or its first bytes."""
    if path.lower().endswith(".dcm"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # a dangling link or a file of somebody else, and no volume by its name


def find_series(paths: Iterable[str]) -> Iterator[Source]:
    """Group DICOM files into volumes.

    Files of one volume have the same patient and series, and agree in size, orientation,
    pixel spacing, frame of reference, temporal position, echo and image type. A series may lie in
    several folders if its slices are evenly spaced together. Localizers, segmentations, doses,
    contours, indices and single slices are left out, with one warning that counts them.

    Yields:
        The files of each volume, in anatomical order. Damaged files are one volume, in place of the
        only series of their folder, so that a series without them is not taken for a whole one.
    """
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    damaged: dict[str, list[str]] = defaultdict(list)
    left_out: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths):
        try:
            header = _header(path)
        except Exception:
            damaged[os.path.dirname(path)].append(path)
            continue
        if header.left_out:
            left_out[header.left_out].append(path)
        else:
            alone = path if header.frames > 1 else ""
            key = (*header.series, header.size, *header.volume, alone)
            groups[key].append(path)
    volumes = []
    for part in (part for group in groups.values() for part in _by_reference(group)):
        for volume in _by_folder(part):
            if len(volume) > 1 or _header(volume[0]).frames > 1:
                volumes.append(volume)
            else:
                left_out["single slice"] += volume
    held = Counter(folder for volume in volumes for folder in {*map(os.path.dirname, volume)})
    for volume in volumes:
        folder = os.path.dirname(volume[0])
        if not (folder in damaged and held[folder] == 1):
            yield _ordered(volume)
    yield from (tuple(files) for files in damaged.values())
    if left_out:
        kinds = (f"{len(files)} {kind} ({files[0]})" for kind, files in sorted(left_out.items()))
        warnings.warn(f"DICOM files are left out: {', '.join(kinds)}.", stacklevel=2)


def _by_reference(paths: list[str]) -> Collection[list[str]]:
    """One list for each frame of reference; one for all if every file has another one.

    Programs that write slice by slice give each slice a new frame of reference.
    """
    references: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        references[_header(path).reference].append(path)
    return [paths] if len(references) == len(paths) else references.values()


def _ordered(paths: list[str]) -> tuple[str, ...]:
    """By position, where the files say it."""
    try:
        return tuple(dict.fromkeys(frame.path for frame in _place(paths)[0]))
    except Exception:  # named when the volume is read
        return tuple(paths)


def _by_folder(paths: list[str]) -> list[list[str]]:
    """One volume if the files are evenly spaced together, otherwise one for each folder."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    if len(folders) > 1:
        try:
            _place(paths)
        except Exception:
            return list(folders.values())
    return [paths]


def read_geometry_of_series(paths: Sequence[str]) -> tuple[tuple[int, int, int], np.ndarray]:
    """Read shape (x, y, z) and affine (4, 4) to RAS mm of a volume of :func:`find_series`.

    Raises:
        InputError: slices are missing, there twice, tilted or without a position.
    """
    frames, affine = _place(paths)
    rows, columns = _header(frames[0].path).size
    return (columns, rows, len(frames)), affine


def read_series(paths: Sequence[str]) -> np.ndarray:
    """Read the voxels of a volume, float32 (x, y, z); each frame has a rescaling of its own.

    Raises:
        InputError: as for :func:`read_geometry_of_series`, or a file is damaged.
    """
    frames, _ = _place(paths)
    stored: dict[str, np.ndarray] = {}
    slices = []
    for frame in frames:
        if frame.path not in stored:
            if len(paths) > 1:
                stored.clear()
            stored[frame.path] = _stored_values(frame.path)
        values = stored[frame.path][frame.number].astype(np.float32)
        slices.append(values.T * np.float32(frame.slope) + np.float32(frame.intercept))
    return np.stack(slices, axis=-1)


def _place(paths: Sequence[str]) -> tuple[list[_Frame], np.ndarray]:
    """The frames of a volume from first to last along their normal, and the affine to RAS mm."""
    frames = [frame for path in paths for frame in _frames(path)]
    for frame in frames[1:]:
        if not np.allclose(frame.rows, frames[0].rows, atol=1e-3) or not np.allclose(
            frame.spacing, frames[0].spacing, rtol=1e-3
        ):
            raise InputError(
                f"{describe(tuple(paths))} has frames of different orientation or pixel spacing "
                f"({frame.path}); split it or leave it out."
            )
    right, down = np.reshape(frames[0].rows, (2, 3))
    normal = np.cross(right, down)
    frames.sort(key=lambda frame: float(normal @ frame.position))
    positions = np.array([frame.position for frame in frames])
    along = (positions[-1] - positions[0]) / max(1, len(frames) - 1)
    distance = float(np.linalg.norm(along))
    if len(frames) > 1:
        _require_even(paths, frames, positions)
        tilt = np.degrees(np.arccos(min(1.0, abs(float(normal @ along)) / distance)))
        if tilt > _MOST_TILTED:
            raise InputError(
                f"{describe(tuple(paths))} has slices that are tilted by {tilt:.0f} degrees "
                "(gantry tilt); convert it with a tool that corrects this, such as dcm2niix, or "
                "leave it out."
            )
    affine = np.eye(4)
    affine[:3, :3] = np.stack(
        [right * frames[0].spacing[1], down * frames[0].spacing[0], along], axis=1
    )
    affine[:3, 3] = positions[0]
    return frames, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _require_even(paths: Sequence[str], frames: Sequence[_Frame], positions: np.ndarray) -> None:
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    even = np.linspace(positions[0], positions[-1], len(positions))
    middle = float(np.median(steps))
    if middle == 0 or np.linalg.norm(positions - even, axis=1).max() > _UNEVEN * middle:
        place = int(np.abs(steps - middle).argmax())
        raise InputError(
            f"{describe(tuple(paths))} has slices between {steps.min():g} and {steps.max():g} mm "
            f"apart (at {frames[place + 1].path}); add those that are missing, remove those that "
            "are there twice, or leave it out."
        )


def _dataset(path: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that the standard does not allow
        return pydicom.dcmread(path, force=True, **options)


def _header(path: str) -> _Header:
    """Raises any error if the file is no DICOM file."""
    return _read_header(path, *_version(path))


def _version(path: str) -> tuple[int, int]:
    """Differs after the file has changed."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=50_000)
def _read_header(path: str, *version: int) -> _Header:
    data = _dataset(path, stop_before_pixels=True)
    meta = getattr(data, "file_meta", {})
    kind = data.get("Modality") or ""
    rows, columns = data.get("Rows"), data.get("Columns")
    if "SOPClassUID" not in data and "MediaStorageSOPClassUID" not in meta:
        raise ValueError("it has no SOP class")
    image_type = tuple(map(str, data.get("ImageType") or ()))
    if not rows or not columns or kind in _NO_IMAGES:
        left_out = kind or "file without an image"
    else:
        left_out = "localizer" if "LOCALIZER" in image_type else ""
    try:
        slices: tuple[_Frame, ...] | Exception = _slices(path, data)
    except Exception as error:  # raised where the volume is placed
        slices = error.with_traceback(None)  # which would keep the whole header
    orientation = data.get("ImageOrientationPatient") or ()
    spacing = data.get("PixelSpacing") or ()
    return _Header(
        series=tuple(str(data.get(key, "")) for key in ("PatientID", "SeriesInstanceUID")),
        volume=(
            tuple(round(float(number), 3) for number in orientation),
            tuple(round(float(number), 3) for number in spacing),
            str(data.get("TemporalPositionIdentifier", "")),
            str(data.get("EchoNumbers", "")),
            image_type,
        ),
        size=(int(rows or 0), int(columns or 0)),
        frames=int(data.get("NumberOfFrames") or 1),
        slices=slices,
        reference=str(data.get("FrameOfReferenceUID", "")),
        left_out=left_out,
    )


def _frames(path: str) -> tuple[_Frame, ...]:
    """The slices of a file."""
    with _reading(path):
        slices = _header(path).slices
        if isinstance(slices, Exception):
            raise slices.with_traceback(None)
        return slices


def _slices(path: str, data: Any) -> tuple[_Frame, ...]:
    if not data.get("Rows"):
        raise ValueError("it holds no DICOM image")
    count = int(data.get("NumberOfFrames") or 1)
    shared = (data.get("SharedFunctionalGroupsSequence") or [{}])[0]
    own = data.get("PerFrameFunctionalGroupsSequence") or [{}] * count
    frames = []
    for index in range(count):
        places = (own[index], shared)
        position = _value(data, places, "PlanePositionSequence", "ImagePositionPatient")
        rows = _value(data, places, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = _value(data, places, "PixelMeasuresSequence", "PixelSpacing")
        scale = [
            _value(data, places, "PixelValueTransformationSequence", name)
            for name in ("RescaleSlope", "RescaleIntercept")
        ]
        needed = {"position": position, "orientation": rows, "pixel spacing": spacing}
        if missing := [name for name, value in needed.items() if value is None]:
            raise InputError(
                f"{path} does not say the {missing[0]} of its slices; convert it to NIfTI with "
                "the right geometry, or leave it out."
            )
        place = np.array(position, dtype=float)
        if "PlanePositionSequence" not in own[index] and index:
            place = place + _offset(path, data, rows, index)
        frames.append(
            _Frame(
                path,
                tuple(place.tolist()),
                tuple(map(float, rows)),
                tuple(map(float, spacing)),
                1.0 if scale[0] is None else float(scale[0]),
                0.0 if scale[1] is None else float(scale[1]),
                index,
            )
        )
    return tuple(frames)


def _value(data: Any, places: Sequence[Any], sequence: str, name: str) -> Any:
    """A value of a frame: its own, or the one of all frames, or the one of the file."""
    for place in places:
        items = place.get(sequence)
        if items and items[0].get(name) is not None:
            return items[0].get(name)
    return data.get(name)


def _offset(path: str, data: Any, rows: Any, index: int) -> np.ndarray:
    """From the first frame to another one, of a file that gives the position of the first."""
    offsets, step = data.get("GridFrameOffsetVector"), data.get("SpacingBetweenSlices")
    if offsets is None and step is None:
        raise InputError(
            f"{path} does not say the position of each frame; convert it to NIfTI with the right "
            "geometry, or leave it out."
        )
    distance = float(step) * index if offsets is None else float(offsets[index] - offsets[0])
    normal: np.ndarray = np.cross(*np.reshape(np.array(rows, dtype=float), (2, 3)))
    return normal * distance


def _stored_values(path: str) -> np.ndarray:
    """The stored values (frames, rows, columns) of a file, before any rescaling."""
    with _reading(path):
        data = _dataset(path)
        if data.get("SamplesPerPixel", 1) != 1:
            raise InputError(
                f"{path} has voxels that are colours; convert it to real numbers or leave it out."
            )
        if "TransferSyntaxUID" not in data.file_meta:
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        values = _decoded(data)
        bits = int(data.get("BitsStored") or 0)
        if values.dtype.kind in "iu" and 0 < bits < 8 * values.dtype.itemsize:
            # bits above the stored ones may hold anything
            values = values.astype(np.int64) & ((1 << bits) - 1)
            if data.get("PixelRepresentation"):
                values -= (values >> (bits - 1)) << bits
        return values.reshape(-1, int(data.Rows), int(data.Columns))


def _decoded(data: Any) -> np.ndarray:
    """By pydicom; by GDCM in SimpleITK where the voxels are compressed as JPEG."""
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax.name.startswith("RLE"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values: np.ndarray = data.pixel_array
        return values
    # GDCM applies the rescaling of the first frame and inverts MONOCHROME1: it must find neither
    for item in (data, *data.get("SharedFunctionalGroupsSequence", ())):
        for name in ("RescaleSlope", "RescaleIntercept", "PixelValueTransformationSequence"):
            if name in item:
                delattr(item, name)
    for item in data.get("PerFrameFunctionalGroupsSequence", ()):
        if "PixelValueTransformationSequence" in item:
            del item.PixelValueTransformationSequence
    data.PhotometricInterpretation = "MONOCHROME2"
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "copy.dcm")
        data.save_as(copy, enforce_file_format=True)
        image = SimpleITK.ReadImage(copy)
    return np.asarray(SimpleITK.GetArrayFromImage(image))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Make one sentence of any error about a file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{path} cannot be read ({cause_of(error)}); replace the damaged file or leave it out."
        ) from error
