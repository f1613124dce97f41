"""A network as a MONAI bundle, which runs without this package.

https://docs.monai.io/en/stable/mb_specification.html. The network is TorchScript, because some of
our networks are not in MONAI.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch

from gvsl_lightning.data.preparation import find_transform
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.export.exported import Model, write_saved, write_torchscript
from gvsl_lightning.export.model_card import describe_prediction, describe_preparation
from gvsl_lightning.runs.files import write_text

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
"""Of the metadata, as MONAI publishes it."""

BUNDLE_FILES = (
    "configs/inference.json",
    "configs/metadata.json",
    "models/model.pt",
    "models/model.ts",
)


def write_bundle(model: Model, path: Path) -> float:
    """Write a folder of :data:`BUNDLE_FILES`.

    ``model.ts`` returns logits, or of a backbone local features; ``model.pt`` holds the weights.

    Returns:
        See :func:`gvsl_lightning.export.exported.largest_difference`, of ``model.ts``.

    Raises:
        InputError: if the preparation is not recorded, or MONAI has no transform for it.
    """
    if not model.has_intensities:
        raise InputError(
            "A bundle prepares volumes itself, and the weights do not name the preparation: give "
            "--modality ct, mri or none, and --window and --spacing."
        )
    if model.hooks:
        raise InputError(
            f"A bundle cannot prepare volumes as the data module did ({' '.join(model.hooks)}): "
            "export another format, whose card says so, or, unless they were cropped, name the "
            "intensities by --modality."
        )
    if not _is_plain(model.class_names):
        raise InputError(
            "MONAI runs names that begin with $, @, % or _ as code, and the classes are "
            f"{', '.join(model.class_names)}: choose another format."
        )
    weights = model.network.state_dict()
    write_saved(path / "models" / "model.pt", lambda file: torch.save(weights, file))
    for name, content in (("metadata", _metadata(model)), ("inference", _inference(model))):
        write_text(path / "configs" / f"{name}.json", json.dumps(content, indent=4) + "\n")
    local = replace(model, local_only=model.kind == "backbone")
    difference = write_torchscript(local, path / "models" / "model.ts")
    _parse(path)
    return difference


def _parse(path: Path) -> None:
    from monai.bundle.config_parser import ConfigParser  # slow to import

    parser = ConfigParser()
    parser.read_config(path / "configs" / "inference.json")
    parser["bundle_root"] = str(path)
    for name in (name for name in cast(dict[str, Any], parser.get()) if name != "run"):
        try:
            parser.get_parsed_content(name)
        except Exception as error:  # of any class that it names
            raise InputError(
                f"The part {name} of the bundle cannot be built ({cause_of(error)}): correct the "
                "options and transforms of the data, or choose another format."
            ) from error


def _metadata(model: Model) -> dict[str, Any]:
    names = model.class_names
    if model.kind == "backbone":
        names = [f"local feature {index}" for index in range(model.backbone.local_channels)]
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": {"ct": "CT", "mri": "MR"}.get(model.preparation.modality, "n/a"),
        "value_range": [0, 1],
        **_tensor(model, ["image"] * model.backbone.in_channels),
    }
    formats = {"backbone": "latent", "segmentation": "labels", "classification": "classes"}
    pred = {
        "type": "image",
        "format": formats[model.kind],
        "value_range": [],
        **_tensor(model, names),
    }
    if model.kind == "classification":
        pred |= {"type": "probabilities", "spatial_shape": []}
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported"},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch").partition("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {"nibabel": metadata.version("nibabel")},
        "task": {
            "backbone": "Local features of 3D volumes",
            "segmentation": f"Segmentation of {', '.join(names[1:])}",
            "classification": f"Classification as {', '.join(names)}",
        }[model.kind],
        "description": " ".join([*describe_preparation(model), *describe_prediction(model)]),
        "authors": "to be filled in",
        "copyright": "to be filled in",
        "intended_use": "Research; no medical device.",
        "references": ["Geometric Visual Similarity Learning, https://arxiv.org/abs/2303.00874"],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def _tensor(model: Model, channels: list[str]) -> dict[str, Any]:
    """Metadata of a tensor with named channels."""
    return {
        "num_channels": len(channels),
        "spatial_shape": list(model.size),
        "dtype": "float32",
        "is_patch_data": model.kind == "segmentation",
        "channel_def": {str(index): name for index, name in enumerate(channels)},
    }


def _inference(model: Model) -> dict[str, Any]:
    """Settings for ``monai.bundle run``; it evaluates every value with ``$`` as Python."""
    inferer: dict[str, Any] = {
        "_target_": "SlidingWindowInferer",
        "roi_size": list(model.size),
        "sw_batch_size": 1,
        "overlap": float(model.card["task"].get("overlap", 0.5)),
        "mode": "gaussian",
    }
    run = ["$[@postprocessing(@infer(item)) for item in @dataset]"]
    extra: dict[str, Any] = {}
    if model.kind == "classification":
        inferer = {"_target_": "SimpleInferer"}
        extra["saver"] = {"_target_": "CSVSaver", "output_dir": "@output_dir", "overwrite": True}
        run = [
            "$[@saver.save(item['pred'], item['image'].meta) for item in "
            "map(@postprocessing, map(@infer, @dataset))]",
            "$@saver.finalize()",
        ]
    return {
        "imports": ["$import glob", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "data": "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii*'))]",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(model)},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "inferer": inferer,
        "infer": "$lambda item: {**item, 'pred': "
        "@inferer(item['image'][None].to(@device), @network_def)[0].cpu()}",
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(model)},
        **extra,
        "run": run,
    }


def _preprocessing(model: Model) -> list[dict[str, Any]]:
    preparation = model.preparation

    def on_image(target: str, **options: Any) -> dict[str, Any]:
        return {"_target_": target, "keys": "image", **options}

    steps = [
        on_image("LoadImaged"),
        on_image("EnsureChannelFirstd"),
        on_image("Orientationd", axcodes="RAS", labels=None),
    ]
    if preparation.spacing is not None:
        steps.append(on_image("Spacingd", pixdim=list(preparation.spacing), mode="bilinear"))
    if preparation.transforms is not None:
        steps += [_of_monai(spec) for spec in preparation.transforms]
    elif preparation.modality == "ct":
        low, high = preparation.window
        limits = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0}
        steps.append(on_image("ScaleIntensityRanged", **limits, clip=True))
    elif preparation.modality == "mri":
        steps.append(on_image("Lambdad", func=_PERCENTILES))
    else:
        steps.append(on_image("ScaleIntensityd", minv=0.0, maxv=1.0, channel_wise=True))
    if preparation.crop_foreground is not None:
        select = f"$lambda volume: volume > {preparation.crop_foreground}"
        steps.append(on_image("CropForegroundd", source_key="image", select_fn=select))
    if model.kind == "classification":
        fit = "Resized" if model.card["data"].get("resize") else "ResizeWithPadOrCropd"
        steps.append(on_image(fit, spatial_size=list(model.size)))
    return steps


def _of_monai(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A transform of MONAI as a bundle writes it; any other entry of a card could run code."""
    package, name = "monai.transforms.", spec["class_path"].rpartition(".")[-1]
    options = spec.get("init_args") or {}
    try:
        find_transform(f"{package}{name}")
        if not (_is_plain(options) and spec["class_path"].startswith(package)):
            raise TypeError(options)
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"A bundle takes transforms of monai.transforms with plain options, and not {spec}: "
            "choose another format."
        ) from error
    return {"_target_": f"{package}{name}", **options}


def _is_plain(value: Any) -> bool:
    """Whether a bundle takes no part of the value as an expression, reference, file or class."""
    return not re.search(r'"[$@%_]', json.dumps(value))


# for each channel, maps percentiles 0.5 and 99.5 of the voxels that are not 0 to 0 and 1
_PERCENTILES = (
    "$lambda volume: torch.stack([(lambda low, high: ((channel - low) / (high - low)).clamp(0, 1) "
    "if low < high else channel * 0)(*(np.percentile(channel[channel != 0].numpy(), [0.5, 99.5], "
    "method='nearest').tolist() if channel.any() else (0, 0))) for channel in volume])"
)


def _postprocessing(model: Model) -> list[dict[str, Any]]:
    def on_pred(target: str, **options: Any) -> dict[str, Any]:
        return {"_target_": target, "keys": "pred", **options}

    save = {"output_dir": "@output_dir", "separate_folder": False, "resample": False}
    if model.kind == "backbone":
        return [on_pred("SaveImaged", output_postfix="features", **save)]
    function = "sigmoid" if model.multi_label else "softmax"
    steps = [on_pred("Activationsd", **{function: True})]
    if model.kind == "segmentation":
        original = {"transform": "@preprocessing", "orig_keys": "image", "to_tensor": True}
        steps += [
            on_pred("Invertd", nearest_interp=False, **original),
            on_pred("AsDiscreted", argmax=True),
            on_pred("SaveImaged", output_postfix="seg", output_dtype="$np.uint8", **save),
        ]
    return steps
