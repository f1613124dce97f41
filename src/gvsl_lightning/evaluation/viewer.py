"""Look through volumes in a notebook."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.panels import (
    Column,
    Outline,
    Plane,
    draw_blocks,
    draw_volume,
    middle_voxel,
)


class SliceViewer:
    """Shows volumes next to each other in three planes; sliders move all of them together.

    Write it as the last line of a notebook cell. Without ipywidgets (extra ``notebooks``), or in a
    page that cannot show them, it is a picture. See :func:`draw_slices`.

    Args:
        volumes: see :func:`draw_slices`.
        labels: see :func:`draw_slices`.
        class_names: see :func:`draw_slices`.
        at: the first voxel; None: the middle of the first label map, or else of the volumes.

    Raises:
        InputError: if the volumes differ in size, or the voxel is not in them.
    """

    def __init__(
        self,
        volumes: Mapping[str, Tensor],
        *,
        labels: Mapping[str, Tensor] | None = None,
        class_names: Mapping[int, str] | None = None,
        at: Sequence[int] | None = None,
    ) -> None:
        self._shape = next(iter(volumes.values())).shape[1:]
        if at is None:
            labelled = next(iter((labels or {}).values()), torch.zeros(1, *self._shape))
            at = middle_voxel(labelled[0].cpu().numpy())
        self._at = at
        self._draw = partial(draw_slices, volumes, labels=labels, class_names=class_names)
        self._first = self._picture(at)

    def widget(self) -> Any:
        """Make a box with a slider for each plane, and the picture below them."""
        from ipywidgets import HBox, Image, IntSlider, VBox

        picture = Image(value=self._first, format="png")
        sliders = [
            IntSlider(value=self._at[axis], max=self._shape[axis] - 1, description=name)
            for axis, name in enumerate(("sagittal", "coronal", "axial"))
        ]

        def redraw(_: Any) -> None:
            picture.value = self._picture([slider.value for slider in sliders])

        for slider in sliders:
            slider.observe(redraw, "value")
        return VBox([HBox(sliders), picture])

    def _picture(self, at: Sequence[int]) -> bytes:
        file = io.BytesIO()
        self._draw(at).savefig(file, format="png", dpi=100)
        return file.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Formats for Jupyter, which shows the richest one that the page supports."""
        bundle: dict[str, Any] = {
            "text/plain": repr(self),
            "image/png": base64.b64encode(self._first).decode(),
        }
        with suppress(ImportError):
            bundle |= self.widget()._repr_mimebundle_()
        return bundle


def draw_slices(
    volumes: Mapping[str, Tensor],
    at: Sequence[int],
    *,
    labels: Mapping[str, Tensor] | None = None,
    class_names: Mapping[int, str] | None = None,
    title: str = "",
) -> Figure:
    """Draw the three planes through one voxel of volumes of one size, a column for each.

    Oriented as in :func:`gvsl_lightning.evaluation.matching_figures.draw_matching`; voxels are
    cubes. A cross marks the voxel.

    Args:
        volumes: for each column its heading and the volume, (1, D, H, W) in grey or (3, D, H, W)
            colours in [0, 1].
        at: the voxel.
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
            "give all in one size."
        )
    (shape,) = shapes
    if not all(0 <= place < size for place, size in zip(at, shape, strict=True)):
        raise InputError(f"The voxel {at} is not in volumes of {shape}; give one that is.")
    columns = []
    for heading, tensor in volumes.items():
        values = tensor.detach().cpu().float().numpy()
        outlines: list[Outline] = []
        if heading in labels:
            outlines.append((labels[heading][0].detach().cpu().numpy(), None))
        volume = values if len(values) == 3 else values[0]
        draw = partial(_draw_crossed, volume=volume, outlines=outlines, at=at)
        columns.append(Column(heading, draw))
    return draw_blocks([columns], [shape], (), title, class_names)


def _draw_crossed(axes: Axes, plane: Plane, *, at: Sequence[int], **options: Any) -> AxesImage:
    """As :func:`draw_volume`, with a cross at the voxel."""
    style: dict[str, Any] = {"color": "yellow", "linewidth": 0.5, "alpha": 0.6}
    axes.axvline(at[plane.across], **style)
    axes.axhline(at[plane.up], **style)
    return draw_volume(axes, plane, at=at, **options)
