"""Files of volumes: finding them, checking their headers, reading them with their geometry."""

# mypy: allow-untyped-calls
# SimpleITK ships type information without annotations.

import glob
import gzip
import json
import logging
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import nibabel
import numpy as np
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor
from nibabel.openers import Opener

from gvsl_lightning.errors import InputError, causes
from gvsl_lightning.runs.files import write_whole
from gvsl_lightning.runs.privacy import pseudonyms

Source = str | tuple[str, ...]
"""One file, or the slices of one DICOM series in anatomical order."""

SETTINGS = "settings.json"
"""File by which a folder of prepared volumes is known."""

_NIFTI = (".nii", ".nii.gz")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_SUFFIXES = (*_NIFTI, *_ITK, ".npy")
_LABEL_FOLDERS = ("labelsTr", "labelsTs")
_GRID_FIELDS = (
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z"),
)

_HEADER_BYTES = 1 << 20

MIN_SPACING, MAX_SPACING = 0.01, 100.0
"""Voxel sizes in mm beyond which a header is taken to be wrong."""

_LEAST_VOLUME = 1e-3
"""Of a voxel with edges of 1; less is axes that lie in one plane."""

_MOST_TILTED = 1.0
"""Degrees between the normal of DICOM slices and the line through their corners."""

_DENSEST = 1100
"""Bytes that a compressed byte may stand for; the limit of zlib is 1032."""


# Rounding may make the quaternion of a header a little longer than 1, as in CANDI's, which nibabel
# refuses by default and ITK does not.
nibabel.Nifti1Header.quaternion_threshold = -10 * np.finfo(np.float32).eps

# What is wrong with a header becomes one sentence here; nibabel and ITK say it too, at each access.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)


@dataclass(frozen=True)
class VolumeFile:
    """One volume on disk.

    Attributes:
        image: The file, or the slices of the DICOM series.
        name: Path without suffix, relative to the folder that was searched, otherwise to the one
            that all volumes have in common. No two volumes share it.
        label: File of the label map, if there is one.
    """

    image: Source
    name: str
    label: str | None = None


_File = TypeVar("_File", bound=VolumeFile)


class PackedFiles:
    """Volumes in one piece of memory, each made anew when it is asked for.

    Loader processes share it with the process that started them, but not a list: to look at one
    of its objects is to count a reference to it, which copies the page of memory it lies on.

    Args:
        files: The volumes.
    """

    def __init__(self, files: Iterable[VolumeFile]) -> None:
        packed = [pickle.dumps(file) for file in files]
        self._limits = np.cumsum([0, *map(len, packed)])
        self._packed = b"".join(packed)

    def __len__(self) -> int:
        return len(self._limits) - 1

    def __getitem__(self, index: int) -> VolumeFile:
        place = range(len(self))[index]
        packed = self._packed[slice(*self._limits[place : place + 2])]
        # of this process's own memory
        file: VolumeFile = pickle.loads(packed)  # nosec B301
        return file


def find_volumes(
    root: str | Sequence[str],
    label_root: str | None = None,
    duplicates: Literal["keep", "drop", "refuse"] = "keep",
) -> list[VolumeFile]:
    """Find the volumes that a path, or a list of paths, stands for.

    Args:
        root: One of

            - a folder, searched recursively for NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr),
              MetaImage (.mha, .mhd), NumPy (.npy) and DICOM series; hidden files and folders and
              the folders `labelsTr` and `labelsTs` are left out, and so is what `prepare` wrote;
              with a `dataset.json` of the Medical Segmentation Decathlon in it, the training
              images of that;
            - a file of one of these formats, or a glob pattern (`**` for any depth);
            - a text file, one path per line, ` #` before comments, or a JSON file: a list of
              paths or of `{"image": path, "label": path}`, or a Decathlon `dataset.json`; paths
              are relative to the file's folder;
            - a list of any of these.
        label_root: Folder of label maps named like the images (the suffix may differ); what is in
            it is no image.
        duplicates: What becomes of a file that is found again. `keep`: it is one volume under each
            of its paths, such as links to it. `drop`: it is one volume under the first path.
            `refuse`: an error.

    Returns:
        The volumes sorted by name. The damaged DICOM files of a folder are one of them, so that
        reading them is an error as with every other damaged file, in the place of the folder's
        series if there is but one.

    Raises:
        InputError: A path does not exist or cannot be read, nor a list, or nothing is found.
    """
    roots = [root] if isinstance(root, str | os.PathLike) else list(root)
    found = [pair for entry in roots for pair in _expand(os.fspath(entry), None)]
    if not found:
        raise InputError(
            f"{root} holds no volume; give a folder, pattern or list of "
            f"{', '.join(_SUFFIXES)} files or DICOM series."
        )
    for path in (path for source in dict(found) for path in _paths(source)):
        _require_utf8(path)
    names = _names([source for source, _ in found], _searched_folder(roots))
    if label_root is not None:
        found = [(source, label) for source, label in found if not lies_in(source, label_root)]
    if duplicates == "refuse":
        refuse_duplicates([source for source, _ in found])
    labels = dict(found)
    if label_root is not None:
        labels = _match_labels({source: names[source] for source in labels}, label_root)
    files = sorted(
        (VolumeFile(source, names[source], label) for source, label in labels.items()),
        key=lambda file: file.name,
    )
    if duplicates == "drop":
        first: dict[tuple[Any, ...], VolumeFile] = {}
        for file in files:
            first.setdefault(identity(file.image), file)
        files = list(first.values())
    return files


def find_volume(path: str) -> VolumeFile:
    """Find the one volume that a path stands for.

    Raises:
        InputError: There is none, or there are several.
    """
    files = find_volumes(path)
    if len(files) > 1:
        some = ", ".join(describe(file.image) for file in files[:3])
        raise InputError(
            f"{path} holds {len(files)} volumes ({some}{', ...' if len(files) > 3 else ''}); give "
            "the path of one of them."
        )
    return files[0]


def anonymous(files: Sequence[_File]) -> list[_File]:
    """The same volumes under pseudonyms, see :mod:`gvsl_lightning.runs.privacy`, in their order."""
    hidden = pseudonyms(file.name for file in files)
    return [replace(file, name=name) for file, name in zip(files, hidden, strict=True)]


def identity(source: Source) -> tuple[Any, ...]:
    """What a file on disk is known by, whichever path or link leads to it."""
    if not isinstance(source, str):
        return tuple(identity(one) for one in source)
    try:
        status = os.stat(source)
    except OSError:
        return (source,)  # a dangling link: whoever reads it says so
    return status.st_dev, status.st_ino


def refuse_duplicates(sources: Iterable[Source]) -> None:
    """Make sure that no file is there twice, under one path or under two.

    Raises:
        InputError: One is.
    """
    seen: dict[tuple[Any, ...], Source] = {}
    for source in sources:
        key = identity(source)
        if key in seen:
            other = seen[key]
            raise InputError(
                f"{describe(source)} is listed twice; list it once."
                if other == source
                else f"{describe(source)} is listed twice, also as {describe(other)}, which is the "
                "same on disk; leave out one of the two."
            )
        seen[key] = source


def check_volume(source: Source, channels: int = 1) -> None:
    """Look at the header alone.

    Args:
        source: File or DICOM slices.
        channels: Number of channels that the volume must have.

    Raises:
        InputError: The header is unreadable, not that of a volume with so many channels, says more
            voxels than the file can hold, or places them nowhere.
    """
    with _reading(source):
        opened = _open(source)
        if isinstance(source, str):
            _require_complete(source, opened)
        shape = _header_shape(source, opened)
        affine = _header_affine(opened)
    _require_shape(source, shape, channels)
    _require_place(source, affine, opened)


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
    volume = _read_tensor(source, channels)
    if is_constant(volume):
        raise InputError(f"{describe(source)} holds a single value; leave it out.")
    return volume


def read_label(path: str) -> MetaTensor:
    """Read a label map.

    Args:
        path: Its file.

    Returns:
        float32 whole numbers, (1, D, H, W), in the stored axis order; `affine` as from
        `read_volume`.

    Raises:
        InputError: As in `read_volume`, but a single value is fine; or values are no whole numbers.
    """
    label = _read_tensor(path, channels=1)
    whole = label.as_tensor().round()
    distance = (label.as_tensor() - whole).abs()
    if distance.max() > _WHOLE:
        value = float(label.as_tensor().flatten()[distance.argmax()])
        raise InputError(
            f"{path} holds the value {value:g}, which is no whole number; give a label map."
        )
    return MetaTensor(whole, affine=label.affine)


_WHOLE = 1e-3
"""Distance from a whole number that is the rounding of a scaled label map."""


def _read_tensor(source: Source, channels: int) -> MetaTensor:
    with _reading(source):
        opened = None
        if isinstance(source, str):
            opened = _open(source)
            _require_complete(source, opened)
            array, affine = _read(source, opened)
        else:
            array, affine = _read_itk(source)
        _require_numbers(source, array.dtype)
    _require_shape(source, array.shape, channels)
    _require_place(source, affine, opened)
    channel_first = np.moveaxis(array.reshape(*array.shape[:3], channels), -1, 0)
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        values = torch.from_numpy(np.ascontiguousarray(channel_first, dtype=np.float32))
    _require_finite(source, values)
    return MetaTensor(values, affine=torch.as_tensor(affine, dtype=torch.float64))


def read_case(file: VolumeFile, channels: int = 1, labelled: bool = False) -> dict[str, MetaTensor]:
    """Read a volume and, if wanted, its label map.

    Args:
        file: The volume.
        channels: Number of channels that it must have.
        labelled: Read its label map, which there must be.

    Returns:
        `image` and perhaps `label`, as from `read_volume`.

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
    """Where a volume lies in the patient; only a DICOM series is read as a whole for it.

    Args:
        source: File or DICOM slices.

    Returns:
        Shape (x, y, z) and affine (4, 4) to mm in the RAS system.

    Raises:
        InputError: The file is unreadable.
    """
    with _reading(source):
        if not isinstance(source, str):
            array, affine = _read_itk(source)
            return array.shape[:3], affine
        opened = _open(source)
        return _header_shape(source, opened)[:3], _header_affine(opened)


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
    if isinstance(source, str) and source.lower().endswith(_NIFTI):
        stored: Any = nibabel.load(source)
        if stored.header["sform_code"] > 0 or stored.header["qform_code"] > 0:
            for key in _GRID_FIELDS:
                header[key] = stored.header[key]
            header["pixdim"][:4] = stored.header["pixdim"][:4]
    if vector:
        header.set_intent("vector")
    write_whole(path, partial(_write_nifti, image, path.name))


def _write_nifti(image: Any, name: str, file: IO[bytes]) -> None:
    if not name.endswith(".gz"):
        image.to_stream(file)
        return
    # without its name and the time: the same content gives the same file
    with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as compressed:
        image.to_stream(compressed)


_COMPRESSION = 1  # nibabel's: higher levels take many times as long for little


def files_of(source: Source) -> list[str]:
    """All files that a volume is read from: a header of its own may name files of voxels."""
    if not isinstance(source, str):
        return list(source)
    if not source.lower().endswith((".mhd", ".nhdr")):
        return [source]
    with open(source, "rb") as file:
        lines = [line.strip() for line in file.read(_HEADER_BYTES).decode("latin-1").splitlines()]
    named: list[str] = []
    for place, line in enumerate(lines):
        match = re.fullmatch(r"(?:ElementDataFile\s*=|data file:)\s*(.+)", line)
        if match:
            rest = lines[place + 1 :] if match[1].startswith("LIST") else [match[1].split(" ")[0]]
            named += [match[1], *rest]
    paths = [os.path.join(os.path.dirname(source), name) for name in named]
    for path in list(paths):
        paths += sorted(glob.glob(re.sub(r"%\d*d", "*", glob.escape(path))))
    return [source, *dict.fromkeys(path for path in paths if os.path.isfile(path))]


def describe(source: Source) -> str:
    """Name a source in a message: the file, or the folder of the DICOM series."""
    return (
        source if isinstance(source, str) else f"The DICOM series in {os.path.dirname(source[0])}"
    )


def is_constant(volume: Any) -> bool:
    """Whether every channel of a volume (C, ...) holds a single value."""
    return all(bool(channel.min() == channel.max()) for channel in volume)


def cause_of(error: BaseException) -> str:
    """First line of what lies at the root of a chain of exceptions; of SimpleITK's, the error."""
    *_, error = causes(error)
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if lines[0].startswith("Exception thrown in SimpleITK"):
        said = next((line for line in lines if "ERROR: " in line), lines[-1])
        return re.sub(r"\w+\(0x\w+\): ", "", said.rpartition("ERROR: ")[-1])
    return lines[0]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of fsspec, such as `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][\w+.-]*(://|::)", os.fspath(path)) is not None


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that the command `prepare` wrote."""
    try:
        content = json.loads(Path(folder, SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "prepared" in content


def _expand(path: str, label: str | None) -> Iterator[tuple[Source, str | None]]:
    if is_url(path):
        raise InputError(
            f"{path} is a URL, which only pre-training reads, and only as its one and only root; "
            "give the path of a local copy."
        )
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        if is_prepared(path):
            raise InputError(
                f"{path} holds prepared volumes, which only pre-training reads, and only as its "
                "one and only root; give the original volumes, and this as prepared where the data "
                "are labelled."
            )
        dataset = os.path.join(path, "dataset.json")
        yield from _expand_json(dataset) if _is_decathlon(dataset) else _search(path, label)
    elif not os.path.lexists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"{path} does not exist and matches no file; correct the path.")
        for match in matches:
            if os.path.isdir(match) or match.lower().endswith(_SUFFIXES):
                yield from _expand(match, label)
    elif path.endswith(".json"):
        yield from _expand_json(path)
    elif path.endswith(".txt"):
        yield from _expand_entries(_listed(path), path)
    elif path.lower().endswith(_SUFFIXES):
        yield path, label
    else:
        raise InputError(
            f"{path} is of an unknown format; give {', '.join(_SUFFIXES)}, the folder of a DICOM "
            "series, or a .txt or .json list."
        )


def _is_decathlon(path: str) -> bool:
    content = load_json(path) if os.path.isfile(path) else None
    return isinstance(content, dict) and "training" in content


def load_json(path: str) -> Any:
    """Content of a JSON file.

    Raises:
        InputError: It is no JSON, or cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); correct that.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); correct it.") from error


def _listed(path: str) -> list[str]:
    """Lines of a text file, without comments."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); correct that.") from error
    except ValueError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}); save it as such.") from error
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _expand_json(path: str) -> Iterator[tuple[Source, str | None]]:
    content = load_json(path)
    entries = content.get("training") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise InputError(
            f'{path} holds neither a list nor a "training" list; write one of paths or of '
            '{"image": path, "label": path}.'
        )
    yield from _expand_entries(entries, path)


def _expand_entries(entries: list[Any], path: str) -> Iterator[tuple[Source, str | None]]:
    folder = os.path.dirname(path)
    for entry in entries:
        image, label = (
            (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        )
        if not isinstance(image, str) or not isinstance(label, str | None):
            raise InputError(
                f'{path} has the entry {entry}; write a path or {{"image": path, "label": path}}.'
            )
        image = os.path.join(folder, os.path.expanduser(image))
        if not os.path.exists(image) and not glob.has_magic(image):
            raise InputError(f"{image}, listed in {path}, does not exist; correct the list.")
        yield from _expand(image, label and os.path.join(folder, os.path.expanduser(label)))


def _search(root: str, label: str | None) -> Iterator[tuple[Source, str | None]]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        seen.add(os.path.realpath(folder))
        if SETTINGS in files and is_prepared(folder):
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _LABEL_FOLDERS
            and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        others = []
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield path, label
            elif not name.startswith("."):
                others.append(path)
        dicom = [path for path in others if _is_dicom(path)]
        if dicom:
            yield from ((source, label) for source in _dicom_sources(folder, dicom))


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}); change its permissions or move it "
        "away."
    ) from error


def _is_dicom(path: str) -> bool:
    if path.lower().endswith(".dcm"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # a dangling link or a file of somebody else, and no volume by its name


def _dicom_sources(folder: str, paths: Sequence[str]) -> Iterator[Source]:
    """Series of a folder, unless its only one lacks the damaged files, and these as another one."""
    unread = dict.fromkeys(paths)
    series: list[Source] = []
    for identifier in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(folder):
        slices = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(folder, identifier)
        for path in slices:
            unread.pop(path, None)
        if len(slices) == 1 and _header_shape(slices, _open(slices))[2] == 1:
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


def _is_damaged_dicom(path: str) -> bool:
    """Whether a file that is in no series should be: contours, reports and indices should not."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return True
    rows = (b"\x28\x00\x10\x00", b"\x00\x28\x00\x10")  # the tag that every image has
    return content[128:132] != b"DICM" or any(tag in content for tag in rows)


def _searched_folder(roots: Sequence[str]) -> str | None:
    """The folder to which names are relative, if there is a single one and no list in it."""
    if len(roots) > 1:
        return None
    (root,) = (os.path.abspath(os.path.expanduser(root)) for root in roots)
    searched = os.path.isdir(root) and not _is_decathlon(os.path.join(root, "dataset.json"))
    return root if searched else None


def _names(sources: Iterable[Source], folder: str | None) -> dict[Source, str]:
    """Name of every source: its path below the folder, or below the common one."""
    paths: dict[Source, str] = {}
    for source in sources:
        path = source if isinstance(source, str) else os.path.dirname(source[0])
        paths[source] = _stem(path)
    common = folder or os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    wanted: dict[Source, str] = {}
    for source, path in paths.items():
        # slices may lie in the folder itself
        below = path.removeprefix(common).lstrip(os.sep)
        wanted[source] = below or os.path.basename(path)
    names: dict[Source, str] = {}
    taken: set[str] = set()
    reserved = set(wanted.values())
    for source, name in wanted.items():
        unique, number = name, 1
        while unique in taken or (number > 1 and unique in reserved):
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        names[source] = unique
    return names


def _stem(path: str) -> str:
    suffix = next((s for s in reversed(_SUFFIXES) if path.lower().endswith(s)), "")
    return path[: len(path) - len(suffix)]


def _match_labels(names: dict[Source, str], label_root: str) -> dict[Source, str | None]:
    root = os.path.abspath(os.path.expanduser(label_root))
    if not os.path.isdir(root):
        raise InputError(f"{root}, the folder of labels, does not exist; correct label_root.")
    by_path: dict[str, str] = {}
    by_name: dict[str, str] = {}
    for folder, folders, files in os.walk(root, onerror=_refuse_folder):
        if SETTINGS in files and is_prepared(folder):
            folders.clear()
            continue
        for file in sorted(files):
            path = os.path.join(folder, file)
            if file.lower().endswith(_SUFFIXES) and not file.startswith("."):
                by_path[Path(os.path.relpath(_stem(path), root)).as_posix()] = path
                by_name[_stem(file)] = path
    return {
        source: by_path.get(name) or by_name.get(os.path.basename(name))
        for source, name in names.items()
    }


def _paths(source: Source) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else source


def _require_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(f"The name of {shown} is no UTF-8; rename it.") from error


def lies_in(source: Source, folder: str) -> bool:
    """Whether a volume lies below a folder, which may not exist."""
    folder = os.path.join(os.path.abspath(os.path.expanduser(folder)), "")
    return (source if isinstance(source, str) else source[0]).startswith(folder)


def require_apart(folder: Path, data: Any) -> None:
    """Refuse to write volumes where those of a data module are searched for, and would be found.

    Args:
        folder: for the results.
        data: a data module, which may have `root` and `label_root`.

    Raises:
        InputError: The folder is, or lies in, one of these.
    """
    for name in ("root", "label_root"):
        given = getattr(data, name, None) or []
        for path in [given] if isinstance(given, str | os.PathLike) else given:
            searched = os.path.expanduser(os.fspath(path))
            if _searched_folder([searched]) and lies_in(
                os.path.join(folder.absolute(), ""), searched
            ):
                raise InputError(
                    f"{folder} lies in {path}, the {name} of the data, where the results would be "
                    "taken for volumes; give another folder for them."
                )


def _open(source: Source) -> Any:
    """Read a header: nibabel's image, ITK's reader (of a first slice), or a mapped array."""
    if isinstance(source, str) and source.lower().endswith(_NIFTI):
        return nibabel.load(source)
    if isinstance(source, str) and source.lower().endswith(".npy"):
        return _load_npy(source)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(source if isinstance(source, str) else source[0])
    reader.ReadImageInformation()
    return reader


def _header_shape(source: Source, opened: Any) -> tuple[int, ...]:
    """Shape (x, y, z) or (x, y, z, channels)."""
    if not isinstance(opened, SimpleITK.ImageFileReader):
        return tuple(opened.shape)
    size = tuple(opened.GetSize())
    if not isinstance(source, str) and len(source) > 1:
        size = (*size[:2], len(source))
    components = opened.GetNumberOfComponents()
    return (*size, components) if components > 1 else size


def _header_affine(opened: Any) -> np.ndarray:
    """Affine to RAS mm; that of a DICOM series without the distance of its slices."""
    if isinstance(opened, np.ndarray):
        return np.eye(4)
    if isinstance(opened, SimpleITK.ImageFileReader):
        return _itk_affine(opened)
    affine: np.ndarray = opened.affine
    return affine


def _require_complete(path: str, opened: Any) -> None:
    """Compare what a header says with the size of the files, before memory is asked for.

    Raises:
        InputError: The voxels are no real numbers.
        ValueError: The files cannot hold so many.
    """
    if isinstance(opened, np.ndarray):
        _require_numbers(path, opened.dtype)
        return
    if isinstance(opened, SimpleITK.ImageFileReader):
        voxels, size, densest = math.prod(opened.GetSize()), 1, _DENSEST
    else:
        dtype = opened.header.get_data_dtype()
        _require_numbers(path, dtype)
        shape = tuple(map(int, opened.header.get_data_shape()))
        if min(shape, default=0) < 1:
            raise ValueError(f"its header says the shape {shape}")
        voxels, size = math.prod(shape), dtype.itemsize
        densest = _DENSEST if path.lower().endswith(".gz") else 1
    held = sum(os.path.getsize(part) for part in files_of(path))
    if voxels * size > held * densest:
        raise ValueError(f"its header says {voxels * size:,} bytes and it has {held:,}")


def _read(path: str, opened: Any) -> tuple[np.ndarray, np.ndarray]:
    """Array (x, y, z) or (x, y, z, channels) and affine to RAS mm."""
    if isinstance(opened, np.ndarray):
        return opened, np.eye(4)
    if isinstance(opened, SimpleITK.ImageFileReader):
        return _read_itk(path)
    with np.errstate(over="ignore"):
        return np.asarray(opened.dataobj, dtype=np.float32), opened.affine


def _load_npy(path: str) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.moveaxis(array, 0, -1) if array.ndim == 4 else array


def _read_itk(source: Source) -> tuple[np.ndarray, np.ndarray]:
    image = SimpleITK.ReadImage(source) if isinstance(source, str) else _read_series(source)
    array = SimpleITK.GetArrayViewFromImage(image)
    dimension = image.GetDimension()
    axes = (*reversed(range(dimension)), *range(dimension, array.ndim))
    return array.transpose(axes).copy(), _itk_affine(image)


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


def _read_series(slices: tuple[str, ...]) -> Any:
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


def _require_shape(source: Source, shape: tuple[int, ...], channels: int) -> None:
    if len(shape) < 3 or min(shape[:3]) < 2 or np.prod(shape[3:]) != channels:
        raise InputError(
            f"{describe(source)} has the shape {shape}, not that of a 3D volume with {channels} "
            f"channel{'s' if channels > 1 else ''}; convert it, leave it out, or set `channels`."
        )


def _require_place(source: Source, affine: np.ndarray, opened: Any) -> None:
    if not np.isfinite(affine).all():
        raise InputError(
            f"{describe(source)} has an affine that is not finite; correct its header or leave it "
            "out."
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if isinstance(source, str) and _lacks_spacing(source, opened):
        spacing = np.zeros(3)
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        raise InputError(
            f"{describe(source)} has voxels of {' x '.join(f'{size:g}' for size in spacing)} mm, "
            f"not between {MIN_SPACING:g} and {MAX_SPACING:g}; correct its header or leave it out."
        )
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < _LEAST_VOLUME:
        raise InputError(
            f"{describe(source)} has axes that lie in one plane; correct its header or leave it "
            "out."
        )


def _lacks_spacing(path: str, opened: Any) -> bool:
    """Whether a NIfTI header has voxels of 0 mm, which are read as 1 mm."""
    is_nifti = path.lower().endswith(_NIFTI)
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


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Make one sentence of whatever a library says of a file."""
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
    """Why a file cannot be read, and what to do about it."""
    reason = cause_of(error)
    if isinstance(source, str):
        try:
            with open(source, "rb") as file:
                start = file.read(348)
        except OSError as refused:  # of which libraries do not always tell
            return refused.strerror or reason, "correct that or leave the file out"
        is_packed, is_named = start.startswith(b"\x1f\x8b"), source.lower().endswith(_NIFTI)
        is_named_packed = source.lower().endswith(".gz")
        if is_packed and is_named and not is_named_packed:
            return reason, "it is compressed: rename it to .nii.gz"
        if is_named_packed and (start[344:347] == b"n+1" or start[4:7] == b"n+2"):
            return reason, "it is not compressed: rename it to .nii"
    return reason, "replace the damaged file or leave it out"


def _require_numbers(source: Source, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf":
        found = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, f"of the type {dtype}")
        raise InputError(
            f"{describe(source)} has voxels that are {found}; convert it to real numbers or leave "
            "it out."
        )
