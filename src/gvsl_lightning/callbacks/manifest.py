"""Which input, model and preparation each result in a folder was made of."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from gvsl_lightning.data.fingerprint import content_hash
from gvsl_lightning.data.source import Source
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import append_whole


class Manifest:
    """Lines of ``manifest.jsonl`` in a folder of results: one for each result, the last one counts.

    Args:
        folder: of the results.
        model: gives the hash of the weights, see :func:`model_hash`; called at the first use, as
            Lightning loads a checkpoint after the callbacks are set up.
        settings: everything else that decides the results, as JSON values.
        overwrite: make results again that are there.
    """

    FILE = "manifest.jsonl"

    def __init__(
        self,
        folder: Path,
        model: Callable[[], str],
        settings: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self._path = folder / self.FILE
        self._model = model
        self._settings = json.loads(json.dumps(settings, default=str))
        self._overwrite = overwrite
        self._known = _read(self._path)
        self._hashes: dict[str, list[str]] = {}

    def is_done(self, name: str, inputs: Sequence[Source], results: Sequence[Path]) -> bool:
        """Whether the results of an item are there and would come out the same.

        Args:
            name: of the item.
            inputs: volumes that it is made of.
            results: its files.

        Raises:
            InputError: a result is there and was made of another input or by another model.
        """
        there = [path for path in results if path.exists()]
        if self._overwrite or not there:
            return False
        entry, known = self._entry(name, inputs), self._known.get(name, {})
        differing = [key for key in ("input", "model", "settings") if known.get(key) != entry[key]]
        if differing:
            raise InputError(
                f"{there[0]} is there and was made with another {differing[0]}; give another "
                "folder by --out, or add --overwrite=true."
            )
        return len(there) == len(results) and bool(known["written"])

    def begin(self, name: str, inputs: Sequence[Source]) -> None:
        """Note the origin of results that are about to be written."""
        self._append({**self._entry(name, inputs), "written": False})

    def finish(self, name: str, inputs: Sequence[Source]) -> None:
        """Note that all results of an item are written."""
        self._append({**self._entry(name, inputs), "written": True})

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        return {"model": self._model(), "settings": self._settings}

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(self._path, json.dumps(entry, ensure_ascii=False) + "\n")

    def _entry(self, name: str, inputs: Sequence[Source]) -> dict[str, Any]:
        if name not in self._hashes:
            self._hashes[name] = [content_hash(source) for source in inputs]
        return {"name": name, "input": self._hashes[name], **self._made_by}


def model_hash(task: pl.LightningModule) -> str:
    """SHA-256 of the weights, once they are loaded."""
    digest = hashlib.sha256()
    for name, value in sorted(task.state_dict().items()):
        digest.update(name.encode())
        flat = value.detach().cpu().reshape(-1).contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                known[entry["name"]] = {"written": False, **entry}
            except (ValueError, TypeError, KeyError):
                continue  # the process ended while it wrote
    return known
