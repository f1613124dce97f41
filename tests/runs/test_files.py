import csv
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gvsl_lightning.runs.files import append_rows, write_csv


@contextmanager
def largest(size: int) -> Iterator[None]:
    """No file may become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_that_do_not_fit_leave_a_table_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, ["name", "value"], [{"name": "=1", "value": 1.5}, {"name": "b"}])
    before = path.read_bytes()
    with largest(len(before) + 3), pytest.raises(OSError, match=r"table\.csv"):
        append_rows(path, ["name", "value"], [{"name": "long", "value": 1}])
    assert path.read_bytes() == before
    append_rows(path, ["name", "value"], [{"value": -2.0}])
    assert read(path) == [
        {"name": "'=1", "value": "1.5"},
        {"name": "b", "value": ""},
        {"name": "", "value": "-2.0"},
    ]
