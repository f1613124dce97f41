"""3D backbones: a volume in, global and local features out.

The global features are the bottleneck's, the local ones the last decoder stage's (GVSL, He et al.,
CVPR 2023, section 3.1). Every network is read through an explicit forward, without hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gvsl_lightning.errors import InputError

T = TypeVar("T")

Checkpointing = bool | Literal["light"]
"""Of activations: none, of all, or of those that are no outcome of a convolution or product."""

# A norm's weight below this, or below this many rounding errors of its bias, is not divided by
_SMALLEST_WEIGHT, _ROUNDING_ERRORS = 1e-6, 8

_GROUP_NORM = ("group", {"num_groups": 8})  # instance norm fails on a bottleneck of one voxel


class Features(NamedTuple):
    """What a backbone sees in a batch of volumes.

    Attributes:
        global_features: (N, global_channels, d, h, w), the bottleneck.
        local_features: (N, local_channels, D, H, W), one vector for each voxel of the input.
    """

    global_features: Tensor
    local_features: Tensor


class Backbone(nn.Module, ABC):
    """Base of all backbones; takes volumes of any size.

    A subclass sets ``global_channels``, ``local_channels`` and ``divisor`` and implements
    :meth:`encode_padded` and :meth:`decode`.

    Args:
        in_channels: channels of the input volumes.
        activation_checkpointing: recompute the activations of each stage in the backward pass:
            ``true`` all of them, for about a third more computation, ``light`` all but the outcomes
            of convolutions and other products, for much less. ``unet`` keeps no more than that
            anyway.

    Attributes:
        name: registry name, set by :func:`build_backbone`.
        options: the options given to :func:`build_backbone`; name, ``in_channels`` and options
            rebuild the network.
        in_channels: channels of the input volumes.
        global_channels: channels of the global features.
        local_channels: channels of the local features.
        divisor: input sizes are padded to a multiple of it.
        decoder_parts: names of the modules that the global features do not depend on.
        compiled: whether :meth:`forward` and :meth:`encode` run through ``torch.compile``, each
            shape of volumes compiled when it first comes. Modules and weights stay as they are, so
            that it may be set at any time, is copied along and changes no checkpoint.
    """

    global_channels: int
    local_channels: int
    divisor: int = 16
    decoder_parts: tuple[str, ...] = ("decoder",)
    compiled: bool = False

    def __init__(
        self, in_channels: int = 1, activation_checkpointing: Checkpointing = False
    ) -> None:
        super().__init__()
        self.name = ""
        self.options: dict[str, Any] = {}
        self.in_channels = in_channels
        self.activation_checkpointing = activation_checkpointing

    def forward(self, volume: Tensor) -> Features:
        """Compute both feature maps.

        Args:
            volume: (N, in_channels, D, H, W). Padded with zeros to a multiple of the network's
                divisor, symmetrically, an odd voxel at the end; the local features are cropped
                back.

        Returns:
            The features.

        Raises:
            InputError: if the volume has another number of dimensions or channels.
        """
        compute = Backbone._compute_features
        return (_compiled(compute) if self.compiled else compute)(self, volume)

    def encode(self, volume: Tensor) -> Tensor:
        """Global features only; the decoder is not run.

        Args:
            volume: (N, in_channels, D, H, W).

        Returns:
            (N, global_channels, d, h, w).
        """
        compute = Backbone._compute_global_features
        return (_compiled(compute) if self.compiled else compute)(self, volume)

    @abstractmethod
    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the encoder on a volume of a fitting size.

        Returns:
            The global features and whatever the decoder needs beside them.
        """

    @abstractmethod
    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the decoder on what :meth:`encode_padded` returned."""

    def freeze_decoder(self) -> None:
        """For what reads the global features alone: multi-process training wants no idle part."""
        for part in self.decoder_parts:
            self.get_submodule(part).requires_grad_(False)

    def run_stage(self, stage: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call a stage, with activation checkpointing if asked for."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return stage(*inputs)
        light = self.activation_checkpointing == "light"
        options: dict[str, Any] = {"context_fn": _keep_products} if light else {}
        return cast(Tensor, checkpoint(stage, *inputs, use_reentrant=False, **options))

    def _compute_features(self, volume: Tensor) -> Features:
        padded, before = self._pad(volume)
        global_features, skips = self.encode_padded(padded)
        local_features = self.decode(global_features, skips)
        (d, h, w), (i, j, k) = volume.shape[2:], before
        return Features(global_features, local_features[:, :, i : i + d, j : j + h, k : k + w])

    def _compute_global_features(self, volume: Tensor) -> Tensor:
        return self.encode_padded(self._pad(volume)[0])[0]

    def _pad(self, volume: Tensor) -> tuple[Tensor, list[int]]:
        if volume.ndim != 5 or volume.shape[1] != self.in_channels:
            raise InputError(
                f"{self.name or type(self).__name__} needs volumes (N, {self.in_channels}, D, H, "
                f"W) and got {tuple(volume.shape)}; make in_channels of the model and channels of "
                "the data equal."
            )
        missing = [-size % self.divisor for size in volume.shape[2:]]
        before = [size // 2 for size in missing]
        if not any(missing):
            return volume, before
        padding: list[int] = []
        for size, start in zip(reversed(missing), reversed(before), strict=True):
            padding += [start, size - start]
        return F.pad(volume, padding), before


class UNet(Backbone):
    """The paper's 3D U-Net (section 4.1): 23,538,144 parameters at the default width.

    Each stage is twice (convolution 3x3x3, GroupNorm of channels / 8 groups, LeakyReLU 0.2);
    max-pooling, trilinear upsampling (align_corners), concatenation [skip, upsampled]. For the
    backward pass each block keeps one map, and upsampled ones are not kept but computed again
    (compiled, it is PyTorch that decides).

    Args:
        in_channels: channels of the input volumes.
        channels: of the encoder's stages, the bottleneck last; the decoder mirrors them.
        activation_checkpointing: see :class:`Backbone`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        if len(channels) < 2:
            raise InputError(f"unet needs channels of at least two stages, got {list(channels)}.")
        self.global_channels, self.local_channels = channels[-1], channels[0]
        self.divisor = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            double_convolution(before, after)
            for before, after in zip((in_channels, *channels[:-1]), channels, strict=True)
        )
        coarse_to_fine = list(reversed(channels))
        self.decoder = nn.ModuleList(
            double_convolution(skip + below, skip) for below, skip in pairwise(coarse_to_fine)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def run_stage(self, stage: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """See :meth:`Backbone.run_stage`; there is nothing that ``light`` would save."""
        if self.activation_checkpointing == "light":
            return stage(*inputs)
        return super().run_stage(stage, *inputs)

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Backbone.encode_padded`."""
        if volume.device.type == "cpu":
            # faster convolutions; clone, as one channel counts as laid out so already and would
            # stay as it is. On CUDA each GroupNorm would turn it back.
            volume = volume.clone(memory_format=torch.channels_last_3d)
        skips = [self.run_stage(self.encoder[0], volume)]
        for stage in self.encoder[1:]:
            skips.append(self.run_stage(stage, _pooled(skips[-1])))
        return skips[-1], skips[:-1]

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """See :meth:`Backbone.decode`."""
        stages = [partial(_double_and_join, stage) for stage in self.decoder]
        return _decode_in_stages(self, stages, global_features, skips)


class BasicUNetBackbone(Backbone):
    """MONAI's BasicUNet; ``features[4]`` is the bottleneck, ``features[5]`` the last stage.

    Args:
        in_channels: channels of the input volumes.
        features: six numbers of channels.
        activation_checkpointing: see :class:`Backbone`.
        **options: passed to ``monai.networks.nets.BasicUNet``; the norm is GroupNorm by default.
    """

    def __init__(
        self,
        in_channels: int = 1,
        features: Sequence[int] = (32, 32, 64, 128, 256, 32),
        activation_checkpointing: Checkpointing = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        self.global_channels, self.local_channels = features[4], features[5]
        options = {"norm": _GROUP_NORM, **options}
        net = BasicUNet(3, in_channels, features=tuple(features), **options)
        self.encoder = nn.ModuleList([net.conv_0, net.down_1, net.down_2, net.down_3, net.down_4])
        self.decoder = nn.ModuleList([net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1])

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Backbone.encode_padded`."""
        return _encode_in_stages(self, self.encoder, volume)

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """See :meth:`Backbone.decode`."""
        stages = [partial(_upsample_and_join, stage) for stage in self.decoder]
        return _decode_in_stages(self, stages, global_features, skips)


class DynUNetBackbone(Backbone):
    """MONAI's DynUNet (the nnU-Net layout), kernel 3 and stride 2 in every stage.

    Args:
        in_channels: channels of the input volumes.
        filters: channels of the encoder's stages, the bottleneck last.
        activation_checkpointing: see :class:`Backbone`.
        **options: passed to ``monai.networks.nets.DynUNet``; the norm is GroupNorm by default.
    """

    def __init__(
        self,
        in_channels: int = 1,
        filters: Sequence[int] = (32, 64, 128, 256, 320),
        activation_checkpointing: Checkpointing = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        stages = len(filters)
        self.global_channels, self.local_channels = filters[-1], filters[0]
        self.divisor = 2 ** (stages - 1)
        strides = [1] + [2] * (stages - 1)
        options = {"norm_name": _GROUP_NORM, **options}
        net = DynUNet(
            3, in_channels, 1, [3] * stages, strides, strides[1:], filters=filters, **options
        )
        self.encoder = nn.ModuleList([net.input_block, *net.downsamples, net.bottleneck])
        self.decoder = net.upsamples

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Backbone.encode_padded`."""
        return _encode_in_stages(self, self.encoder, volume)

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """See :meth:`Backbone.decode`."""
        return _decode_in_stages(self, self.decoder, global_features, skips)


class SegResNetBackbone(Backbone):
    """MONAI's SegResNet.

    Args:
        in_channels: channels of the input volumes.
        init_filters: channels of the first stage; each further stage doubles them.
        blocks_down: residual blocks in each encoder stage.
        activation_checkpointing: see :class:`Backbone`.
        **options: passed to ``monai.networks.nets.SegResNet``.
    """

    decoder_parts = ("upsample", "decoder")

    def __init__(
        self,
        in_channels: int = 1,
        init_filters: int = 16,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        activation_checkpointing: Checkpointing = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        stages = len(blocks_down)
        self.divisor = 2 ** (stages - 1)
        self.global_channels, self.local_channels = init_filters * self.divisor, init_filters
        options = {"blocks_up": (1,) * (stages - 1), **options}
        net = SegResNet(3, init_filters, in_channels, blocks_down=tuple(blocks_down), **options)
        self.stem = net.convInit
        self.encoder = net.down_layers
        self.upsample = net.up_samples
        self.decoder = net.up_layers

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Backbone.encode_padded`."""
        return _encode_in_stages(self, self.encoder, self.stem(volume))

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """See :meth:`Backbone.decode`."""
        x = global_features
        for upsample, stage, skip in zip(self.upsample, self.decoder, reversed(skips), strict=True):
            x = self.run_stage(stage, upsample(x) + skip)
        return x


class SwinUNETRBackbone(Backbone):
    """MONAI's Swin UNETR.

    Args:
        in_channels: channels of the input volumes.
        feature_size: channels of the local features, a multiple of 12; the global ones have 16
            times as many.
        activation_checkpointing: see :class:`Backbone`.
        **options: passed to ``monai.networks.nets.SwinUNETR``; the norm of the convolutional
            blocks is GroupNorm by default.
    """

    divisor = 32
    decoder_parts = ("skip_encoders", "decoder")

    def __init__(
        self,
        in_channels: int = 1,
        feature_size: int = 24,
        activation_checkpointing: Checkpointing = False,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        self.global_channels, self.local_channels = 16 * feature_size, feature_size
        options = {"norm_name": ("group", {"num_groups": 4}), **options}
        net = SwinUNETR(
            in_channels,
            1,
            feature_size=feature_size,
            use_checkpoint=activation_checkpointing is True,
            **options,
        )
        self.transformer = net.swinViT
        self.skip_encoders = nn.ModuleList([net.encoder1, net.encoder2, net.encoder3, net.encoder4])
        self.bottleneck = net.encoder10
        self.decoder = nn.ModuleList(
            [net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1]
        )

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Backbone.encode_padded`."""
        hidden = self.transformer(volume, True)
        skips = [
            self.run_stage(stage, x)
            for stage, x in zip(self.skip_encoders, (volume, *hidden[:3]), strict=True)
        ]
        return self.run_stage(self.bottleneck, hidden[4]), [*skips, hidden[3]]

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> Tensor:
        """See :meth:`Backbone.decode`."""
        return _decode_in_stages(self, self.decoder, global_features, skips)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "unet": UNet,
    "basic_unet": BasicUNetBackbone,
    "dynunet": DynUNetBackbone,
    "segresnet": SegResNetBackbone,
    "swin_unetr": SwinUNETRBackbone,
}
"""Builders by name. A new backbone is one entry here."""


def build_backbone(name: str, in_channels: int = 1, **options: Any) -> Backbone:
    """Build a backbone by name.

    Args:
        name: a key of :data:`BACKBONES`.
        in_channels: channels of the input volumes.
        **options: of the network, see its class; scalars and lists only.

    Returns:
        The backbone, with random weights.

    Raises:
        InputError: if the name is unknown or an option does not fit the network.
    """
    if name not in BACKBONES:
        raise InputError(f"There is no backbone {name!r}; choose one of {', '.join(BACKBONES)}.")
    try:
        backbone = BACKBONES[name](in_channels=in_channels, **options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"The backbone options {options} do not fit {name} ({reason[0]}); give options of this "
            "network."
        ) from error
    backbone.name, backbone.options = name, dict(options)
    return backbone


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
    than in.
    """
    narrowing = weight.shape[0] < weight.shape[1]
    return x.device.type == "cpu" and narrowing and x.numel() > weight.numel()


def _mirrored(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flip(2, 3, 4)


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
        if of_x is not None:
            upsample_backward = torch.ops.aten.upsample_trilinear3d_backward
            of_x = upsample_backward(of_x, skip.shape[2:], x.shape, True).to(x.dtype)
        of_skip, of_first, of_bias = _convolution_gradients(
            gradient, skip, first, [needs_skip, *needs_parameters]
        )
        of_skip = None if of_skip is None else of_skip.to(skip.dtype)
        parts = (of_first, of_second)
        of_weight = None if parts[0] is None else torch.cat(cast(Any, parts), dim=1)
        return of_skip, of_x, of_weight, of_bias


def _joined(skip: Tensor, x: Tensor) -> Tensor:
    return torch.cat([skip, _upsampled(x)], dim=1)


def _pooled(x: Tensor) -> Tensor:
    with _without_autocast(x):
        return F.max_pool3d(x, 2)


def _upsampled(x: Tensor) -> Tensor:
    with _without_autocast(x):
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For what autocast does in float32 on a CPU, and need not."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _convolution_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> list[Tensor | None]:
    """Of volume, kernel and bias of a `Convolution`, those that are needed."""
    transposed = _is_faster_transposed(x, weight)
    kernel = (_mirrored(weight) if transposed else weight).to(gradient.dtype)
    ones = [1, 1, 1]
    sizes = ([len(weight)], ones, ones, ones, transposed, [0, 0, 0], 1)
    of_x, of_kernel, of_bias = torch.ops.aten.convolution_backward(
        gradient, x.to(gradient.dtype), kernel, *sizes, needed
    )
    if of_kernel is not None:
        of_kernel = (_mirrored(of_kernel) if transposed else of_kernel).to(weight.dtype)
    return [of_x, of_kernel, None if of_bias is None else of_bias.to(weight.dtype)]


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
    """Whether there is a backward pass to keep anything for, in PyTorch itself."""
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


def _encode_in_stages(
    backbone: Backbone, stages: nn.ModuleList, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    outputs: list[Tensor] = []
    for stage in stages:
        x = backbone.run_stage(stage, x)
        outputs.append(x)
    return outputs[-1], outputs[:-1]


def _keep_products() -> Any:
    """Contexts of a checkpoint that recomputes what is no product, and cheap."""
    aten = torch.ops.aten
    kept = [aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default]
    return create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]


@cache
def _compiled(function: Callable[[Backbone, Tensor], T]) -> Callable[[Backbone, Tensor], T]:
    """Compile a function of all backbones; torch keeps what belongs to each network and shape."""
    return torch.compile(function, dynamic=False)


def _double_and_join(stage: Any, x: Tensor, skip: Tensor) -> Tensor:
    first, second = stage
    if _keeps_own_maps():
        joined = _JoinedConvolution.apply(skip, x, first.conv.weight, first.conv.bias)  # type: ignore[no-untyped-call]
    else:
        joined = first.conv(_joined(skip, x))
    doubled: Tensor = second(first.activate(joined))
    return doubled


def _upsample_and_join(stage: Any, x: Tensor, skip: Tensor) -> Tensor:
    """MONAI's ``UpCat`` for even sizes, without its ``torch.jit``, where a compiler stops."""
    joined: Tensor = stage.convs(torch.cat([skip, stage.upsample(x)], dim=1))
    return joined


def _decode_in_stages(
    backbone: Backbone, stages: Iterable[Callable[..., Tensor]], x: Tensor, skips: list[Tensor]
) -> Tensor:
    for stage, skip in zip(stages, reversed(skips), strict=True):
        x = backbone.run_stage(stage, x, skip)
    return x
