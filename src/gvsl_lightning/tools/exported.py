"""A trained network as it is exported: read from a file, made recordable, compared."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.backbones import Backbone, build_backbone
from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import Classification, Segmentation
from gvsl_lightning.tasks.pretraining import pool
from gvsl_lightning.transforms.intensity import Modality
from gvsl_lightning.weights import WeightReport, load_backbone_weights, local_file, read_head

Kind = Literal["backbone", "segmentation", "classification"]

OUTPUTS: dict[Kind, tuple[str, ...]] = {
    "backbone": ("global_features", "local_features"),
    "segmentation": ("logits",),
    "classification": ("logits",),
}
"""Names of what a network returns."""

_SIZE = (96, 96, 96)


@dataclass(frozen=True)
class Model:
    """A backbone, or a fine-tuned network, and what is known of it.

    Attributes:
        kind: what it is.
        network: a :class:`~gvsl_lightning.backbones.Backbone`, a
            :class:`~gvsl_lightning.tasks.Segmentation` or a
            :class:`~gvsl_lightning.tasks.Classification`, on the CPU, in eval mode, without
            gradients.
        card: ``backbone`` (its architecture), ``task`` and ``data`` (class and options that others
            can use: no paths), and what is known of the training: ``weights``, ``steps``,
            ``epochs``, ``seed``, ``score``.
        size: (D, H, W) in voxels of the volumes or windows it was trained with.
    """

    kind: Kind
    network: nn.Module
    card: Mapping[str, Any]
    size: tuple[int, int, int]

    @property
    def backbone(self) -> Backbone:
        """The network itself, or what lies below its head."""
        backbone = self.network if self.kind == "backbone" else self.network.backbone
        return cast(Backbone, backbone)

    @property
    def head(self) -> nn.Module | None:
        """What a fine-tuned network has on top."""
        return None if self.kind == "backbone" else cast(nn.Module, self.network.head)

    @property
    def class_names(self) -> list[str]:
        """Name of every class; none of a backbone."""
        return [] if self.kind == "backbone" else list(self.card["task"]["class_names"])

    @property
    def multi_label(self) -> bool:
        """Whether any number of classes applies to a volume, in classification."""
        return bool(self.card["task"].get("multi_label"))

    @property
    def is_fixed(self) -> bool:
        """Whether what is recorded of it holds for volumes of one size alone."""
        return self.backbone.name == "swin_unetr"  # numbers of windows become constants

    def compute(self, volume: Tensor) -> tuple[Tensor, ...]:
        """What is named in :data:`OUTPUTS`, of volumes (N, channels, D, H, W)."""
        return as_tuple(self.network(volume))


def load_model(
    weights: str | Path,
    size: Sequence[int] | None = None,
    modality: Modality | None = None,
    window: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
) -> Model:
    """Read a network and what its file says of it.

    Args:
        weights: a ``.ckpt`` of this package, of pre-training or fine-tuning, or a ``.safetensors``
            with its card next to it, see :func:`gvsl_lightning.weights.load_backbone_weights`.
        size: see :class:`Model`; takes the place of what the file says, like all below.
        modality: intensity preset.
        window: lower and upper limit of the preset ``ct`` in HU.
        spacing: voxel size in mm.

    Returns:
        The network.

    Raises:
        InputError: the file is missing, damaged or incomplete, or does not say what it holds.
    """
    path = local_file(weights)
    head = read_head(path, "head")
    card = _read_card(path)
    task, data = card["task"], card["data"]
    given = {"modality": modality, "window": window, "spacing": spacing}
    data.update({name: value for name, value in given.items() if value is not None})
    kind: Kind = "backbone"
    network: Any
    if head and "class_names" in task:
        is_map = any(value.ndim == 5 for value in head.values())
        kind = "segmentation" if is_map else "classification"
        network = _build_task(kind, card)
        expected = {name: value.shape for name, value in network.head.state_dict().items()}
        if expected != {name: value.shape for name, value in head.items()}:
            raise InputError(
                f"{path} has a head that is not the {kind}'s of this package: export its backbone "
                "alone, from a backbone.safetensors."
            )
        network.head.load_state_dict(head)
    else:
        network = build_backbone(
            card["backbone"]["name"],
            in_channels=card["backbone"]["in_channels"],
            **card["backbone"]["options"],
        )
    report = load_backbone_weights(network if kind == "backbone" else network.backbone, path)
    _require_all(report)
    found = size or task.get("window_size") or data.get("patch_size") or data.get("size") or _SIZE
    network.eval().requires_grad_(False)
    return Model(kind, network, card, cast(tuple[int, int, int], tuple(found)))


class Recordable(nn.Module):
    """A model for ``torch.jit.trace`` and ``torch.export``, with its padding inside.

    All sizes are computed from the volume's, without a decision, so that what is recorded holds for
    every size.

    Args:
        model: the model; it is not copied.
        local_only: of a backbone, return the local features alone.
    """

    def __init__(self, model: Model, local_only: bool = False) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head
        self.kind = model.kind
        self.local_only = local_only

    def forward(self, volume: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(N, channels, D, H, W) to what is named in :data:`OUTPUTS`."""
        sizes = [volume.shape[axis] for axis in (2, 3, 4)]
        divisor = self.backbone.divisor
        # in this form the padded size is seen to be a multiple of the divisor
        missing = [divisor * ((size + divisor - 1) // divisor) - size for size in sizes]
        before = [size // 2 for size in missing]
        padding: list[int] = []
        for total, start in zip(reversed(missing), reversed(before), strict=True):
            padding += [start, total - start]
        global_features, skips = self.backbone.encode_padded(F.pad(volume, padding))
        if self.kind == "classification":
            assert self.head is not None
            return cast(Tensor, self.head(pool(global_features)))
        decoded = self.backbone.decode(global_features, skips)
        (i, j, k), (d, h, w) = before, sizes
        local_features = decoded[:, :, i : i + d, j : j + h, k : k + w]
        if self.head is not None:
            return cast(Tensor, self.head(local_features))
        return local_features if self.local_only else (global_features, local_features)


def example_volume(model: Model) -> Tensor:
    """A volume to record the network with: of a size of its own on each axis, needing padding."""
    if model.is_fixed:
        return torch.rand(1, model.backbone.in_channels, *model.size)
    divisor = model.backbone.divisor
    # padded to different sizes, as equal ones would be taken for a rule
    sizes = (2 * divisor + 1, 4 * divisor, 4 * divisor + 3)
    return torch.rand(2, model.backbone.in_channels, *sizes)


def largest_difference(
    model: Model,
    run: Callable[[Tensor], Sequence[Tensor]],
    outputs: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    pads: bool = True,
) -> float:
    """Compare what was exported with the model it was made from, on random volumes.

    One batch needs no padding, the other one does, and has another number of volumes; a network of
    a fixed size gets one volume of that.

    Args:
        model: the model.
        run: what was exported, from volumes to the outputs.
        outputs: their names, if not all that the model has.
        pads: whether what was exported takes volumes that need padding.
        tolerance: largest difference allowed, of values in [-1, 1]; in proportion to the largest
            one beyond that.

    Returns:
        The largest difference, in the same measure.

    Raises:
        InputError: it is above the tolerance, or the shapes differ.
    """
    divisor, channels = model.backbone.divisor, model.backbone.in_channels
    shapes = [(2, *[2 * divisor] * 3), (1, divisor + 3, 2 * divisor, divisor + 1)]
    if model.is_fixed:
        shapes = [(1, *model.size)]
    elif not pads:
        del shapes[1]
    names = OUTPUTS[model.kind]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for number, *size in shapes:
        volume = torch.rand(number, channels, *size, generator=generator)
        expected = dict(zip(names, model.compute(volume), strict=True))
        for name, found in zip(outputs or names, run(volume), strict=True):
            wanted = expected[name]
            difference = float("inf")
            if found.shape == wanted.shape:
                scale = max(1.0, float(wanted.abs().max()))
                difference = float((found - wanted).abs().max()) / scale
            if not difference <= tolerance:
                raise InputError(
                    f"The {name} of the exported {model.backbone.name} differ from its own by "
                    f"{difference:.1e} for a volume of {'x'.join(map(str, size))}, more than "
                    f"{tolerance:.0e}, and nothing was written: choose another format, or another "
                    "version of the packages."
                )
            worst = max(worst, difference)
    return worst


def write_torchscript(model: Model, path: Path, local_only: bool = False) -> float:
    """Write what ``torch.jit.load`` reads.

    Args:
        model: what is exported.
        path: the ``.ts`` file.
        local_only: of a backbone, the local features alone.

    Returns:
        See :func:`largest_difference`.
    """
    recorded: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        Recordable(model, local_only), example_volume(model), check_trace=False
    )
    torch.jit.save(recorded, path)
    network: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
    outputs = ("local_features",) if local_only and model.kind == "backbone" else None
    return largest_difference(model, lambda volume: as_tuple(network(volume)), outputs)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What a network returned, one tensor or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


_DATA = (
    "class",
    "scene",
    "modality",
    "window",
    "spacing",
    "transforms",
    "crop_foreground",
    "channels",
    "patch_size",
    "size",
    "resize",
    "training_items",
    "description",
)
"""Of a data module: what says how volumes look, and no paths."""

_TRAINING = ("weights", "steps", "epochs", "seed", "score")


def _read_card(path: Path) -> dict[str, Any]:
    # a damaged or missing file is named by read_head
    card: dict[str, Any] = {}
    with suppress(Exception):
        card = _read_json(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if not card:
        raise InputError(
            f"{path} does not say which network it holds: give a .ckpt of this package, or a "
            ".safetensors with its .json next to it."
        )
    data = {name: card["data"][name] for name in _DATA if name in card["data"]}
    task = {
        name: value
        for name, value in card["task"].items()
        if not name.startswith("_") and name != "weights"
    }
    known = {name: card[name] for name in _TRAINING if card.get(name) is not None}
    return {"backbone": card["backbone"], "task": task, "data": data, **known}


def _read_json(path: Path) -> dict[str, Any]:
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data, task = card.get("data") or {}, card.get("task") or {}
    architecture = {key: card["backbone"][key] for key in ("name", "in_channels", "options")}
    return {
        **card,
        "backbone": architecture,
        "task": task if isinstance(task, dict) else {"class": str(task)},
        "data": data if isinstance(data, dict) else {"description": str(data)},
    }


def _read_checkpoint(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    task = content["hyper_parameters"]
    data = content.get("datamodule_hyper_parameters") or {}

    def name_of(options: Mapping[str, Any]) -> dict[str, str]:
        path = options.get("_class_path")
        return {"class": path.rpartition(".")[-1]} if path else {}

    return {
        "backbone": {
            "name": task["backbone"],
            "in_channels": task["in_channels"],
            "options": task["backbone_options"] or {},
        },
        "task": {**name_of(task), **task},
        "data": {**name_of(data), **data},
        "weights": f"checkpoint {path.name}",
        "steps": content["global_step"],
        "epochs": content["epoch"] + 1,
    }


def _build_task(kind: Kind, card: Mapping[str, Any]) -> Segmentation | Classification:
    task, architecture = card["task"], card["backbone"]
    options: dict[str, Any] = {
        "class_names": task["class_names"],
        "backbone": architecture["name"],
        "backbone_options": architecture["options"],
        "in_channels": architecture["in_channels"],
    }
    if kind == "segmentation":
        return Segmentation(mode="scratch", **options)
    mode = "linear" if task.get("mode") == "linear" else "scratch"
    return Classification(mode=mode, multi_label=task.get("multi_label", False), **options)


def _require_all(report: WeightReport) -> None:
    if report.missing or report.unexpected or report.mismatched or report.adapted:
        raise InputError(f"{report}: not what its own card says, save it again.")
