"""Scores of a validation, some of which may be undefined."""

import math
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.scores import mean_defined


def log_scores(
    task: LightningModule, score: str, values: Mapping[str, float], required: str
) -> None:
    """Log a validation score of every class, and its mean over the classes where it is defined.

    Args:
        task: in validation.
        score: its name, such as ``dice``.
        values: class -> score; NaN where undefined: a warning names the class.
        required: the condition of a score, such as ``Dice needs a case with the class``.

    Raises:
        InputError: in training, if a callback monitors an undefined score.
    """
    named = {f"val/{score}_{name}": value for name, value in values.items()}
    named[f"val/{score}"] = mean_defined(list(values.values()))
    for name, value in named.items():
        if math.isfinite(value):
            task.log(name, value, prog_bar=name == f"val/{score}")
    undefined = [name for name, value in named.items() if not math.isfinite(value)]
    trainer: Any = task.trainer
    if not undefined or trainer.sanity_checking:
        return
    reason = f"undefined, as {required}; choose other validation cases"
    if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:
        for callback in trainer.callbacks:
            if getattr(callback, "monitor", None) in undefined:
                raise InputError(
                    f"{type(callback).__name__} monitors {callback.monitor}, which is {reason} or "
                    "monitor val/loss."
                )
    rank_zero_warn(f"Not logged: {', '.join(undefined)} ({reason}).")
