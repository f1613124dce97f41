"""``python -m gvsl_lightning export``: write a network for other programs.

Every export is read back and compared with the PyTorch network on random volumes.
"""

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gvsl_lightning.cli.diagnosis import call
from gvsl_lightning.errors import InputError
from gvsl_lightning.export.bundle import BUNDLE_FILES, write_bundle
from gvsl_lightning.export.exported import (
    Model,
    Recordable,
    as_tuple,
    example_volume,
    largest_difference,
    load_model,
    write_saved,
    write_torchscript,
)
from gvsl_lightning.export.model_card import write_model_card
from gvsl_lightning.export.nnunet import write_nnunet
from gvsl_lightning.runs.files import unwritable
from gvsl_lightning.transforms.intensity import Modality
from gvsl_lightning.weights import local_file, save_backbone

Format = Literal["safetensors", "huggingface", "torchscript", "pt2", "onnx", "bundle", "nnunet"]


def main(args: Sequence[str]) -> None:
    """Run the command: ``args`` are the words after ``export``, see :func:`export_model`."""
    call(export_model, "python -m gvsl_lightning export", args)


def export_model(
    weights: str,
    format: Format,
    out: str,
    size: tuple[int, int, int] | None = None,
    modality: Modality | None = None,
    window: tuple[float, float] | None = None,
    spacing: tuple[float, float, float] | None = None,
    push_to_hub: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a backbone or a fine-tuned network in a format that other programs read.

    A model card in Markdown is written, too. If anything fails, nothing is written.

    Args:
        weights: a checkpoint of this package, of pre-training or fine-tuning, or a
            backbone.safetensors with its backbone.json; or a Hugging Face repository.
        format: safetensors, huggingface (a folder for the Hub), torchscript, pt2 (torch.export),
            onnx, bundle (MONAI), or nnunet (weights for nnU-Net v2).
        out: the file, whose suffix is that of the format (.safetensors, .ts, .pt2, .onnx, .pth), or
            for huggingface and bundle the folder.
        size: voxels of the windows of a bundle, and of the volumes of an exported swin_unetr,
            which has one size; by default those of the training.
        modality: intensity preset ct, mri or none, if the weights do not name it; replaces the
            transforms that they name.
        window: lower and upper limit of the preset ct in HU, if the weights do not name it.
        spacing: voxel size in mm, if the weights do not name it.
        push_to_hub: Hugging Face repository (owner/name) to upload the folder of huggingface to;
            if it does not exist, it is created as a private one.
        overwrite: replace an earlier export.

    Raises:
        InputError: a file or an option is wrong, or the network cannot be exported to this format.
    """
    kind = FORMATS[format]
    path = Path(os.path.abspath(out))
    if path.suffix != kind.suffix and kind.suffix:
        raise InputError(f"--out is {out}; a file of {format} ends in {kind.suffix}.")
    if push_to_hub is not None and format != "huggingface":
        raise InputError(f"push_to_hub needs the format huggingface, and the format is {format}.")
    hub = None if push_to_hub is None else _connect()
    source = local_file(weights)
    _refuse_existing(path, overwrite, kind, source)
    model = load_model(source, size, modality, window, spacing)
    try:
        difference = _write(model, format, path, overwrite, source)
    except OSError as error:
        raise InputError(
            unwritable(error, path)
            or f"{path} cannot be written ({error.strerror or error}): give another --out."
        ) from error
    if push_to_hub is not None:
        _upload(hub, push_to_hub, path)
    print(f"{path}: {model.kind} as {format}, differs from PyTorch by {difference:.1e} at most")


def write_safetensors(model: Model, path: Path) -> float:
    """Write the weights and their card, as :func:`gvsl_lightning.weights.save_backbone` does."""
    card = {name: value for name, value in model.card.items() if name != "backbone"}
    save_backbone(model.backbone, path, card, model.head)
    return largest_difference(model, load_model(path).compute)


def write_huggingface(model: Model, path: Path) -> float:
    """Write a folder for :func:`gvsl_lightning.weights.load_backbone`, here or on the Hub."""
    return write_safetensors(model, path / "backbone.safetensors")


def write_pt2(model: Model, path: Path) -> float:
    """Write a program for ``torch.export.load``."""
    program = _record(model, Recordable(model))
    write_saved(path, lambda file: torch.export.save(program, file))
    network = torch.export.load(path).module()
    return largest_difference(model, lambda volume: as_tuple(network(volume)))


def write_onnx(model: Model, path: Path) -> float:
    """Write a file for ONNX Runtime; its input is ``volume``."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise InputError(
            f'The package {error.name} is missing: pip install "gvsl-lightning[onnx]".'
        ) from error
    program = torch.onnx.export(
        _record(model, _with_precise_norms(Recordable(model))),
        dynamo=True,
        input_names=["volume"],
        output_names=list(model.outputs),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(volume: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(None, {"volume": volume.numpy()})]

    return largest_difference(model, run)


@dataclass(frozen=True)
class _Kind:
    """A format.

    Attributes:
        write: writes a model to a path and returns the largest difference after reading back, see
            :func:`gvsl_lightning.export.exported.largest_difference`.
        suffix: of the file; empty if the export is a folder.
        card: place of the model card in a folder.
        others: the other files of a folder; a folder with further files is no earlier export.
    """

    write: Callable[[Model, Path], float]
    suffix: str = ""
    card: str = ""
    others: tuple[str, ...] = ()


FORMATS: dict[Format, _Kind] = {
    "safetensors": _Kind(write_safetensors, ".safetensors"),
    "huggingface": _Kind(
        write_huggingface, "", "README.md", ("backbone.json", "backbone.safetensors")
    ),
    "torchscript": _Kind(write_torchscript, ".ts"),
    "pt2": _Kind(write_pt2, ".pt2"),
    "onnx": _Kind(write_onnx, ".onnx"),
    "bundle": _Kind(write_bundle, "", "docs/README.md", BUNDLE_FILES),
    "nnunet": _Kind(write_nnunet, ".pth"),
}
"""Writers by name. A new format is one entry here and one name in :data:`Format`."""


class _Norm(nn.Module):
    """Group or instance norm that takes means axis by axis.

    ONNX Runtime adds voxels one after the other: for the equal voxels of a padded volume, its
    rounding error is 100 times that of PyTorch.
    """

    def __init__(self, norm: nn.GroupNorm | nn.InstanceNorm3d) -> None:
        super().__init__()
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
        self.eps = norm.eps
        self.weight: Tensor | None = norm.weight
        self.bias: Tensor | None = norm.bias

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])
        centred = grouped - self._mean(grouped)
        variance = self._mean(centred.square())
        normed = (centred / (variance + self.eps).sqrt()).reshape(x.shape)
        if self.weight is None or self.bias is None:
            return normed
        return normed * self.weight[:, None, None, None] + self.bias[:, None, None, None]

    def _mean(self, x: Tensor) -> Tensor:
        for axis in (5, 4, 3, 2):
            x = x.mean(dim=axis, keepdim=True)
        return x


def _with_precise_norms(module: nn.Module) -> nn.Module:
    """The network with other norms, sharing its parameters."""
    if isinstance(module, nn.GroupNorm):
        return _Norm(module)
    if isinstance(module, nn.InstanceNorm3d):
        return module if module.track_running_stats else _Norm(module)
    copied = copy.copy(module)
    copied._modules = {
        name: None if child is None else _with_precise_norms(child)
        for name, child in module._modules.items()
    }
    return copied


def _write(model: Model, format: Format, path: Path, overwrite: bool, source: Path) -> float:
    """Write the export and its card in a temporary folder, and move both to their place."""
    kind = FORMATS[format]
    existing = next(folder for folder in path.parents if folder.exists())
    with TemporaryDirectory(prefix=f".{path.name}.", dir=existing) as folder:
        stage = Path(folder)
        difference = _convert(model, format, stage / path.name)
        card = Path(path.name, kind.card) if kind.card else Path(f"{path.name}.md")
        write_model_card(model, format, path.name, difference, stage / card)
        moves = {part: path.parent / part.name for part in sorted(stage.iterdir())}
        for target in moves.values():
            _refuse_existing(target, overwrite, kind, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        for part, target in moves.items():
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
    return difference


def _convert(model: Model, format: Format, path: Path) -> float:
    try:
        with _quiet(), torch.no_grad():
            return FORMATS[format].write(model, path)
    except (InputError, OSError):
        raise
    except Exception as error:  # exporters fail in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{model.backbone.name} could not be exported to {format} ({reason}): choose another "
            f"format, or another PyTorch than {torch.__version__}; exports are tested with 2.13."
        ) from error


def _record(model: Model, network: nn.Module) -> torch.export.ExportedProgram:
    # private, but the only way to volumes and batches of 1, which count as a case of their own
    from torch.fx.experimental import _config as config

    dynamic = dict.fromkeys((0, 2, 3, 4), torch.export.Dim.DYNAMIC)
    shapes = ({} if model.is_fixed else dynamic,)
    with config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            network, (example_volume(model),), dynamic_shapes=shapes, strict=False
        )


def _refuse_existing(path: Path, overwrite: bool, kind: _Kind, source: Path) -> None:
    """Refuse a path with anything but an earlier export, and that one without ``overwrite``."""
    if not os.path.lexists(path):
        return
    for file in (source, source.with_suffix(".json")):
        if file.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} is or holds the file of --weights: give another --out.")
    if not _is_export(path, kind):
        raise InputError(
            f"{path} is nothing that such an export wrote, or holds more: give another --out."
        )
    if not overwrite:
        raise InputError(f"{path} exists: give another --out, or --overwrite true.")


def _is_export(path: Path, kind: _Kind) -> bool:
    if not kind.card:
        return not path.is_dir()
    if path.is_symlink() or not path.is_dir():
        return False
    found = {
        part.relative_to(path).as_posix()
        for part in path.rglob("*")
        if part.is_symlink() or not part.is_dir()
    }
    return found - {".gitattributes"} == {kind.card, *kind.others}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of exporters; the comparison checks the result."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _connect() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise InputError(
            'push_to_hub needs the package huggingface_hub: pip install "gvsl-lightning[hub]".'
        ) from error
    return HfApi()


def _upload(hub: Any, repository: str, folder: Path) -> None:
    # the type of a network error depends on the HTTP library of the installed version
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise InputError(
            f"{folder} is written, but could not be uploaded to {repository} "
            f"({type(error).__name__}): check the name, hf auth login and the network."
        ) from error
