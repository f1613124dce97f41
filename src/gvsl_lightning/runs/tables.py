"""Cells of CSV files, which a spreadsheet may take for formulas."""

from typing import Any

_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def csv_cell(value: Any) -> Any:
    """What is written for a value: a text that a spreadsheet would compute gets a ``'`` before it.

    Numbers stay as they are, also in words.
    """
    if not isinstance(value, str) or not value.startswith(_SIGNS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def text(written: str) -> str:
    """The text of a cell that :func:`csv_cell` made."""
    is_marked = written.startswith("'") and written[1:].startswith(_SIGNS)
    return written[1:] if is_marked else written
