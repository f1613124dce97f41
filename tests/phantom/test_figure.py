import numpy as np
from PIL import Image

from gvsl_lightning.phantom import SCENES
from gvsl_lightning.phantom.figure import save_figure


def test_figure(tmp_path):
    path = tmp_path / "new" / "phantom.png"
    save_figure(path, subjects=2, size=24)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows = np.array_split(pixels, len(SCENES))
    for row in rows:
        colour = np.ptp(row, axis=2) > 40
        halves = np.array_split(colour, 4, axis=1)
        assert [half.mean() > 0.005 for half in halves] == [False, True, False, True]
