"""Generated 3D anatomy: the data that is always there.

A phantom body is a fixed set of smooth implicit functions in body coordinates. A subject is that
body seen through a random affine and a random invertible displacement: every voxel looks up its
own place in the body, so nothing is resampled and all subjects share one topology. Intensities,
noise, bias field and field of view are the subject's own.

Array axes point to the patient's right, anterior and superior (RAS), like every volume that the
other data modules load.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gvsl_lightning.errors import InputError, check_choice, check_range
from gvsl_lightning.phantom.brain import draw_brain
from gvsl_lightning.phantom.canvas import Canvas
from gvsl_lightning.phantom.deformation import body_points
from gvsl_lightning.phantom.scanner import finish_ct, finish_mr
from gvsl_lightning.phantom.shapes import Array, Point
from gvsl_lightning.phantom.thorax import draw_thorax


@dataclass(frozen=True)
class Scene:
    """One kind of phantom.

    Attributes:
        labels: Name of every label value, "background" first.
        extent: Half the field of view per axis in body units (65 mm in CT, 95 mm in MR).
        centre: Middle of the field of view in body units.
        tissues: Intensity per tissue as (mean, spread over subjects), HU in CT, 0..1 in MR.
        draw: Draws the body onto a canvas.
        parts: Structures that are drawn separately but share a label: structure -> label name.
        classes: Number of classes that subjects belong to.
        modality: Decides on noise and on how intensities become [0, 1].
        view: Array axis to look along in figures.
        window: Intensities in [0, 1] shown black and white in figures.
    """

    labels: tuple[str, ...]
    extent: Point
    centre: Point
    tissues: Mapping[str, tuple[float, float]]
    draw: Callable[[Canvas, np.random.Generator, int], None]
    parts: Mapping[str, str] = field(default_factory=dict)
    classes: int = 1
    modality: Literal["ct", "mr"] = "ct"
    view: int = 2
    window: tuple[float, float] = (0.35, 0.75)

    @property
    def values(self) -> dict[str, int]:
        """Label value of every label and of every part."""
        values = {name: value for value, name in enumerate(self.labels)}
        return values | {part: values[name] for part, name in self.parts.items()}


def generate_phantom(
    scene: str, index: int, size: Sequence[int] = (64, 64, 64), seed: int = 0
) -> dict[str, Any]:
    """Generate one subject.

    The subject depends on the four arguments alone; its anatomy does not depend on ``size``.

    Args:
        scene: A name in ``SCENES``.
        index: Number of the subject, 0 or more.
        size: Voxels per axis; the field of view is the same for every size.
        seed: Chooses the population that ``index`` counts in.

    Returns:
        ``image``: float32 array (D, H, W) in [0, 1]. CT scenes map -1024..1024 HU to it.
        ``label``: uint8 array (D, H, W), named by ``SCENES[scene].labels``.
        ``class``: int; in ``chest_ct`` 1 with lung lesions and 0 without, otherwise 0.

    Raises:
        InputError: If the scene is unknown, or index or size is out of range.
    """
    spec, rng = _subject(scene, index, size, seed)
    points = body_points(rng, spec.extent, spec.centre, size)
    tissues = {
        name: float(mean + spread * rng.uniform(-1, 1))
        for name, (mean, spread) in spec.tissues.items()
    }
    canvas = Canvas(points, spec.extent, tissues, spec.values)
    category = _class_of(index, seed, spec.classes)
    spec.draw(canvas, rng, category)
    finish = finish_ct if spec.modality == "ct" else finish_mr
    image, label = canvas.volumes()
    return {"image": finish(image, rng), "label": label, "class": category}


def body_coordinates(
    scene: str, index: int, size: Sequence[int] = (64, 64, 64), seed: int = 0
) -> Array:
    """Body coordinates of each voxel of a subject: the true correspondence between subjects.

    Voxels of two subjects that hold the same coordinates show the same place of the body.

    Returns:
        Array (3, D, H, W) in body units; the map from voxels to it is invertible.
    """
    spec, rng = _subject(scene, index, size, seed)
    return body_points(rng, spec.extent, spec.centre, size)


def check_subject(scene: str, index: int, size: Sequence[int], seed: int) -> None:
    """Check the arguments of ``generate_phantom``.

    Raises:
        InputError: If the scene is unknown, or index or size is out of range.
    """
    check_choice("scene", scene, SCENES)
    check_range("index", index, 0)
    check_range("seed", seed, 0)
    if len(size) != 3 or min(size) < _SMALLEST:
        raise InputError.about(
            "size", f"is {tuple(size)}; give three numbers of {_SMALLEST} or more."
        )


def _subject(
    scene: str, index: int, size: Sequence[int], seed: int
) -> tuple[Scene, np.random.Generator]:
    check_subject(scene, index, size, seed)
    return SCENES[scene], np.random.default_rng([seed, index, zlib.crc32(scene.encode())])


_SMALLEST = 16


def _class_of(index: int, seed: int, classes: int) -> int:
    """Every run of ``classes`` consecutive subjects holds each class once, in random order."""
    order = np.random.default_rng([seed, index // classes]).permutation(classes)
    return int(order[index % classes])


_CT_TISSUES = {
    "air": (-1000.0, 10.0),
    "lung": (-830.0, 50.0),
    "fat": (-95.0, 15.0),
    "muscle": (55.0, 12.0),
    "liver": (95.0, 25.0),
    "spleen": (110.0, 25.0),
    "myocardium": (105.0, 25.0),
    "marrow": (220.0, 60.0),
    "cortical bone": (650.0, 120.0),
    "left blood": (390.0, 90.0),
    "right blood": (250.0, 120.0),
}


_HEART_PARTS = (
    "right ventricle",
    "right atrium",
    "left atrium",
    "myocardium",
    "left ventricle",
    "coronary artery",
)

_BRAIN_PAIRS = (
    "cerebral white matter",
    "cerebral cortex",
    "lateral ventricle",
    "cerebellar white matter",
    "cerebellar cortex",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
    "hippocampus",
    "amygdala",
    "accumbens",
)

SCENES: dict[str, Scene] = {
    "cardiac_ct": Scene(
        labels=(
            "background",
            "myocardium",
            "left atrium",
            "left ventricle",
            "right atrium",
            "right ventricle",
            "ascending aorta",
            "pulmonary artery",
        ),
        extent=(1.4, 1.4, 1.4),
        centre=(-0.05, 0.0, -0.1),
        tissues=_CT_TISSUES,
        draw=draw_thorax,
    ),
    "coronary_ct": Scene(
        labels=("background", "coronary artery"),
        extent=(1.25, 1.25, 1.25),
        centre=(-0.1, 0.1, -0.1),
        view=1,
        tissues=_CT_TISSUES,
        draw=draw_thorax,
    ),
    "brain_mr": Scene(
        labels=(
            "background",
            *(f"{side} {name}" for name in _BRAIN_PAIRS for side in ("left", "right")),
            "third ventricle",
            "fourth ventricle",
            "brain stem",
            "CSF",
        ),
        extent=(1.0, 1.12, 1.0),
        centre=(0.0, 0.0, 0.0),
        tissues={
            "air": (0.01, 0.01),
            "scalp": (0.85, 0.1),
            "muscle": (0.35, 0.06),
            "skull": (0.08, 0.03),
            "diploe": (0.4, 0.15),
            "csf": (0.17, 0.05),
            "grey matter": (0.5, 0.05),
            "white matter": (0.78, 0.04),
            "brain stem": (0.72, 0.04),
            "thalamus": (0.62, 0.03),
            "caudate": (0.53, 0.03),
            "putamen": (0.56, 0.03),
            "pallidum": (0.68, 0.03),
            "hippocampus": (0.51, 0.03),
            "amygdala": (0.49, 0.03),
        },
        draw=draw_brain,
        modality="mr",
        window=(0.0, 1.0),
    ),
    "chest_ct": Scene(
        labels=("background", "left lung", "right lung", "heart", "aorta", "airway", "lesion"),
        extent=(2.5, 2.5, 2.05),
        centre=(0.0, -0.05, 0.1),
        tissues={
            **_CT_TISSUES,
            "left blood": (150.0, 100.0),
            "right blood": (150.0, 100.0),
            "ground glass": (-480.0, 120.0),
            "consolidation": (10.0, 40.0),
        },
        draw=draw_thorax,
        parts={
            "ascending aorta": "aorta",
            "descending aorta": "aorta",
            **{
                chamber + layer: "heart"
                for chamber in _HEART_PARTS
                for layer in ("", " wall", " fat")
            },
        },
        classes=2,
        view=1,
        window=(0.0, 0.75),
    ),
}
