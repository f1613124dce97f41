"""Figures of matched pairs of volumes, without Lightning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from torch import Tensor

from gvsl_lightning.evaluation.panels import (
    Array,
    Column,
    Outline,
    Plane,
    cut_slice,
    draw_blocks,
    draw_volume,
    intensity_window,
    label_colour,
)
from gvsl_lightning.nn import geometry


def draw_matching(
    fixed: Tensor,
    moving: Tensor,
    coordinates: Tensor | None = None,
    *,
    fixed_label: Tensor | None = None,
    moving_label: Tensor | None = None,
    corrupted: Tensor | None = None,
    restored: Tensor | None = None,
    names: Sequence[str] = (),
    scores: Sequence[Mapping[str, float]] = (),
    title: str = "",
) -> Figure:
    """Draw how pairs of volumes were matched and restored, in three planes.

    Each pair is a block of three rows: the axial, coronal and sagittal slices through the centre of
    the fixed volume. Volumes are in RAS orientation; as in radiology, superior (axial: anterior) is
    up and the patient's right (sagittal: anterior) is left. Only the first channel is drawn.
    Columns of tensors that are not given are left out.

    Args:
        fixed: (N, C, D, H, W) volumes.
        moving: the same shape.
        coordinates: (N, 3, D, H, W) from :func:`gvsl_lightning.nn.geometry.compose`: where in the
            moving volume each voxel of the fixed grid lies. Gives the warped volume, the difference
            after, the displacement (colour: its length in voxels) and the grid it deforms.
        fixed_label: (N, 1, D, H, W) integers, drawn as outlines; 0 is background. On the warped
            volume, the fixed outlines are white.
        moving_label: the same of the moving volumes.
        corrupted: (N, C, D, H, W), the input of the restoration.
        restored: (N, C, D, H, W), its output.
        names: of the N pairs.
        scores: of each pair, from :meth:`gvsl_lightning.tasks.gvsl.GVSL.measure`, for the headings.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window.
    """
    tensors = {
        "fixed": fixed,
        "moving": moving,
        "coordinates": coordinates,
        "fixed_label": fixed_label,
        "moving_label": moving_label,
        "corrupted": corrupted,
        "restored": restored,
    }
    given = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
    blocks = [
        _pair_columns(
            {name: tensor[index : index + 1] for name, tensor in given.items()},
            scores[index] if scores else {},
        )
        for index in range(len(fixed))
    ]
    figure = draw_blocks(blocks, [fixed.shape[2:]] * len(blocks), names, title)
    if fixed_label is not None or moving_label is not None:
        _add_legend(figure, has_white=fixed_label is not None and coordinates is not None)
    return figure


def draw_displacement(
    fixed: Tensor, coordinates: Tensor, *, names: Sequence[str] = (), title: str = ""
) -> Figure:
    """Draw how space is deformed to match pairs of volumes: displacement and change of volume.

    Takes ``fixed`` and ``coordinates`` of :func:`draw_matching`, one pair next to the other. The
    determinant of the Jacobian is red where the moving volume is compressed, blue where it is
    stretched, and black where it folds.
    """
    folded_black = mpl.colormaps["RdBu_r"].with_extremes(bad="black")
    blocks = []
    for volume, mapped in zip(fixed.detach().cpu(), coordinates.detach().cpu(), strict=True):
        image, places = volume[0].float().numpy(), mapped.float().numpy()
        displacement = torch.from_numpy(places - np.indices(places.shape[1:]))
        jacobian = geometry.jacobian_determinant(displacement[None].float())[0]
        logarithm = jacobian.clamp(min=1e-6).log2().where(jacobian > 0, torch.nan).numpy()
        # one voxel shorter than the volume
        logarithm = np.pad(logarithm, [(0, 1)] * 3, mode="edge")
        blocks.append(
            [
                Column("fixed\n", partial(draw_volume, volume=image)),
                Column("displacement\n", partial(_draw_displacement, coordinates=places), "voxels"),
                Column(
                    "change of volume\n(determinant of the Jacobian)",
                    partial(draw_volume, volume=logarithm, limits=(-1, 1), colours=folded_black),
                    "log2",
                ),
            ]
        )
    shapes = [volume.shape[1:] for volume in fixed]
    return draw_blocks(blocks, shapes, names, title, side_by_side=True)


_GRID_LINES = 16


def _add_legend(figure: Figure, *, has_white: bool) -> None:
    """Explain the outlines; ``has_white``: those of the fixed volume lie over the warped one."""
    colours = tuple(Line2D([], [], color=label_colour(value)) for value in range(1, 5))
    named: dict[str, Any] = {"outlines: volume shown": colours}
    if has_white:
        named["outlines: fixed volume"] = Line2D([], [], color="white")
    figure.legend(
        handles=list(named.values()),
        labels=list(named),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="upper left",
        ncols=len(named),
        fontsize=7,
        facecolor="0.6",  # white is seen on it
    )


def _pair_columns(tensors: Mapping[str, Tensor], scores: Mapping[str, float]) -> list[Column]:
    """Columns of one pair: the tensors of :func:`draw_matching` with N = 1, and their scores."""
    volumes = {name: tensor[0, 0].float().numpy() for name, tensor in tensors.items()}
    fixed, moving = volumes["fixed"], volumes["moving"]
    window, moving_window = intensity_window(fixed), intensity_window(moving)
    limit = max(float(np.percentile(np.abs(moving - fixed), 99)), 1e-6)

    def label_outlines(name: str, colour: str | None = None) -> list[Outline]:
        return [(volumes[name], colour)] if name in volumes else []

    def difference(heading: str, volume: Array) -> Column:
        limits = (-limit, limit)
        draw = partial(draw_volume, volume=volume - fixed, limits=limits, colours="RdBu_r")
        return Column(heading, draw, "intensity")

    fixed_outlines, moving_outlines = map(label_outlines, ("fixed_label", "moving_label"))
    columns = [
        Column(
            _heading("fixed"),
            partial(draw_volume, volume=fixed, limits=window, outlines=fixed_outlines),
        ),
        Column(
            _heading("moving", NCC=scores.get("ncc_before"), Dice=scores.get("dice_before")),
            partial(draw_volume, volume=moving, limits=moving_window, outlines=moving_outlines),
        ),
    ]
    before = difference("difference before\n(moving - fixed)", moving)
    if "coordinates" in tensors:
        coordinates = tensors["coordinates"]
        warped = geometry.sample(tensors["moving"], coordinates)[0, 0].numpy()
        outlines = label_outlines("fixed_label", "white")
        if "moving_label" in tensors:
            label = geometry.sample(tensors["moving_label"], coordinates, "nearest")[0, 0].numpy()
            outlines.append((label, None))
        folded = scores.get("folded")
        columns += [
            Column(
                _heading(
                    "moving, warped", NCC=scores.get("ncc_after"), Dice=scores.get("dice_after")
                ),
                partial(draw_volume, volume=warped, limits=moving_window, outlines=outlines),
            ),
            before,
            difference("difference after\n(warped - fixed)", warped),
            Column(
                f"displacement\n{'' if folded is None else f'{100 * folded:.2f} % folded'}",
                partial(_draw_displacement, coordinates=coordinates[0].float().numpy()),
                "voxels",
            ),
        ]
    else:
        columns.append(before)
    for name in ("corrupted", "restored"):
        if name in volumes:
            error = float(np.abs(volumes[name] - fixed).mean())
            draw = partial(draw_volume, volume=volumes[name], limits=window)
            columns.append(Column(f"{name}\nmean error {error:.3f}", draw))
    return columns


def _heading(name: str, **scores: float | None) -> str:
    known = (f"{title} {value:.3f}" for title, value in scores.items() if value is not None)
    return f"{name}\n{', '.join(known)}"


def _draw_displacement(axes: Axes, plane: Plane, *, coordinates: Array) -> AxesImage:
    displacement = coordinates - np.indices(coordinates.shape[1:])
    length = np.sqrt(np.square(displacement).sum(axis=0))
    image = draw_volume(
        axes,
        plane,
        volume=length,
        # at least a voxel: rounding errors of the identity should look like nothing
        limits=(0, max(1.0, float(np.percentile(length, 99.5)))),
        colours="viridis",
    )
    points = np.stack(
        [cut_slice(coordinates[axis], plane) for axis in (plane.across, plane.up)], axis=-1
    )
    step = max(1, round(max(points.shape[:2]) / _GRID_LINES))
    lines = [*points[step // 2 :: step], *points[:, step // 2 :: step].swapaxes(0, 1)]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.6))
    return image
