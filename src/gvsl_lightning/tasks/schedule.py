"""Learning rates over the steps of a run."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gvsl_lightning.errors import InputError

SCHEDULES = ("constant", "cosine")


def build_schedule(
    optimizer: Optimizer, name: str, warmup_steps: int, count_steps: Callable[[], float]
) -> LambdaLR | None:
    """Build the schedule of an optimiser, to be advanced after each step.

    The learning rate rises over ``warmup_steps``; a parameter group with ``frozen_steps`` has the
    rate 0 until then. ``cosine`` alone calls ``count_steps``, for the number of steps of the run.

    Returns:
        The schedule; None where the learning rate never changes, so that the rate of a
        learning-rate finder stays.

    Raises:
        InputError: if ``cosine`` has no last step.
    """
    frozen = [group.get("frozen_steps", 0) for group in optimizer.param_groups]
    if name == "constant" and warmup_steps == 0 and not any(frozen):
        return None
    last = count_steps() if name == "cosine" else math.inf
    if name == "cosine" and last == math.inf:
        raise InputError(
            "The cosine schedule needs to know the last step: set trainer.max_steps or "
            "trainer.max_epochs, or use schedule: constant."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant":
            return 1.0
        progress = (step - warmup_steps) / max(last - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def factor_after(frozen_steps: int) -> Callable[[int], float]:
        return lambda step: 0.0 if step < frozen_steps else factor(step)

    return LambdaLR(optimizer, [factor_after(steps) for steps in frozen])
