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
from gvsl_lightning.evaluation.panels import Column, Plane, draw_blocks, draw_volume, middle_voxel


class SliceViewer:
    """Shows volumes next to each other in three planes; sliders move all of them together.

    Write it as the last line of a notebook cell. Without ipywidgets (extra ``notebooks``), or in a
    page that cannot show them, it is a picture. It begins in the middle of the first label map, or
    else of the volumes.

    Args:
        volumes: heading -> volume, (1, D, H, W) in grey or (3, D, H, W) colours in [0, 1].
        labels: heading -> label map (1, D, H, W), drawn as outlines over that volume; 0 is
            background.
        class_names: names of label values, for a legend.

    Raises:
        InputError: if the volumes and label maps differ in size.
    """

    def __init__(
        self,
        volumes: Mapping[str, Tensor],
        *,
        labels: Mapping[str, Tensor] | None = None,
        class_names: Mapping[int, str] | None = None,
    ) -> None:
        labels = labels or {}
        shapes = {tuple(tensor.shape[1:]) for tensor in (*volumes.values(), *labels.values())}
        if len(shapes) != 1:
            raise InputError(
                f"The volumes and label maps have the sizes {', '.join(map(str, sorted(shapes)))}; "
                "give all in one size."
            )
        (self._shape,) = shapes
        self._volumes = {
            heading: (tensor[0] if len(tensor) == 1 else tensor).detach().cpu().float().numpy()
            for heading, tensor in volumes.items()
        }
        self._labels = {heading: label[0].cpu().numpy() for heading, label in labels.items()}
        self._class_names = class_names
        first = next(iter(self._labels.values()), torch.zeros(self._shape).numpy())
        self._middle = middle_voxel(first)
        self._first = self._picture(self._middle)

    def draw(self, at: Sequence[int]) -> Figure:
        """Draw the three planes through a voxel, which a cross marks; voxels are cubes.

        Oriented as in :func:`gvsl_lightning.evaluation.matching_figures.draw_matching`.
        """
        columns = []
        for heading, volume in self._volumes.items():
            outlines = [(self._labels[heading], None)] if heading in self._labels else []
            draw = partial(_draw_crossed, volume=volume, outlines=outlines, at=at)
            columns.append(Column(heading, draw))
        return draw_blocks([columns], [self._shape], (), "", self._class_names)

    def widget(self) -> Any:
        """Make a box with a slider for each plane, and the picture below them."""
        from ipywidgets import HBox, Image, IntSlider, VBox

        picture = Image(value=self._first, format="png")
        sliders = [
            IntSlider(value=self._middle[axis], max=self._shape[axis] - 1, description=name)
            for axis, name in enumerate(("sagittal", "coronal", "axial"))
        ]

        def redraw(_: Any) -> None:
            picture.value = self._picture([slider.value for slider in sliders])

        for slider in sliders:
            slider.observe(redraw, "value")
        return VBox([HBox(sliders), picture])

    def _picture(self, at: Sequence[int]) -> bytes:
        file = io.BytesIO()
        self.draw(at).savefig(file, format="png", dpi=100)
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


def _draw_crossed(axes: Axes, plane: Plane, *, at: Sequence[int], **options: Any) -> AxesImage:
    style: dict[str, Any] = {"color": "yellow", "linewidth": 0.5, "alpha": 0.6}
    axes.axvline(at[plane.across], **style)
    axes.axhline(at[plane.up], **style)
    return draw_volume(axes, plane, at=at, **options)
