"""A trained network as it is exported: read from a file, made recordable, compared."""

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal, cast, get_args

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning import datamodules
from gvsl_lightning.data.regions import AroundLabel
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.files import write_whole
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
        network: a :class:`~gvsl_lightning.nn.backbones.Backbone`, a
            :class:`~gvsl_lightning.tasks.Segmentation` or a
            :class:`~gvsl_lightning.tasks.Classification`, on the CPU, in eval mode, without
            gradients.
        card: ``backbone`` (its architecture), ``task`` and ``data`` (class and options that others
            can use: no paths), and what else is known of the training, such as ``steps``.
        size: (D, H, W) in voxels of the volumes or windows it was trained with.
        hooks: sentences about how the data module prepared volumes beyond what ``data`` says.
    """

    kind: Kind
    network: nn.Module
    card: Mapping[str, Any]
    size: tuple[int, int, int]
    hooks: tuple[str, ...] = ()

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
        modality: intensity preset; takes the place of transforms too.
        window: lower and upper limit of the preset ``ct`` in HU.
        spacing: voxel size in mm.

    Returns:
        The network.

    Raises:
        InputError: the file is missing, damaged or incomplete, or does not say what it holds.
    """
    path = local_file(weights)
    head = read_head(path, "head")
    card, options = _read_card(path)
    task, data = card["task"], card["data"]
    given = {"modality": modality, "window": window, "spacing": spacing, "size": size}
    given = {name: value for name, value in given.items() if value is not None}
    _require_valid(given, "--")
    _require_valid({**task, **data}, f"The card of {path} is wrong: ")
    if modality is not None:
        data.pop("transforms", None)
    data.update({name: value for name, value in given.items() if name != "size"})
    kind: Kind = "backbone"
    if head and "class_names" in task:
        is_map = any(value.ndim == 5 for value in head.values())
        kind = "segmentation" if is_map else "classification"
    try:
        network: Any = _build_network(kind, card)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"The card of {path} does not describe a network ({error}): save the weights again."
        ) from error
    if kind != "backbone":
        expected = {name: value.shape for name, value in network.head.state_dict().items()}
        if expected != {name: value.shape for name, value in head.items()}:
            raise InputError(
                f"{path} has a head that is not the {kind}'s of this package: export its backbone "
                "alone, from a backbone.safetensors."
            )
        network.head.load_state_dict(head)
    report = load_backbone_weights(network if kind == "backbone" else network.backbone, path)
    _require_all(report)
    found = size or task.get("window_size") or data.get("patch_size") or data.get("size") or _SIZE
    network.eval().requires_grad_(False)
    hooks = _describe_hooks(data.get("class"), options, modality is not None)
    return Model(kind, network, card, cast(tuple[int, int, int], tuple(found)), hooks)


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
        decoded = self.backbone.decode(global_features, skips)[-1]
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

    Raises:
        InputError: what was recorded is tied to this device, or computes something else.
    """
    recorded: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        Recordable(model, local_only), example_volume(model), check_trace=False
    )
    if 'prim::Constant[value="cpu"]' in str(recorded.inlined_graph):
        raise InputError(
            f"TorchScript of {model.backbone.name} would run on no other device than this CPU: "
            "choose pt2 or onnx."
        )
    write_saved(path, lambda file: torch.jit.save(recorded, file))
    network: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
    outputs = ("local_features",) if local_only and model.kind == "backbone" else None
    return largest_difference(model, lambda volume: as_tuple(network(volume)), outputs)


def write_saved(path: Path, save: Callable[[IO[bytes]], Any]) -> None:
    """Write what PyTorch saves, by way of memory.

    Where the disk is full, its own writers end the process (TorchScript), or name neither the file
    nor the reason.

    Args:
        path: the file.
        save: saves into an open file.
    """
    content = io.BytesIO()
    save(content)
    write_whole(path, lambda file: file.write(content.getbuffer()))


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
    "lungs",
    "margin",
    "crop",
    "training_items",
    "description",
)
"""Of a data module: what says how volumes look, and no paths."""

_PATH = re.compile(r"""(?:^|[\s"'(\[=,;])(?:~\w*/|\.{0,2}[/\\]\S|[A-Za-z]:[/\\]|file:)""")
_PATH_LIKE = re.compile(r"(?!\w+://)\S*[/\\]\S*")
_NAMES_PATH = re.compile(r"(?:.*_)?(?:root|paths?|folders?|files?|dirs?|directory|config)")

_OWN = ("backbone", "task", "data", "parameters", "versions", "date")

_Check = tuple[Callable[[Any], bool], str]


def _numbers(count: int, least: float, kinds: Any) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        return isinstance(x, kinds) and math.isfinite(x) and x > least

    def check(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == count and all(map(fits, value))

    return check


_voxels: _Check = (_numbers(3, 0, int), "three numbers of voxels above 0")
_limits = _numbers(2, -math.inf, (int, float))

_CHECKS: dict[str, _Check] = {
    "modality": (lambda value: value in get_args(Modality), "ct, mri or none"),
    "window": (lambda value: _limits(value) and value[0] < value[1], "two HU, the lower one first"),
    "spacing": (_numbers(3, 0, (int, float)), "three lengths in mm above 0"),
    "size": _voxels,
    "patch_size": _voxels,
    "window_size": _voxels,
    "crop_foreground": (lambda value: isinstance(value, int | float), "a number"),
    "transforms": (
        lambda value: (
            isinstance(value, list)
            and all(isinstance(spec, dict) and "class_path" in spec for spec in value)
        ),
        "a list of transforms, each with a class_path",
    ),
    "class_names": (
        lambda value: (
            isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        ),
        "a list of names",
    ),
    "overlap": (lambda value: isinstance(value, int | float) and 0 <= value < 1, "0 to below 1"),
}


def _require_valid(values: Mapping[str, Any], prefix: str) -> None:
    for name, (check, wanted) in _CHECKS.items():
        value = values.get(name)
        if value is not None and not check(value):
            raise InputError(f"{prefix}{name} is {value!r}, not {wanted}; correct it.")


def _describe_hooks(
    class_name: str | None, options: Mapping[str, Any], intensity_given: bool
) -> tuple[str, ...]:
    """What hooks of a data module do that its options do not say; no module is imported for it."""
    if class_name is None:  # a checkpoint of a run without the command line
        crops = [f"{name} {options[name]}" for name in ("lungs", "crop") if options.get(name)]
        return tuple(f"Cropped beforehand by the data module ({crop})." for crop in crops)
    found = next(
        (known for known in _subclasses(pl.LightningDataModule) if known.__name__ == class_name),
        None,
    )
    if found is None:
        if intensity_given:
            return ()
        return (
            f"{class_name} is no data class of this package: hooks of its own are not recorded.",
        )
    sentences = []
    region: Any = getattr(found, "configure_region", None)
    if region is not None:
        try:
            box = region(SimpleNamespace(**options))
            if box is not None and not isinstance(box, AroundLabel):  # which needs a label map
                sentences.append(f"Cropped beforehand by {class_name}, to {box}.")
        except Exception:  # it may ask for anything that an instance has
            sentences.append(f"Cropped beforehand by {class_name}.configure_region.")
    intensity: Any = getattr(found, "configure_intensity", None)
    if (
        not intensity_given
        and intensity
        and not intensity.__module__.startswith(datamodules.__name__)
    ):
        sentences.append(f"Intensities by {class_name}.configure_intensity.")
    return tuple(sentences)


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    below: list[type[Any]] = base.__subclasses__()
    for known in below:
        yield known
        yield from _subclasses(known)


def _without_paths(value: Any) -> Any:
    """The value without entries that hold paths; None if it is one."""
    if isinstance(value, str):
        return None if _PATH.search(value) or _PATH_LIKE.fullmatch(value) else value
    if isinstance(value, Mapping):
        kept = {
            name: _without_paths(entry)
            for name, entry in value.items()
            if not _NAMES_PATH.fullmatch(str(name))
        }
        return {name: entry for name, entry in kept.items() if entry is not None}
    if isinstance(value, list | tuple):
        kept_items = [_without_paths(entry) for entry in value]
        return None if None in kept_items else kept_items
    return value


def _read_card(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The card as it is passed on, and all options of the data."""
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
    others: dict[str, Any] = {
        name: value if name == "wandb" else _without_paths({name: value}).get(name)
        for name, value in card.items()
        if name not in _OWN
    }
    known: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
    if "trained_with" not in known and card.get("versions"):
        known["trained_with"] = {
            name: card[name] for name in ("versions", "date") if card.get(name)
        }
    return {"backbone": card["backbone"], "task": task, "data": data, **known}, card["data"]


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
        "wandb": content.get("wandb"),
        "versions": (content.get("record") or {}).get("versions"),
    }


def _build_network(kind: Kind, card: Mapping[str, Any]) -> nn.Module:
    task, architecture = card["task"], card["backbone"]
    name, in_channels = architecture["name"], architecture["in_channels"]
    if kind == "backbone":
        return build_backbone(name, in_channels=in_channels, **architecture["options"])
    options: dict[str, Any] = {
        "class_names": task["class_names"],
        "backbone": name,
        "backbone_options": architecture["options"],
        "in_channels": in_channels,
    }
    if kind == "segmentation":
        return Segmentation(mode="scratch", **options)
    mode = "linear" if task.get("mode") == "linear" else "scratch"
    return Classification(mode=mode, multi_label=task.get("multi_label", False), **options)


def _require_all(report: WeightReport) -> None:
    if report.missing or report.unexpected or report.mismatched or report.adapted:
        raise InputError(f"{report}: not what its own card says, save it again.")
