"""A picture of prepared volumes, by which a wrong axis or window is seen at once."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume
from gvsl_lightning.evaluation.panels import without_formulas


def draw_contact_sheet(
    folder: PreparedFolder, volumes: Sequence[PreparedVolume], count: int = 12, seed: int = 0
) -> Figure:
    """Draw the three middle slices of some volumes, each with name, shape and voxel size.

    As in radiology, superior (axial: anterior) is up and the patient's right (sagittal: anterior)
    is left. Slices of one volume have one scale in mm.

    Args:
        folder: of the volumes.
        volumes: those to choose from.
        count: how many are drawn at most.
        seed: of the choice.

    Returns:
        A figure that belongs to no window.
    """
    chosen = random.Random(seed).sample(list(volumes), min(count, len(volumes)))  # nosec B311
    chosen.sort(key=lambda volume: volume.name)
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(8 * columns, 3 * rows), facecolor="white")
    cells = figure.subfigures(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_facecolor("white")
    for volume, cell in zip(chosen, cells, strict=False):
        _draw_slices(folder, volume, cell)
    return without_formulas(figure)


def _draw_slices(folder: PreparedFolder, volume: PreparedVolume, cell: Any) -> None:
    known = folder.sidecar(volume.name)
    spacing = known["stored"]["spacing"] or [1.0, 1.0, 1.0]
    limits = (known["intensity"]["percentiles"]["0.5"], known["intensity"]["max"])
    assert isinstance(volume.image, str)
    array = np.load(volume.image, mmap_mode="r", allow_pickle=False)[0]
    sizes = np.multiply(array.shape, spacing)
    planes = [(axis, *(other for other in range(3) if other != axis)) for axis in (2, 1, 0)]
    grid = {"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.86, "wspace": 0.03}
    widths = [sizes[across] for _, across, _ in planes]
    panels = cell.subplots(1, 3, gridspec_kw={"width_ratios": widths, **grid})
    for axes, (cut, across, up) in zip(panels, planes, strict=True):
        middle = array.take(array.shape[cut] // 2, axis=cut).T.astype(np.float32)
        axes.imshow(
            middle[:, ::-1],
            cmap="gray",
            origin="lower",
            aspect=spacing[up] / spacing[across],
            vmin=limits[0],
            vmax=limits[1],
            interpolation="bilinear",
        )
        axes.set_axis_off()
    shape = " x ".join(map(str, array.shape))
    size = " x ".join(f"{edge:.3g}" for edge in spacing)
    name = volume.name if len(volume.name) <= _NAME else f"...{volume.name[3 - _NAME :]}"
    cell.suptitle(f"{name}\n{shape} voxels of {size} mm", fontsize=11, y=0.99)


_NAME = 60
"""Letters of a name that are drawn."""
