"""Whether the files of a volume are those that were prepared: paths, sizes, times and hashes."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from gvsl_lightning.data.source import Source, describe, files_of
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.privacy import Shown


def fingerprint(source: Source, shown: Shown) -> dict[str, Any]:
    """Paths, sizes, times of change and hash of the files of a volume."""
    try:
        return {**_status(source, shown), "sha256": content_hash(source)}
    except OSError as error:
        raise InputError(
            f"{describe(source)} cannot be read ({error.strerror}); replace the file or leave it "
            "out."
        ) from error


def unchanged(known: Mapping[str, Any], source: Source, shown: Shown) -> dict[str, Any] | None:
    """The new fingerprint of a volume; None if its content has changed."""
    status = _status(source, shown)
    if status["bytes"] != known["bytes"]:
        return None
    same = all(known[key] == value for key, value in status.items())
    if not same and content_hash(source) != known["sha256"]:
        return None
    return {**status, "sha256": known["sha256"]}


def _status(source: Source, shown: Shown) -> dict[str, Any]:
    paths = files_of(source)
    found = [os.stat(path) for path in paths]
    paths = [shown(path) for path in paths]
    return {
        "path": paths[0] if len(paths) == 1 else paths,
        "bytes": [status.st_size for status in found],
        "mtime_ns": [status.st_mtime_ns for status in found],
    }


def content_hash(source: Source) -> str:
    """SHA-256 of the content of all files of a volume."""
    digest = hashlib.sha256()
    for path in files_of(source):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
