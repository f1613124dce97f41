"""A volume on disk: its files and its name; lists of volumes."""

import glob
import os
import pickle
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.privacy import pseudonyms

Source = str | tuple[str, ...]
"""One file, or the files of one DICOM volume in anatomical order."""

NIFTI = (".nii", ".nii.gz")
FREESURFER = (".mgz", ".mgh")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
SUFFIXES = (*NIFTI, *FREESURFER, *_ITK, ".npy")


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
_Item = TypeVar("_Item")


class PackedFiles(Generic[_File]):
    """Volumes in one piece of memory, each made anew when it is asked for.

    Loader processes share it with the process that started them. They do not share a list: reading
    one of its objects counts a reference to it, which copies the page of memory it lies on.
    """

    def __init__(self, files: Iterable[_File]) -> None:
        packed = [pickle.dumps(file) for file in files]
        self._limits = np.cumsum([0, *map(len, packed)])
        self._packed = b"".join(packed)

    def __len__(self) -> int:
        return len(self._limits) - 1

    def __getitem__(self, index: int) -> _File:
        place = range(len(self))[index]
        packed = self._packed[slice(*self._limits[place : place + 2])]
        # of this process's own memory
        file: _File = pickle.loads(packed)  # nosec B301
        return file


def anonymous(files: Sequence[_File]) -> list[_File]:
    """The same volumes under pseudonyms, see :mod:`gvsl_lightning.runs.privacy`, in their order."""
    hidden = pseudonyms(file.name for file in files)
    return [replace(file, name=name) for file, name in zip(files, hidden, strict=True)]


def identity(source: Source) -> tuple[Any, ...]:
    """Device and inode of each file: the same for all paths and links to it."""
    if not isinstance(source, str):
        return tuple(map(identity, source))
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


def first_file(source: Source) -> str:
    """The file, or the first slice."""
    return source if isinstance(source, str) else source[0]


def evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """All items, or so many of them in even steps."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]


def files_of(source: Source) -> list[str]:
    """All files of a volume: a header file may name other files with the voxels."""
    if not isinstance(source, str):
        return list(source)
    if not source.lower().endswith((".mhd", ".nhdr")):
        return [source]
    with open(source, "rb") as file:
        lines = [line.strip() for line in file.read(_HEADER_BYTES).decode("latin-1").splitlines()]
    named: list[str] = []
    for place, line in enumerate(lines):
        match = re.fullmatch(r"(?i:ElementDataFile\s*=|data ?file:)\s*(.+)", line)
        if match:
            rest = lines[place + 1 :] if match[1].startswith("LIST") else [match[1].split(" ")[0]]
            named += [match[1], *rest]
    paths = [os.path.join(os.path.dirname(source), name) for name in named]
    for path in list(paths):
        paths += sorted(glob.glob(re.sub(r"%\d*d", "*", glob.escape(path))))
    return [source, *dict.fromkeys(path for path in paths if os.path.isfile(path))]


_HEADER_BYTES = 1 << 20


def describe(source: Source) -> str:
    """Name a source in a message: the file, or the DICOM series by its first file."""
    return source if isinstance(source, str) else f"The DICOM series of {source[0]}"
