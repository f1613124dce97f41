"""A picture of every scene."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gvsl_lightning.phantom.canvas import Scalar
from gvsl_lightning.phantom.scenes import SCENES, generate_phantom


def save_figure(path: str | Path, subjects: int = 3, size: int = 96) -> None:
    """Draw the first subjects of every scene, each with its labels, as in the README.

    Args:
        path: PNG to write; its folder is made if need be.
        subjects: Number of subjects per scene.
        size: Voxels per axis.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(3.6 * subjects, 1.8 * len(SCENES)), dpi=80, facecolor="black")
    axes = figure.subplots(len(SCENES), 2 * subjects, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0.02)
    for row, (scene, spec) in zip(axes, SCENES.items(), strict=True):
        colours = colormaps["hsv"]((0.6 + 0.382 * np.arange(len(spec.labels))) % 1)
        colours[:, 3] = [0, *[0.55] * (len(spec.labels) - 1)]
        black, white = spec.window
        for subject in range(subjects):
            phantom = generate_phantom(scene, subject, (size,) * 3)
            image = np.moveaxis(phantom["image"], spec.view, 0)[size // 2]
            labels = np.moveaxis(phantom["label"], spec.view, 0)
            # One slice of a thin vessel would be a dot: its label is shown through all slices.
            labels = labels[size // 2] if len(spec.labels) > 2 else labels.max(axis=0)
            grey, overlaid = row[2 * subject : 2 * subject + 2]
            for axis in (grey, overlaid):
                axis.imshow(_upright(image), cmap="gray", vmin=black, vmax=white, aspect="auto")
                axis.set_axis_off()
            overlaid.imshow(_upright(colours[labels]), interpolation="nearest", aspect="auto")
        row[0].text(0.03, 0.93, scene, transform=row[0].transAxes, color="white", va="top", size=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture)
    Image.open(picture).convert("RGB").quantize(200).save(path, optimize=True)


def _upright(plane: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """As radiologists look at it: the patient's right on the left, front or head on top."""
    return np.swapaxes(plane, 0, 1)[::-1, ::-1]
