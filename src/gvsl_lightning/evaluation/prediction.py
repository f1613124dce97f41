"""From a trained network to a volume on the grid of the original scan."""

import math
from collections.abc import Callable, Sequence
from itertools import chain, combinations

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.utils import sliding_window_inference
from monai.transforms.spatial.array import SpatialResample
from torch import Tensor

LARGEST_MAP = 2**26
"""Numbers in one full-resolution feature map of all windows of a batch: 256 MiB in float32."""


def choose_window(size: Sequence[int], overlap: float, most_voxels: int) -> tuple[int, ...]:
    """Choose the largest window for a volume: few windows, of almost equal edges.

    Args:
        size: (D, H, W) of the volume.
        overlap: of neighbouring windows, as a share of their edges, in [0, 1).
        most_voxels: of one window.

    Returns:
        (D, H, W), each a multiple of 16 or the volume's edge.
    """
    counts = [1, 1, 1]
    while True:
        edges = [
            edge if count == 1 else min(edge, _round_up(edge / (count - overlap * (count - 1))))
            for edge, count in zip(size, counts, strict=True)
        ]
        if math.prod(edges) <= most_voxels or max(edges) <= _UNIT:
            return tuple(edges)
        counts[edges.index(max(edges))] += 1


def sliding_window(
    volume: Tensor,
    network: Callable[[Tensor], Tensor],
    window_size: Sequence[int] | None = None,
    overlap: float = 0.25,
    mirror: bool = False,
    channels: int = 32,
) -> Tensor:
    """Run a network over a volume of any size, window by window.

    Windows are weighted by a Gaussian and stitched on the CPU: the memory of the volume's device
    holds a few windows only, see :data:`LARGEST_MAP`.

    Args:
        volume: (1, C, D, H, W); may be smaller than a window.
        network: from `(N, C, *window_size)` to logits `(N, classes, *window_size)`.
        window_size: (D, H, W) in voxels; None: see :func:`choose_window`.
        overlap: of neighbouring windows, as a share of their edges, in [0, 1).
        mirror: average over the eight mirrorings of the volume.
        channels: channels of the network at full resolution; they limit the windows of a batch.

    Returns:
        Logits, or with ``mirror`` the logarithms of mean probabilities, (1, classes, D, H, W),
        float32 on the CPU.
    """
    most_voxels = max(1, LARGEST_MAP // channels)
    window = list(window_size or choose_window(volume.shape[2:], overlap, most_voxels))

    def run(flipped: tuple[int, ...] = ()) -> Tensor:
        logits = sliding_window_inference(
            torch.flip(volume, flipped) if flipped else volume,
            window,
            max(1, most_voxels // math.prod(window)),
            network,
            overlap=overlap,
            mode="gaussian",
            sw_device=volume.device,
            device="cpu",
        )
        assert isinstance(logits, Tensor)
        return (torch.flip(logits, flipped) if flipped else logits).float()

    if not mirror:
        return run()
    total = torch.zeros(())
    for flipped in chain.from_iterable(combinations((2, 3, 4), count) for count in range(4)):
        total = total + run(flipped).softmax(dim=1) / 8
    return total.clamp_min(1e-12).log()


def to_original_grid(
    volume: Tensor, affine: np.ndarray, original_affine: np.ndarray, original_shape: Sequence[int]
) -> Tensor:
    """Resample a volume from the prepared grid to the one it came from, linearly, on the CPU.

    Args:
        volume: (C, D, H, W).
        affine: (4, 4) from its voxels to mm.
        original_affine: (4, 4) of the result.
        original_shape: of the result.

    Returns:
        `(C, *original_shape)`, float32; up to one voxel beyond the prepared grid the value of the
        nearest voxel, and 0 further away.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=np.float64)
    moved = resample(
        MetaTensor(volume.cpu().float(), affine=torch.as_tensor(affine, dtype=torch.float64)),
        dst_affine=torch.as_tensor(original_affine, dtype=torch.float64),
        spatial_size=[int(size) for size in original_shape],
    )
    assert isinstance(moved, MetaTensor)
    beyond = _beyond(volume.shape[1:], np.linalg.inv(affine) @ original_affine, original_shape)
    return moved.as_tensor().float().masked_fill(beyond, 0.0)


def labels_on_original_grid(
    probabilities: Tensor,
    affine: np.ndarray,
    original_affine: np.ndarray,
    original_shape: Sequence[int],
) -> Tensor:
    """Most probable class of every voxel of the original grid, see `to_original_grid`.

    Takes probabilities (classes, D, H, W), and resamples them, not labels, so that borders stay
    smooth; one class at a time, as all of them may not fit into memory.

    Returns:
        `(*original_shape)`, the smallest integer type that holds all classes.
    """
    classes = len(probabilities)
    dtype = torch.uint8 if classes <= 256 else torch.int16
    shape = tuple(int(size) for size in original_shape)
    best, labels = torch.full(shape, -1.0, dtype=torch.float32), torch.zeros(shape, dtype=dtype)
    for index in range(classes):
        one = probabilities[index : index + 1]
        here = to_original_grid(one, affine, original_affine, shape)[0]
        better = here > best
        best[better], labels[better] = here[better], index
    return labels


_UNIT = 16


def _round_up(edge: float) -> int:
    return math.ceil(edge / _UNIT) * _UNIT


def _beyond(shape: Sequence[int], matrix: np.ndarray, original_shape: Sequence[int]) -> Tensor:
    """Voxels of the original grid more than one voxel beyond a grid of `shape`.

    `matrix` (4, 4) leads from the voxels of the original grid to those of the other one. The result
    is a mask of the original shape, or one False for all voxels.
    """

    def outside(places: Sequence[np.ndarray]) -> np.ndarray:
        far = np.zeros(np.broadcast_shapes(*(place.shape for place in places)), dtype=bool)
        for row, size in zip(matrix[:3], shape, strict=True):
            place = row[0] * places[0] + row[1] * places[1] + row[2] * places[2] + row[3]
            far |= (place < -1 - 1e-3) | (place > size + 1e-3)
        return far

    matrix = matrix.astype(np.float32)  # half the memory for a whole volume of places
    ends = np.ix_(*(np.array([0, int(size) - 1], dtype=np.float32) for size in original_shape))
    if not outside(ends).any():
        return torch.tensor(False)
    voxels = np.ix_(*(np.arange(int(size), dtype=np.float32) for size in original_shape))
    return torch.from_numpy(outside(voxels))
