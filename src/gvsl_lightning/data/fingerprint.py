"""Fingerprints of the files of a volume: paths, sizes, times of change and hash."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from gvsl_lightning.data.source import Source, describe, files_of
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.privacy import Hide


def fingerprint(source: Source, hide: Hide) -> dict[str, Any]:
    """Make the fingerprint of a volume."""
    try:
        return {**_status(source, hide), "sha256": content_hash(source)}
    except OSError as error:
        raise InputError(
            f"{describe(source)} cannot be read ({error.strerror}); replace the file or leave it "
            "out."
        ) from error


def unchanged(known: Mapping[str, Any], source: Source, hide: Hide) -> dict[str, Any] | None:
    """The new fingerprint of a volume; None if its content has changed."""
    status = _status(source, hide)
    if status["bytes"] != known["bytes"]:
        return None
    is_same = all(known[key] == value for key, value in status.items())
    if not is_same and content_hash(source) != known["sha256"]:
        return None
    return {**status, "sha256": known["sha256"]}


def _status(source: Source, hide: Hide) -> dict[str, Any]:
    files = files_of(source)
    found = [os.stat(path) for path in files]
    paths = [hide(path) for path in files]
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
