"""Files that are there as a whole or not at all, whatever ends the process that writes them."""

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
from gvsl_lightning.runs.tables import csv_cell

PARTIAL = ".partial"
"""What names of files end in while they are written; they begin with a dot."""


_WRITTEN_HERE = re.compile(rf"\.[0-9a-f]{{32}}\{PARTIAL}").fullmatch


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file, also where several processes write it at once.

    It is written beside its place, flushed to the disk and put there at once.

    Args:
        path: the file; its folder is made.
        write: writes into the open file.

    Raises:
        OSError: it cannot be written; its ``filename`` is the path.
    """
    partial = path.with_name(f".{uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            with suppress(OSError):  # some file systems cannot
                fcntl.flock(file, fcntl.LOCK_EX)  # the system drops it with the process
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # not the partial file; a failed write names none, and NumPy's not even a reason
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
    """Say in one sentence that a file or folder cannot be used, why, and what to do.

    Args:
        error: raised when it was opened, written or made.
        path: what cannot be used; None: what the error names.

    Returns:
        None if the error is about something else.
    """
    named = path or (Path(error.filename) if isinstance(error.filename, str) else None)
    shown = named or "A file"
    if error.errno in _FULL:
        return (
            f"{shown} cannot be written ({error.strerror}); make room there and give the same "
            "command again."
        )
    if error.errno not in _WRONG_PLACE:
        return None
    for folder in named.parents if named else ():
        if os.path.lexists(folder) and not folder.is_dir():
            return f"{shown} cannot be made, as {folder} is no folder; give another path."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{shown} is no folder; give another path."
    return (
        f"{shown} cannot be used ({error.strerror}); correct its permissions or give another path."
    )


def require_writable(folder: Path) -> None:
    """Make sure that a folder can be made and written to, before there is something to write.

    Raises:
        OSError: it cannot.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written to", str(folder))


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, see :func:`write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table, see :func:`write_whole`; texts go through :func:`csv_cell`.

    Args:
        path: the file.
        columns: their names, in order.
        rows: what stands in them; what is missing is left empty.
    """
    write_text(path, csv_lines([columns, *_cells(columns, rows)]))


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a table of :func:`write_csv` with the same columns: all of them or none.

    Raises:
        OSError: they cannot be written; its ``filename`` is the path.
    """
    added = csv_lines(_cells(columns, rows)).encode()
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


def _cells(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterable[list[Any]]:
    return ([row.get(name, "") for name in columns] for row in rows)


def csv_lines(rows: Iterable[Iterable[Any]], end: str = "\r\n") -> str:
    """Rows of a table as they are written, their values through :func:`csv_cell`."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(map(csv_cell, row) for row in rows)
    return text.getvalue()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the ``metrics.csv`` of a run.

    Args:
        path: the file.

    Returns:
        A dictionary for each row, with ``step`` and what was logged in that row.

    Raises:
        InputError: if the file does not exist, or is no table of numbers.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)
            ]
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist: let CSVLogger or VersionedWandbLogger be the first of "
            "trainer.logger."
        ) from error
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path} is no table of logged values ({error}).") from error


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture of the kind that its name ends in, see :func:`write_whole`."""
    kind = path.suffix.removeprefix(".")
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=dpi))


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed left in a folder and those below it.

    What another process writes just now stays.
    """
    for left in folder.rglob(f".*{PARTIAL}"):
        if not _WRITTEN_HERE(left.name):
            continue
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)
