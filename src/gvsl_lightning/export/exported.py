"""A trained network: read from a file, made recordable, compared with its export."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.datamodules.volume_data import check_size
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.export.card import describe_hooks, read_card
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.files import write_whole
from gvsl_lightning.tasks import Classification, Segmentation
from gvsl_lightning.tasks.pretraining import pool
from gvsl_lightning.transforms.intensity import Modality
from gvsl_lightning.weights import load_backbone_weights, local_file, read_head

Kind = Literal["backbone", "segmentation", "classification"]


@dataclass(frozen=True)
class Model:
    """A backbone, or a fine-tuned network, and its card.

    Attributes:
        kind: backbone, or the task of the network.
        network: a `Backbone`, `Segmentation` or `Classification`, on the CPU, in eval mode,
            without gradients.
        card: see :func:`gvsl_lightning.export.card.read_card`.
        size: (D, H, W) in voxels of the volumes or windows of the training.
        preparation: of the volumes; see :attr:`has_intensities`.
        hooks: see :func:`gvsl_lightning.export.card.describe_hooks`.
        local_only: whether a backbone returns the local features alone.
    """

    kind: Kind
    network: nn.Module
    card: Mapping[str, Any]
    size: tuple[int, int, int]
    preparation: Preparation
    hooks: tuple[str, ...] = ()
    local_only: bool = False

    @property
    def backbone(self) -> Backbone:
        """The network itself, or the part below its head."""
        backbone = self.network if self.kind == "backbone" else self.network.backbone
        return cast(Backbone, backbone)

    @property
    def head(self) -> nn.Module | None:
        """The head of a fine-tuned network."""
        return None if self.kind == "backbone" else cast(nn.Module, self.network.head)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        if self.kind != "backbone":
            return ("logits",)
        return ("local_features",) if self.local_only else ("global_features", "local_features")

    @property
    def class_names(self) -> list[str]:
        """Name of every class; empty for a backbone."""
        return [] if self.kind == "backbone" else list(map(str, self.card["task"]["class_names"]))

    @property
    def multi_label(self) -> bool:
        """Whether any number of classes applies to a volume, in classification."""
        return bool(self.card["task"].get("multi_label"))

    @property
    def has_intensities(self) -> bool:
        """Whether the card says how intensities are prepared."""
        data = self.card["data"]
        return data.get("modality") is not None or data.get("transforms") is not None

    @property
    def is_fixed(self) -> bool:
        """Whether an export takes volumes of one size alone."""
        return self.backbone.name == "swin_unetr"  # numbers of windows become constants

    def compute(self, volume: Tensor) -> tuple[Tensor, ...]:
        """Compute :attr:`outputs` of volumes (N, channels, D, H, W)."""
        return as_tuple(self.network(volume))[-len(self.outputs) :]


def load_model(
    weights: str | Path,
    size: Sequence[int] | None = None,
    modality: Modality | None = None,
    window: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
) -> Model:
    """Read a network and its card.

    Args:
        weights: a ``.ckpt`` of this package, of pre-training or fine-tuning, or a ``.safetensors``
            with its card next to it, see :func:`gvsl_lightning.weights.load_backbone_weights`.
        size: (D, H, W) in voxels; replaces that of the card, as the options below.
        modality: intensity preset; replaces transforms, too.
        window: lower and upper limit of the preset ``ct`` in HU.
        spacing: voxel size in mm.

    Raises:
        InputError: if the file is missing, damaged or incomplete, has no or a wrong card, or an
            option is wrong.
    """
    given: dict[str, Any] = {"modality": modality, "window": window, "spacing": spacing}
    given = {name: value for name, value in given.items() if value is not None}
    Preparation(**given)  # refuses wrong options
    if size is not None:
        check_size("size", size)
    path = local_file(weights)
    head = read_head(path, "head")
    card = read_card(path)
    task, data = card["task"], card["data"]
    if modality is not None:
        data.pop("transforms", None)
    data.update(given)
    try:
        _require_numbers({**task, **data})
        sizes = (size, task.get("window_size"), data.get("patch_size"), data.get("size"), _SIZE)
        d, h, w = next(found for found in sizes if found is not None)
        check_size("size", (d, h, w))
        check_range("overlap", task.get("overlap") or 0, 0, below=1)
        preparation = Preparation(
            **{name: data[name] for name in _PREPARATION if data.get(name) is not None}
        )
        if not all("class_path" in spec for spec in preparation.transforms or ()):
            raise InputError.about("transforms", "has an entry without class_path; correct it.")
    except (TypeError, ValueError) as error:
        raise InputError(f"The card of {path} is wrong: {error}") from error
    kind, network = _load_network(path, card, head)
    hooks = describe_hooks(data, modality is not None)
    return Model(kind, network, card, (d, h, w), preparation, hooks)


class Recordable(nn.Module):
    """A model for ``torch.jit.trace`` and ``torch.export``, with its padding inside.

    All sizes are computed from the volume's without a branch, so that the record holds for every
    size. The model is not copied.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head
        self.kind = model.kind
        self.local_only = model.local_only

    def forward(self, volume: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(N, channels, D, H, W) to the outputs, see :attr:`Model.outputs`."""
        sizes = [volume.shape[axis] for axis in (2, 3, 4)]
        divisor = self.backbone.divisor
        # in this form torch.export sees that the padded size is a multiple of the divisor
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
    """A volume to record the network with."""
    divisor = model.backbone.divisor
    # padded to different sizes, as equal ones would be taken for a rule
    sizes = (2 * divisor + 1, 4 * divisor, 4 * divisor + 3)
    number, sizes = (1, model.size) if model.is_fixed else (2, sizes)
    return torch.rand(number, model.backbone.in_channels, *sizes)


def largest_difference(
    model: Model,
    run: Callable[[Tensor], Sequence[Tensor]],
    tolerance: float = 1e-4,
    pads: bool = True,
) -> float:
    """Compare an export with its model on random volumes, with and without padding.

    Args:
        model: the model.
        run: the export: from volumes to the outputs.
        tolerance: largest allowed difference of values in [-1, 1]; for larger values, relative to
            the largest value.
        pads: whether the export takes volumes that need padding.

    Returns:
        The largest difference, measured likewise.

    Raises:
        InputError: if it is above the tolerance, or the shapes differ.
    """
    divisor = model.backbone.divisor
    shapes = [(2, *[2 * divisor] * 3), (1, divisor + 3, 2 * divisor, divisor + 1)]
    if model.is_fixed:
        shapes = [(1, *model.size)]
    elif not pads:
        del shapes[1]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for number, *size in shapes:
        volume = torch.rand(number, model.backbone.in_channels, *size, generator=generator)
        outputs = zip(model.outputs, model.compute(volume), run(volume), strict=True)
        for name, wanted, found in outputs:
            difference = math.inf
            if found.shape == wanted.shape:
                difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
            if not difference <= tolerance:
                raise InputError(
                    f"The {name} of the exported {model.backbone.name} differ from its own by "
                    f"{difference:.1e} for a volume of {'x'.join(map(str, size))}, more than "
                    f"{tolerance:.0e}, and nothing was written: choose another format, or another "
                    "version of the packages."
                )
            worst = max(worst, difference)
    return worst


def write_torchscript(model: Model, path: Path) -> float:
    """Write a program for ``torch.jit.load``; see :func:`largest_difference`.

    Raises:
        InputError: if the program is tied to this device, or computes something else.
    """
    recorded: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        Recordable(model), example_volume(model), check_trace=False
    )
    if 'prim::Constant[value="cpu"]' in str(recorded.inlined_graph):
        raise InputError(
            f"TorchScript of {model.backbone.name} would run on no other device than this CPU: "
            "choose pt2 or onnx."
        )
    write_saved(path, lambda file: torch.jit.save(recorded, file))
    network: Any = torch.jit.load(path)  # type: ignore[no-untyped-call]
    return largest_difference(model, lambda volume: as_tuple(network(volume)))


def write_saved(path: Path, save: Callable[[IO[bytes]], Any]) -> None:
    """Write a file of PyTorch by way of memory.

    On a full disk, PyTorch's own writers end the process (TorchScript), or name neither the file
    nor the reason.
    """
    content = io.BytesIO()
    save(content)
    write_whole(path, lambda file: file.write(content.getbuffer()))


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a network that returns one tensor or several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


_SIZE = (96, 96, 96)
_PREPARATION = ("modality", "window", "transforms", "spacing", "crop_foreground")
_SHAPES = {
    "window": (2,),
    "crop_foreground": (),
    "overlap": (),
    **dict.fromkeys(("spacing", "window_size", "patch_size", "size"), (3,)),
}


def _require_numbers(options: Mapping[str, Any]) -> None:
    """Refuse options of a card that must be numbers and are not: a bundle could run a text."""
    for name, shape in _SHAPES.items():
        if options.get(name) is not None:
            numbers = np.asarray(options[name])
            if numbers.dtype.kind not in "if" or numbers.shape != shape:
                raise InputError.about(name, f"is {options[name]!r}; correct it.")


def _load_network(
    path: Path, card: Mapping[str, Any], head: Mapping[str, Tensor]
) -> tuple[Kind, nn.Module]:
    kind: Kind = "backbone"
    if head and "class_names" in card["task"]:
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
    if report.missing or report.unexpected or report.mismatched or report.adapted:
        raise InputError(f"{report}: the card describes another network, save it again.")
    return kind, network.eval().requires_grad_(False)


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
