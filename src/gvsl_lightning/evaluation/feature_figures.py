"""Figures of local features: as colours beside the volume, and as points in a plane."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from gvsl_lightning.evaluation.panels import (
    Column,
    Page,
    draw_blocks,
    draw_volume,
    label_colour,
    middle_voxel,
    without_formulas,
)


def draw_features(
    volumes: Sequence[Tensor],
    colours: Mapping[str, Sequence[Tensor]],
    *,
    labels: Sequence[Tensor] = (),
    class_names: Mapping[int, str] | None = None,
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw volumes and, next to each, its local features as colours.

    Slices as in :func:`gvsl_lightning.evaluation.matching_figures.draw_matching`, but through the
    middle of the labelled voxels. Volumes may differ in size.

    Args:
        volumes: each (C, D, H, W).
        colours: heading of a column -> colours (3, D, H, W) in [0, 1] of each volume, see
            :class:`gvsl_lightning.evaluation.probes.FeatureColours`.
        labels: each (1, D, H, W) integers, drawn as outlines, white ones on the colours; 0 is
            background.
        class_names: names of label values, for a legend.
        names: of the volumes.
        title: of the whole figure.
    """
    blocks = []
    for index, tensor in enumerate(volumes):
        volume = tensor[0].detach().cpu().float().numpy()
        label = labels[index][0].cpu().numpy() if labels else None
        at = middle_voxel(volume if label is None else label)
        outlines = [] if label is None else [(label, None)]
        white = [(outline, "white") for outline, _ in outlines]
        draw = partial(draw_volume, volume=volume, outlines=outlines, at=at)
        columns = [Column("image\n", draw)]
        for heading, coloured in colours.items():
            values = coloured[index].cpu().numpy()
            draw = partial(draw_volume, volume=values, outlines=white, at=at)
            columns.append(Column(heading, draw))
        blocks.append(columns)
    shapes = [tensor.shape[1:] for tensor in volumes]
    return draw_blocks(blocks, shapes, names, title, class_names, side_by_side=True)


def draw_embedding(
    points: Mapping[str, npt.NDArray[Any]],
    labels: Tensor,
    class_names: Mapping[int, str],
    title: str = "",
) -> Figure:
    """Draw feature vectors laid out in a plane, coloured by structure.

    Args:
        points: heading of a panel -> (n, 2), see :func:`gvsl_lightning.evaluation.probes.embed`.
        labels: (n,) label values of the points of every panel; 0, the background, is grey.
        class_names: names of all label values, in the order of the legend.
        title: of the whole figure.
    """
    values = labels.cpu().numpy()
    size, margin, head = 4.0, 0.15, 0.4
    width = margin + len(points) * (size + margin)
    page = Page(width, head + size + margin, title, class_names)
    # in random order, so that no structure hides another
    order = np.random.default_rng(0).permutation(len(values))
    order = np.concatenate([order[values[order] == 0], order[values[order] != 0]])
    palette = {value: label_colour(value) for value in np.unique(values).tolist()}
    shades = np.array([palette[value] for value in values.tolist()])
    for number, (heading, positions) in enumerate(points.items()):
        axes = page.add_axes(margin + number * (size + margin), head, size, size)
        across, up = positions[order].T
        axes.scatter(across, up, c=shades[order], s=7, linewidths=0)
        axes.set_title(heading, fontsize=9, linespacing=1.3)
        axes.set(xticks=[], yticks=[])
    return without_formulas(page.figure)
