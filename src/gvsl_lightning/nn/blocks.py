"""The unit of U-Net and heads: convolution 3x3x3, GroupNorm, LeakyReLU."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError


class ConvolutionBlock(nn.Module):
    """Convolution 3x3x3, GroupNorm of channels / 8 groups, LeakyReLU 0.2.

    Args:
        in_channels: channels before.
        out_channels: channels after.
        groups: groups of the GroupNorm, if not ``out_channels / 8``.

    Raises:
        InputError: if the channels cannot be divided into so many groups.
    """

    negative_slope: ClassVar[float] = 0.2

    def __init__(self, in_channels: int, out_channels: int, groups: int | None = None) -> None:
        super().__init__()
        groups = groups or max(out_channels // 8, 1)
        if out_channels < 1 or out_channels % groups:
            raise InputError(
                f"{out_channels} channels make no {groups} equal groups for GroupNorm; give fewer "
                "than 16 or a multiple of 8."
            )
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) to (N, out_channels, D, H, W)."""
        return self.activate(self.conv(x))

    def activate(self, x: Tensor) -> Tensor:
        """Norm and activation, (N, out_channels, D, H, W) to the same shape."""
        # back to half precision: under autocast on a GPU the norm is in float32
        return F.leaky_relu(self.norm(x), self.negative_slope, inplace=True).to(x.dtype)


def double_convolution(
    in_channels: int, out_channels: int, block: type[ConvolutionBlock] = ConvolutionBlock
) -> nn.Sequential:
    """Two convolution blocks, the unit of the paper's networks."""
    return nn.Sequential(block(in_channels, out_channels), block(out_channels, out_channels))
