"""Reading volumes with their geometry, checking their headers, and writing NIfTI."""

# mypy: allow-untyped-calls
# SimpleITK ships type information without annotations.

import gzip
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor
from nibabel.openers import Opener

from gvsl_lightning.data.dicom import read_geometry_of_series, read_series
from gvsl_lightning.data.source import FREESURFER, NIFTI, Source, VolumeFile, describe, files_of
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.files import write_whole

MIN_SPACING, MAX_SPACING = 0.01, 100.0
"""Voxel sizes in mm beyond which a header is taken to be wrong."""

_LEAST_VOLUME = 1e-3
"""Of a voxel with edges of 1; less is axes that lie in one plane."""

_DENSEST = 1100
"""Bytes that a compressed byte may stand for; the limit of zlib is 1032."""

_ROUNDING = 1e-3
"""Distance from a whole number that is the rounding of a scaled label map."""

_MM = {"micron": 1e-3, "meter": 1e3}
"""Length in mm of a unit of NIfTI; all others count as mm."""

_COMPRESSION = 1  # nibabel's: higher levels take many times as long for little

_GRID_FIELDS = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z"),
)

# Rounding may make the quaternion of a header a little longer than 1, as in CANDI's, which nibabel
# refuses by default and ITK does not.
nibabel.Nifti1Header.quaternion_threshold = -10 * np.finfo(np.float32).eps

# nibabel would repeat at each access the header faults that are one sentence here.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def check_volume(source: Source, channels: int = 1) -> None:
    """Check the header of a volume.

    Raises:
        InputError: As in `read_volume`, but for the values.
    """
    with _reading(source):
        opened, shape, affine = _open(source)
        _require_complete(source, opened)
    _require_grid(source, opened, shape, affine, channels)


def read_volume(source: Source, channels: int = 1) -> MetaTensor:
    """Read a volume and where it lies in the patient.

    Args:
        source: File or DICOM slices. A NumPy file has the shape (D, H, W) or (C, D, H, W), and,
            for lack of a header, axes to the right, front and top and voxels of 1 mm.
        channels: Number of channels that the volume must have.

    Returns:
        float32, (C, D, H, W), in the stored axis order; `affine` leads from voxels to mm in the
        RAS system.

    Raises:
        InputError: The file is unreadable or truncated, is not a volume with so many channels,
            lies nowhere (its axes in one plane, voxels not between `MIN_SPACING` and
            `MAX_SPACING`), or holds values that are not finite, or a single one.
    """
    array, affine = _read_array(source, channels, np.float32)
    values = torch.from_numpy(array)
    _require_finite(source, values)
    if is_constant(values):
        raise InputError(f"{describe(source)} holds a single value; leave it out.")
    return _placed(values, affine)


def read_label(path: str) -> MetaTensor:
    """Read a label map.

    Returns:
        (1, D, H, W) in the stored axis order, int32, or int64 where a value needs it; `affine` as
        from `read_volume`.

    Raises:
        InputError: As in `read_volume`, but a single value is fine; or values are no whole numbers.
    """
    array, affine = _read_array(path, channels=1, dtype=None)
    if array.dtype.kind == "f":
        _require_finite(path, torch.from_numpy(array))
        whole = np.rint(array)
        distance = np.abs(array - whole)
        if distance.max() > _ROUNDING:
            value = array.flat[distance.argmax()]
            raise InputError(
                f"{path} holds the value {value:g}, which is no whole number; give a label map."
            )
        array = whole
    dtype = first_fitting(array, (np.int32, np.int64))
    if dtype is None:
        raise InputError(f"{path} holds values beyond 64 bits; give a label map.")
    return _placed(torch.from_numpy(array.astype(dtype)), affine)


def read_case(file: VolumeFile, channels: int = 1, labelled: bool = False) -> dict[str, MetaTensor]:
    """Read a volume, `image`, and, if wanted, its label map, `label`, which there must be.

    Raises:
        InputError: One of them cannot be read, or they lie on different grids.
    """
    case = {"image": read_volume(file.image, channels)}
    if labelled:
        assert file.label is not None
        case["label"] = read_label(file.label)
        image = case["image"]
        require_one_grid(file, tuple(image.shape[1:]), image.affine.numpy(), case["label"])
    return case


def require_one_grid(
    file: VolumeFile, shape: tuple[int, ...], affine: np.ndarray, label: MetaTensor
) -> None:
    """Make sure that a label map lies on the grid of its image, up to a tenth of a voxel.

    Args:
        file: The volume.
        shape: (X, Y, Z) of the image.
        affine: (4, 4) of the image.
        label: The label map, (1, X, Y, Z).

    Raises:
        InputError: It does not.
    """
    if tuple(label.shape[1:]) != shape:
        raise InputError(
            f"{file.label} has the shape {tuple(label.shape[1:])} and its image {shape}; give the "
            "label map of this image."
        )
    corners = np.stack(np.meshgrid(*[(0, size - 1) for size in shape], (1,))).reshape(4, -1)
    distance = np.linalg.norm(((affine - label.affine.numpy()) @ corners)[:3], axis=0).max()
    voxel = np.linalg.norm(affine[:3, :3], axis=0).min()
    if not distance < 0.1 * voxel:
        raise InputError(
            f"{file.label} lies up to {distance:.2f} mm away from its image "
            f"{describe(file.image)}; give both the same orientation, spacing and origin."
        )


def read_geometry(source: Source) -> tuple[tuple[int, ...], np.ndarray]:
    """Read shape (x, y, z) and affine (4, 4) to RAS mm of a volume, without its voxels.

    Raises:
        InputError: The file is unreadable.
    """
    with _reading(source):
        _, shape, affine = _open(source)
        return shape[:3], affine


def write_volume(
    path: Path, array: np.ndarray, source: Source, affine: np.ndarray, vector: bool = False
) -> None:
    """Write an array on the stored grid of a volume as NIfTI, as a whole or not at all.

    Args:
        path: File to write; its folder is made.
        array: (X, Y, Z, ...); a trailing axis of one channel is left out.
        source: The volume; sform, qform and their codes are copied where it is a NIfTI file that
            has any.
        affine: (4, 4) of the volume, written as sform and qform otherwise.
        vector: Mark the values of the last axis as those of a vector.

    Raises:
        InputError: The file would take the place of the volume itself.
    """
    if isinstance(source, str) and path.exists() and path.samefile(source):
        raise InputError(f"{path} is the volume itself; give another folder for the results.")
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    header = image.header
    header.set_xyzt_units("mm")
    if isinstance(source, str) and source.lower().endswith(NIFTI):
        stored: Any = nibabel.load(source)
        placed = stored.header["sform_code"] > 0 or stored.header["qform_code"] > 0
        if placed and _mm(stored) == 1:
            for key in _GRID_FIELDS:
                header[key] = stored.header[key]
            header["pixdim"][:4] = stored.header["pixdim"][:4]
    if vector:
        header.set_intent("vector")
    write_whole(path, partial(_write_nifti, image, path.name.endswith(".gz")))


def is_constant(volume: Any) -> bool:
    """Whether every channel of a volume (C, ...) holds a single value."""
    return all(bool(channel.min() == channel.max()) for channel in volume)


def first_fitting(array: np.ndarray, types: Sequence[type]) -> np.dtype[Any] | None:
    """The first integer type that holds all values of an array; None: there is none."""
    low, high = int(array.min()), int(array.max())
    limits = (np.iinfo(kind) for kind in types)
    return next((one.dtype for one in limits if one.min <= low and high <= one.max), None)


def _write_nifti(image: Any, is_packed: bool, file: IO[bytes]) -> None:
    if not is_packed:
        image.to_stream(file)
        return
    # without its name and the time: the same content gives the same file
    with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as compressed:
        image.to_stream(compressed)


def _placed(values: torch.Tensor, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(values, affine=torch.as_tensor(affine, dtype=torch.float64))


def _read_array(
    source: Source, channels: int, dtype: type[np.float32] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (C, X, Y, Z), of a type or as they are stored, and affine to RAS mm."""
    with _reading(source), np.errstate(over="ignore"):  # too large values become infinite
        opened, _, affine = _open(source)
        _require_complete(source, opened)
        array = _read_voxels(source, opened, dtype)
        _require_numbers(source, array.dtype)
    _require_grid(source, opened, array.shape, affine, channels)
    channel_first = np.moveaxis(array.reshape(*array.shape[:3], channels), -1, 0)
    with np.errstate(over="ignore"):
        values = np.array(channel_first, dtype=dtype or array.dtype, order="C", subok=False)
    return values.astype(values.dtype.newbyteorder("="), copy=False), affine


def _open(source: Source) -> tuple[Any, tuple[int, ...], np.ndarray]:
    """Read the header of a volume.

    Returns:
        None for a DICOM series, a mapped array, ITK's reader or nibabel's image; shape (x, y, z) or
        (x, y, z, channels); affine to RAS mm.
    """
    if not isinstance(source, str):
        return None, *read_geometry_of_series(source)
    if source.lower().endswith((*NIFTI, *FREESURFER)):
        image: Any = nibabel.load(source)
        return image, tuple(image.shape), np.diag([*[_mm(image)] * 3, 1.0]) @ image.affine
    if source.lower().endswith(".npy"):
        array = np.load(source, mmap_mode="r", allow_pickle=False)
        array = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
        return array, array.shape, np.eye(4)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(source)
    reader.ReadImageInformation()
    components = reader.GetNumberOfComponents()
    shape = (*reader.GetSize(), *([components] if components > 1 else []))
    return reader, shape, _itk_affine(reader)


def _read_voxels(source: Source, opened: Any, dtype: type[np.float32] | None) -> np.ndarray:
    """Array (x, y, z) or (x, y, z, channels)."""
    if not isinstance(source, str):
        return read_series(source)
    if isinstance(opened, np.ndarray):
        return opened
    if not isinstance(opened, SimpleITK.ImageFileReader):
        return np.asarray(opened.dataobj, dtype=dtype)
    image = opened.Execute()
    array = SimpleITK.GetArrayViewFromImage(image)
    dimension = image.GetDimension()
    axes = (*reversed(range(dimension)), *range(dimension, array.ndim))
    copy: np.ndarray = array.transpose(axes).copy()
    return copy


def _itk_affine(image: Any) -> np.ndarray:
    """Affine to RAS mm of an image or of a reader that knows its header."""
    dimension = image.GetDimension()
    affine = np.eye(max(dimension, 3) + 1)
    affine[:dimension, :dimension] = np.reshape(image.GetDirection(), (dimension, dimension))
    affine[:dimension, :dimension] *= image.GetSpacing()
    affine[:dimension, -1] = image.GetOrigin()
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    to_ras: np.ndarray = lps_to_ras @ affine[np.ix_((0, 1, 2, -1), (0, 1, 2, -1))]
    return to_ras


def _mm(image: Any) -> float:
    """Length in mm of the unit of a header of nibabel."""
    header = image.header
    return _MM.get(header.get_xyzt_units()[0], 1.0) if hasattr(header, "get_xyzt_units") else 1.0


def _require_complete(source: Source, opened: Any) -> None:
    """Compare the shape in a header with the size of the files, before memory is allocated.

    Raises:
        InputError: The voxels are no real numbers.
        ValueError: The files cannot hold so many.
    """
    if not isinstance(source, str):
        return
    if isinstance(opened, np.ndarray):
        _require_numbers(source, opened.dtype)
        return
    densest = _DENSEST
    if isinstance(opened, SimpleITK.ImageFileReader):
        size = math.prod(opened.GetSize())
    else:
        dtype = opened.header.get_data_dtype()
        _require_numbers(source, dtype)
        shape = tuple(map(int, opened.header.get_data_shape()))
        if min(shape, default=0) < 1:
            raise ValueError(f"its header says the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        densest = _DENSEST if source.lower().endswith((".gz", ".mgz")) else 1
    held = sum(os.path.getsize(part) for part in files_of(source))
    if size > held * densest:
        raise ValueError(f"its header says {size:,} bytes and it has {held:,}")


def _require_grid(
    source: Source, opened: Any, shape: tuple[int, ...], affine: np.ndarray, channels: int
) -> None:
    name = describe(source)
    if len(shape) < 3 or min(shape[:3]) < 2 or np.prod(shape[3:]) != channels:
        raise InputError(
            f"{name} has the shape {shape}, not that of a 3D volume with {channels} "
            f"channel{'s' if channels > 1 else ''}; convert it, leave it out, or set `channels`."
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if isinstance(source, str) and _lacks_spacing(source, opened):
        spacing = np.zeros(3)
    if not np.isfinite(affine).all():
        fault = "an affine that is not finite"
    elif spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        size = " x ".join(f"{edge:g}" for edge in spacing)
        fault = f"voxels of {size} mm, not between {MIN_SPACING:g} and {MAX_SPACING:g}"
    elif abs(np.linalg.det(affine[:3, :3] / spacing)) < _LEAST_VOLUME:
        fault = "axes that lie in one plane"
    else:
        return
    raise InputError(f"{name} has {fault}; correct its header or leave it out.")


def _lacks_spacing(path: str, opened: Any) -> bool:
    """Whether a NIfTI header has voxels of 0 mm, which are read as 1 mm."""
    is_nifti = path.lower().endswith(NIFTI)
    if not is_nifti or opened.header["sform_code"] > 0:
        return False
    with Opener(path) as file:
        header = type(opened.header).from_fileobj(file, check=False)
    return header["sform_code"] <= 0 and bool((header["pixdim"][1:4] == 0).any())


def _require_finite(source: Source, values: torch.Tensor) -> None:
    if not all(torch.isfinite(end) for end in values.aminmax()):  # one pass, no memory
        counts = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
        found = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
        raise InputError(
            f"{describe(source)} holds {found} values among {values.numel():,}; replace them by "
            "numbers or leave the file out."
        )


def _require_numbers(source: Source, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf":
        found = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, f"of the type {dtype}")
        raise InputError(
            f"{describe(source)} has voxels that are {found}; convert it to real numbers or leave "
            "it out."
        )


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Make one sentence of the error of any library about a file."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{describe(source)} does not fit into memory; leave it out or lower num_workers."
        ) from error
    except Exception as error:
        reason, remedy = _diagnose(source, error)
        raise InputError(f"{describe(source)} cannot be read ({reason}); {remedy}.") from error


def _diagnose(source: Source, error: Exception) -> tuple[str, str]:
    """Why a file cannot be read, and the remedy."""
    reason = cause_of(error)
    if isinstance(source, str):
        try:
            with open(source, "rb") as file:
                start = file.read(348)
        except OSError as refused:  # of which libraries do not always tell
            return refused.strerror or reason, "correct that or leave the file out"
        is_named_packed = source.lower().endswith(".gz")
        if start.startswith(b"\x1f\x8b") and source.lower().endswith(".nii"):
            return reason, "it is compressed: rename it to .nii.gz"
        if is_named_packed and (start[344:347] == b"n+1" or start[4:7] == b"n+2"):
            return reason, "it is not compressed: rename it to .nii"
    return reason, "replace the damaged file or leave it out"
