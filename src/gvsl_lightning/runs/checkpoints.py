"""Checkpoints that survive what ends a run: written as a whole, compared with their checksums."""

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
    """Lightning's, for files that can be relied on; they are read as any others.

    - A file is written beside its place and put there at once: what ends the process, or a full
      disk, leaves the one that was there. Lightning's is written in the system's folder for
      temporary files, which may be another disk, from which it is copied.
    - Weights and states of optimisers that are not finite are refused.
    - A file is compared with the checksums (CRC-32) that PyTorch writes into it and does not read,
      see :func:`check_checkpoint`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            InputError: it holds weights that are not finite, or cannot be written.
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
            # PyTorch's writer gives its own error in place of the system's, which is its context
            found: BaseException | None = error
            while found is not None and not isinstance(found, OSError):
                found = found.__context__
            if found is None and "PytorchStreamWriter" not in str(error):
                raise
            cause = "the disk may be full" if found is None else found.strerror
            left = f"{newest_whole(path.parent) or 'no other checkpoint'} is left as it was"
            raise InputError(
                f"{path} cannot be written ({cause}); {left}: make room and go on from it."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            InputError: it is damaged.
        """
        if "://" not in str(path):
            check_checkpoint(Path(path))
        content: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return content


def check_checkpoint(path: Path) -> None:
    """Compare a file of PyTorch with the checksums in it.

    Args:
        path: the file; one that does not exist, or in PyTorch's format before 1.6, which has none,
            passes.

    Raises:
        InputError: it is cut off, or changed since it was written.
    """
    if reason := damage(path):
        kept = newest_whole(path.parent)
        raise InputError(
            f"{path} is damaged ({reason}); give "
            f"{f'{kept}, which is whole' if kept else 'another one, or copy it again'}."
        )


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint of a folder that was written last, of those that are not damaged."""
    found = [path for path in folder.glob("*.ckpt") if path.is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in found if not damage(path)), None)


def damage(path: Path) -> str | None:
    """What is wrong with a file of PyTorch, by its checksums; see :func:`check_checkpoint`."""
    if not path.is_file():
        return None
    now = path.stat()
    return _damage(path.absolute(), now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=8)
def _damage(path: Path, changed: int, size: int) -> str | None:
    """Of a file as it was at a time: several steps of one command look at the same checkpoint."""
    with open(path, "rb") as file:
        beginning = file.read(len(_ZIP))
    if beginning != _ZIP:
        return None if beginning else "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(one.compress_type for one in archive.infolist()):  # not one of PyTorch's
                return None
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError):
        return "it is cut off"
    return f"{wrong} does not match its checksum" if wrong else None


_ZIP = b"PK\x03\x04"


def _not_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """What is not finite, in words."""
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
