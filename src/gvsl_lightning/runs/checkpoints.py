"""Checkpoints that are written completely or not at all, and checked with their checksums."""

import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import write_whole


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes and reads Lightning's checkpoint files safely.

    - A file is written to its own folder and renamed. If the process ends or the disk is full, the
      earlier file stays. Lightning writes to the system's temporary folder and copies from there,
      perhaps between disks.
    - Weights and optimiser states that are not finite are refused.
    - Before a file is read, its checksums are checked; see :func:`check_checkpoint`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            InputError: if it holds weights that are not finite, or cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        if name := _not_finite(checkpoint):
            kept = newest_whole(path.parent)
            raise InputError(
                f"{name} is not finite after step {checkpoint.get('global_step')}, so that {path} "
                f"is not written; go on from {kept or 'the beginning'} with a lower learning_rate, "
                "with gradient_clip_val or in another precision."
            )
        try:
            write_whole(path, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            # PyTorch's writer raises an error of its own; the system's error is its context
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None and "PytorchStreamWriter" not in str(error):
                raise
            reason = "the disk may be full" if cause is None else cause.strerror
            other = newest_whole(path.parent) or "no other checkpoint"
            raise InputError(
                f"{path} cannot be written ({reason}); {other} is left as it was: make room and go "
                "on from it."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            InputError: if it is damaged.
        """
        if "://" not in str(path):
            check_checkpoint(Path(path))
        content: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return content


def check_checkpoint(path: Path) -> None:
    """Check a file of PyTorch with the checksums (CRC-32) in it, which PyTorch does not read.

    A file that does not exist passes, and so does one in PyTorch's format before 1.6, which has no
    checksums.

    Raises:
        InputError: if the file is cut off, or was changed after it was written.
    """
    if reason := find_damage(path):
        kept = newest_whole(path.parent)
        raise InputError(
            f"{path} is damaged ({reason}); give "
            f"{f'{kept}, which is whole' if kept else 'another one, or copy it again'}."
        )


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is not damaged."""
    found = [path for path in folder.glob("*.ckpt") if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in found if not find_damage(path)), None)


def find_damage(path: Path) -> str | None:
    """Damage of a file of PyTorch in a few words; None if :func:`check_checkpoint` passes it."""
    if not path.is_file():
        return None
    now = path.stat()
    return _find_damage(path.absolute(), now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=8)
def _find_damage(path: Path, changed: int, size: int) -> str | None:
    # cached until the file changes: one command checks the same checkpoint several times
    with open(path, "rb") as file:
        beginning = file.read(len(_ZIP))
    if beginning != _ZIP:
        return None if beginning else "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):  # not PyTorch's
                return None
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError):
        return "it is cut off"
    return f"{wrong} does not match its checksum" if wrong else None


_ZIP = b"PK\x03\x04"


def _not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """Description of the first weight or optimiser state that is not finite."""
    if name := first_non_finite(checkpoint.get("state_dict", {})):
        return f"The weight {name}"
    for optimizer in checkpoint.get("optimizer_states", ()):
        for state in optimizer["state"].values():
            if name := first_non_finite(state):
                return f"{name}, a state of the optimiser,"
    return None


def first_non_finite(entries: Mapping[Any, Any]) -> Any:
    """Name of the first tensor that holds NaN or infinity; None if none does."""
    return next(
        (
            name
            for name, value in entries.items()
            if isinstance(value, Tensor) and not torch.isfinite(value).all()
        ),
        None,
    )
