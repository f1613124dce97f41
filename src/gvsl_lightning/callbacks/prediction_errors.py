"""Volumes that could not be predicted."""

import sys
from collections.abc import Mapping

import pytorch_lightning as pl

from gvsl_lightning.errors import InputError


def raise_prediction_errors(trainer: pl.Trainer, errors: Mapping[str, str], predicted: int) -> None:
    """Print the volumes that could not be predicted, and end the run if there are any.

    Args:
        trainer: of the run.
        errors: name of a volume -> cause, of all processes.
        predicted: number of volumes that were predicted.

    Raises:
        InputError: if there are errors.
    """
    if not errors:
        return
    count, first = len(errors) + predicted, next(iter(errors.values()))
    if len(errors) == 1:
        raise InputError(f"1 of {count} volumes was not predicted: {first}")
    if trainer.is_global_zero:
        for error in errors.values():
            print(f"not predicted: {error}", file=sys.stderr)
    raise InputError(
        f"{len(errors)} of {count} volumes were not predicted, the first one because {first}"
    )
