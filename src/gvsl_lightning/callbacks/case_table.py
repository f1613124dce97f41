"""Tables with a row for each case."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gvsl_lightning.runs.files import write_csv


def write_cases(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table; undefined values (NaN) become empty cells."""
    defined = [
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    write_csv(path, list(rows[0]) if rows else ["name"], defined)
