"""Files that are written completely or not at all, and tables in CSV format."""

import csv
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from matplotlib.figure import Figure

from gvsl_lightning.errors import InputError

PARTIAL = ".partial"
"""Suffix of files while they are written; their names begin with a dot."""

_PARTIAL_NAME = re.compile(rf"\.[0-9a-f]{{32}}\{PARTIAL}").fullmatch


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file completely or not at all, also if several processes write it at once.

    The content goes to a temporary file in the same folder, is flushed to the disk, and the file is
    renamed.

    Args:
        path: the file; its folder is made.
        write: writes into the open file.

    Raises:
        OSError: if the file cannot be written; ``filename`` of the error is the path.
    """
    partial = path.with_name(f".{uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # name the file, not the partial one; NumPy's errors have no number
            number = error.errno or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unwritable(error: OSError, path: Path | None = None) -> str | None:
    """One sentence about a file or folder that cannot be used; None if the error is another.

    Args:
        error: raised when the file was opened, written or made.
        path: of the file or folder; None: the path in the error.
    """
    named = path or (Path(error.filename) if isinstance(error.filename, str) else None)
    name = named or "A file"
    if error.errno in _FULL:
        return (
            f"{name} cannot be written ({error.strerror}); make room there and give the same "
            "command again."
        )
    if error.errno not in _WRONG_PLACE:
        return None
    for folder in named.parents if named else ():
        if os.path.lexists(folder) and not folder.is_dir():
            return f"{name} cannot be made, as {folder} is no folder; give another path."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{name} is no folder; give another path."
    return (
        f"{name} cannot be used ({error.strerror}); correct its permissions or give another path."
    )


def require_writable(folder: Path) -> None:
    """Check, before a long computation, that a folder can be made and written to.

    Raises:
        OSError: if it cannot.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written to", str(folder))


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, see :func:`write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as in :func:`write_whole`; missing values become empty cells."""
    write_text(path, _csv([columns, *_cells(columns, rows)]))


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append all rows or none to a table of :func:`write_csv` with the same columns.

    Raises:
        OSError: if the rows cannot be written; ``filename`` of the error is the path.
    """
    append_whole(path, _csv(_cells(columns, rows)))


def append_whole(path: Path, text: str) -> None:
    """Append a whole text, or nothing.

    Raises:
        OSError: if it cannot be written; ``filename`` of the error is the path.
    """
    added = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            written = file.write(added)
            if written < len(added):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.truncate(path, size)
            number = error.errno or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error


def csv_cell(value: Any) -> Any:
    """Value of a cell; ``'`` is put before a text that a spreadsheet would run as a formula.

    Numbers stay as they are, also as text.
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA_SIGNS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def cell_text(cell: str) -> str:
    """The text from which :func:`csv_cell` made a cell."""
    is_marked = cell.startswith("'") and cell[1:].startswith(_FORMULA_SIGNS)
    return cell[1:] if is_marked else cell


TABLES = ("metrics.csv", "validation.csv", "test.csv")
"""Tables of logged values in the folder of a run: of training, validations and tests."""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the tables of a run: for each row, ``step`` and the values logged in it.

    Args:
        folder: of the run; it holds at least one of :data:`TABLES`.

    Raises:
        InputError: if no table exists, or one is no table of numbers.
    """
    paths = [folder / name for name in TABLES if (folder / name).is_file()]
    if not paths:
        raise InputError(
            f"{folder} has no metrics.csv: let CSVLogger or VersionedWandbLogger be the first of "
            "trainer.logger."
        )
    rows = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows += [
                    {name: float(value) for name, value in row.items() if value}
                    for row in csv.DictReader(file)
                ]
        except (OSError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{path} is no table of logged values ({error}).") from error
    return rows


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture in the format of the file's suffix; see :func:`write_whole`."""
    kind = path.suffix.removeprefix(".")
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=dpi))


def remove_partials(folder: Path) -> None:
    """Remove unfinished files of killed processes from a folder and its subfolders.

    Files that another process is writing stay.
    """
    for left in folder.rglob(f".*{PARTIAL}"):
        if not _PARTIAL_NAME(left.name):
            continue
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}

_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(map(csv_cell, row) for row in rows)
    return lines.getvalue()


def _cells(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterable[list[Any]]:
    return ([row.get(name, "") for name in columns] for row in rows)
