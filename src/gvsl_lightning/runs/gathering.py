"""Python objects of all processes of a run."""

from typing import Any

import torch


def gather_objects(mine: Any) -> list[Any]:
    """The objects that all processes pass, in the order of their ranks; call it in all of them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def gather_dict(mine: dict[str, Any]) -> dict[str, Any]:
    """The dictionaries of all processes in one; a key that several have counts once."""
    return {name: value for part in gather_objects(mine) for name, value in part.items()}
