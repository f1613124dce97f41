"""What U-Net and heads are made of: convolution, GroupNorm, LeakyReLU.

On a CPU by the faster formula, and with as little kept for the backward pass as can be.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gvsl_lightning.errors import InputError

# A norm's weight below this, or below this many rounding errors of its bias, is not divided by
_SMALLEST_WEIGHT, _ROUNDING_ERRORS = 1e-6, 8


class Convolution(nn.Conv3d):
    """Convolution 3x3x3 that keeps the size, by the faster one of two equal formulas on a CPU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) to (N, out_channels, D, H, W)."""
        return _convolve(x, self.weight, self.bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _is_faster_transposed(x, weight):
        return F.conv_transpose3d(x, _mirrored(weight), bias, padding=1)
    return F.conv3d(x, weight, bias, padding=1)


def _is_faster_transposed(x: Tensor, weight: Tensor) -> bool:
    """Whether to convolve by the transpose of the mirrored kernel, which gives the same.

    OneDNN takes longer for the gradient of the weights of a convolution with fewer channels out
    than in. Exported networks keep the plain convolution.
    """
    if _is_exporting():
        return False
    narrowing = weight.shape[0] < weight.shape[1]
    return x.device.type == "cpu" and narrowing and x.numel() > weight.numel()


def _is_exporting() -> bool:
    """Whether operations are recorded, for runtimes and sizes not known here."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_exporting())  # type: ignore[attr-defined, no-untyped-call]


def _mirrored(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flip(2, 3, 4)


def convolve_joined(convolution: Convolution, skip: Tensor, x: Tensor) -> Tensor:
    """Convolve [skip, x upsampled] without keeping what is joined.

    Args:
        convolution: of the channels of both; it lends its parameters.
        skip: (N, C, D, H, W).
        x: (N, C', D / 2, H / 2, W / 2), upsampled trilinearly (align_corners).

    Returns:
        (N, out_channels, D, H, W).
    """
    if not _keeps_own_maps() or torch.are_deterministic_algorithms_enabled():
        joined: Tensor = convolution(_joined(skip, x))
        return joined
    parameters = convolution.weight, convolution.bias
    convolved: Tensor = _JoinedConvolution.apply(skip, x, *parameters)  # type: ignore[no-untyped-call]
    return convolved


class _JoinedConvolution(torch.autograd.Function):
    """`Convolution` of [skip, x upsampled], the largest map of a U-Net.

    It is neither kept for the backward pass nor made there: each of the two parts has its own
    kernel, and the upsampled one is computed again. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(skip, x, weight)
        return _convolve(_joined(skip, x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        skip, x, weight = ctx.saved_tensors
        needs_skip, needs_x, *needs_parameters = ctx.needs_input_grad
        first, second = weight.split([skip.shape[1], x.shape[1]], dim=1)
        of_x, of_second, _ = _convolution_gradients(
            gradient, _upsampled(x), second, [needs_x, needs_parameters[0], False]
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


def _joined(skip: Tensor, x: Tensor) -> Tensor:
    return torch.cat([skip, _upsampled(x)], dim=1)


def max_pool(x: Tensor) -> Tensor:
    """The largest of each 2x2x2 voxels, (N, C, D, H, W) to half the size."""
    with _without_autocast(x):
        if torch.are_deterministic_algorithms_enabled():  # older versions refuse its gradient
            d, h, w = (size // 2 for size in x.shape[2:])
            return x.reshape(*x.shape[:2], d, 2, h, 2, w, 2).amax(dim=(3, 5, 7))
        return F.max_pool3d(x, 2)


def _upsampled(x: Tensor) -> Tensor:
    with _without_autocast(x):
        if torch.are_deterministic_algorithms_enabled():
            return _upsampled_by_products(x)
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


def _upsampled_by_products(x: Tensor) -> Tensor:
    """The same of matrix products, whose gradient is deterministic on a GPU too."""
    doubled = x.float()
    for axis in (2, 3, 4):
        size = x.shape[axis]
        place = torch.arange(2 * size, device=x.device) * ((size - 1) / (2 * size - 1))
        distance = (place - torch.arange(size, device=x.device)[:, None]).abs()
        weights = (1 - distance).clamp_min(0)
        doubled = (doubled.movedim(axis, -1) @ weights).movedim(-1, axis)
    return doubled.to(x.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what autocast does in float32 on a CPU, and need not."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Any, Any, Any]:
    """Of volume, kernel and bias of a `Convolution`; None for those that are not needed."""
    transposed = _is_faster_transposed(x, weight)
    kernel = (_mirrored(weight) if transposed else weight).to(gradient.dtype)
    ones = [1, 1, 1]
    sizes = ([len(weight)], ones, ones, ones, transposed, [0, 0, 0], 1)
    of_x, of_kernel, of_bias = torch.ops.aten.convolution_backward(
        gradient, x.to(gradient.dtype), kernel, *sizes, needed
    )
    if of_kernel is not None:
        of_kernel = (_mirrored(of_kernel) if transposed else of_kernel).to(weight.dtype)
    return of_x, of_kernel, None if of_bias is None else of_bias.to(weight.dtype)


class ConvolutionBlock(nn.Module):
    """Convolution 3x3x3, GroupNorm of channels / 8 groups, LeakyReLU 0.2.

    With gradients the GroupNorm lends its parameters, but is not called: its hooks do not run.

    Args:
        in_channels: channels before.
        out_channels: channels after.
        groups: of the GroupNorm, if not ``out_channels / 8``.

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
        self.conv = Convolution(in_channels, out_channels)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) to (N, out_channels, D, H, W)."""
        return self.activate(self.conv(x))

    def activate(self, x: Tensor) -> Tensor:
        """What follows the convolution, (N, out_channels, D, H, W) to the same shape."""
        norm = self.norm
        if _keeps_own_maps() and type(norm) is nn.GroupNorm:
            options = norm.num_groups, norm.eps, self.negative_slope
            activated: Tensor = _NormActivation.apply(x, norm.weight, norm.bias, *options)  # type: ignore[no-untyped-call]
            return activated
        return F.leaky_relu(norm(x), self.negative_slope, inplace=True).to(x.dtype)


def _keeps_own_maps() -> bool:
    """Whether autograd runs the backward pass: TorchScript cannot store functions of our own."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return torch.is_grad_enabled() and not tracing


class _NormActivation(torch.autograd.Function):
    """GroupNorm and LeakyReLU of which the outcome alone is kept: its inverse gives the input back.

    In-Place Activated BatchNorm, Rota Bulo et al., CVPR 2018, https://arxiv.org/abs/1712.02616, for
    groups. Where a channel's weight is so small beside its bias that rounding has lost the input,
    the mean stands for it: that weight gets no gradient. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float
    ) -> Tensor:
        sizes = (x.shape[0], x.shape[1], x.shape[2:].numel(), groups)
        y, mean, rstd = torch.native_group_norm(*_arranged(x, weight, bias), *sizes, eps)
        y = F.leaky_relu_(y, slope).to(x.dtype)
        ctx.save_for_backward(y, weight, bias, mean, rstd)
        ctx.sizes, ctx.slope = sizes, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, bias, mean, rstd = ctx.saved_tensors
        y, arranged_weight, _ = _arranged(kept, weight, bias)
        gradient = gradient.to(y.dtype).contiguous(memory_format=_layout(y))
        gradient = torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True)
        scale, shift = _inverse(weight, bias, mean, rstd, kept.dtype)
        if y.dtype is torch.bfloat16:  # two precisions in one operation are slow
            scale, shift = scale.bfloat16(), shift.bfloat16()
        x = F.leaky_relu(y, 1 / ctx.slope)
        x.mul_(scale[:, :, None, None, None]).add_(shift[:, :, None, None, None])
        # of the input in any case: without it the kernel crashes on channels last
        of_x, *of_others = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, arranged_weight, *ctx.sizes, [True, *ctx.needs_input_grad[1:3]]
        )
        of_others = [None if of is None else of.to(weight.dtype) for of in of_others]
        return (of_x.to(kept.dtype), *of_others, None, None, None)


def _arranged(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels of GroupNorm want it: on a GPU in one precision, of 32 bits or more."""
    if x.device.type != "cpu":
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    return x.contiguous(memory_format=_layout(x)), weight, bias


def _inverse(
    weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What to multiply by and to add, (N, C) each, to undo a norm whose outcome had this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias, mean, rstd = (each.to(wide) for each in (weight, bias, mean, rstd))
    smallest = max(_SMALLEST_WEIGHT, 16 * torch.finfo(dtype).tiny)
    lost = weight.abs() <= smallest + _ROUNDING_ERRORS * torch.finfo(dtype).eps * bias.abs()
    inverse = torch.where(lost, 0, 1 / weight)
    channels = len(weight) // mean.shape[1]
    scale = inverse / rstd.repeat_interleave(channels, 1)
    return scale, mean.repeat_interleave(channels, 1) - bias * scale


def _layout(x: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    if x.device.type == "cpu" and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def double_convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolution blocks, the unit of the paper's networks."""
    return nn.Sequential(
        ConvolutionBlock(in_channels, out_channels), ConvolutionBlock(out_channels, out_channels)
    )
