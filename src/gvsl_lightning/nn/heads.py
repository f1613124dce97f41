"""Heads that read a backbone's features: Z-matching (affine, deformable), restoration, projection.

Heads compute in float32, also under autocast: a displacement in half precision is off by half a
voxel.
Source: GVSL, He et al., CVPR 2023, section 3.2, https://arxiv.org/abs/2303.00874.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_choice
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.blocks import ConvolutionBlock, double_convolution
from gvsl_lightning.nn.correlation import CorrelationHead

MATCHINGS = ("regression", "correlation")
"""How a :class:`ZMatchingHead` can work."""


class Matching(NamedTuple):
    """Affine matrix (N, 3, 4) and displacement (N, 3, D, H, W) in voxels from fixed to moving."""

    affine: Tensor
    displacement: Tensor


class AffineHead(nn.Module):
    """Affine matrix from the global features of two volumes.

    The pooled features of (moving, fixed) minus those of (fixed, moving) feed linear layers without
    bias: equal volumes give exactly the identity, and swapped ones the opposite parameters. Read
    directly, as in the paper, the pooled features hardly differ between pairs (GroupNorm fixes
    their mean), and training makes them a constant: the same affine map for every pair.

    The rotation stays within +-20 degrees, the scale within 0.75..1.25 and the shear within +-10
    degrees (the paper's ranges), the translation within a quarter of each edge. The bounds are
    smooth (tanh): a clamp has no gradient at the limit.

    Args:
        global_channels: channels of the global features of one volume.
        hidden_channels: channels of the convolutions.
    """

    max_rotation = math.pi / 9
    max_scale = 0.25
    max_shear = math.pi / 18
    max_translation = 0.25

    def __init__(self, global_channels: int, hidden_channels: int = 256) -> None:
        super().__init__()
        self.convolutions = double_convolution(2 * global_channels, hidden_channels)
        self.rotation = nn.Linear(hidden_channels, 3, bias=False)
        self.scale = nn.Linear(hidden_channels, 3, bias=False)
        self.shear = nn.Linear(hidden_channels, 6, bias=False)
        self.translation = nn.Linear(hidden_channels, 3, bias=False)
        for linear in (self.rotation, self.scale, self.shear, self.translation):
            start_at_identity(linear)

    def forward(self, moving: Tensor, fixed: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Predict the matrix (N, 3, 4) that maps fixed coordinates to moving ones.

        Args:
            moving: (N, global_channels, d, h, w) global features.
            fixed: the same of the fixed volume.
            shape: (D, H, W) of the volumes, which scales the translation.
        """
        with torch.autocast(moving.device.type, enabled=False):
            there = torch.cat([moving, fixed], dim=1).float()
            back = torch.cat([fixed, moving], dim=1).float()
            pooled = self.convolutions(torch.cat([there, back])).mean(dim=(2, 3, 4))
            x = pooled[: len(moving)] - pooled[len(moving) :]
            edges = x.new_tensor(shape)
            return geometry.affine_matrix(
                rotation=self.max_rotation * torch.tanh(self.rotation(x)),
                scale=1 + self.max_scale * torch.tanh(self.scale(x)),
                shear=self.max_shear * torch.tanh(self.shear(x)),
                translation=self.max_translation * edges * torch.tanh(self.translation(x)),
            )


class DeformableHead(nn.Module):
    """Displacement field from the local features of two affinely aligned volumes."""

    def __init__(self, local_channels: int, hidden_channels: int = 16) -> None:
        super().__init__()
        self.convolutions = double_convolution(2 * local_channels, hidden_channels)
        self.displacement = nn.Conv3d(hidden_channels, 3, 3, padding=1)
        start_at_identity(self.displacement)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """(N, local_channels, D, H, W) of both volumes to (N, 3, D, H, W) in voxels."""
        with torch.autocast(moving.device.type, enabled=False):
            pair = torch.cat([_for_convolution(moving), _for_convolution(fixed)], dim=1)
            displacement: Tensor = self.displacement(self.convolutions(pair))
            return displacement


class ZMatchingHead(nn.Module):
    """Match two volumes by their features.

    ``regression`` is the head of the paper: it starts at the identity and regresses an affine map
    from the global features, then a displacement from the local ones. Either part can be switched
    off (the paper's ablation is ``affine=False``). ``correlation`` reads the displacement off the
    similarity of the features themselves, see
    :class:`gvsl_lightning.nn.correlation.CorrelationHead`; its affine map is the identity, and the
    options of the two parts have no effect.

    Args:
        global_channels: channels of the backbone's global features.
        local_channels: channels of the backbone's local features.
        matching: ``regression`` or ``correlation``.
        affine: with the affine part.
        deformable: with the deformable part.
        affine_channels: hidden channels of the affine part.
        deformable_channels: hidden channels of the deformable part.
    """

    def __init__(
        self,
        global_channels: int,
        local_channels: int,
        matching: str = "regression",
        affine: bool = True,
        deformable: bool = True,
        affine_channels: int = 256,
        deformable_channels: int = 16,
    ) -> None:
        super().__init__()
        check_choice("matching", matching, MATCHINGS)
        if not (affine or deformable):
            raise InputError(
                "The Z-matching head needs its affine or its deformable part, or both."
            )
        self.correlation_head = CorrelationHead() if matching == "correlation" else None
        regresses = self.correlation_head is None
        self.affine_head = (
            AffineHead(global_channels, affine_channels) if regresses and affine else None
        )
        self.deformable_head = (
            DeformableHead(local_channels, deformable_channels)
            if regresses and deformable
            else None
        )

    def forward(self, moving: Sequence[Tensor], fixed: Sequence[Tensor]) -> Matching:
        """Match the moving volumes to the fixed ones; a part that is switched off is the identity.

        Args:
            moving: features of the moving volumes, coarse to fine: a
                :class:`gvsl_lightning.nn.backbones.Features`, or for ``correlation`` all levels as
                from :meth:`gvsl_lightning.nn.backbones.Backbone.pyramid`.
            fixed: features of the fixed volumes, of the same shapes.
        """
        (global_moving, *_, local), (global_fixed, *_, local_fixed) = moving, fixed
        shape = (local.shape[2], local.shape[3], local.shape[4])
        if self.affine_head is None:
            affine = geometry.identity_affine(local.shape[0], local.device)
        else:
            affine = self.affine_head(global_moving, global_fixed, shape)
        if self.correlation_head is not None:
            displacement = self.correlation_head(moving, fixed)
        elif self.deformable_head is None:
            displacement = affine.new_zeros(local.shape[0], 3, *shape)
        else:
            if self.affine_head is not None:
                local = geometry.sample(local, geometry.compose(affine, None, shape))
            displacement = self.deformable_head(local, local_fixed)
        return Matching(affine, displacement)


class RestorationHead(nn.Module):
    """Undo an appearance corruption: local features back to the volume.

    ``hidden_channels``, those of the convolution, are a multiple of 4.
    """

    def __init__(
        self, local_channels: int, out_channels: int = 1, hidden_channels: int = 16
    ) -> None:
        super().__init__()
        self.convolution = ConvolutionBlock(local_channels, hidden_channels, groups=4)
        self.output = nn.Conv3d(hidden_channels, out_channels, 1)

    def forward(self, local_features: Tensor) -> Tensor:
        """(N, local_channels, D, H, W) to (N, out_channels, D, H, W), float32."""
        with torch.autocast(local_features.device.type, enabled=False):
            volume: Tensor = self.output(self.convolution(_for_convolution(local_features)))
            return volume


class ProjectionHead(nn.Sequential):
    """Linear layers between feature vectors (..., channels) and a contrastive loss.

    Features before such a head keep information that the loss ignores (Chen et al., SimCLR, ICML
    2020, section 4.2, https://arxiv.org/abs/2002.05709).

    Args:
        channels: channels of the feature vectors.
        hidden_channels: channels between the layers.
        out_channels: channels of the result.
        layers: number of layers, 2 or more.
        norm: LayerNorm after every layer except the last one. It replaces the BatchNorm of the 2D
            methods, which fails on one sample; see Richemond et al. 2020, "BYOL works even without
            batch statistics", https://arxiv.org/abs/2010.10241.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 32,
        out_channels: int = 16,
        layers: int = 2,
        norm: bool = False,
    ) -> None:
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            modules.append(nn.Linear(channels, hidden_channels))
            if norm:
                modules.append(nn.LayerNorm(hidden_channels))
            modules.append(nn.LeakyReLU(ConvolutionBlock.negative_slope))
            channels = hidden_channels
        super().__init__(*modules, nn.Linear(channels, out_channels))


class RunningStandardisation(nn.Module):
    """Standardise feature vectors by the running mean and variance of all earlier batches.

    It replaces the BatchNorm that 2D methods have between pooled features and loss: for batches of
    any size, the same in training and evaluation, no gradient through the statistics. Without it
    such a method learns nothing: GroupNorm makes the pooled features of all volumes almost equal,
    so two views agree from the start.

    Args:
        channels: channels of the vectors.
        momentum: weight of a new batch, in [0, 1]; the first batches weigh more. 0: all batches
            weigh the same, for features that do not change.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    # Smallest standard deviation / root mean square of the vectors, or rounding would be amplified
    _floor = 1e-3

    def __init__(self, channels: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Update the statistics with the vectors (N, channels) of a batch, of all processes.

        Vectors that are not finite are left out.
        """
        vectors = vectors[vectors.isfinite().all(dim=1)]
        if len(vectors) == 0:
            return
        weight = (1 / (self.batches + 1)).clamp_min(self.momentum)
        self.batches += 1
        self.mean.lerp_(vectors.mean(dim=0), weight)
        self.variance.lerp_((vectors - self.mean).square().mean(dim=0), weight)

    def forward(self, vectors: Tensor) -> Tensor:
        """(N, channels) to the same shape."""
        floor = self._floor**2 * (self.mean.square() + self.variance).mean()
        standardised: Tensor = (vectors - self.mean) / (self.variance + floor).sqrt()
        return standardised


def start_at_identity(layer: nn.Linear | nn.Conv3d) -> None:
    """Initialise a head's last layer so that it predicts less than 1e-4 voxel.

    Zero would stop the gradient to all earlier layers.
    """
    nn.init.normal_(layer.weight, std=1e-6)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _for_convolution(local_features: Tensor) -> Tensor:
    """In float32, and on a CPU channels last, the faster layout for thin convolutions."""
    features = local_features.float()
    if features.device.type == "cpu":
        return features.contiguous(memory_format=torch.channels_last_3d)
    return features
