"""A picture of prepared volumes, which shows a wrong axis or window at once."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gvsl_lightning.data.prepared import PreparedFolder, PreparedVolume
from gvsl_lightning.evaluation.panels import PLANES, cut_slice, without_formulas


def draw_contact_sheet(folder: PreparedFolder, volumes: Sequence[PreparedVolume]) -> Figure:
    """Draw the three middle slices of some volumes, each with name, shape and voxel size.

    Of many volumes, twelve are chosen at random. Superior (axial: anterior) is up and the patient's
    right (sagittal: anterior) is left. The slices of a volume have the same scale in mm.
    """
    chosen = random.Random(0).sample(list(volumes), min(12, len(volumes)))  # nosec B311
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
    sidecar = folder.sidecar(volume.name)
    spacing = sidecar["stored"]["spacing"] or [1.0, 1.0, 1.0]
    intensity = sidecar["intensity"]
    assert isinstance(volume.image, str)
    array = np.load(volume.image, mmap_mode="r", allow_pickle=False)[0]
    grid = {"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.86, "wspace": 0.03}
    widths = [array.shape[plane.across] * spacing[plane.across] for plane in PLANES]
    panels = cell.subplots(1, 3, gridspec_kw={"width_ratios": widths, **grid})
    for axes, plane in zip(panels, PLANES, strict=True):
        axes.imshow(
            cut_slice(array, plane)[:, ::-1].astype(np.float32),
            cmap="gray",
            origin="lower",
            aspect=spacing[plane.up] / spacing[plane.across],
            vmin=intensity["percentiles"]["0.5"],
            vmax=intensity["max"],
            interpolation="bilinear",
        )
        axes.set_axis_off()
    shape = " x ".join(map(str, array.shape))
    size = " x ".join(f"{edge:.3g}" for edge in spacing)
    name = volume.name if len(volume.name) <= _NAME else f"...{volume.name[3 - _NAME :]}"
    cell.suptitle(f"{name}\n{shape} voxels of {size} mm", fontsize=11, y=0.99)


_NAME = 60
"""Letters of a name that are drawn."""
