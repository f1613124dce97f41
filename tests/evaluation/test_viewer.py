"""The viewer of notebooks: sliders that move the planes, and a picture without them."""

import base64
import io
import sys

import numpy as np
import pytest
import torch

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.panels import middle_voxel
from gvsl_lightning.evaluation.viewer import SliceViewer

SHAPE = (6, 8, 10)
VOLUMES = {
    "image": torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0)),
    "colours": torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)),
}
LABEL = torch.zeros(1, *SHAPE, dtype=torch.uint8)
LABEL[0, 1:4, 5:8, 2] = 1


def test_slices_are_those_through_the_voxel() -> None:
    figure = SliceViewer(VOLUMES, labels={"image": LABEL}).draw((1, 2, 3))
    axial, coronal, sagittal, *coloured = (axes.images[0].get_array() for axes in figure.axes)
    image, colours = VOLUMES["image"][0].numpy(), VOLUMES["colours"].numpy()
    np.testing.assert_array_equal(axial, image[:, :, 3].T)
    np.testing.assert_array_equal(coronal, image[:, 2].T)
    np.testing.assert_array_equal(sagittal, image[1].T)
    np.testing.assert_array_equal(coloured[0], colours[:, :, :, 3].transpose(2, 1, 0))
    crosses = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes[:3]]
    assert [(x[0][0], y[0][1]) for x, y in crosses] == [(1, 2), (1, 3), (2, 3)]


def test_sizes_that_differ_are_named() -> None:
    with pytest.raises(InputError, match="9"):
        SliceViewer({**VOLUMES, "other": torch.ones(1, 6, 8, 9)})


def test_sliders_redraw_the_picture_at_their_place() -> None:
    viewer = SliceViewer(VOLUMES, labels={"image": LABEL})
    first = viewer.widget().children[1].value
    sliders, picture = viewer.widget().children
    middle = [slider.value for slider in sliders.children]
    assert middle == [2, 6, 2] == [*middle_voxel(LABEL[0].numpy())]
    assert [slider.max for slider in sliders.children] == [5, 7, 9]
    sliders.children[2].value = 7
    file = io.BytesIO()
    viewer.draw((2, 6, 7)).savefig(file, format="png", dpi=100)
    assert picture.value == file.getvalue() != first


def test_shows_sliders_or_else_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = SliceViewer(VOLUMES)
    shown = viewer._repr_mimebundle_()
    assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in shown
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert viewer._repr_mimebundle_().keys() == {"text/plain", "image/png"}
    assert viewer._repr_mimebundle_()["image/png"] == shown["image/png"]
