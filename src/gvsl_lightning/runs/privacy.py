"""Pseudonyms for names of volumes and paths of data, which may tell who a patient is.

A pseudonym is a keyed hash (HMAC-SHA-256). Without the key, nobody can check a guessed name. The
same key and name always give the same pseudonym. The key and the table of names, ``key`` and
``names.csv``, stay in a private folder that only the user can read: the value of the environment
variable ``GVSL_PRIVATE``, by default ``~/.gvsl_lightning``.
"""

import csv
import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import csv_cell

FOLDER = "GVSL_PRIVATE"
"""Environment variable that names the private folder."""

PATH_OPTIONS = (
    *("root", "val_root", "label_root", "prepared", "cache_folder", "split_file"),
    *("atlas", "atlas_label", "pairs"),
)
"""Options of data modules that hold paths of data."""


def pseudonyms(names: Iterable[str]) -> list[str]:
    """Replace names or paths by ``anon_`` and 16 hexadecimal digits, and add new ones to the table.

    Pseudonyms stay as they are.

    Raises:
        InputError: if the private folder cannot be used, or others may read its key.
    """
    folder = Path(os.environ.get(FOLDER) or "~/.gvsl_lightning").expanduser()
    known = _known.setdefault(folder, {})
    wanted = list(names)
    missing = [n for n in dict.fromkeys(wanted) if n not in known and not is_pseudonym(n)]
    if missing:
        try:
            with _locked(folder):
                key = _key(folder / "key")
                made = {
                    name: f"anon_{hmac.new(key, name.encode(), 'sha256').hexdigest()[:16]}"
                    for name in missing
                }
                _record(folder / "names.csv", made)
        except OSError as error:
            raise InputError(
                f"{folder}, the private folder of anonymise, cannot be used ({error.strerror}); "
                f"correct it, or name another one by the environment variable {FOLDER}."
            ) from error
        known.update(made)
    return [known.get(name, name) for name in wanted]


def pseudonym(name: str) -> str:
    """Replace one name; see :func:`pseudonyms`."""
    return pseudonyms([name])[0]


def hide_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the paths among the options of a data module by pseudonyms.

    Paths are the values of :data:`PATH_OPTIONS`, and other absolute paths and URLs.
    """
    return {name: _hide(value, name in PATH_OPTIONS) for name, value in options.items()}


def is_pseudonym(name: str) -> bool:
    """Whether a name has the form of a pseudonym."""
    return _PSEUDONYM(name) is not None


Hide = Callable[[str], str]
"""Replaces a name or path: :func:`pseudonym`, or ``str``, which hides nothing."""

_PSEUDONYM = re.compile("anon_[0-9a-f]{16}").fullmatch

_known: dict[Path, dict[str, str]] = {}
"""Private folder -> name -> pseudonym."""


def _hide(value: Any, is_path: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_hide(one, is_path) for one in value]
    if isinstance(value, dict):
        return {key: _hide(one, is_path) for key, one in value.items()}
    if isinstance(value, str) and (is_path or os.path.isabs(value) or "://" in value):
        return pseudonym(value)
    return value


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(folder / ".lock", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(path: Path) -> bytes:
    if not path.exists():
        with _private(path) as file:
            file.write(f"{secrets.token_hex(32)}\n")
    if path.stat().st_mode & 0o077:
        raise InputError(
            f"{path}, the key of anonymise, can be read by others; forbid it with chmod 600 {path}."
        )
    key = path.read_bytes().strip()
    if len(key) < 16:
        raise InputError(
            f"{path}, the key of anonymise, is shorter than 16 characters; restore it, or remove "
            "it for a new one, which gives all names new pseudonyms."
        )
    return key


def _record(path: Path, made: Mapping[str, str]) -> None:
    is_new = not path.exists()
    written: set[str] = set()
    if not is_new:
        with open(path, encoding="utf-8", newline="") as file:
            written = {row[0] for row in csv.reader(file) if row}
    with _private(path) as file:
        table = csv.writer(file)
        if is_new:
            table.writerow(["pseudonym", "name"])
        table.writerows(
            (other, csv_cell(name)) for name, other in made.items() if other not in written
        )


def _private(path: Path) -> Any:
    """Open a file to append; only the user can read it."""
    return open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "a", encoding="utf-8")
