"""Crops of volumes, and tensors of the arrays that volumes are stored as."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.utils.type_conversion import convert_to_tensor
from torch import Tensor
from torch.nn import functional as F


def crop(
    volume: Tensor | np.ndarray, patch_size: Sequence[int], position: np.ndarray | float = 0.5
) -> Tensor:
    """Crop a volume and, along axes shorter than the patch, pad it with zeros on both sides.

    Args:
        volume: (C, D, H, W); of an array that is mapped from a file, only the crop is read.
        patch_size: Size (D, H, W) of the crop.
        position: See `crop_start`.

    Returns:
        `(C, *patch_size)`, a plain tensor; of an array a copy, see `array_to_tensor`.
    """
    voxels: Any = volume
    if isinstance(volume, Tensor):
        voxels = convert_to_tensor(volume, track_meta=False)
    start = crop_start(voxels.shape[1:], patch_size, position)
    stop = start + np.array(patch_size)
    region = [slice(max(low, 0), high) for low, high in zip(start, stop, strict=True)]
    patch = voxels[:, region[0], region[1], region[2]]
    if isinstance(patch, np.ndarray):
        patch = array_to_tensor(patch)
    before = (-start).clip(min=0)
    after = (stop - np.array(voxels.shape[1:])).clip(min=0)
    padding = [int(side[axis]) for axis in (2, 1, 0) for side in (before, after)]
    return F.pad(patch, padding) if any(padding) else patch


def crop_start(
    shape: Sequence[int], patch_size: Sequence[int], position: np.ndarray | float = 0.5
) -> np.ndarray:
    """Find the voxel (3,) of a volume that becomes voxel 0 of a crop.

    Args:
        shape: Size (D, H, W) of the volume.
        patch_size: Size (D, H, W) of the crop; the voxel is negative along an axis that is padded.
        position: Fraction of the free range, one number or one for each axis; 0.5 is the centre.
    """
    free = np.array(shape) - np.array(patch_size)
    start: np.ndarray = np.where(free < 0, -(-free // 2), np.rint(position * free)).astype(int)
    return start


def array_to_tensor(array: np.ndarray) -> Tensor:
    """Copy an array into a tensor: float32, or int32 or int64 of whole numbers."""
    whole = np.int64 if array.dtype.itemsize > 4 or array.dtype == np.uint32 else np.int32
    dtype = np.float32 if np.issubdtype(array.dtype, np.floating) else whole
    return torch.from_numpy(np.array(array, dtype=dtype, order="C", subok=False))
