"""3D backbones: a volume in, global and local features out.

The global features are the bottleneck's, the local ones the last decoder stage's (GVSL, He et al.,
CVPR 2023, section 3.1). Every network is read through an explicit forward, without hooks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gvsl_lightning.errors import InputError, check_choice, check_options
from gvsl_lightning.nn.blocks import convolve_joined, double_convolution, max_pool

T = TypeVar("T")

Checkpointing = bool | Literal["light"]
"""Of activations: none, of all, or of those that are no outcome of a convolution or product."""

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
        network: what takes the options that the subclass does not name, if any.
        compiled: whether :meth:`forward` and :meth:`encode` run through ``torch.compile``, each
            shape of volumes compiled when it first comes. Modules and weights stay as they are, so
            that it may be set at any time, is copied along and changes no checkpoint.
    """

    global_channels: int
    local_channels: int
    divisor: int = 16
    decoder_parts: tuple[str, ...] = ("decoder",)
    network: type[nn.Module] | None = None
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
            skips.append(self.run_stage(stage, max_pool(skips[-1])))
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

    network = BasicUNet

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

    network = DynUNet

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
    network = SegResNet

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
    network = SwinUNETR

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
    check_choice("backbone", name, BACKBONES)
    builder = BACKBONES[name]
    takers = [taker for taker in (builder, getattr(builder, "network", None)) if taker is not None]
    check_options("backbone_options", name, options, *takers)
    try:
        backbone = builder(in_channels=in_channels, **options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"The backbone options {options} do not fit {name} ({reason[0]}); give options of this "
            "network."
        ) from error
    backbone.name, backbone.options = name, dict(options)
    return backbone


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
    doubled: Tensor = second(first.activate(convolve_joined(first.conv, skip, x)))
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
