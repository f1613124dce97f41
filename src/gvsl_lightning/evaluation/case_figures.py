"""Figures of segmented cases: the image with the outlines of label map and prediction."""

# mypy: allow-untyped-calls
# nibabel ships type information without annotations.

from collections.abc import Sequence
from typing import NamedTuple

import nibabel
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from gvsl_lightning.evaluation.panels import (
    PLANES,
    Array,
    draw_contours,
    label_colour,
    without_formulas,
)


class CaseDrawing(NamedTuple):
    """Axial, coronal and sagittal slices of a segmented case, and their height over width."""

    images: tuple[Array, ...]
    labels: tuple[Array, ...]
    predictions: tuple[Array, ...]
    aspects: tuple[float, ...]

    @classmethod
    def of(cls, image: Tensor, label: Tensor, prediction: Tensor, affine: Array) -> "CaseDrawing":
        """Cut each plane where most voxels are labelled, or else predicted, or else the middle.

        Takes the image and two maps of class indices, (D, H, W), and the affine (4, 4) from their
        voxels to mm, by which they are turned to RAS.
        """
        orientation = nibabel.io_orientation(affine)
        volumes = [
            nibabel.apply_orientation(tensor.cpu().float().numpy(), orientation)
            for tensor in (image, label, prediction)
        ]
        edges = np.zeros(3)
        edges[orientation[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
        structures = volumes[1] > 0 if (volumes[1] > 0).any() else volumes[2] > 0
        slices: list[list[Array]] = [[], [], []]
        for plane in PLANES:
            counts = structures.sum(axis=(plane.across, plane.up))
            place = int(counts.argmax()) if counts.any() else len(counts) // 2
            for kept, volume in zip(slices, volumes, strict=True):
                kept.append(np.flip(volume.take(place, axis=plane.cut).T, axis=1).copy())
        aspects = tuple(float(edges[plane.up] / edges[plane.across]) for plane in PLANES)
        images, labels, predictions = map(tuple, slices)
        return cls(images, labels, predictions, aspects)


def draw_cases(
    cases: Sequence[CaseDrawing], titles: Sequence[str], class_names: Sequence[str]
) -> Figure:
    """Draw segmented cases: the image, with outlines of label map and prediction.

    Each case has a row with a title. The patient's right (sagittal: anterior) is on the left.
    ``class_names`` begins with the background.
    """
    width, row = 10.0, 3.4
    height = row * len(cases) + 0.5
    figure = Figure(figsize=(width, height), facecolor="white")
    for place, (case, title) in enumerate(zip(cases, titles, strict=True)):
        top = 1 - (place * row + 0.05) / height
        figure.text(0.02, top, title, va="top", fontsize=10)
        for number, plane in enumerate(PLANES):
            left, bottom = 0.02 + number * 0.325, top - (row - 0.1) / height
            axes = figure.add_axes((left, bottom, 0.31, (row - 0.45) / height))
            axes.imshow(
                case.images[number],
                cmap="gray",
                origin="lower",
                interpolation="bilinear",
                aspect=case.aspects[number],
            )
            for values, style in ((case.labels[number], "dotted"), (case.predictions[number], "-")):
                draw_contours(axes, values, width=1.4, style=style)
            axes.set_axis_off()
            if place == 0:
                axes.set_title(plane.name, fontsize=9)
    handles = [
        Line2D([], [], color=label_colour(value), label=name)
        for value, name in enumerate(class_names[1:], start=1)
    ]
    handles += [
        Line2D([], [], color="black", linestyle="dotted", label="label map"),
        Line2D([], [], color="black", label="prediction"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(6, len(handles)), fontsize=9)
    return without_formulas(figure)
