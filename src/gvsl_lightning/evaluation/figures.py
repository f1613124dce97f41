"""Figures of volumes, without Lightning: in a plain loop or a notebook as well as in a run."""

# mypy: allow-untyped-calls
# nibabel ships type information without annotations.

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib as mpl
import nibabel
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from torch import Tensor

from gvsl_lightning.errors import InputError
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
    up and the patient's right (sagittal: anterior) is left. Of several channels, the first is
    shown. What is not given is left out.

    Args:
        fixed: (N, C, D, H, W) volumes.
        moving: the same shape.
        coordinates: (N, 3, D, H, W) from :func:`gvsl_lightning.nn.geometry.compose`: where in the
            moving volume each voxel of the fixed grid lies. Gives the warped volume, the difference
            after, the displacement (colour: its length in voxels) and the grid it deforms.
        fixed_label: (N, 1, D, H, W) integers, drawn as outlines; 0 is background. On the warped
            volume, the fixed outlines are white.
        moving_label: the same of the moving volumes.
        corrupted: (N, C, D, H, W), what the restoration saw.
        restored: (N, C, D, H, W), what it made of it.
        names: N descriptions of the pairs.
        scores: N times what :meth:`gvsl_lightning.tasks.gvsl.GVSL.measure` returns; written into
            the headings.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window; ``figure.savefig(path)`` writes it.
    """
    optional = {
        "coordinates": coordinates,
        "fixed_label": fixed_label,
        "moving_label": moving_label,
        "corrupted": corrupted,
        "restored": restored,
    }
    given = {
        "fixed": fixed,
        "moving": moving,
        **{name: tensor for name, tensor in optional.items() if tensor is not None},
    }
    blocks = [
        _columns(
            {name: tensor[index : index + 1].detach().cpu() for name, tensor in given.items()},
            scores[index] if scores else {},
        )
        for index in range(len(fixed))
    ]
    return _draw_blocks(blocks, [fixed.shape[2:]] * len(blocks), names, title)


def draw_displacement(
    fixed: Tensor, coordinates: Tensor, *, names: Sequence[str] = (), title: str = ""
) -> Figure:
    """Draw how space is deformed to match pairs of volumes: displacement and change of volume.

    Slices as in :func:`draw_matching`, one pair next to the other.

    Args:
        fixed: (N, C, D, H, W) volumes.
        coordinates: (N, 3, D, H, W) as in :func:`draw_matching`.
        names: N descriptions of the pairs.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window. The determinant of the Jacobian is red where the moving
        volume is compressed, blue where it is stretched, and black where it folds.
    """
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
                _Column("fixed\n", partial(_draw_volume, volume=image, limits=_window(image))),
                _Column(
                    "displacement\n", partial(_draw_displacement, coordinates=places), "voxels"
                ),
                _Column(
                    "change of volume\n(determinant of the Jacobian)",
                    partial(_draw_logarithm, volume=logarithm),
                    "log2",
                ),
            ]
        )
    shapes = [volume.shape[1:] for volume in fixed]
    return _draw_blocks(blocks, shapes, names, title, side_by_side=True)


def draw_features(
    volumes: Sequence[Tensor],
    colours: Mapping[str, Sequence[Tensor]],
    *,
    labels: Sequence[Tensor] = (),
    class_names: Mapping[int, str] | None = None,
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw volumes and, beside each, its local features as colours.

    Slices as in :func:`draw_matching`, but through the middle of what is labelled, and one volume
    next to the other; they may differ in size.

    Args:
        volumes: each (C, D, H, W).
        colours: for each column its heading and, per volume, the colours (3, D, H, W) in [0, 1],
            see :class:`gvsl_lightning.evaluation.features.FeatureColours`.
        labels: each (1, D, H, W) integers, drawn as outlines, white ones on the colours; 0 is
            background.
        class_names: names of label values, for a legend.
        names: descriptions of the volumes.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window.
    """
    blocks = []
    for index, tensor in enumerate(volumes):
        volume = tensor[0].detach().cpu().float().numpy()
        label = labels[index][0].cpu().numpy() if labels else None
        at = middle_voxel(volume if label is None else label)
        outlines: list[_Outline] = [] if label is None else [(label, None)]
        draw = partial(
            _draw_volume, volume=volume, limits=_window(volume), outlines=outlines, at=at
        )
        columns = [_Column("image\n", draw)]
        for heading, coloured in colours.items():
            shown = coloured[index].cpu().numpy()
            outlines = [] if label is None else [(label, "white")]
            draw = partial(_draw_colours, colours=shown, outlines=outlines, at=at)
            columns.append(_Column(heading, draw))
        blocks.append(columns)
    shapes = [tensor.shape[1:] for tensor in volumes]
    return _draw_blocks(blocks, shapes, names, title, class_names, side_by_side=True)


def draw_slices(
    volumes: Mapping[str, Tensor],
    at: Sequence[int],
    *,
    labels: Mapping[str, Tensor] | None = None,
    class_names: Mapping[int, str] | None = None,
    title: str = "",
) -> Figure:
    """Draw the three planes through one voxel of volumes of one size, a column for each.

    Oriented as in :func:`draw_matching`, voxels as cubes; a cross marks the voxel.

    Args:
        volumes: for each column its heading and the volume, (1, D, H, W) in grey or (3, D, H, W)
            colours in [0, 1].
        at: the voxel, see :func:`middle_voxel`.
        labels: label maps (1, D, H, W) by the headings of the volumes over which their outlines are
            drawn; 0 is background.
        class_names: names of label values, for a legend.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window.

    Raises:
        InputError: if the volumes differ in size, or the voxel is not in them.
    """
    labels = labels or {}
    shapes = {tuple(tensor.shape[1:]) for tensor in (*volumes.values(), *labels.values())}
    if len(shapes) != 1:
        raise InputError(
            f"The volumes and label maps have the sizes {', '.join(map(str, sorted(shapes)))}; "
            "give some of one size."
        )
    (shape,) = shapes
    if not all(0 <= place < size for place, size in zip(at, shape, strict=True)):
        raise InputError(f"The voxel {at} is not in volumes of {shape}; give one that is.")
    columns = []
    for heading, tensor in volumes.items():
        values = tensor.detach().cpu().float().numpy()
        outlined: list[_Outline] = []
        if heading in labels:
            outlined.append((labels[heading][0].detach().cpu().numpy(), None))
        draw = (
            partial(_draw_colours, colours=values, outlines=outlined, at=at)
            if len(values) == 3
            else partial(
                _draw_volume, volume=values[0], limits=_window(values), outlines=outlined, at=at
            )
        )
        columns.append(_Column(heading, partial(_draw_crossed, draw=draw, at=at)))
    return _draw_blocks([columns], [shape], (), title, class_names)


def draw_embedding(
    points: Mapping[str, npt.NDArray[Any]],
    labels: Tensor,
    class_names: Mapping[int, str],
    title: str = "",
) -> Figure:
    """Draw feature vectors laid out in a plane, coloured by structure.

    Args:
        points: for each panel its heading and the points (n, 2), see
            :func:`gvsl_lightning.evaluation.features.embed`.
        labels: (n,) label values of the points of every panel; 0, the background, is grey.
        class_names: names of all label values, in the order of the legend.
        title: of the whole figure.

    Returns:
        A figure that belongs to no window.
    """
    values = labels.cpu().numpy()
    size, margin, head = 4.0, 0.15, 0.4
    width = margin + len(points) * (size + margin)
    legend = _legend_rows(class_names, width) * _LEGEND
    top = (0.35 if title else 0.1) + legend + head
    height = top + size + margin
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center")
    _add_legend(figure, class_names, 1 - (top - head - legend / 2) / height)
    # in random order, so that no structure hides another
    order = np.random.default_rng(0).permutation(len(values))
    order = np.concatenate([order[values[order] == 0], order[values[order] != 0]])
    palette = {value: _label_colour(value) for value in np.unique(values).tolist()}
    shades = np.array([palette[value] for value in values.tolist()])
    for number, (heading, positions) in enumerate(points.items()):
        left = margin + number * (size + margin)
        axes = figure.add_axes((left / width, margin / height, size / width, size / height))
        across, up = positions[order].T
        axes.scatter(across, up, c=shades[order], s=7, linewidths=0)
        axes.set_title(heading, fontsize=9, linespacing=1.3)
        axes.set(xticks=[], yticks=[])
    return without_formulas(figure)


def middle_voxel(volume: npt.NDArray[Any]) -> tuple[int, ...]:
    """Centre of gravity of what is not 0 in (D, H, W), rounded; of nothing, the centre."""
    places = np.nonzero(volume)
    if len(places[0]) == 0:
        return tuple(size // 2 for size in volume.shape)
    return tuple(round(float(axis.mean())) for axis in places)


# inches
_PANEL = 1.7
_GAP = 0.06
_MARGIN = 0.35
_HEAD = 0.55
_FOOT = 0.35
_LEGEND = 0.25

_GRID_LINES = 16

_Array = npt.NDArray[Any]

_Outline = tuple[_Array, str | None]
"""A label map and the colour of its outlines; None for a colour of its own for each label."""


class _Plane(NamedTuple):
    name: str
    cut: int
    across: int
    up: int
    letters: tuple[str, str]
    """Directions in the patient of the left and of the upper edge."""


_PLANES = (
    _Plane("axial", 2, 0, 1, ("R", "A")),
    _Plane("coronal", 1, 0, 2, ("R", "S")),
    _Plane("sagittal", 0, 1, 2, ("A", "S")),
)


class _Column(NamedTuple):
    heading: str
    draw: Callable[[Axes, _Plane], AxesImage]
    unit: str = ""
    """Of the colour bar; none without a unit."""


def _draw_blocks(
    blocks: Sequence[Sequence[_Column]],
    shapes: Sequence[Sequence[int]],
    names: Sequence[str],
    title: str,
    classes: Mapping[int, str] | None = None,
    side_by_side: bool = False,
) -> Figure:
    """Blocks, each of three rows, one for each plane of a volume (D, H, W)."""
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
    legend = _legend_rows(classes or {}, width) * _LEGEND
    top = (0.35 if title else 0.1) + legend
    height = top + (max(heights) if side_by_side else sum(heights))
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center")
    if classes:
        _add_legend(figure, classes, 1 - (top - legend / 2) / height)

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
            for plane, panel_height in zip(_PLANES, panels[index], strict=True):
                axes = add_axes(left, down, _PANEL, panel_height)
                image = column.draw(axes, plane)
                _frame(axes, plane, first=number == 0)
                if plane is _PLANES[0]:
                    axes.set_title(column.heading, fontsize=8, pad=3, linespacing=1.3)
                down += panel_height + _GAP
            if column.unit:
                bar = add_axes(left + 0.15 * _PANEL, down, 0.7 * _PANEL, 0.05)
                figure.colorbar(image, cax=bar, orientation="horizontal")
                bar.tick_params(labelsize=6, length=2, pad=1)
                bar.set_xlabel(column.unit, fontsize=6, labelpad=0)
    return without_formulas(figure)


def _columns(tensors: Mapping[str, Tensor], scores: Mapping[str, float]) -> list[_Column]:
    """Columns of one pair; tensors as in :func:`draw_matching`, with N = 1."""
    volumes = {name: tensor[0, 0].float().numpy() for name, tensor in tensors.items()}
    fixed, moving = volumes["fixed"], volumes["moving"]
    window, moving_window = _window(fixed), _window(moving)
    fixed_outlines = _outlines(volumes, "fixed_label")
    limit = max(float(np.percentile(np.abs(moving - fixed), 99)), 1e-6)
    difference = partial(_draw_volume, limits=(-limit, limit), colours="RdBu_r")
    before = _Column(
        "difference before\n(moving - fixed)",
        partial(difference, volume=moving - fixed),
        "intensity",
    )
    columns = [
        _Column(
            _heading("fixed"),
            partial(_draw_volume, volume=fixed, limits=window, outlines=fixed_outlines),
        ),
        _Column(
            _heading("moving", NCC=scores.get("ncc_before"), Dice=scores.get("dice_before")),
            partial(
                _draw_volume,
                volume=moving,
                limits=moving_window,
                outlines=_outlines(volumes, "moving_label"),
            ),
        ),
    ]
    if "coordinates" in tensors:
        coordinates = tensors["coordinates"]
        warped = geometry.sample(tensors["moving"], coordinates)[0, 0].numpy()
        outlines: list[_Outline] = [(label, "white") for label, _ in fixed_outlines]
        if "moving_label" in tensors:
            label = geometry.sample(tensors["moving_label"], coordinates, "nearest")[0, 0].numpy()
            outlines.append((label, None))
        folded = scores.get("folded")
        columns += [
            _Column(
                _heading(
                    "moving, warped", NCC=scores.get("ncc_after"), Dice=scores.get("dice_after")
                ),
                partial(_draw_volume, volume=warped, limits=moving_window, outlines=outlines),
            ),
            before,
            _Column(
                "difference after\n(warped - fixed)",
                partial(difference, volume=warped - fixed),
                "intensity",
            ),
            _Column(
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
            columns.append(
                _Column(
                    f"{name}\nmean error {error:.3f}",
                    partial(_draw_volume, volume=volumes[name], limits=window),
                )
            )
    return columns


def _heading(name: str, **scores: float | None) -> str:
    known = (f"{title} {value:.3f}" for title, value in scores.items() if value is not None)
    return f"{name}\n{', '.join(known)}"


def _window(volume: _Array) -> tuple[float, float]:
    low, high = np.percentile(volume, (0.5, 99.5))
    return float(low), float(high)


def _outlines(volumes: Mapping[str, _Array], name: str) -> list[_Outline]:
    return [(volumes[name], None)] if name in volumes else []


def _draw_volume(
    axes: Axes,
    plane: _Plane,
    *,
    volume: _Array,
    limits: tuple[float, float],
    colours: str = "gray",
    outlines: Sequence[_Outline] = (),
    at: Sequence[int] | None = None,
) -> AxesImage:
    _draw_outlines(axes, plane, outlines, at)
    return axes.imshow(
        _slice(volume, plane, at),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        interpolation="bilinear",
    )


def _draw_outlines(
    axes: Axes, plane: _Plane, outlines: Sequence[_Outline], at: Sequence[int] | None
) -> None:
    for label, colour in outlines:
        values = _slice(label, plane, at)
        # one voxel of background around, so that outlines close at the border
        rows, columns = (np.arange(-1, size + 1) for size in values.shape)
        for value in np.unique(values[values > 0]):
            axes.contour(
                columns,
                rows,
                np.pad(values == value, 1),
                levels=[0.5],
                colors=[colour or _label_colour(value)],
                linewidths=0.9,
            )


def _draw_displacement(axes: Axes, plane: _Plane, *, coordinates: _Array) -> AxesImage:
    displacement = coordinates - np.indices(coordinates.shape[1:])
    length = np.sqrt(np.square(displacement).sum(axis=0))
    image = _draw_volume(
        axes,
        plane,
        volume=length,
        # at least a voxel: rounding errors of the identity should look like nothing
        limits=(0, max(1.0, float(np.percentile(length, 99.5)))),
        colours="viridis",
    )
    points = np.stack(
        [_slice(coordinates[plane.across], plane), _slice(coordinates[plane.up], plane)], axis=-1
    )
    step = max(1, round(max(points.shape[:2]) / _GRID_LINES))
    lines = [*points[step // 2 :: step], *points[:, step // 2 :: step].swapaxes(0, 1)]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.6))
    return image


def _draw_logarithm(axes: Axes, plane: _Plane, *, volume: _Array) -> AxesImage:
    axes.set_facecolor("black")  # seen where there is no number
    return axes.imshow(
        _slice(volume, plane),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        origin="lower",
        interpolation="nearest",
    )


def _draw_colours(
    axes: Axes,
    plane: _Plane,
    *,
    colours: _Array,
    outlines: Sequence[_Outline],
    at: Sequence[int],
) -> AxesImage:
    _draw_outlines(axes, plane, outlines, at)
    channels = [_slice(channel, plane, at) for channel in colours]
    return axes.imshow(np.stack(channels, axis=-1), origin="lower", interpolation="nearest")


def _draw_crossed(
    axes: Axes, plane: _Plane, *, draw: Callable[[Axes, _Plane], AxesImage], at: Sequence[int]
) -> AxesImage:
    style: dict[str, Any] = {"color": "yellow", "linewidth": 0.5, "alpha": 0.6}
    axes.axvline(at[plane.across], **style)
    axes.axhline(at[plane.up], **style)
    return draw(axes, plane)


def _slice(volume: _Array, plane: _Plane, at: Sequence[int] | None = None) -> _Array:
    """Slice through ``at``, or the centre, with rows upwards and columns across."""
    index = volume.shape[plane.cut] // 2 if at is None else at[plane.cut]
    chosen: _Array = np.take(volume, index, axis=plane.cut).T
    return chosen


def _label_colour(value: int) -> tuple[float, float, float, float]:
    """A colour of its own for every label value; grey for the background."""
    if value == 0:
        return (0.75, 0.75, 0.75, 1.0)
    colour: tuple[float, float, float, float] = (
        mpl.colormaps["tab10"](int(value))
        if value < 10
        # steps of the golden ratio: neighbours differ most
        else mpl.colormaps["hsv"](int(value) * 0.618 % 1)
    )
    return colour


def _legend_rows(class_names: Mapping[int, str], width: float) -> int:
    """Rows of a legend in a figure of this width in inches."""
    longest = max((len(name) for name in class_names.values()), default=0)
    columns = max(1, int(width / (0.35 + 0.08 * longest)))
    return -(-len(class_names) // columns)


def _add_legend(figure: Figure, class_names: Mapping[int, str], middle: float) -> None:
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_label_colour(value), label=name)
        for value, name in class_names.items()
    ]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, middle),
        ncols=-(-len(handles) // _legend_rows(class_names, figure.get_figwidth())),
        fontsize=8,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.0,
    )


def _frame(axes: Axes, plane: _Plane, *, first: bool) -> None:
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


class CaseDrawing(NamedTuple):
    """Three slices of a segmented case, small enough to keep of every case.

    Attributes:
        images: axial, coronal and sagittal slice of the image.
        labels: the same of the label map.
        predictions: the same of the prediction.
        aspects: height of a pixel over its width in each.
    """

    images: tuple[_Array, ...]
    labels: tuple[_Array, ...]
    predictions: tuple[_Array, ...]
    aspects: tuple[float, ...]

    @classmethod
    def of(cls, image: Tensor, label: Tensor, prediction: Tensor, affine: _Array) -> "CaseDrawing":
        """Cut each plane where most voxels are labelled, or else predicted, or else the middle.

        Args:
            image: (D, H, W).
            label: (D, H, W) class indices; 0 is background.
            prediction: likewise.
            affine: (4, 4) from their voxels to mm: the volumes are turned to RAS.
        """
        orientation = nibabel.io_orientation(affine)
        volumes = [
            nibabel.apply_orientation(tensor.cpu().float().numpy(), orientation)
            for tensor in (image, label, prediction)
        ]
        edges = np.zeros(3)
        edges[orientation[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
        shown = volumes[1] > 0 if (volumes[1] > 0).any() else volumes[2] > 0
        slices: list[list[_Array]] = [[], [], []]
        for plane in _PLANES:
            counts = shown.sum(axis=(plane.across, plane.up))
            place = int(counts.argmax()) if counts.any() else shown.shape[plane.cut] // 2
            for kept, volume in zip(slices, volumes, strict=True):
                kept.append(np.flip(volume.take(place, axis=plane.cut).T, axis=1).copy())
        aspects = tuple(float(edges[plane.up] / edges[plane.across]) for plane in _PLANES)
        images, labels, predictions = map(tuple, slices)
        return cls(images, labels, predictions, aspects)


def without_formulas(figure: Figure) -> Figure:
    """The figure, in which a name with dollar signs is no formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def draw_cases(
    cases: Sequence[CaseDrawing], titles: Sequence[str], class_names: Sequence[str]
) -> Figure:
    """Draw segmented cases, a row for each: image, label map and prediction outlined over it.

    As in :func:`draw_matching`, the patient's right (sagittal: anterior) is on the left.

    Args:
        cases: what to draw.
        titles: of the rows.
        class_names: name of every class, the background first.

    Returns:
        A figure that belongs to no window.
    """
    width, row = 10.0, 3.4
    height = row * len(cases) + 0.5
    figure = Figure(figsize=(width, height), facecolor="white")
    colours = [mpl.colormaps["tab10"](index % 10) for index in range(len(class_names))]
    for place, (case, title) in enumerate(zip(cases, titles, strict=True)):
        top = 1 - (place * row + 0.05) / height
        figure.text(0.02, top, title, va="top", fontsize=10)
        for number, plane in enumerate(_PLANES):
            axes = figure.add_axes(
                (
                    0.02 + number * 0.325,
                    top - (row - 0.1) / height,
                    0.31,
                    (row - 0.45) / height,
                )
            )
            image = case.images[number]
            axes.imshow(
                image,
                cmap="gray",
                origin="lower",
                interpolation="bilinear",
                aspect=case.aspects[number],
            )
            for values, style in ((case.labels[number], "dotted"), (case.predictions[number], "-")):
                rows, columns = (np.arange(-1, size + 1) for size in values.shape)
                for value in np.unique(values[values > 0]):
                    axes.contour(
                        columns,
                        rows,
                        np.pad(values == value, 1),
                        levels=[0.5],
                        colors=[colours[int(value)]],
                        linewidths=1.4,
                        linestyles=style,
                    )
            axes.set_axis_off()
            if place == 0:
                axes.set_title(plane.name, fontsize=9)
    handles = [
        Line2D([], [], color=colour, label=name)
        for colour, name in list(zip(colours, class_names, strict=True))[1:]
    ]
    handles += [
        Line2D([], [], color="black", linestyle="dotted", label="label map"),
        Line2D([], [], color="black", label="prediction"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(6, len(handles)), fontsize=9)
    return without_formulas(figure)
