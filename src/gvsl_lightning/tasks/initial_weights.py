"""The pre-trained weights that a transfer task starts from."""

from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone
from gvsl_lightning.weights import load_backbone_weights, local_file, read_head


def load_initial_weights(
    source: str, backbone: Backbone, head: nn.Module | None = None, encoder_only: bool = False
) -> Path:
    """Load pre-trained weights into a backbone, and into a head; print a report.

    Args:
        source: see :func:`gvsl_lightning.weights.load_backbone_weights`.
        backbone: is filled.
        head: is filled too, if one is given.
        encoder_only: leave the decoder of the backbone as it is.

    Returns:
        The file on this machine.

    Raises:
        InputError: if the weights do not fit.
    """
    path = local_file(source)
    report = load_backbone_weights(backbone, path, encoder_only)
    if head is not None:
        _load_head(head, path)
    rank_zero_only(print)(report)
    return path


def _load_head(head: nn.Module, path: Path) -> None:
    own = {name: value.shape for name, value in head.state_dict().items()}
    for name in ("out_conv", "head"):
        found = read_head(path, name)
        if {entry: value.shape for entry, value in found.items()} == own:
            head.load_state_dict(found)
            return
    shapes = ", ".join(f"{entry} {tuple(shape)}" for entry, shape in own.items())
    raise InputError(
        f"{path} has no head of this task's shape ({shapes}): set head_from_weights to false, or "
        "give as many classes as the file has."
    )
