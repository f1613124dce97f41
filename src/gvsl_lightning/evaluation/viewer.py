"""Look through volumes in a notebook."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gvsl_lightning.evaluation.figures import draw_slices, middle_voxel


class SliceViewer:
    """Volumes beside each other in three planes, which sliders move through all of them together.

    As the last line of a cell it shows itself: with sliders where ipywidgets (extra ``notebooks``)
    is installed and the page can show them, else as a picture of the same planes. Orientation and
    outlines are those of :func:`gvsl_lightning.evaluation.figures.draw_slices`.

    Args:
        volumes: for each column its heading and the volume, (1, D, H, W) in grey or (3, D, H, W)
            colours in [0, 1], all of one size.
        labels: label maps (1, D, H, W) by the headings of the volumes over which their outlines are
            drawn; 0 is background.
        class_names: names of label values, for a legend.
        at: the voxel that is shown first; None: the middle of the first label map, or else of the
            volumes.

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
        self._first = self._picture(self._at)

    def widget(self) -> Any:
        """A box: a slider for each plane, and below them the picture, which follows.

        Raises:
            ImportError: without ipywidgets.
        """
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
        """What Jupyter shows: the page takes the richest of these that it can."""
        bundle: dict[str, Any] = {
            "text/plain": repr(self),
            "image/png": base64.b64encode(self._first).decode(),
        }
        with suppress(ImportError):
            bundle |= self.widget()._repr_mimebundle_()
        return bundle
