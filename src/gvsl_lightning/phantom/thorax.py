"""The body of the CT scenes: chest, heart, vessels, lungs and upper abdomen."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gvsl_lightning.phantom.canvas import ALL, Canvas
from gvsl_lightning.phantom.shapes import (
    ENDLESS,
    Array,
    Ellipsoid,
    Shape,
    Tubes,
    Vector,
    curve,
    polyline,
    tube,
)


def draw_thorax(canvas: Canvas, rng: np.random.Generator, category: int) -> None:
    """Draw a trunk onto a canvas, in category 1 with lung lesions."""
    trunk = _TRUNK.distance(canvas.points)
    canvas.fill("fat", "trunk", ALL, trunk)
    canvas.fill("muscle", "trunk", ALL, trunk, grow=-0.16)
    cage = _CAGE.distance(canvas.points)
    canvas.fill("fat", "mediastinum", ALL, cage, grow=-0.07)
    abdomen = _abdomen_distance(canvas.points[2], canvas.distance)
    lungs = _lung_distance(cage, abdomen, canvas.distance)
    canvas.fill("lung", "lung", ALL, lungs)
    within = canvas.cover(lungs)
    canvas.paint("right blood", None, _lung_vessels(), within=within)
    if category:
        _draw_lesions(canvas, rng, within)
    np.maximum(abdomen, cage + 0.07, out=abdomen)
    canvas.fill("liver", "abdomen", ALL, abdomen)
    within = canvas.cover(abdomen)
    for tissue, organ in _ABDOMEN:
        canvas.paint(tissue, "abdomen", organ, within=within)
    _draw_heart(canvas)
    _draw_bones(canvas, cage)
    # Thinner than a voxel's diagonal, an artery would fall apart on the grid.
    arteries = _coronary_arteries().at_least(canvas.pitch)
    canvas.paint("left blood", "coronary artery", arteries)


def _lung_distance(cage: Array, abdomen: Array, distance: Callable[[Ellipsoid], Array]) -> Array:
    lungs: Array = np.maximum(cage + 0.1, -distance(_MEDIASTINUM))
    np.maximum(lungs, -abdomen, out=lungs)
    return lungs


def _abdomen_distance(height: Array, distance: Callable[[Ellipsoid], Array]) -> Array:
    """Distance to the space below the two domes of the diaphragm."""
    right, left = map(distance, _DIAPHRAGM)
    abdomen: Array = np.minimum(np.minimum(right, left), height + 1.4)
    return abdomen


def _lung_places(places: Vector) -> tuple[Array, Array]:
    """Distance of places (N, 3) to the rib cage and to the lungs."""
    points = places.T.astype(np.float32)
    cage = _CAGE.distance(points)

    def distance(shape: Ellipsoid) -> Array:
        return shape.distance(points)

    return cage, _lung_distance(cage, _abdomen_distance(points[2], distance), distance)


def _draw_heart(canvas: Canvas) -> None:
    """Fat, then walls, then the inside of all parts, so that neighbours share one wall."""
    parts = [
        (part, canvas.measure(shape, margin=part.fat)) for part in _heart() for shape in part.shapes
    ]
    for part, measured in parts:
        if part.fat > part.wall:
            canvas.fill("fat", f"{part.name} fat", *measured, grow=part.fat)
    for part, measured in parts:
        if part.wall:
            canvas.fill("muscle", f"{part.name} wall", *measured, grow=part.wall)
    for part, measured in parts:
        canvas.fill(part.tissue, part.name, *measured)
    canvas.paint("myocardium", None, _PAPILLARY_MUSCLES)


def _draw_bones(canvas: Canvas, cage: Array) -> None:
    shell = np.abs(cage) - 0.055
    wall = np.flatnonzero(shell.min(axis=1) < canvas.pitch)
    _, a, s = canvas.points.take(wall, axis=1)
    ribs = np.maximum(shell[wall], _stripes(s + 0.45 * a, 0.45, 0.1))
    np.maximum(ribs, a - 1.0, out=ribs)
    np.maximum(ribs, -1.8 - s, out=ribs)
    bones = [(wall, ribs), *map(canvas.measure, _BONES)]
    for region, distance in bones:
        canvas.fill("cortical bone", "bone", region, distance)
    for region, distance in bones:
        canvas.fill("marrow", "bone", region, distance, grow=-0.045)
    region, distance = canvas.measure(_VERTEBRAE)
    np.maximum(distance, _stripes(canvas.points[2, region], 0.42, 0.05), out=distance)
    canvas.fill("muscle", "bone", region, distance)
    canvas.paint("muscle", "spinal canal", _SPINAL_CANAL)


def _stripes(height: Array, period: float, half_width: float) -> Array:
    """Distance to slabs that repeat along an axis."""
    phase = height * (1 / period)
    phase -= np.floor(phase)
    phase -= 0.5
    np.abs(phase, out=phase)
    phase *= period
    phase -= half_width
    return phase


def _draw_lesions(canvas: Canvas, rng: np.random.Generator, within: Array) -> None:
    """Ground glass with consolidated cores, mostly low, at the back and near the chest wall."""
    places = rng.uniform([-1.9, -1.3, -1.0], [1.9, 0.9, 1.5], (512, 3))
    cage, depth = _lung_places(places)
    weight = np.exp(-4 * np.abs(cage + 0.35) - 0.6 * places[:, 1] - 0.4 * places[:, 2])
    weight[depth > -0.15] = 0
    chosen = rng.choice(512, size=rng.integers(3, 8), replace=False, p=weight / weight.sum())
    for x, y, z in places[chosen].tolist():
        u, v, w = rng.uniform(0.22, 0.5, 3).tolist()
        phase = rng.uniform(0, 2 * np.pi, 3).tolist()
        region, distance = canvas.measure(Ellipsoid((x, y, z), (u, v, w)), margin=0.15)
        r, a, s = canvas.points[:, region]
        ragged = np.sin(11 * r + 5 * a + phase[0]) + np.sin(11 * a - 5 * s + phase[1])
        ragged += np.sin(11 * s + 5 * r + phase[2])
        ragged *= 0.05
        distance += ragged
        canvas.fill("ground glass", "lesion", region, distance, within=within)
        distance += ragged
        canvas.fill("consolidation", None, region, distance, grow=-0.16, within=within)


_TRUNK = Ellipsoid((0.0, -0.08, 0.0), (2.3, 1.62, ENDLESS))
_CAGE = Ellipsoid((0.0, -0.08, -0.5), (1.98, 1.3, 2.65))
_MEDIASTINUM = Ellipsoid((-0.05, -0.1, 0.0), (0.5, 1.3, ENDLESS))
_DIAPHRAGM = (
    Ellipsoid((0.95, 0.0, -1.85), (1.2, 1.3, 1.1)),
    Ellipsoid((-0.95, 0.0, -1.95), (1.1, 1.3, 1.05)),
)

_ABDOMEN = (
    ("fat", Ellipsoid((-1.0, -0.1, -1.9), (1.1, 1.0, 0.75))),
    ("spleen", Ellipsoid((-1.35, -0.55, -1.5), (0.35, 0.55, 0.5))),
    ("muscle", Ellipsoid((-0.8, 0.35, -1.5), (0.55, 0.5, 0.42))),
    ("air", Ellipsoid((-0.8, 0.5, -1.4), (0.42, 0.3, 0.25))),
)

_VERTEBRAE = Ellipsoid((0.0, -1.05, 0.0), (0.27, 0.23, ENDLESS))
_SPINAL_CANAL = Ellipsoid((0.0, -1.37, 0.0), (0.11, 0.1, ENDLESS))
_BONES = (
    Ellipsoid((0.0, -1.38, 0.0), (0.2, 0.17, ENDLESS)),
    Ellipsoid((0.0, -1.54, 0.0), (0.06, 0.16, ENDLESS)),
    _VERTEBRAE,
    Ellipsoid((0.0, 1.24, 0.3), (0.22, 0.08, 1.1)),
)

_LEFT_VENTRICLE = (-0.36, 0.12, -0.28)
_LEFT_VENTRICLE_AXIS = (-0.66, 0.54, -0.52)
_PAPILLARY_MUSCLES = tube([(-0.42, 0.02, -0.42), (-0.62, 0.22, -0.55)], [0.04, 0.06]) + tube(
    [(-0.47, 0.28, -0.2), (-0.66, 0.4, -0.4)], [0.04, 0.06]
)


@dataclass(frozen=True)
class _Part:
    """A cavity or vessel; ``wall`` and ``fat`` are the thicknesses around it in body units."""

    tissue: str
    name: str
    wall: float
    fat: float
    shapes: tuple[Shape, ...]


def _airway() -> Tubes:
    airway = tube([(0.0, -0.3, 2.6), (0.02, -0.38, 1.5), (0.03, -0.42, 0.95)], [0.14, 0.13, 0.13])
    for x, z, first, last in ((0.6, 0.4, 0.12, 0.07), (-0.65, 0.35, 0.11, 0.06)):
        way = [(0.03, -0.42, 0.95), (0.55 * x, -0.49, z + 0.2), (x, -0.52, z)]
        airway += tube(way, [first, (first + last) / 2, last])
    return airway


def _lung_veins() -> Tubes:
    lung_veins = tube(
        [(0.2, -0.45, 0.2), (0.55, -0.55, 0.25), (0.95, -0.6, 0.4)], [0.12, 0.1, 0.06]
    )
    for side, start, middle, end in (
        (1, 0.05, -0.02, -0.25),
        (-1, 0.22, 0.3, 0.45),
        (-1, 0.05, 0.0, -0.2),
    ):
        way = [(0.2 * side, -0.48, start), (0.53 * side, -0.58, middle), (0.92 * side, -0.63, end)]
        lung_veins += tube(way, [0.12, 0.1, 0.06])
    return lung_veins


def _lung_arteries() -> Tubes:
    fork = (-0.2, 0.02, 0.72)
    left = [fork, (-0.45, -0.25, 0.74), (-0.85, -0.42, 0.6)]
    right = [fork, (0.15, -0.16, 0.68), (0.5, -0.22, 0.6), (0.9, -0.35, 0.5)]
    trunk = tube([(-0.12, 0.48, 0.3), (-0.17, 0.3, 0.55), fork], [0.18, 0.185, 0.18])
    return trunk + tube(left, [0.16, 0.13, 0.09]) + tube(right, [0.15, 0.14, 0.13, 0.09])


@functools.cache
def _heart() -> tuple[_Part, ...]:
    """Airways, great vessels and chambers in painting order."""
    veins = tube([(0.52, 0.02, 0.1), (0.48, 0.0, 0.6), (0.42, -0.02, 2.6)], [0.15, 0.13, 0.12])
    veins += tube([(0.55, -0.15, -0.3), (0.5, -0.28, -0.8), (0.4, -0.45, -2.6)], [0.17] * 3)
    outflow = tube([(-0.02, 0.6, -0.1), (-0.08, 0.58, 0.12), (-0.12, 0.48, 0.3)], [0.3, 0.24, 0.18])
    arch = [(-0.04, 0.02, 0.0), (0.05, 0.09, 0.2), (0.14, 0.12, 0.45), (0.19, 0.13, 0.8)]
    arch += [(0.12, 0.02, 1.15), (-0.06, -0.2, 1.32)]
    descending = [(-0.06, -0.2, 1.32), (-0.26, -0.5, 1.2), (-0.36, -0.68, 0.85)]
    descending += [(-0.36, -0.78, 0.3), (-0.3, -0.8, -0.6), (-0.2, -0.78, -1.4)]
    descending += [(-0.12, -0.75, -2.6)]
    ventricle = Ellipsoid((0.1, 0.46, -0.28), (0.62, 0.3, 0.36), (-0.75, 0.3, -0.45))
    atrium = Ellipsoid((0.58, -0.02, -0.08), (0.32, 0.36, 0.42))
    left_atrium = Ellipsoid((0.02, -0.42, 0.1), (0.42, 0.27, 0.32))
    appendages = (
        Ellipsoid((0.42, 0.3, 0.18), (0.2, 0.16, 0.16)),
        Ellipsoid((-0.4, -0.12, 0.2), (0.2, 0.13, 0.13), (-0.5, 0.7, 0.1)),
    )
    muscle = Ellipsoid(_LEFT_VENTRICLE, (0.66, 0.41, 0.41), _LEFT_VENTRICLE_AXIS, base=-0.36)
    cavity = Ellipsoid(_LEFT_VENTRICLE, (0.52, 0.265, 0.265), _LEFT_VENTRICLE_AXIS, base=-0.39)
    ascending_aorta = tube(arch, [0.15, 0.21, 0.19, 0.19, 0.18, 0.17])
    descending_aorta = tube(descending, [0.17, 0.165, 0.16, 0.155, 0.15, 0.145, 0.14])
    return (
        _Part("air", "airway", 0.04, 0.04, (_airway(),)),
        _Part("left blood", "descending aorta", 0.02, 0.02, (descending_aorta,)),
        _Part("right blood", "caval vein", 0.015, 0.015, (veins,)),
        _Part("left blood", "pulmonary vein", 0.015, 0.015, (_lung_veins(),)),
        _Part("right blood", "right ventricle", 0.055, 0.155, (ventricle, outflow)),
        _Part("right blood", "right atrium", 0.03, 0.13, (atrium, appendages[0])),
        _Part("left blood", "left atrium", 0.03, 0.1, (left_atrium, appendages[1])),
        _Part("right blood", "pulmonary artery", 0.025, 0.06, (_lung_arteries(),)),
        _Part("myocardium", "myocardium", 0.03, 0.13, (muscle,)),
        _Part("left blood", "left ventricle", 0.0, 0.0, (cavity,)),
        _Part("left blood", "ascending aorta", 0.03, 0.1, (ascending_aorta,)),
    )


@functools.cache
def _coronary_arteries() -> Tubes:
    """Left and right coronary tree, drawn roughly and laid onto the surface of the heart."""
    right = [(0.13, 0.2, 0.24), (0.3, 0.42, 0.22), (0.52, 0.5, 0.08), (0.66, 0.42, -0.15)]
    right += [(0.6, 0.2, -0.48), (0.35, -0.08, -0.6), (0.08, -0.18, -0.58)]
    anterior = [(-0.05, 0.1, 0.25), (-0.28, 0.18, 0.26), (-0.38, 0.42, 0.1), (-0.45, 0.58, -0.1)]
    anterior += [(-0.6, 0.68, -0.35), (-0.8, 0.65, -0.6), (-0.8, 0.5, -0.8)]
    circumflex = [(-0.28, 0.18, 0.26), (-0.5, 0.0, 0.15), (-0.55, -0.25, -0.05)]
    circumflex += [(-0.42, -0.38, -0.28), (-0.15, -0.38, -0.42)]
    branches = [
        (right, 0.05, 0.03),
        ([right[3], (0.45, 0.7, -0.45), (0.15, 0.78, -0.65)], 0.034, 0.02),
        ([right[6], (-0.1, 0.05, -0.72), (-0.35, 0.3, -0.82), (-0.6, 0.4, -0.85)], 0.034, 0.02),
        (anterior, 0.052, 0.024),
        ([anterior[3], (-0.7, 0.45, -0.12), (-0.9, 0.35, -0.35)], 0.034, 0.02),
        ([anterior[4], (-0.82, 0.5, -0.42), (-0.95, 0.4, -0.55)], 0.03, 0.02),
        (circumflex, 0.044, 0.026),
        ([circumflex[2], (-0.72, -0.1, -0.25), (-0.82, 0.05, -0.5)], 0.034, 0.02),
    ]
    trees = []
    for points, first, last in branches:
        path, radii = curve(points, np.linspace(first, last, len(points)).tolist(), 2)
        trees.append(polyline(_onto_heart(path), radii))
    return functools.reduce(operator.add, trees)


def _onto_heart(path: Vector) -> Vector:
    """Move points along the gradient of the distance until they lie just outside the heart."""
    parts = [part for part in _heart() if part.fat > 0.05]

    def distance(points: Vector) -> Vector:
        field = points.T.astype(np.float32)
        nearest = np.min([s.distance(field) for part in parts for s in part.shapes], axis=0)
        return np.asarray(nearest, dtype=np.float64)

    for _ in range(20):
        slope = np.stack(
            [(distance(path + step) - distance(path - step)) / 0.02 for step in 0.01 * np.eye(3)], 1
        )
        error = distance(path) - _ARTERY_HEIGHT
        path = path - 0.5 * (error / ((slope**2).sum(1) + 0.1))[:, None] * slope
    return path


_ARTERY_HEIGHT = 0.06


@functools.cache
def _lung_vessels() -> Tubes:
    """A tree in each lung: places in it join, near ones first, the closest branch so far."""
    rng = np.random.default_rng(7)
    paths, widths = [], []
    for side in (-1, 1):
        wanted = rng.uniform([0.4, -1.3, -1.1], [1.8, 1.1, 1.9], (900, 3)) * [side, 1, 1]
        wanted = wanted[_lung_places(wanted)[1] < -0.1][:30]
        nodes = [np.array([side * 0.55, -0.4, 0.45])]
        parents = [0]
        for goal in wanted[np.argsort(np.linalg.norm(wanted - nodes[0], axis=1))]:
            gaps = np.linalg.norm(np.array(nodes) - goal, axis=1)
            nearest = int(np.argmin(gaps))
            bend = rng.normal(0, 0.12, 3) * gaps[nearest]
            parents += [nearest, len(nodes)]
            nodes += [(nodes[nearest] + goal) / 2 + bend, goal]
        supplied = np.ones(len(nodes))
        for node in range(len(nodes) - 1, 0, -1):
            supplied[parents[node]] += supplied[node]
        radii = np.minimum(0.02 * supplied**0.4, 0.1)
        paths.append(np.stack([np.array(nodes)[parents[1:]], nodes[1:]], axis=1))
        widths.append(
            np.stack([np.minimum(radii[parents[1:]], 1.3 * radii[1:]), radii[1:]], axis=1)
        )
    return Tubes(np.concatenate(paths), np.concatenate(widths))
