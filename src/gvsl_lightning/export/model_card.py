"""The model card of an export, in Markdown."""

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from gvsl_lightning import __version__
from gvsl_lightning.export.exported import Model
from gvsl_lightning.export.nnunet import describe_normalization
from gvsl_lightning.runs.files import write_text

TEMPLATE = """\
---
license: other
license_name: to-be-filled-in
library_name: gvsl-lightning
tags: [medical-imaging, self-supervised-learning, 3d]
---

# {name}

{summary}

## Intended use

Research. To be filled in: for which questions, scanners and patients this network was made and
tested. It is no medical device, and nothing here says how well it works on other data.

## Limits

To be filled in: what was not tested, such as other scanners, contrasts, body regions, or children.

## Input

{input}

## Output

{output}

## Reading it

{reading}

## Training

{training}

## Results

To be filled in: task, data, split, metric, number of seeds, beside training from scratch; the
command that printed them.

## Check

Read back after writing, it differed from the PyTorch network by {difference:.1e} at most, on random
volumes.

## Licence

To be filled in: of these weights, and of the data that they were trained on, with the consent and
ethics approval for these.

## Method

Geometric Visual Similarity Learning in 3D Medical Image Self-supervised Pre-training, He et al.,
CVPR 2023, https://arxiv.org/abs/2303.00874. Written by gvsl-lightning {versions}.
"""


def write_model_card(model: Model, format: str, name: str, difference: float, path: Path) -> None:
    """Write the model card of an export to a Markdown file.

    ``name`` is that of the exported file or folder. ``difference`` is the result of
    :func:`gvsl_lightning.export.exported.largest_difference`.
    """
    packages = ("torch", "monai", "pytorch-lightning")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    text = TEMPLATE.format(
        name=name,
        summary=_summary(model, format),
        input=_lines(_input(model, format)),
        output=_lines(_output(model, format)),
        reading=_READING[format].format(name=name),
        training=_lines(_training(model)),
        difference=difference,
        versions=f"{__version__} with Python {platform.python_version()}, {', '.join(versions)}",
    )
    write_text(path, text)


def describe_preparation(model: Model) -> list[str]:
    """Sentences on the preparation of volumes."""
    preparation = model.preparation
    sentences = ["Turned to RAS: the axes point right, anterior, superior."]
    if preparation.spacing is not None:
        size = " x ".join(f"{edge:g}" for edge in preparation.spacing)
        sentences.append(f"Resampled linearly to voxels of {size} mm.")
    else:
        sentences.append("Voxel size: as stored, or not recorded.")
    if not model.has_intensities:
        sentences.append("Intensities: about 0 to 1; the preset was not recorded.")
    elif preparation.transforms is not None:
        sentences.append(f"Intensities by the MONAI transforms {preparation.transforms}.")
    else:
        low, high = preparation.window
        presets = {
            "ct": f"CT: {low:g} to {high:g} HU, clipped and mapped linearly to 0 to 1.",
            "mri": "MR: of the voxels that are not 0, percentiles 0.5 and 99.5 are mapped linearly "
            "to 0 and 1, and clipped.",
            "none": "Smallest value to 0, largest to 1, each channel by itself.",
        }
        sentences.append(presets[preparation.modality])
    if preparation.crop_foreground is not None:
        sentences.append(f"Cropped to the box of all voxels above {preparation.crop_foreground:g}.")
    return [*sentences, *model.hooks]


def describe_prediction(model: Model) -> list[str]:
    """Sentences on the prediction of the training that an export does not repeat."""
    if not model.card["task"].get("mirror"):
        return []
    return [
        "Exported, it predicts without mirroring; its tests and predictions were means over the "
        "eight mirrorings of a volume."
    ]


_OURS = """\
```python
from gvsl_lightning.weights import load_backbone

backbone = load_backbone("{name}")
```

The card, a `.json` next to the weights, names the architecture. A head has the names `head.*`."""

_READING = {
    "safetensors": _OURS,
    "huggingface": f"{_OURS} On the Hub, the name is `OWNER/NAME`.",
    "torchscript": """\
```python
network = torch.jit.load("{name}")
outputs = network(volume)
```""",
    "pt2": """\
```python
network = torch.export.load("{name}").module()
outputs = network(volume)
```""",
    "onnx": """\
```python
session = onnxruntime.InferenceSession("{name}")
outputs = session.run(None, {{"volume": volume}})
```""",
    "bundle": """\
```bash
python -m monai.bundle run --config_file {name}/configs/inference.json --bundle_root {name} \\
  --dataset_dir FOLDER --output_dir RESULTS
```

`FOLDER` holds NIfTI files. `models/model.ts` is the network, `models/model.pt` its weights.""",
    "nnunet": """\
After `nnUNetv2_plan_and_preprocess`, copy your plans, write the entries of this export's
`_plans.json` into the copy, preprocess with it, and train:

```bash
nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS -pretrained_weights {name}
```

The axes of these weights are right, anterior, superior: `image_reader_writer` and
`transpose_forward` turn volumes to them.""",
}


def _summary(model: Model, format: str) -> str:
    architecture = model.card["backbone"]
    options = f" with {architecture['options']}" if architecture["options"] else ""
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    kind = {
        "backbone": "A pre-trained 3D backbone",
        "segmentation": "A network that segments 3D volumes",
        "classification": "A network that classifies 3D volumes",
    }[model.kind]
    if format == "nnunet" and model.kind != "backbone":
        kind += ", here without its head"
    return f"{kind}: `{architecture['name']}`{options}, {parameters:,} parameters."


def _input(model: Model, format: str) -> Iterator[str]:
    channels = model.backbone.in_channels
    yield f"`volume`: float32, (N, {channels}, D, H, W)."
    if model.is_fixed and format not in ("safetensors", "huggingface"):
        size = " x ".join(map(str, model.size))
        yield f"D x H x W is {size} and N is 1: this network was recorded for this size."
    elif format == "nnunet":
        yield f"D, H and W are multiples of {model.backbone.divisor}."
    else:
        yield "D, H and W may have any size; padding is part of the network."
    yield from describe_preparation(model)
    if format == "nnunet":
        yield describe_normalization(model)


def _output(model: Model, format: str) -> Iterator[str]:
    backbone, names = model.backbone, ", ".join(model.class_names)
    if format == "nnunet" or (model.kind == "backbone" and format != "bundle"):
        yield (
            f"`global_features`: (N, {backbone.global_channels}, d, h, w), the bottleneck; "
            f"one voxel stands for {backbone.divisor} on each axis."
        )
    if format == "nnunet" or model.kind == "backbone":
        yield f"`local_features`: (N, {backbone.local_channels}, D, H, W), one vector per voxel."
    elif model.kind == "segmentation":
        yield f"`logits`: (N, {len(model.class_names)}, D, H, W); softmax makes them probabilities."
        yield f"Classes, in this order: {names}."
        yield "For whole volumes: overlapping windows, weighted by a Gaussian."
        yield from describe_prediction(model)
    else:
        function = "sigmoid" if model.multi_label else "softmax"
        yield f"`logits`: (N, {len(model.class_names)}); {function} makes them probabilities."
        yield f"Classes, in this order: {names}."


def _training(model: Model) -> Iterator[str]:
    card = model.card
    task, data = card["task"], card["data"]
    yield f"Method: {task.get('class', 'not recorded')}."
    items = f", {data['training_items']} training items" if "training_items" in data else ""
    yield f"Data: {data.get('description') or data.get('class') or 'not recorded'}{items}."
    size = data.get("patch_size") or data.get("size")
    if size:
        yield f"Trained on {' x '.join(map(str, size))} voxels."
    for name in ("weights", "steps", "epochs", "seed", "score"):
        if name in card:
            yield f"{name.capitalize()}: {card[name]}."
    yield "To be filled in: where the data come from, how many patients, and under which licence."


def _lines(sentences: Iterator[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
