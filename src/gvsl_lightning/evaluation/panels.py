"""Panels of figures: slices of volumes in three planes, outlines of labels, legends.

Volumes (D, H, W) are in RAS orientation. As in radiology, superior (axial: anterior) is up and the
patient's right (sagittal: anterior) is left.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

Array = npt.NDArray[Any]

Outline = tuple[Array, str | None]
"""A label map and the colour of its outlines; None: each label has its own colour."""

LEGEND_ROW = 0.25  # inches, as the sizes below

_PANEL = 1.7
_GAP = 0.06
_MARGIN = 0.35
_HEAD = 0.55
_FOOT = 0.35


class Plane(NamedTuple):
    """One of the three planes.

    Attributes:
        name: such as ``axial``.
        cut: axis of the volume that is orthogonal to the plane.
        across: axis from left to right.
        up: axis from bottom to top.
        letters: directions in the patient of the left and of the upper edge.
    """

    name: str
    cut: int
    across: int
    up: int
    letters: tuple[str, str]


PLANES = (
    Plane("axial", 2, 0, 1, ("R", "A")),
    Plane("coronal", 1, 0, 2, ("R", "S")),
    Plane("sagittal", 0, 1, 2, ("A", "S")),
)


class Column(NamedTuple):
    """A column of three panels.

    Attributes:
        heading: above the column.
        draw: draws one plane.
        unit: of the colour bar; a column without a unit has no colour bar.
    """

    heading: str
    draw: Callable[[Axes, Plane], AxesImage]
    unit: str = ""


def draw_blocks(
    blocks: Sequence[Sequence[Column]],
    shapes: Sequence[Sequence[int]],
    names: Sequence[str],
    title: str,
    classes: Mapping[int, str] | None = None,
    side_by_side: bool = False,
) -> Figure:
    """Draw blocks of three rows, a row for each plane of a volume.

    Args:
        blocks: the columns of each block.
        shapes: (D, H, W) of the volume of each block.
        names: a heading for each block, or none.
        title: of the whole figure.
        classes: names of label values, for a legend.
        side_by_side: blocks next to each other, not one below the other.

    Returns:
        A figure that belongs to no window.
    """
    scales = [_PANEL / max(d, h) for d, h, _ in shapes]
    panels = [
        [scale * size for size in (h, w, w)]
        for (_, h, w), scale in zip(shapes, scales, strict=True)
    ]
    foot = _FOOT if any(column.unit for block in blocks for column in block) else 2 * _GAP
    head = _HEAD if names else _HEAD - 0.2
    heights = [head + sum(panel) + 3 * _GAP + foot for panel in panels]
    block_width = _MARGIN + len(blocks[0]) * (_PANEL + _GAP)
    width = block_width * (len(blocks) if side_by_side else 1)
    legend = legend_rows(classes or {}, width) * LEGEND_ROW
    top = (0.35 if title else 0.1) + legend
    height = top + (max(heights) if side_by_side else sum(heights))
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center")
    if classes:
        add_legend(figure, classes, 1 - (top - legend / 2) / height)

    def add_axes(left: float, down: float, wide: float, high: float) -> Axes:
        return figure.add_axes(
            (left / width, 1 - (down + high) / height, wide / width, high / height)
        )

    for index, columns in enumerate(blocks):
        block_left = index * block_width if side_by_side else 0.0
        block_top = top if side_by_side else top + sum(heights[:index])
        if names:
            figure.text(
                (block_left + _MARGIN) / width,
                1 - (block_top + 0.1) / height,
                names[index],
                fontsize=9,
                weight="bold",
                va="center",
            )
        for number, column in enumerate(columns):
            left = block_left + _MARGIN + number * (_PANEL + _GAP)
            down = block_top + head
            for plane, panel_height in zip(PLANES, panels[index], strict=True):
                axes = add_axes(left, down, _PANEL, panel_height)
                image = column.draw(axes, plane)
                _frame(axes, plane, first=number == 0)
                if plane is PLANES[0]:
                    axes.set_title(column.heading, fontsize=8, pad=3, linespacing=1.3)
                down += panel_height + _GAP
            if column.unit:
                bar = add_axes(left + 0.15 * _PANEL, down, 0.7 * _PANEL, 0.05)
                figure.colorbar(image, cax=bar, orientation="horizontal")
                bar.tick_params(labelsize=6, length=2, pad=1)
                bar.set_xlabel(column.unit, fontsize=6, labelpad=0)
    return without_formulas(figure)


def draw_volume(
    axes: Axes,
    plane: Plane,
    *,
    volume: Array,
    limits: tuple[float, float] | None = None,
    colours: str = "gray",
    outlines: Sequence[Outline] = (),
    at: Sequence[int] | None = None,
) -> AxesImage:
    """Draw one plane of a volume.

    Args:
        axes: to draw in.
        plane: to draw.
        volume: (D, H, W).
        limits: values of the darkest and the brightest colour; None: :func:`intensity_window`.
        colours: Matplotlib's name of the colour map.
        outlines: drawn over the volume.
        at: a voxel of the plane; None: the plane through the centre.
    """
    low, high = intensity_window(volume) if limits is None else limits
    _draw_outlines(axes, plane, outlines, at)
    return axes.imshow(
        cut_slice(volume, plane, at),
        cmap=colours,
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="bilinear",
    )


def draw_colours(
    axes: Axes,
    plane: Plane,
    *,
    colours: Array,
    outlines: Sequence[Outline],
    at: Sequence[int],
) -> AxesImage:
    """Draw one plane of a volume of colours (3, D, H, W) in [0, 1]; see :func:`draw_volume`."""
    _draw_outlines(axes, plane, outlines, at)
    channels = [cut_slice(channel, plane, at) for channel in colours]
    return axes.imshow(np.stack(channels, axis=-1), origin="lower", interpolation="nearest")


def draw_contours(
    axes: Axes, labels: Array, colour: str | None = None, width: float = 0.9, style: str = "-"
) -> None:
    """Draw the outlines of a two-dimensional label map; 0 is background.

    Args:
        axes: to draw in.
        labels: (rows, columns) integers.
        colour: of all outlines; None: :func:`label_colour` of each.
        width: of the line in points.
        style: of the line, Matplotlib's.
    """
    # one voxel of background around, so that outlines close at the border
    rows, columns = (np.arange(-1, size + 1) for size in labels.shape)
    for value in np.unique(labels[labels > 0]):
        axes.contour(
            columns,
            rows,
            np.pad(labels == value, 1),
            levels=[0.5],
            colors=[colour or label_colour(value)],
            linewidths=width,
            linestyles=style,
        )


def cut_slice(volume: Array, plane: Plane, at: Sequence[int] | None = None) -> Array:
    """Slice of a volume (D, H, W) through ``at``, or the centre: rows upwards, columns across."""
    index = volume.shape[plane.cut] // 2 if at is None else at[plane.cut]
    chosen: Array = np.take(volume, index, axis=plane.cut).T
    return chosen


def intensity_window(volume: Array) -> tuple[float, float]:
    """0.5th and 99.5th percentile of the values."""
    low, high = np.percentile(volume, (0.5, 99.5))
    return float(low), float(high)


def middle_voxel(volume: npt.NDArray[Any]) -> tuple[int, ...]:
    """Centre of gravity of the voxels that are not 0 in (D, H, W); the centre if there are none."""
    places = np.nonzero(volume)
    if len(places[0]) == 0:
        return tuple(size // 2 for size in volume.shape)
    return tuple(round(float(axis.mean())) for axis in places)


def label_colour(value: int) -> tuple[float, float, float, float]:
    """Colour of a label value; grey for the background."""
    if value == 0:
        return (0.75, 0.75, 0.75, 1.0)
    colour: tuple[float, float, float, float] = (
        mpl.colormaps["tab10"](int(value))
        if value < 10
        # steps of the golden ratio: neighbours differ most
        else mpl.colormaps["hsv"](int(value) * 0.618 % 1)
    )
    return colour


def legend_rows(class_names: Mapping[int, str], width: float) -> int:
    """Rows of a legend in a figure of this width in inches."""
    longest = max((len(name) for name in class_names.values()), default=0)
    columns = max(1, int(width / (0.35 + 0.08 * longest)))
    return -(-len(class_names) // columns)


def add_legend(figure: Figure, class_names: Mapping[int, str], middle: float) -> None:
    """Add a legend of label values at the height ``middle``, a share of the figure's height."""
    handles = [
        Line2D([], [], marker="o", linestyle="", color=label_colour(value), label=name)
        for value, name in class_names.items()
    ]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, middle),
        ncols=-(-len(handles) // legend_rows(class_names, figure.get_figwidth())),
        fontsize=8,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.0,
    )


def without_formulas(figure: Figure) -> Figure:
    """Show dollar signs in names as they are; Matplotlib would read a formula between them."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def _draw_outlines(
    axes: Axes, plane: Plane, outlines: Sequence[Outline], at: Sequence[int] | None
) -> None:
    for label, colour in outlines:
        draw_contours(axes, cut_slice(label, plane, at), colour)


def _frame(axes: Axes, plane: Plane, *, first: bool) -> None:
    rows, columns = axes.images[0].get_size()
    # falling to the right: the larger index (right, anterior) is the left edge
    axes.set(xlim=(columns - 0.5, -0.5), ylim=(-0.5, rows - 0.5), xticks=[], yticks=[])
    if first:
        axes.set_ylabel(plane.name, fontsize=8)
        style: dict[str, Any] = {
            "color": "yellow",
            "fontsize": 7,
            "transform": axes.transAxes,
            "path_effects": [withStroke(linewidth=1.5, foreground="black")],
        }
        axes.text(0.02, 0.5, plane.letters[0], va="center", **style)
        axes.text(0.5, 0.98, plane.letters[1], ha="center", va="top", **style)
