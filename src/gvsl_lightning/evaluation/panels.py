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
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

Array = npt.NDArray[Any]

Outline = tuple[Array, str | None]
"""A label map and the colour of its outlines; None: each label has its own colour."""

# inches
_PANEL = 1.7
_GAP = 0.06
_MARGIN = 0.35
_HEAD = 0.55
_FOOT = 0.35
_LEGEND_ROW = 0.25


class Plane(NamedTuple):
    """One of the three planes: its name, axes of the volume, and directions in the patient."""

    name: str
    cut: int
    """Axis that is orthogonal to the plane."""
    across: int
    up: int
    letters: tuple[str, str]
    """Directions of the left and of the upper edge."""


PLANES = (
    Plane("axial", 2, 0, 1, ("R", "A")),
    Plane("coronal", 1, 0, 2, ("R", "S")),
    Plane("sagittal", 0, 1, 2, ("A", "S")),
)


class Column(NamedTuple):
    """A column of three panels; one with a unit has a colour bar."""

    heading: str
    draw: Callable[[Axes, Plane], AxesImage]
    unit: str = ""


class Page:
    """A figure laid out in inches, with a title and a legend above its content.

    Args:
        width: of the figure.
        height: of the content; lengths ``down`` begin at its upper edge.
        title: of the figure.
        class_names: names of label values, for the legend.
    """

    def __init__(
        self, width: float, height: float, title: str, class_names: Mapping[int, str] | None
    ) -> None:
        names = class_names or {}
        longest = max(map(len, names.values()), default=0)
        rows = -(-len(names) // max(1, int(width / (0.35 + 0.08 * longest))))
        self._top = (0.35 if title else 0.1) + rows * _LEGEND_ROW
        self._width, self._height = width, self._top + height
        self.figure = Figure(figsize=(self._width, self._height), facecolor="white")
        self.figure.text(0.5, 1 - 0.2 / self._height, title, ha="center", va="center")
        if not names:
            return
        handles = [
            Line2D([], [], marker="o", linestyle="", color=label_colour(value), label=name)
            for value, name in names.items()
        ]
        self.figure.legend(
            handles=handles,
            loc="center",
            bbox_to_anchor=(0.5, 1 - (self._top - rows * _LEGEND_ROW / 2) / self._height),
            ncols=-(-len(handles) // rows),
            fontsize=8,
            frameon=False,
            handletextpad=0.1,
            columnspacing=1.0,
        )

    def add_axes(self, left: float, down: float, width: float, height: float) -> Axes:
        """Add axes whose upper left corner is ``left`` and ``down`` from that of the content."""
        bottom = self._height - self._top - down - height
        x, y = self._width, self._height
        return self.figure.add_axes((left / x, bottom / y, width / x, height / y))

    def write(self, left: float, down: float, words: str) -> None:
        """Write a bold heading in the content."""
        x, y = left / self._width, 1 - (self._top + down) / self._height
        self.figure.text(x, y, words, fontsize=9, weight="bold", va="center")


def draw_blocks(
    blocks: Sequence[Sequence[Column]],
    shapes: Sequence[Sequence[int]],
    names: Sequence[str],
    title: str,
    classes: Mapping[int, str] | None = None,
    side_by_side: bool = False,
) -> Figure:
    """Draw blocks of three rows, a row for each plane of a volume.

    Blocks are next to each other or one below the other; each has its columns, the (D, H, W) of its
    volume and, if there are ``names``, a heading. ``classes`` names label values, for a legend.
    """
    foot = _FOOT if any(column.unit for block in blocks for column in block) else 2 * _GAP
    head = _HEAD if names else _HEAD - 0.2
    panels = [[size * _PANEL / max(d, h) for size in (h, w, w)] for d, h, w in shapes]
    heights = [head + sum(panel) + 3 * _GAP + foot for panel in panels]
    width = _MARGIN + len(blocks[0]) * (_PANEL + _GAP)
    if side_by_side:
        page = Page(width * len(blocks), max(heights), title, classes)
        corners = [(index * width, 0.0) for index in range(len(blocks))]
    else:
        page = Page(width, sum(heights), title, classes)
        corners = [(0.0, sum(heights[:index])) for index in range(len(blocks))]
    for index, (columns, (left, down)) in enumerate(zip(blocks, corners, strict=True)):
        if names:
            page.write(left + _MARGIN, down + 0.1, names[index])
        for number, column in enumerate(columns):
            place = left + _MARGIN + number * (_PANEL + _GAP)
            _draw_column(page, column, place, down + head, panels[index], first=number == 0)
    return without_formulas(page.figure)


def _draw_column(
    page: Page, column: Column, left: float, down: float, heights: Sequence[float], *, first: bool
) -> None:
    for plane, height in zip(PLANES, heights, strict=True):
        axes = page.add_axes(left, down, _PANEL, height)
        image = column.draw(axes, plane)
        _frame(axes, plane, first=first)
        if plane is PLANES[0]:
            axes.set_title(column.heading, fontsize=8, pad=3, linespacing=1.3)
        down += height + _GAP
    if column.unit:
        bar = page.add_axes(left + 0.15 * _PANEL, down, 0.7 * _PANEL, 0.05)
        page.figure.colorbar(image, cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=6, length=2, pad=1)
        bar.set_xlabel(column.unit, fontsize=6, labelpad=0)


def draw_volume(
    axes: Axes,
    plane: Plane,
    *,
    volume: Array,
    limits: tuple[float, float] | None = None,
    colours: str | Colormap = "gray",
    outlines: Sequence[Outline] = (),
    at: Sequence[int] | None = None,
) -> AxesImage:
    """Draw one plane of a volume (D, H, W), or of colours (3, D, H, W) in [0, 1].

    The plane goes through the voxel ``at`` or the centre. ``limits`` are the values of the first
    and the last colour; None: :func:`intensity_window`.
    """
    for label, colour in outlines:
        draw_contours(axes, cut_slice(label, plane, at), colour)
    if volume.ndim == 4:
        channels = [cut_slice(channel, plane, at) for channel in volume]
        return axes.imshow(np.stack(channels, axis=-1), origin="lower", interpolation="nearest")
    low, high = limits or intensity_window(volume)
    return axes.imshow(
        cut_slice(volume, plane, at),
        cmap=colours,
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="bilinear",
    )


def draw_contours(
    axes: Axes, labels: Array, colour: str | None = None, width: float = 0.9, style: str = "-"
) -> None:
    """Draw the outlines of a label map (rows, columns); 0 is background.

    Without ``colour``, each label has its :func:`label_colour`; ``width`` is in points and
    ``style`` Matplotlib's.
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


def without_formulas(figure: Figure) -> Figure:
    """Draw dollar signs in names as they are, not formulas between them."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


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
