"""U-Net stages that keep one map of each block for the backward pass; written by hand.

Outputs and gradients equal those of the plain blocks. ``docs/scaling.md`` lists what these stages
save and cost.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gvsl_lightning.nn.blocks import ConvolutionBlock
from gvsl_lightning.nn.deterministic import upsample

# A norm's weight below this, or below this many rounding errors of its bias, is not divided by
_SMALLEST_WEIGHT, _ROUNDING_ERRORS = 1e-6, 8


class LowMemoryBlock(ConvolutionBlock):
    """A block that keeps its input and its output, but not the map between norm and activation.

    During training the GroupNorm lends its parameters and is not called: its hooks do not run.
    """

    def activate(self, x: Tensor) -> Tensor:
        """Norm and activation, (N, out_channels, D, H, W) to the same shape."""
        norm = self.norm
        if not _is_training():
            return super().activate(x)
        options = norm.num_groups, norm.eps, self.negative_slope
        activated: Tensor = _NormActivation.apply(x, norm.weight, norm.bias, *options)  # type: ignore[no-untyped-call]
        return activated


def upsample_and_join(stage: Any, x: Tensor, skip: Tensor) -> Tensor:
    """Run a decoder stage on [skip, x upsampled] without keeping the joined map.

    Args:
        stage: two blocks, the first one for the channels of both maps.
        x: (N, C, D / 2, H / 2, W / 2).
        skip: (N, C', D, H, W).

    Returns:
        (N, out_channels, D, H, W).
    """
    joined: Tensor
    if not _is_training() or torch.are_deterministic_algorithms_enabled():
        joined = stage(torch.cat([skip, upsample(x)], dim=1))
        return joined
    first, second = stage
    parameters = first.conv.weight, first.conv.bias
    joined = _JoinedConvolution.apply(skip, x, *parameters)  # type: ignore[no-untyped-call]
    joined = second(first.activate(joined))
    return joined


def _is_training() -> bool:
    """Whether a backward pass may follow; TorchScript cannot store functions of our own."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.is_grad_enabled() and not tracing


class _NormActivation(torch.autograd.Function):
    """GroupNorm and LeakyReLU. The backward pass computes the input from the output.

    In-Place Activated BatchNorm, Rota Bulo et al., CVPR 2018, https://arxiv.org/abs/1712.02616, for
    groups. If a channel's weight is so small beside its bias that rounding has destroyed the input,
    the mean replaces it: that weight gets no gradient. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float
    ) -> Tensor:
        sizes = (x.shape[0], x.shape[1], x.shape[2:].numel(), groups)
        y, mean, rstd = torch.native_group_norm(*_for_kernel(x, weight, bias), *sizes, eps)
        y = F.leaky_relu_(y, slope).to(x.dtype)
        ctx.save_for_backward(y, weight, bias, mean, rstd)
        ctx.sizes, ctx.slope = sizes, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, bias, mean, rstd = ctx.saved_tensors
        y, kernel_weight, _ = _for_kernel(kept, weight, bias)
        gradient = gradient.to(y.dtype).contiguous(memory_format=_layout(y))
        gradient = torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True)
        scale, shift = _inverse(weight, bias, mean, rstd, kept.dtype)
        if y.dtype is torch.bfloat16:  # an operation on two precisions is slow
            scale, shift = scale.bfloat16(), shift.bfloat16()
        x = F.leaky_relu(y, 1 / ctx.slope)
        x.mul_(scale[:, :, None, None, None]).add_(shift[:, :, None, None, None])
        # the gradient of the input in any case: without it the kernel crashes on channels last
        of_x, *of_others = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, kernel_weight, *ctx.sizes, [True, *ctx.needs_input_grad[1:3]]
        )
        of_others = [None if of is None else of.to(weight.dtype) for of in of_others]
        return (of_x.to(kept.dtype), *of_others, None, None, None)


class _JoinedConvolution(torch.autograd.Function):
    """Convolution of [skip, x upsampled], the largest map of a U-Net.

    The joined map is neither kept nor made again: each part has its own kernel, and the backward
    pass upsamples x again. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(skip, x, weight)
        return F.conv3d(torch.cat([skip, upsample(x)], dim=1), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        skip, x, weight = ctx.saved_tensors
        needs_skip, needs_x, *needs_parameters = ctx.needs_input_grad
        first, second = weight.split([skip.shape[1], x.shape[1]], dim=1)
        of_x, of_second, _ = _convolution_gradients(
            gradient, upsample(x), second, [needs_x, needs_parameters[0], False]
        )
        if needs_x:
            upsample_backward = torch.ops.aten.upsample_trilinear3d_backward
            of_x = upsample_backward(of_x, skip.shape[2:], x.shape, True).to(x.dtype)
        of_skip, of_first, of_bias = _convolution_gradients(
            gradient, skip, first, [needs_skip, *needs_parameters]
        )
        of_skip = of_skip.to(skip.dtype) if needs_skip else None
        of_weight = torch.cat([of_first, of_second], dim=1) if needs_parameters[0] else None
        return of_skip, of_x, of_weight, of_bias


def _convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Any, Any, Any]:
    """Gradients of volume, kernel and bias of a convolution; None for those not needed."""
    ones = [1, 1, 1]
    sizes = ([len(weight)], ones, ones, ones, False, [0, 0, 0], 1)
    of_x, of_kernel, of_bias = torch.ops.aten.convolution_backward(
        gradient, x.to(gradient.dtype), weight.to(gradient.dtype), *sizes, needed
    )
    of_kernel = None if of_kernel is None else of_kernel.to(weight.dtype)
    return of_x, of_kernel, None if of_bias is None else of_bias.to(weight.dtype)


def _for_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments for the kernels of GroupNorm: on a GPU in one precision, of 32 bits or more."""
    if x.device.type != "cpu":
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return x.contiguous(memory_format=_layout(x)), weight, bias


def _inverse(
    weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Factor and summand, (N, C) each, that undo a norm whose output had this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias, mean, rstd = (each.to(wide) for each in (weight, bias, mean, rstd))
    smallest = max(_SMALLEST_WEIGHT, 16 * torch.finfo(dtype).tiny)
    destroyed = weight.abs() <= smallest + _ROUNDING_ERRORS * torch.finfo(dtype).eps * bias.abs()
    inverse = torch.where(destroyed, 0, 1 / weight)
    channels = len(weight) // mean.shape[1]
    scale = inverse / rstd.repeat_interleave(channels, 1)
    return scale, mean.repeat_interleave(channels, 1) - bias * scale


def _layout(x: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    if x.device.type == "cpu" and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
