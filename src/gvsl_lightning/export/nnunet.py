"""A ``dynunet`` backbone as weights for nnU-Net v2.

nnU-Net's ``PlainConvUNet`` (package dynamic-network-architectures) is a ``dynunet`` with instance
normalisation, module by module.
"""

import json
import math
import pydoc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.export.exported import Model, largest_difference, write_saved
from gvsl_lightning.nn.backbones import Backbone
from gvsl_lightning.runs.files import write_text

_INSTANCE_NORM = "--model.backbone=dynunet --model.backbone_options=" + (
    "'{norm_name: [instance, {affine: true}]}'"
)

_INSTALL = 'pip install "dynamic-network-architectures==0.4.*"'

_OPTIONS = {"filters", "norm_name", "activation_checkpointing"}

_NORMALIZATIONS = {
    "ct": "CTNormalization",
    "mri": "ZScoreNormalization",
    "none": "RescaleTo01Normalization",
}
"""nnU-Net's normalisation for each of our presets; only the last one computes the same."""


def write_nnunet(model: Model, path: Path) -> float:
    """Write weights and, next to them, a sketch of plans (``*_plans.json``).

    The head of a fine-tuned network is left out: nnU-Net's segmentation layers are 1x1x1.

    Returns:
        Difference of a ``PlainConvUNet`` made by the plans and filled with the file, see
        :func:`gvsl_lightning.export.exported.largest_difference`.

    Raises:
        InputError: no ``PlainConvUNet`` computes the same, or the package is missing.
    """
    backbone = model.backbone
    _require_same_layout(backbone)
    weights = {"network_weights": _plain_conv_unet_entries(backbone)}
    write_saved(path, lambda file: torch.save(weights, file))
    plans = _plans(model)
    write_text(path.with_name(f"{path.stem}_plans.json"), json.dumps(plans, indent=2) + "\n")
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    network = _read_back(path, architecture, backbone.in_channels)
    features: list[Tensor] = []
    network.decoder.stages[-1].register_forward_hook(
        lambda module, inputs, output: features.append(output)
    )

    def run(volume: Tensor) -> tuple[Tensor, Tensor]:
        skips = network.encoder(volume)
        network.decoder(skips)
        return skips[-1], features.pop()

    headless = replace(model, kind="backbone", network=backbone)
    return largest_difference(headless, run, tolerance=1e-5, pads=False)


def describe_normalization(model: Model) -> str:
    """One sentence on the difference between nnU-Net's intensities and those of the training."""
    name = _normalization(model)
    if name is None:
        return (
            "Intensities: the plans of this export name no normalization, as none of nnU-Net is "
            "known to do this: choose one; the first layers will have to adapt."
        )
    if name == "RescaleTo01Normalization":
        return f"nnU-Net's {name} does the same."
    return (
        f"nnU-Net's {name}, in the plans of this export, is not the same: it gives mean 0 and "
        "deviation 1, not 0 to 1. The first layers will have to adapt."
    )


def _normalization(model: Model) -> str | None:
    preparation = model.preparation
    if preparation.transforms is not None or model.hooks or not model.has_intensities:
        return None
    return _NORMALIZATIONS[preparation.modality]


def _require_same_layout(backbone: Backbone) -> None:
    if backbone.name != "dynunet":
        raise InputError(
            f"nnU-Net has no network that computes the same as {backbone.name} (PlainConvUNet has "
            "strided and transposed convolutions and no GroupNorm): pre-train with "
            f"{_INSTANCE_NORM}, or export to onnx or bundle."
        )
    norms = [norm for name, norm in backbone.named_modules() if name.endswith(("norm1", "norm2"))]
    if not all(isinstance(norm, nn.InstanceNorm3d) for norm in norms):
        raise InputError(
            f"This dynunet has {type(norms[0]).__name__} and nnU-Net's PlainConvUNet InstanceNorm: "
            f"pre-train with {_INSTANCE_NORM}."
        )
    if others := sorted(backbone.options.keys() - _OPTIONS):
        raise InputError(
            f"This dynunet was built with {', '.join(others)}, which nnU-Net's plans do not have: "
            "pre-train without."
        )


def _plain_conv_unet_entries(backbone: Backbone) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = {}

    def add(module: Any, *prefixes: str) -> None:
        weight: Tensor | None = module.weight
        channels = module.num_features if weight is None else module.weight.shape[0]
        if isinstance(module, nn.ConvTranspose3d):
            channels = module.out_channels
        bias = module.bias
        for prefix in prefixes:
            entries[f"{prefix}.weight"] = torch.ones(channels) if weight is None else weight
            # nnU-Net plans convolutions with a bias, MONAI's have none: zero is the same
            entries[f"{prefix}.bias"] = torch.zeros(channels) if bias is None else bias

    def add_block(block: Any, prefix: str) -> None:
        for place, convolution, norm in (
            (0, block.conv1.conv, block.norm1),
            (1, block.conv2.conv, block.norm2),
        ):
            part = f"{prefix}.convs.{place}"
            add(convolution, f"{part}.conv", f"{part}.all_modules.0")
            add(norm, f"{part}.norm", f"{part}.all_modules.1")

    encoder: Any = backbone.encoder
    decoder: Any = backbone.decoder
    for stage, block in enumerate(encoder):
        add_block(block, f"encoder.stages.{stage}.0")
        add_block(block, f"decoder.encoder.stages.{stage}.0")
    for stage, block in enumerate(decoder):
        add(block.transp_conv.conv, f"decoder.transpconvs.{stage}")
        add_block(block.conv_block, f"decoder.stages.{stage}")
    return {name: value.detach().clone() for name, value in entries.items()}


def _plans(model: Model) -> dict[str, Any]:
    """The entries of nnU-Net's plans that these weights need; nnU-Net plans the rest."""
    encoder: Any = model.backbone.encoder
    channels = [block.conv1.conv.out_channels for block in encoder]
    stages = len(channels)
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": channels,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    divisor, normalization = model.backbone.divisor, _normalization(model)
    configuration: dict[str, Any] = {
        "patch_size": [math.ceil(edge / divisor) * divisor for edge in model.size],
        "architecture": architecture,
    }
    if normalization is not None:
        configuration["normalization_schemes"] = [normalization] * model.backbone.in_channels
    if model.preparation.spacing is not None:
        configuration["spacing"] = model.preparation.spacing
    return {
        # arrays as these weights know them: axes right, anterior, superior
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "configurations": {"3d_fullres": configuration},
    }


def _read_back(path: Path, architecture: dict[str, Any], in_channels: int) -> Any:
    network_class: Any = pydoc.locate(architecture["network_class_name"])
    if network_class is None:
        raise InputError(
            "The weights are checked in nnU-Net's own network, and its package is missing: "
            f"{_INSTALL}."
        )
    options = dict(architecture["arch_kwargs"])
    for name in architecture["_kw_requires_import"]:
        options[name] = None if options[name] is None else pydoc.locate(options[name])
    network = network_class(input_channels=in_channels, num_classes=2, **options).eval()
    weights = torch.load(path, weights_only=True)["network_weights"]
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if others := [name for name in missing if ".seg_layers." not in name] + unexpected:
        raise InputError(
            f"PlainConvUNet of the installed dynamic-network-architectures has other entries "
            f"({others[0]}): {_INSTALL}."
        )
    return network.requires_grad_(False)
