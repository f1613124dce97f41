"""3D backbones: a volume in, global and local features out.

The global features are the bottleneck's, the local ones the last decoder stage's (GVSL, He et al.,
CVPR 2023, section 3.1). Every network here is read through an explicit forward, without hooks;
:mod:`gvsl_lightning.nn.wrapped` wraps any other.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_type_hints

import torch
import torch.nn.functional as F
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gvsl_lightning.errors import InputError, check_choice, check_options
from gvsl_lightning.nn import low_memory as low_memory_stages
from gvsl_lightning.nn.blocks import ConvolutionBlock, double_convolution
from gvsl_lightning.nn.deterministic import max_pool, upsample

T = TypeVar("T")

Checkpointing = bool | Literal["light"]
"""Of no activation, of all, or (``light``) of all but the outputs of convolutions and products."""

_GROUP_NORM = ("group", {"num_groups": 8})  # instance norm fails on a bottleneck of one voxel


class Features(NamedTuple):
    """Bottleneck (N, global_channels, d, h, w) and a vector for each voxel of the input.

    The local features have the shape (N, local_channels, D, H, W).
    """

    global_features: Tensor
    local_features: Tensor


class Backbone(nn.Module, ABC):
    """Base of all backbones; takes volumes of any size.

    A subclass sets ``global_channels``, ``local_channels`` and ``divisor`` and implements
    :meth:`encode_padded` and :meth:`decode`. A volume is padded with zeros to a multiple of the
    divisor on each axis, evenly on both sides, an odd voxel at the end.

    Args:
        in_channels: channels of the input volumes.
        activation_checkpointing: recompute the activations of each stage in the backward pass:
            ``true`` all of them, for about a third more computation, ``light`` all but the outputs
            of convolutions and other products, for much less.

    Attributes:
        name: registry name, set by :func:`build_backbone`.
        options: the options given to :func:`build_backbone`; name, ``in_channels`` and options
            rebuild the network.
        global_channels: channels of the global features.
        local_channels: channels of the local features.
        divisor: input sizes are padded to a multiple of it.
        decoder_parts: names of the modules that the global features do not depend on.
        network: class that takes the options which the subclass does not name, if any.
        compiled: whether the network runs through ``torch.compile``, each shape of volumes compiled
            when it first comes. Modules and weights stay as they are: it may be set at any time, is
            copied along and changes no checkpoint.
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
        """Compute both feature maps of volumes (N, in_channels, D, H, W).

        Raises:
            InputError: if the volume has another number of dimensions or channels.
        """
        return self._run(Backbone._compute_features, volume)

    def encode(self, volume: Tensor) -> Tensor:
        """Compute the global features (N, global_channels, d, h, w) without the decoder."""
        return self._run(Backbone._compute_global_features, volume)

    def pyramid(self, volume: Tensor) -> list[Tensor]:
        """Compute the features of all resolutions, coarse to fine.

        Returns:
            The bottleneck and the output of every decoder stage; the last one equals the local
            features. A level of stride s has ceil(size / s) voxels on each axis. Its first voxel
            covers s voxels of the padded volume from a multiple of s on: the volume begins in that
            voxel, ``before % s`` voxels after its edge, where ``before`` counts the voxels padded
            in front.
        """
        return self._run(Backbone._compute_pyramid, volume)

    @abstractmethod
    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Global features of a volume of a fitting size, and the maps that :meth:`decode` needs."""

    @abstractmethod
    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        """Outputs of all decoder stages, coarse to fine; the last one as large as the volume."""

    def freeze_decoder(self) -> None:
        """Train the encoder alone: multi-process training allows no trainable part without use."""
        for part in self.decoder_parts:
            self.get_submodule(part).requires_grad_(False)

    def run_stage(self, stage: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call a stage, with activation checkpointing if that is on."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return stage(*inputs)
        light = self.activation_checkpointing == "light"
        options: dict[str, Any] = {"context_fn": _keep_products} if light else {}
        return cast(Tensor, checkpoint(stage, *inputs, use_reentrant=False, **options))

    def _run(self, compute: Callable[["Backbone", Tensor], T], volume: Tensor) -> T:
        return (_compiled(compute) if self.compiled else compute)(self, volume)

    def _compute_features(self, volume: Tensor) -> Features:
        padded, before = self._pad(volume)
        global_features, skips = self.encode_padded(padded)
        local_features = self.decode(global_features, skips)[-1]
        return Features(global_features, _crop(local_features, 1, volume, before))

    def _compute_global_features(self, volume: Tensor) -> Tensor:
        return self.encode_padded(self._pad(volume)[0])[0]

    def _compute_pyramid(self, volume: Tensor) -> list[Tensor]:
        padded, before = self._pad(volume)
        global_features, skips = self.encode_padded(padded)
        levels = [global_features, *self.decode(global_features, skips)]
        return [_crop(x, padded.shape[2] // x.shape[2], volume, before) for x in levels]

    def _pad(self, volume: Tensor) -> tuple[Tensor, list[int]]:
        """Returns the padded volume and the voxels added in front on each axis."""
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
        axes = zip(reversed(missing), reversed(before), strict=True)
        return F.pad(volume, [side for m, start in axes for side in (start, m - start)]), before


class UNet(Backbone):
    """The paper's 3D U-Net (section 4.1): 23,538,144 parameters at the default width.

    Each stage is twice (convolution 3x3x3, GroupNorm of channels / 8 groups, LeakyReLU 0.2);
    max-pooling, trilinear upsampling (align_corners), concatenation [skip, upsampled].

    Args:
        channels: channels of the encoder's stages, the bottleneck last; the decoder mirrors them.
        low_memory: train with the stages of :mod:`gvsl_lightning.nn.low_memory`, which keep one map
            of each block for the backward pass. Same results.

    Raises:
        InputError: if there are fewer than two stages, or a stage is neither narrower than 16
            channels nor a multiple of 8.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        activation_checkpointing: Checkpointing = False,
        low_memory: bool = False,
    ) -> None:
        super().__init__(in_channels, activation_checkpointing)
        if len(channels) < 2:
            raise InputError(f"unet needs channels of at least two stages, got {list(channels)}.")
        self.low_memory = low_memory
        block = low_memory_stages.LowMemoryBlock if low_memory else ConvolutionBlock
        self.global_channels, self.local_channels = channels[-1], channels[0]
        self.divisor = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            double_convolution(before, after, block)
            for before, after in zip((in_channels, *channels[:-1]), channels, strict=True)
        )
        coarse_to_fine = list(reversed(channels))
        self.decoder = nn.ModuleList(
            double_convolution(skip + below, skip, block)
            for below, skip in pairwise(coarse_to_fine)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        if volume.device.type == "cpu":
            # the faster layout; clone, as a volume of one channel counts as channels last already
            volume = volume.clone(memory_format=torch.channels_last_3d)
        skips = [self.run_stage(self.encoder[0], volume)]
        for stage in self.encoder[1:]:
            skips.append(self.run_stage(stage, max_pool(skips[-1])))
        return skips[-1], skips[:-1]

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        join = low_memory_stages.upsample_and_join if self.low_memory else _upsample_and_join
        stages = [partial(join, stage) for stage in self.decoder]
        return _decode_in_stages(self, stages, global_features, skips)


class BasicUNetBackbone(Backbone):
    """MONAI's BasicUNet; ``features[4]`` is the bottleneck, ``features[5]`` the last stage.

    Further options go to ``monai.networks.nets.BasicUNet``; the norm is GroupNorm by default.
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
        return _encode_in_stages(self, self.encoder, volume)

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        stages = [partial(_up_cat, stage) for stage in self.decoder]
        return _decode_in_stages(self, stages, global_features, skips)


class DynUNetBackbone(Backbone):
    """MONAI's DynUNet (the nnU-Net layout), kernel 3 and stride 2 in every stage.

    Args:
        filters: channels of the encoder's stages, the bottleneck last.
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
        return _encode_in_stages(self, self.encoder, volume)

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        return _decode_in_stages(self, self.decoder, global_features, skips)


class SegResNetBackbone(Backbone):
    """MONAI's SegResNet.

    Args:
        init_filters: channels of the first stage; each further stage doubles them.
        blocks_down: residual blocks in each encoder stage.
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
        return _encode_in_stages(self, self.encoder, self.stem(volume))

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        levels = [global_features]
        for double, stage, skip in zip(self.upsample, self.decoder, reversed(skips), strict=True):
            levels.append(self.run_stage(stage, double(levels[-1]) + skip))
        return levels[1:]


class SwinUNETRBackbone(Backbone):
    """MONAI's Swin UNETR.

    Args:
        feature_size: channels of the local features, a multiple of 12; the global ones have 16
            times as many.
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
        hidden = self.transformer(volume, True)
        skips = [
            self.run_stage(stage, x)
            for stage, x in zip(self.skip_encoders, (volume, *hidden[:3]), strict=True)
        ]
        return self.run_stage(self.bottleneck, hidden[4]), [*skips, hidden[3]]

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        return _decode_in_stages(self, self.decoder, global_features, skips)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "unet": UNet,
    "basic_unet": BasicUNetBackbone,
    "dynunet": DynUNetBackbone,
    "segresnet": SegResNetBackbone,
    "swin_unetr": SwinUNETRBackbone,
}
"""Name -> builder. Register your own with ``BACKBONES["name"] = MyBackbone``."""


OWN = "own:"
"""Beginning of the name of a backbone that no name rebuilds."""


def build_backbone(name: str, in_channels: int = 1, **options: Any) -> Backbone:
    """Build a backbone with random weights by its name in :data:`BACKBONES`, or by a path.

    A path such as ``my_package.my_network`` names a subclass of :class:`Backbone`, or a function
    that is annotated to return one.

    The options are those of its class, scalars and lists only.

    Raises:
        InputError: if the name is unknown or an option does not fit the network.
    """
    if name.startswith(OWN):
        raise InputError(
            f"The backbone is a network of your own, {name.removeprefix(OWN)}, which no name "
            "rebuilds; give it as backbone=wrap_backbone(...)."
        )
    if "." in name:
        builder = _find_builder(name)
    else:
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


def _find_builder(name: str) -> Callable[..., Backbone]:
    """Import the builder of a backbone by its path, such as ``my_package.my_network``.

    Only a subclass of :class:`Backbone` is taken, or a function
    annotated to return one: a name in a file of weights must not call anything else.

    Raises:
        InputError: if there is none.
    """
    path, _, attribute = name.rpartition(".")
    try:
        builder = getattr(importlib.import_module(path), attribute)
        made = builder if inspect.isclass(builder) else get_type_hints(builder).get("return")
    except Exception as error:
        raise InputError.about(
            "backbone", f"is {name}, which cannot be imported: {error}."
        ) from error
    if not (inspect.isclass(made) and issubclass(made, Backbone)):
        raise InputError.about(
            "backbone",
            f"is {name}, which is neither a Backbone nor a function annotated to return one; "
            "annotate it with -> Backbone.",
        )
    found: Callable[..., Backbone] = builder
    return found


def _encode_in_stages(
    backbone: Backbone, stages: nn.ModuleList, x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    outputs: list[Tensor] = []
    for stage in stages:
        x = backbone.run_stage(stage, x)
        outputs.append(x)
    return outputs[-1], outputs[:-1]


def _keep_products() -> Any:
    """Contexts of a checkpoint that keeps the outputs of products and recomputes the rest."""
    aten = torch.ops.aten
    kept = [aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default]
    return create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]


@cache
def _compiled(function: Callable[[Backbone, Tensor], T]) -> Callable[[Backbone, Tensor], T]:
    """Compile a function of all backbones; torch keeps one program for each network and shape."""
    return torch.compile(function, dynamic=False)


def _upsample_and_join(stage: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    joined: Tensor = stage(torch.cat([skip, upsample(x)], dim=1))
    return joined


def _up_cat(stage: Any, x: Tensor, skip: Tensor) -> Tensor:
    """MONAI's ``UpCat`` for even sizes, without its ``torch.jit``, which breaks compiled graphs."""
    joined: Tensor = stage.convs(torch.cat([skip, stage.upsample(x)], dim=1))
    return joined


def _decode_in_stages(
    backbone: Backbone, stages: Iterable[Callable[..., Tensor]], x: Tensor, skips: list[Tensor]
) -> list[Tensor]:
    levels: list[Tensor] = []
    for stage, skip in zip(stages, reversed(skips), strict=True):
        x = backbone.run_stage(stage, x, skip)
        levels.append(x)
    return levels


def _crop(level: Tensor, stride: int, volume: Tensor, before: list[int]) -> Tensor:
    """Remove the padding from a map that has one voxel for each ``stride`` of the padded volume."""
    d, h, w = (-(-size // stride) for size in volume.shape[2:])
    i, j, k = (start // stride for start in before)
    return level[:, :, i : i + d, j : j + h, k : k + w]
