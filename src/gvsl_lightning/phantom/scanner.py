"""From tissues to the intensities of a scanner: uneven tissue, artefacts and noise."""

from __future__ import annotations

import numpy as np

from gvsl_lightning.phantom.deformation import spline
from gvsl_lightning.phantom.shapes import Array


def finish_ct(image: Array, rng: np.random.Generator) -> Array:
    """Uneven tissue, a mild shading artefact, noise correlated in the slice; HU to [0, 1]."""
    image += _smooth_field(rng, image.shape, 4, 10.0)
    image += _smooth_field(rng, image.shape, 16, 12.0)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise[1:] += 0.6 * noise[:-1]
    noise[:, 1:] += 0.6 * noise[:, :-1]
    noise *= float(rng.uniform(8, 22))
    image += noise
    image += 1024
    image *= 1 / 2048
    return np.clip(image, 0, 1, out=image)


def finish_mr(image: Array, rng: np.random.Generator) -> Array:
    """Tissue texture, receive-coil bias and magnitude noise."""
    texture = _smooth_field(rng, image.shape, 20, 0.04)
    texture += 1
    image *= texture
    bias = _smooth_field(rng, image.shape, 3, 0.1)
    image *= np.exp(bias, out=bias)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= float(rng.uniform(0.012, 0.035))
    image += noise
    np.abs(image, out=image)
    return np.minimum(image, 1, out=image)


def _smooth_field(
    rng: np.random.Generator, size: tuple[int, ...], intervals: int, deviation: float
) -> Array:
    # A cubic B-spline keeps 0.69 of the standard deviation of its coefficients along each axis.
    control = rng.standard_normal((1, *[intervals + 3] * 3)) * (deviation / 0.69**3)
    field: Array = spline(control, size)[0]
    return field
