"""The volumes of a batch."""

from collections.abc import Mapping
from typing import Any


def names_of(batch: Mapping[str, Any]) -> list[str]:
    """Names of the volumes of a batch, fixed ones first; empty if it has none."""
    return [name for key in ("name", "fixed_name", "moving_name") for name in batch.get(key, ())]
