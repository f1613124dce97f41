"""A survey of a folder of volumes: sizes, spacings, intensities, classes, subjects."""

# mypy: allow-untyped-calls
# nibabel ships no types for its orientations.

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np
import pydicom
from rich.progress import track

from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import read_geometry, read_label, read_volume
from gvsl_lightning.data.source import VolumeFile, evenly
from gvsl_lightning.transforms.intensity import Modality

_MOST_HEADERS = 1000
_MOST_READ = 8
_SUBJECT_PATTERNS = (r"(sub-[A-Za-z0-9]+)", r"([Pp]atient[-_]?\d+)")


@dataclass(frozen=True)
class Survey:
    """Facts of a folder.

    Attributes:
        count: number of volumes.
        sizes: (n, 3) voxels along right, front and top, of up to 1,000 volumes.
        spacings: (n, 3) voxel sizes in mm along the same axes.
        orientations: axis codes, such as ``RAS`` -> number of volumes.
        low: smallest value of the volumes that were read, up to eight.
        high: largest value of them.
        modality: intensity preset that fits.
        window: lower and upper limit of the preset ``ct``.
        reason: why this modality.
        classes: label value -> mean volume of the structure in cm3, of up to eight label maps.
        labelled: names of the volumes with a label map.
        group_by: pattern that finds the subject in names; None: every volume is a subject.
        subjects: number of subjects.
    """

    count: int
    sizes: np.ndarray
    spacings: np.ndarray
    orientations: dict[str, int]
    low: float
    high: float
    modality: Modality
    window: tuple[float, float]
    reason: str
    classes: dict[int, float]
    labelled: list[str]
    group_by: str | None
    subjects: int

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm to resample to: the median; None if all volumes have the same."""
        middle = np.median(self.spacings, axis=0)
        if np.allclose(self.spacings, middle, rtol=0.01):
            return None
        right, front, top = (float(f"{size:.3g}") for size in middle)
        return right, front, top

    @property
    def size(self) -> np.ndarray:
        """Median size (3,) in voxels after resampling."""
        spacing = np.array(self.spacing) if self.spacing else self.spacings
        middle: np.ndarray = np.median(self.sizes * self.spacings / spacing, axis=0)
        return middle


def survey(root: str, label_root: str | None = None) -> Survey:
    """Look at the headers of all volumes, and at the voxels of some.

    Args:
        root: see :func:`gvsl_lightning.data.find.find_volumes`.
        label_root: folder of label maps.

    Raises:
        InputError: if there is no volume, or one cannot be read.
    """
    files = find_volumes(root, label_root, duplicates="drop")
    geometries = [
        _ras(*read_geometry(file.image))
        for file in track(evenly(files, _MOST_HEADERS), "Reading headers", transient=True)
    ]
    volumes = [
        read_volume(file.image)[0].numpy()
        for file in track(evenly(files, _MOST_READ), "Reading volumes", transient=True)
    ]
    labelled = [file for file in files if file.label is not None]
    group_by = _group_pattern([file.name for file in files])
    modality, window, reason = _guess_modality(files[0], volumes)
    return Survey(
        count=len(files),
        sizes=np.array([size for size, _, _ in geometries]),
        spacings=np.array([spacing for _, spacing, _ in geometries]),
        orientations=dict(Counter(codes for _, _, codes in geometries)),
        low=float(min(volume.min() for volume in volumes)),
        high=float(max(volume.max() for volume in volumes)),
        modality=modality,
        window=window,
        reason=reason,
        classes=_classes(evenly(labelled, _MOST_READ)),
        labelled=[file.name for file in labelled],
        group_by=group_by,
        subjects=len(
            {re.findall(group_by, file.name)[0] if group_by else file.name for file in files}
        ),
    )


def describe_sizes(
    files: Sequence[VolumeFile],
    spacing: Sequence[float] | None,
    patch_size: Sequence[int],
    subjects: int,
) -> str:
    """One line on the volumes that train: number, sizes of up to 20, and whether the patch fits.

    Args:
        files: volumes.
        spacing: voxel size in mm to which they are resampled; None: as stored.
        patch_size: (D, H, W) in voxels.
        subjects: number of subjects.

    Raises:
        InputError: if a volume cannot be read.
    """
    geometries = [_ras(*read_geometry(file.image)) for file in evenly(list(files), 20)]
    stored = np.array([voxel for _, voxel, _ in geometries])
    voxels = stored if spacing is None else np.array(spacing)
    sizes = np.array([size for size, _, _ in geometries]) * stored / voxels
    middle = np.median(sizes, axis=0)
    edges = " x ".join(f"{edge:.0f}" for edge in middle)
    voxel = " x ".join(f"{edge:.3g}" for edge in np.median(np.atleast_2d(voxels), axis=0))
    line = f"{len(files)} volumes of {subjects} subjects, {edges} voxels of {voxel} mm"
    filled = np.prod(np.minimum(patch_size, middle)) / np.prod(patch_size)
    patch = " x ".join(map(str, patch_size))
    if filled > 0.5:
        return f"{line}, patches of {patch}"
    return (
        f"{line}: patches of {patch} are {100 * (1 - filled):.0f} % padding, and `gvsl plan` "
        "proposes sizes that fit"
    )


def _ras(shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Size and spacing along right, front and top, and the stored axis codes."""
    orientation = nibabel.orientations.io_orientation(affine)
    stored = orientation[:, 0].argsort()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    codes = "".join(map(str, nibabel.orientations.ornt2axcodes(orientation)))
    return np.array(shape)[stored], spacing[stored], codes


def _guess_modality(
    file: VolumeFile, volumes: Sequence[np.ndarray]
) -> tuple[Modality, tuple[float, float], str]:
    hounsfield = (-1024.0, 1024.0)
    if not isinstance(file.image, str):
        tag = str(pydicom.dcmread(file.image[0], stop_before_pixels=True).get("Modality", ""))
        if tag in ("CT", "MR"):
            return ("ct" if tag == "CT" else "mri"), hounsfield, f"the DICOM tag says {tag}"
    low = float(np.median([volume.min() for volume in volumes]))
    if low < -150:
        return "ct", hounsfield, f"values reach {low:g}, as CT does in air"
    inside = np.concatenate([volume[volume > 0].ravel()[::7] for volume in volumes])
    near_water = float(((inside > 850) & (inside < 1150)).mean()) if len(inside) else 0.0
    whole = bool((inside == inside.round()).all()) if len(inside) else False
    if low >= 0 and whole and near_water > 0.3 and inside.max() > 1500:
        share = f"{100 * near_water:.0f} % of the values above 0 are near 1024"
        return "ct", (0.0, 2048.0), f"{share}, as in CT stored as HU + 1024"
    return "mri", hounsfield, f"the smallest value is {low:g}, and CT would have values below 0"


def _classes(files: Sequence[VolumeFile]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for file in files:
        assert file.label is not None
        label = read_label(file.label)
        voxel = abs(np.linalg.det(label.affine.numpy()[:3, :3])) / 1000
        values, counts = np.unique(label.numpy(), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.setdefault(value, []).append(count * voxel)
    return {value: float(np.mean(found[value])) for value in sorted(found)}


def _group_pattern(names: Sequence[str]) -> str | None:
    """The first pattern that finds a subject in all names, and one subject in several."""
    for pattern in _SUBJECT_PATTERNS:
        found = [re.findall(pattern, name) for name in names]
        if all(found) and len({one[0] for one in found}) < len(names):
            return pattern
    return None
