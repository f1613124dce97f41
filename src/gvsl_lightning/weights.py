"""Pre-trained backbones on disk: save, rebuild, and load into another run.

A saved backbone is two files: ``backbone.safetensors`` (the weights) and ``backbone.json`` (the
card: architecture, and how it was trained). No file is opened in a way that could run code in it.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.checkpoints import find_damage, first_non_finite
from gvsl_lightning.runs.files import write_text, write_whole
from gvsl_lightning.runs.record import ARTIFACT, package_versions

MINIMUM_MATCH = 0.9
"""Share of a backbone's entries that a checkpoint must fill to be accepted."""

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Suffixes of files of weights. A name with another suffix may be a repository."""

_Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class WeightReport:
    """Which entries of a checkpoint were loaded; ``print(report)`` gives one line.

    Attributes:
        source: the file the weights came from.
        part: the part that all entries are of, such as ``backbone`` or its ``encoder``.
        matched: entries of the backbone that were loaded.
        missing: entries of the backbone that the file lacks.
        unexpected: entries of the file's backbone that this backbone lacks, without heads.
        mismatched: entries of unequal shape, with the shapes in the file and in the backbone.
        adapted: entries of ``matched`` that were adapted to the number of input channels, with the
            shapes in the file and in the backbone.
    """

    source: Path
    part: str = "backbone"
    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, _Shapes] = field(default_factory=dict)
    adapted: Mapping[str, _Shapes] = field(default_factory=dict)

    @property
    def matched_fraction(self) -> float:
        """Share of the backbone's entries that were loaded, in [0, 1]."""
        return len(self.matched) / max(self._total, 1)

    @property
    def is_exact(self) -> bool:
        """Whether file and backbone have the same entries, in the same shapes."""
        return not (self.missing or self.unexpected or self.mismatched or self.adapted)

    @property
    def _total(self) -> int:
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.matched)} of {self._total} {self.part} entries loaded"]
        adapted = [f"{name} from {a[1]} to {b[1]}" for name, (a, b) in self.adapted.items()]
        shapes = [
            f"{name} is {_shape(in_file)}, not {_shape(in_backbone)}"
            for name, (in_file, in_backbone) in self.mismatched.items()
        ]
        for title, names in (
            ("adapted to the number of input channels", adapted),
            ("missing", self.missing),
            ("of another shape", shapes),
            ("unexpected", self.unexpected),
        ):
            if names:
                rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
                parts.append(f"{len(names)} {title} ({', '.join(names[:2])}{rest})")
        return "; ".join(parts)


def save_backbone(
    backbone: Backbone, path: str | Path, card: Mapping[str, Any], head: nn.Module | None = None
) -> Path:
    """Write a backbone's weights and, next to them, the card that rebuilds it.

    Args:
        backbone: any backbone of :func:`gvsl_lightning.nn.backbones.build_backbone`, on any device.
        path: the ``.safetensors`` file to write; its folder is made. The card gets the same name
            with ``.json``.
        card: facts about the training, e.g. ``data``, ``steps``, ``epochs``, ``seed``; values that
            JSON cannot hold are written as text. The architecture, package versions and date are
            added.
        head: a module to save with the backbone, for :func:`read_head` with the name ``head``.

    Returns:
        ``path``.

    Raises:
        InputError: if ``path`` does not end in ``.safetensors``, or a weight is not finite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name for a backbone: let it end in .safetensors.")
    whole = backbone if head is None else nn.ModuleDict({"backbone": backbone, "head": head})
    # clones: a file of safetensors holds no entry twice, and some networks share theirs
    tensors = {name: value.cpu().clone().contiguous() for name, value in whole.state_dict().items()}
    if wrong := first_non_finite(tensors):
        raise InputError(
            f"{wrong} of the backbone is not finite, so that {path} is not written; train again "
            "with a lower learning_rate, or take a checkpoint from before."
        )
    content = save(tensors)
    write_whole(path, lambda file: file.write(content))
    full_card = {
        **card,
        "backbone": {
            "name": backbone.name,
            "in_channels": backbone.in_channels,
            "options": backbone.options,
        },
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "versions": package_versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text(path.with_suffix(".json"), json.dumps(full_card, indent=2, default=str) + "\n")
    return path


def load_backbone(path: str | Path) -> Backbone:
    """Rebuild a backbone that :func:`save_backbone` wrote.

    Args:
        path: the ``.safetensors`` file, its ``.json`` card next to it, a folder with a
            ``backbone.safetensors``, or a Hugging Face repository, see
            :func:`load_backbone_weights`.

    Returns:
        The backbone on the CPU, every entry as saved.

    Raises:
        InputError: if a file is missing or corrupted, or the card does not describe the weights.
    """
    path = local_file(path)
    card_path = path.with_suffix(".json")
    try:
        architecture = json.loads(card_path.read_text(encoding="utf-8"))["backbone"]
        backbone = build_backbone(
            architecture["name"], in_channels=architecture["in_channels"], **architecture["options"]
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{card_path} does not exist: put the card that was saved with the weights next to "
            "them, or build the backbone yourself and use load_backbone_weights."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{card_path} does not describe a backbone ({error}): export the backbone again."
        ) from error
    report = load_backbone_weights(backbone, path)
    if not report.is_exact:
        raise InputError(f"{report}: {card_path.name} describes another backbone, export it again.")
    return backbone


def load_backbone_weights(
    backbone: Backbone, path: str | Path, encoder_only: bool = False
) -> WeightReport:
    """Fill a backbone with the weights of a checkpoint.

    Reads a checkpoint of this package (``.ckpt``), an exported backbone (``.safetensors``), and,
    into the ``unet`` backbone, the checkpoints of the released GVSL code (``.pth``,
    https://github.com/YutingHe-list/GVSL): of pre-training and of the fine-tuned segmenter. Names
    may carry the prefixes of wrappers (``module.``). The ``swin_unetr`` backbone takes MONAI's
    weights: those of a whole network with ``norm_name: instance``, those of its pre-trained
    transformer with ``encoder_only``. Entries are converted to the backbone's dtype
    and device. Heads in the file are left out, see :func:`read_head`.

    A file of another number of input channels is adapted: from 1 to C channels each gets 1/C of the
    weights, from C to 1 their sum. A volume repeated over the channels gives the same features.

    Args:
        backbone: filled in place; untouched when the file is refused.
        path: the checkpoint, a Hugging Face repository (``owner/name`` or ``hf:owner/name``, extra
            ``hub``), or a W&B artifact (``wandb:ENTITY/PROJECT/NAME:ALIAS``).
        encoder_only: leave the decoder as it is; report and limit are about the encoder alone.

    Returns:
        The entries that were loaded, and those that were not.

    Raises:
        InputError: if the file is missing, corrupted or holds pickled code (which is not run), if
            the repository or artifact cannot be downloaded, if an entry is not finite, or if fewer
            than 90 % of the backbone's entries are in the file in the right shape.
    """
    path = local_file(path)
    own = backbone.state_dict()
    found = _backbone_entries(_read_tensors(path), set(own))
    if encoder_only:
        decoder = tuple(f"{part}." for part in backbone.decoder_parts)
        own = {name: value for name, value in own.items() if not name.startswith(decoder)}
        found = {name: value for name, value in found.items() if not name.startswith(decoder)}
    report = _compare(path, "encoder" if encoder_only else "backbone", own, found)
    if adapted := _of_other_input_channels(report.mismatched, backbone.in_channels):
        for name in adapted:
            found[name] = _spread_over_channels(found[name], backbone.in_channels)
        report = replace(_compare(path, report.part, own, found), adapted=adapted)
    if report.matched_fraction < MINIMUM_MATCH:
        raise InputError(
            f"{report}: too little for the {backbone.name} backbone, give the checkpoint's own "
            "architecture and options or another checkpoint."
        )
    backbone.load_state_dict({name: found[name] for name in report.matched}, strict=False)
    return report


def read_architecture(path: Path) -> dict[str, Any]:
    """Read ``name``, ``in_channels`` and ``options`` of the backbone in a file of weights.

    The file is a ``.safetensors`` with its card or a ``.ckpt`` of this package. Another one gives
    {}.
    """
    try:
        if path.suffix == ".safetensors":
            card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["backbone"]
            return {key: card[key] for key in ("name", "in_channels", "options")}
        task = read_checkpoint(path, mmap=True)["hyper_parameters"]
        return {
            "name": task["backbone"],
            "in_channels": task["in_channels"],
            "options": task["backbone_options"] or {},
        }
    except Exception:  # another program's file, or a damaged one, which loading names
        return {}


def read_head(path: str | Path, name: str = "out_conv") -> dict[str, Tensor]:
    """Read a head from a checkpoint of backbone and head.

    The default is the output convolution of the released fine-tuned segmenter, 3x3x3 on the local
    features: ``weight`` (classes, 32, 3, 3, 3) and ``bias`` (classes,), the background first.

    Args:
        path: a checkpoint, as in :func:`load_backbone_weights`.
        name: of the module.

    Returns:
        Entries of the module's ``state_dict``, on the CPU; empty if the file has no such module.

    Raises:
        InputError: if the file cannot be read, as in :func:`load_backbone_weights`.
    """
    prefix = f"{name}."
    return {
        entry.removeprefix(prefix): value
        for entry, value in _read_tensors(local_file(path)).items()
        if entry.startswith(prefix)
    }


def local_file(path: str | Path) -> Path:
    """Find, or download, the file that a name of weights means; the card lies next to it.

    Args:
        path: a folder with a ``backbone.safetensors``, a Hugging Face repository or a W&B artifact,
            as in :func:`load_backbone_weights`; any other path is returned, even of no file.

    Raises:
        InputError: if it cannot be downloaded.
    """
    if str(path).startswith(ARTIFACT):
        return _download_artifact(str(path).removeprefix(ARTIFACT))
    path = Path(path)
    if (path / "backbone.safetensors").is_file():
        return path / "backbone.safetensors"
    repository = _REPOSITORY.fullmatch(path.as_posix())
    if repository is None or path.suffix in SUFFIXES or path.exists():
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InputError(
            f"{path} is no file, and to read it as a Hugging Face repository the package "
            'huggingface_hub is missing: pip install "gvsl-lightning[hub]" or give a path.'
        ) from error
    try:
        # any revision is safe: neither JSON nor safetensors can hold code
        for name in ("backbone.json", "backbone.safetensors"):
            file = hf_hub_download(repo_id=repository["id"], filename=name)  # nosec B615
        return Path(file)
    except Exception as error:  # of the HTTP library of the installed version
        raise InputError(
            f"{path} is no file, and backbone.safetensors and backbone.json could not be "
            f"downloaded from a Hugging Face repository of that name ({type(error).__name__}): "
            "check the name, your access and the network, or give the path of a checkpoint."
        ) from error


def read_checkpoint(path: Path, mmap: bool = False) -> Any:
    """Read a ``.safetensors`` file, or the tensors and plain values of a file of ``torch.save``.

    No code in the file is run. With ``mmap``, tensors are mapped: faster if few of them are used.

    Raises:
        InputError: if it is missing, corrupted, or holds pickled objects.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file: give the path of a checkpoint.")
    if reason := find_damage(path):
        raise InputError(
            f"{path} may be corrupted or incomplete, as {reason}: copy or download it again."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = mmap and is_zipfile(path)  # files of PyTorch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is corrupted, or holds pickled Python objects, which could run code and are "
            "not opened: save its state_dict alone."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise InputError(
            f"{path} cannot be read as a checkpoint and may be corrupted or incomplete "
            f"({type(error).__name__}): copy or download it again."
        ) from error


def require_entries(path: Path, module: nn.Module) -> None:
    """Check that a checkpoint has exactly the entries of a module.

    Raises:
        InputError: an entry is missing, unexpected, of another shape or not finite.
    """
    found = read_checkpoint(path, mmap=True)["state_dict"]
    report = _compare(path, "model", module.state_dict(), found)
    if not report.is_exact:
        raise InputError(
            f"{report}: give the backbone, options and class_names that it was trained with, or "
            "another checkpoint."
        )
    _require_finite(path, found)


_PREFIXES = ("", "backbone.", "unet.", "unet_pre.unet.")

_REPOSITORY = re.compile(r"(?:hf:)?(?P<id>\w[\w.-]*/\w[\w.-]*)")

_RELEASED_NAME = re.compile(
    r"(?:inc|down(?P<down>\d)\.maxpool_conv\.1|up(?P<up>\d)\.conv)"
    r"\.double_conv\.(?P<layer>[0134])\.(?P<kind>weight|bias)"
)

_RELEASED_LAYERS = {"0": "0.conv", "1": "0.norm", "3": "1.conv", "4": "1.norm"}


def _compare(
    path: Path, part: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> WeightReport:
    """Compare entries of a file with those of a module."""
    mismatched = {
        name: (tuple(found[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    }
    return WeightReport(
        source=path,
        part=part,
        matched=tuple(name for name in own if name in found and name not in mismatched),
        missing=tuple(name for name in own if name not in found),
        unexpected=tuple(name for name in found if name not in own),
        mismatched=mismatched,
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _download_artifact(reference: str) -> Path:
    """Download the checkpoint of a W&B artifact, a ``.safetensors`` rather than another file."""
    import wandb  # slow to import

    try:
        folder = Path(wandb.Api().artifact(reference).download())
    except Exception as error:  # W&B, its HTTP library and the disk have errors of their own
        raise InputError(
            f"{ARTIFACT}{reference} cannot be fetched from Weights & Biases "
            f"({type(error).__name__}): check the name ENTITY/PROJECT/NAME:ALIAS, `wandb login` "
            "and the network, or give the path of a checkpoint."
        ) from error
    for suffix in SUFFIXES:
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1:
            return found[0]
    raise InputError(
        f"{ARTIFACT}{reference} holds no checkpoint, or several: give the artifact of a backbone "
        "or of one checkpoint."
    )


def _require_finite(path: Path, entries: Mapping[str, Tensor]) -> None:
    if name := first_non_finite(entries):
        raise InputError(
            f"{path} holds NaN or infinite values in {name}, as training diverged or the file "
            "is damaged: give an earlier checkpoint."
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    content = read_checkpoint(path)
    entries = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {
        re.sub(r"^(module\.|_orig_mod\.)+", "", name): value
        for name, value in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    _require_finite(path, tensors)
    return tensors


def _backbone_entries(entries: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """Entries under the prefix that fits the backbone best, in the backbone's own names."""
    candidates = [
        {
            _own_name(name.removeprefix(prefix)): value
            for name, value in entries.items()
            if name.startswith(prefix)
        }
        for prefix in _PREFIXES
    ]
    return max(candidates, key=lambda candidate: len(own & candidate.keys()))


def _own_name(name: str) -> str:
    """Name of an entry of the released U-Net or of MONAI's Swin UNETR in ours, or the same name."""
    match = _RELEASED_NAME.fullmatch(name)
    if match is None:
        return _own_swin_name(name)
    stage = f"decoder.{int(match['up']) - 1}" if match["up"] else f"encoder.{match['down'] or 0}"
    return f"{stage}.{_RELEASED_LAYERS[match['layer']]}.{match['kind']}"


def _own_swin_name(name: str) -> str:
    """MONAI publishes whole networks, and transformers alone with other names of linear layers."""
    part, _, rest = name.partition(".")
    if part in _SWIN_PARTS:
        return f"{_SWIN_PARTS[part]}.{rest}"
    if part == "patch_embed" or re.fullmatch(r"layers\d", part):
        return "transformer." + re.sub(r"\.mlp\.fc(\d)\.", r".mlp.linear\1.", name)
    return name


_SWIN_PARTS = {
    "swinViT": "transformer",
    **{f"encoder{number}": f"skip_encoders.{number - 1}" for number in (1, 2, 3, 4)},
    "encoder10": "bottleneck",
    **{f"decoder{number}": f"decoder.{5 - number}" for number in (1, 2, 3, 4, 5)},
}
"""Part of MONAI's ``SwinUNETR`` -> part of our backbone."""


def _of_other_input_channels(
    unequal: Mapping[str, _Shapes], in_channels: int
) -> dict[str, _Shapes]:
    """Entries that differ only in the number of input channels."""
    adaptable = {
        name: shapes
        for name, shapes in unequal.items()
        if all(len(shape) == 5 for shape in shapes)
        and shapes[1] == (shapes[0][0], in_channels, *shapes[0][2:])
    }
    channels_of_the_file = {in_file[1] for in_file, _ in adaptable.values()}
    return adaptable if len(channels_of_the_file) == 1 else {}


def _spread_over_channels(weight: Tensor, channels: int) -> Tensor:
    """(O, C, D, H, W) for ``channels`` in place of C; the sum over them stays the same."""
    given = weight.shape[1]
    share = torch.zeros(channels, given)
    for i in range(max(channels, given)):
        share[i % channels, i % given] = 1
    return torch.einsum("cg,ogdhw->ocdhw", share / share.sum(0), weight.float())
