"""The head of the MR scene."""

from __future__ import annotations

import functools

import numpy as np

from gvsl_lightning.phantom.canvas import ALL, Canvas
from gvsl_lightning.phantom.shapes import Ellipsoid, Point, Shape, tube


def draw_brain(canvas: Canvas, rng: np.random.Generator, category: int) -> None:
    """Draw a head onto a canvas."""
    _, a, s = canvas.points
    head = _HEAD.distance(canvas.points)
    np.minimum(head, np.maximum(canvas.distance(_NECK), s + 0.3), out=head)
    canvas.fill("scalp", None, ALL, head)
    canvas.fill("muscle", None, ALL, head, grow=-0.06)
    # The floor of the skull rises towards the forehead.
    skull = np.maximum(_SKULL.distance(canvas.points), 0.9 * (0.45 * a - s - 0.55))
    np.minimum(skull, canvas.distance(_FOSSA), out=skull)
    canvas.fill("skull", None, ALL, skull, grow=0.085)
    canvas.fill("diploe", None, ALL, np.abs(skull - 0.045), grow=0.012)
    canvas.fill("csf", "CSF", ALL, skull)
    _draw_cerebellum(canvas)
    _draw_cerebrum(canvas)
    for tissue, name, shape in _deep_structures():
        canvas.paint(tissue, name, shape)


def _draw_cerebrum(canvas: Canvas) -> None:
    """Grey matter lies near the fluid around the brain, white matter deeper.

    Sulci are sheets of fluid, the zero set of a gyroid, that reach a fixed depth under the hull.
    """
    hull = np.minimum(canvas.distance(_CEREBRUM), canvas.distance(_TEMPORAL_LOBES))
    holes = functools.reduce(np.minimum, map(canvas.distance, _HOLLOWS))
    core = canvas.distance(_CORE)
    region = np.flatnonzero(hull.min(axis=1) < 0)
    hull = hull[region]
    r, a, s = canvas.points[:, region]
    u, v, w = 11 * r, 11 * a, 11 * s
    sine, cosine = np.sin(u), np.cos(u)
    v += 0.35 * sine
    fold = sine * np.cos(v)
    fold += np.sin(v) * np.cos(w)
    fold += np.sin(w) * cosine
    np.abs(fold, out=fold)
    fold *= 1 / 15
    fold -= 0.004
    depth = np.maximum(fold, -0.17 - hull)
    np.minimum(depth, -hull, out=depth)
    fissure = np.maximum(np.abs(r) - 0.012, -core[region])
    np.minimum(depth, fissure, out=depth)
    np.minimum(depth, holes[region], out=depth)
    np.negative(depth, out=depth)
    canvas.fill("grey matter", "cerebral cortex", region, depth)
    canvas.fill("white matter", "cerebral white matter", region, depth, grow=-0.062)


def _draw_cerebellum(canvas: Canvas) -> None:
    region, lobe = canvas.measure(_CEREBELLUM, margin=0.02)
    _, a, s = canvas.points[:, region]
    folia = np.sin(38 * s + 14 * a)
    canvas.fill("grey matter", "cerebellar cortex", region, lobe + 0.02 * folia)
    canvas.fill("white matter", "cerebellar white matter", region, lobe + 0.035 * folia, -0.095)


_HEAD = Ellipsoid((0.0, 0.0, 0.02), (0.86, 1.02, 0.93))
_NECK = Ellipsoid((0.0, -0.1, -1.0), (0.6, 0.75, 2.0))
_SKULL = Ellipsoid((0.0, -0.01, 0.05), (0.71, 0.87, 0.76))
_CEREBRUM = Ellipsoid((0.0, 0.0, 0.16), (0.68, 0.84, 0.6))
_TEMPORAL_LOBES = Ellipsoid((0.4, 0.12, -0.25), (0.24, 0.42, 0.24), mirrored=True)
_CORE = Ellipsoid((0.0, 0.02, 0.08), (0.3, 0.42, 0.26))
_HOLLOWS = (
    Ellipsoid((0.0, -0.22, -0.5), (0.24, 0.32, 0.36)),
    Ellipsoid((0.0, -0.42, -0.42), (0.62, 0.37, 0.31)),
    Ellipsoid((0.0, 0.22, -0.48), (0.14, 0.24, 0.28)),
)

_FOSSA = Ellipsoid((0.0, -0.38, -0.42), (0.64, 0.42, 0.34))
_CEREBELLUM = Ellipsoid((0.25, -0.42, -0.42), (0.35, 0.34, 0.27), mirrored=True)


@functools.cache
def _deep_structures() -> tuple[tuple[str, str, Shape], ...]:
    """Structures inside the brain as (tissue, name, shape), in painting order."""
    stem = [(0.0, -0.1, -0.12), (0.0, -0.14, -0.32), (0.0, -0.22, -0.6), (0.0, -0.3, -1.4)]
    caudate = [(0.16, 0.3, 0.06), (0.19, 0.24, 0.15), (0.21, 0.02, 0.22), (0.23, -0.18, 0.2)]
    horns = [(0.1, 0.4, 0.1), (0.09, 0.22, 0.2), (0.1, -0.05, 0.25), (0.18, -0.28, 0.18)]
    temporal = [(0.27, -0.36, 0.04), (0.37, -0.24, -0.08), (0.39, -0.05, -0.16)]
    ventricle = tube([*horns, temporal[0]], [0.045, 0.07, 0.065, 0.07, 0.08], 2)
    ventricle += tube(temporal, [0.07, 0.045, 0.035], 2)
    ventricle += tube([temporal[0], (0.24, -0.62, 0.04)], [0.07, 0.03])
    hippocampus = [(0.3, 0.05, -0.24), (0.32, -0.1, -0.21), (0.3, -0.24, -0.11), (0.22, -0.3, 0.0)]
    return (
        ("brain stem", "brain stem", tube(stem, [0.12, 0.14, 0.1, 0.08])),
        ("brain stem", "brain stem", Ellipsoid((0.0, -0.08, -0.36), (0.17, 0.14, 0.14))),
        ("csf", "fourth ventricle", Ellipsoid((0.0, -0.29, -0.4), (0.06, 0.05, 0.12))),
        ("caudate", "caudate", tube(caudate, [0.07, 0.085, 0.055, 0.035], 2).mirrored()),
        ("csf", "lateral ventricle", ventricle.mirrored()),
        ("thalamus", "thalamus", _pair((0.12, -0.1, 0.07), (0.09, 0.17, 0.1))),
        ("csf", "third ventricle", Ellipsoid((0.0, -0.03, 0.02), (0.034, 0.17, 0.11))),
        ("putamen", "putamen", _pair((0.31, 0.1, 0.05), (0.07, 0.22, 0.12))),
        ("pallidum", "pallidum", _pair((0.23, 0.06, 0.03), (0.055, 0.13, 0.08))),
        ("caudate", "accumbens", _pair((0.13, 0.3, -0.04), (0.065, 0.075, 0.055))),
        (
            "hippocampus",
            "hippocampus",
            tube(hippocampus, [0.075, 0.07, 0.06, 0.045], 2).mirrored(),
        ),
        ("amygdala", "amygdala", _pair((0.27, 0.17, -0.22), (0.085, 0.085, 0.075))),
    )


def _pair(centre: Point, radii: Point) -> Ellipsoid:
    return Ellipsoid(centre, radii, mirrored=True)
