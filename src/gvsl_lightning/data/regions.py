"""The part of a volume that a task is about, found before anything is resampled."""

# mypy: allow-untyped-calls
# SimpleITK ships type information without annotations.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK
import torch
from monai.data.meta_tensor import MetaTensor
from scipy import ndimage

from gvsl_lightning.errors import InputError

Region = tuple[slice, slice, slice]
"""A box of voxels of the volume as it is stored."""

FindRegion = Callable[[MetaTensor, MetaTensor | None], Region]
"""From a volume as stored, (C, X, Y, Z), and its label map, if it has one, to a region."""


def crop_to(volume: MetaTensor, region: Region) -> MetaTensor:
    """Crop a volume (C, X, Y, Z) to a copy, whose voxels keep their place in the patient."""
    affine = volume.affine.clone()
    start = torch.tensor([part.start for part in region], dtype=affine.dtype)
    affine[:3, 3] += affine[:3, :3] @ start
    return MetaTensor(volume.as_tensor()[:, region[0], region[1], region[2]].clone(), affine=affine)


@dataclass(frozen=True)
class AroundLabel:
    """The box of all labelled voxels and a margin in mm; without label, the whole volume."""

    margin: float

    def __call__(self, image: MetaTensor, label: MetaTensor | None) -> Region:
        """Find the region."""
        return _grown(_labelled_box(label), self.margin, image)


@dataclass(frozen=True)
class Centred:
    """A box of fixed size about the labelled voxels; without label, about the volume's centre.

    Along an axis on which the volume is shorter, the box is the whole axis.

    Attributes:
        size: In voxels along the stored axes.
    """

    size: tuple[int, int, int]

    def __call__(self, image: MetaTensor, label: MetaTensor | None) -> Region:
        """Find the region."""
        shape = image.shape[1:]
        box = _labelled_box(label) or _whole(shape)
        starts, sizes = [], np.minimum(self.size, shape).tolist()
        for part, size, length in zip(box, sizes, shape, strict=True):
            starts.append(min(max((part.start + part.stop - size) // 2, 0), length - size))
        return _region(starts, np.add(starts, sizes))


@dataclass(frozen=True)
class AroundLungs:
    """The box of the lungs in a CT of the chest and a margin; the whole volume if there are none.

    Lungs are air that the body encloses: voxels below a threshold that are not connected with
    the volume's left, right, front or back. Of its connected parts the largest counts, and those of
    at least a fifth of its size: two lungs may be one part or two, bowel gas is smaller.

    Attributes:
        margin: In mm, on every side.
        threshold: In HU.
        step: In mm; the volume is looked at this coarsely.
    """

    margin: float = 10.0
    threshold: float = -400.0
    step: float = 2.5

    def __call__(self, image: MetaTensor, label: MetaTensor | None) -> Region:
        """Find the region."""
        shape, spacing = image.shape[1:], _spacing(image)
        stride = np.maximum(np.floor(self.step / spacing), 1).astype(int)
        coarse = image[0].numpy()[:: stride[0], :: stride[1], :: stride[2]]
        parts, count = ndimage.label(coarse < self.threshold)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        directions = image.affine.numpy()[:3, :3] / spacing
        vertical = int(np.abs(directions[2]).argmax())
        for axis in {0, 1, 2} - {vertical}:
            sizes[np.unique(parts.take([0, -1], axis))] = 0
        box = _box((sizes >= max(0.2 * sizes.max(), 1))[parts])
        if box is None:
            return _whole(shape)
        # the lungs may begin and end between two voxels that were looked at
        starts = [(part.start - 1) * by + 1 for part, by in zip(box, stride, strict=True)]
        stops = [part.stop * by for part, by in zip(box, stride, strict=True)]
        return _grown(_region(starts, stops), self.margin, image)


@dataclass(frozen=True)
class AroundLungMask:
    """The box of the lungs as the package `lungmask` finds them, and a margin in mm.

    Source: Hofmanninger et al., Automatic lung segmentation in routine imaging is primarily a data
    diversity problem, not a methodology problem, European Radiology Experimental 2020,
    https://github.com/JoHof/lungmask. Its network is downloaded when it is first used.
    """

    margin: float = 10.0

    def __call__(self, image: MetaTensor, label: MetaTensor | None) -> Region:
        """Find the region.

        Raises:
            InputError: `lungmask` is not installed.
        """
        try:
            from lungmask import LMInferer
        except ImportError as error:
            raise InputError(
                "lungmask is not installed; run `pip install lungmask` or set lungs to threshold."
            ) from error
        # it returns an array in the axis order of SimpleITK's, which is the reverse of ours
        mask = LMInferer().apply(_to_itk(image)).transpose(2, 1, 0)
        return _grown(_box(mask > 0), self.margin, image)


def _spacing(volume: MetaTensor) -> np.ndarray:
    """Voxel size in mm along the stored axes."""
    spacing: np.ndarray = np.linalg.norm(volume.affine.numpy()[:3, :3], axis=0)
    return spacing


def _region(starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray) -> Region:
    parts = [slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)]
    return parts[0], parts[1], parts[2]


def _whole(shape: Sequence[int]) -> Region:
    return _region((0, 0, 0), shape)


def _labelled_box(label: MetaTensor | None) -> Region | None:
    return None if label is None else _box(label[0].numpy() != 0)


def _box(mask: np.ndarray) -> Region | None:
    """The smallest box of all voxels of a mask; None if there are none."""
    found = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(mask.ndim)]
    if not found[0].size:
        return None
    return _region([places[0] for places in found], [places[-1] + 1 for places in found])


def _grown(box: Region | None, margin: float, image: MetaTensor) -> Region:
    """A box with a margin in mm on every side, within the volume; the whole volume without box."""
    shape = image.shape[1:]
    if box is None:
        return _whole(shape)
    voxels = np.ceil(margin / _spacing(image) - 1e-6).astype(int)
    starts = np.array([part.start for part in box]) - voxels
    stops = np.array([part.stop for part in box]) + voxels
    return _region(np.maximum(starts, 0), np.minimum(stops, shape))


def _to_itk(volume: MetaTensor) -> SimpleITK.Image:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine.numpy()
    spacing = _spacing(volume)
    image = SimpleITK.GetImageFromArray(volume[0].numpy().transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image
