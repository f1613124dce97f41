"""Printed lines that let SLURM or W&B run what is left of a plan."""

import shlex
from collections.abc import Sequence

import yaml

from gvsl_lightning.benchmark.training import Run


def slurm_lines(runs: Sequence[Run], command: Sequence[str], words: Sequence[str]) -> str:
    """Lines that submit the runs left as job arrays, the transfers after the pre-trainings.

    Args:
        runs: all runs of the plan.
        command: the command line up to the words for every run.
        words: for every run.
    """
    one = shlex.join(["python", "-m", "gvsl_lightning", *command])
    one = f"{one} --only $SLURM_ARRAY_TASK_ID {shlex.join(words)}".rstrip()
    pretrainings, transfers = _indices_left(runs)
    lines, dependency = [], ""
    if pretrainings:
        array = f"sbatch --parsable --array={_ranges(pretrainings)} --wrap={shlex.quote(one)}"
        lines.append(f"pretrainings=$({array})")
        # after any end: a failed pre-training keeps only its own transfers from running
        dependency = "--dependency=afterany:$pretrainings "
    if transfers:
        lines.append(f"sbatch {dependency}--array={_ranges(transfers)} --wrap={shlex.quote(one)}")
    lines.append("# the tables, when all are done: the same command without --print")
    return "\n".join(lines) + "\n"


def sweep(runs: Sequence[Run], command: Sequence[str], words: Sequence[str]) -> str:
    """A W&B sweep over the pre-trainings left or, when these are done, over the transfers left.

    Args:
        runs: all runs of the plan.
        command: the command line up to the words for every run.
        words: for every run.
    """
    pretrainings, transfers = _indices_left(runs)
    content = {
        "program": "gvsl_lightning",
        "command": ["python", "-m", "gvsl_lightning", *command, *words, "${args}"],
        "method": "grid",
        "parameters": {"only": {"values": pretrainings or transfers}},
    }
    note = "# The pre-trainings; when these are done, print the sweep of the transfers.\n"
    lines: str = yaml.safe_dump(content, sort_keys=False)
    return note + lines if pretrainings else lines


def _indices_left(runs: Sequence[Run]) -> tuple[list[int], list[int]]:
    """Of pre-trainings and of transfers."""
    left = [index for index, run in enumerate(runs) if not run.is_done()]
    return (
        [index for index in left if not runs[index].task],
        [index for index in left if runs[index].task],
    )


def _ranges(indices: Sequence[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3, 7."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][-1] == index - 1:
            ranges[-1][1:] = [index]
        else:
            ranges.append([index])
    return ",".join("-".join(map(str, ends)) for ends in ranges)
