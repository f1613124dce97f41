"""Random views of volumes, for methods that compare two views of the same volume."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from gvsl_lightning.errors import check_range
from gvsl_lightning.transforms.corruption import NonLinearIntensity
from gvsl_lightning.transforms.spatial import RandomSpatialTransform


class RandomView(nn.Module):
    """A zoomed, turned and differently contrasted view of each volume.

    The counterpart in 3D of the augmentations of SimCLR (Chen et al., ICML 2020, appendix A): the
    random resized crop becomes a random affine map that zooms in, colour distortion a random curve
    of the intensities, blur additive Gaussian noise. The geometry varies less than theirs, because
    two bodies differ less than two photographs. No mirroring: left and right differ in most
    anatomy. Whole batches on their device; every sample has its own draw.

    Args:
        scale: Smallest and largest share of the volume's edge that is seen, drawn per axis.
        translation: Largest shift over the volume's edge, drawn per axis, either way.
        rotation: Largest angle in radians about each axis, either way.
        shear: Largest shear angle in radians.
        nonlinear_rate: Probability of the curve.
        noise_rate: Probability of the noise.
        noise: Largest standard deviation of the noise; each sample draws its own below it.

    Raises:
        InputError: If an option is out of range.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.8, 1.0),
        translation: float = 0.05,
        rotation: float = math.pi / 18,
        shear: float = math.pi / 36,
        nonlinear_rate: float = 0.8,
        noise_rate: float = 0.5,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        self.spatial = RandomSpatialTransform(
            rotation=rotation, scale=scale, shear=shear, translation=translation, elastic=0
        )
        check_range("nonlinear_rate", nonlinear_rate, 0, 1)
        check_range("noise_rate", noise_rate, 0, 1)
        check_range("noise", noise, 0)
        self.nonlinear = NonLinearIntensity(nonlinear_rate)
        self.noise_rate = noise_rate
        self.noise = noise

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one view of each volume.

        Args:
            volumes: (N, C, D, H, W) in [0, 1].
            generator: Source of the draws, on the device of `volumes`; None for the global one.

        Returns:
            New tensor of the same shape and type, in [0, 1].
        """
        moved: Tensor = self.nonlinear(self.spatial(volumes, generator=generator)[0], generator)
        drawn: dict[str, Any] = {"device": volumes.device, "generator": generator}
        rate, level = torch.rand((2, len(volumes), 1, 1, 1, 1), **drawn)
        spread = self.noise * level * (rate < self.noise_rate)
        noise = torch.randn(volumes.shape, dtype=volumes.dtype, **drawn)
        view: Tensor = (moved + noise * spread.to(volumes.dtype)).clamp(0, 1)
        return view
