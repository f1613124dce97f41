"""Printed lines that let SLURM or W&B execute the remaining runs of a plan."""

import shlex
from collections.abc import Sequence

import yaml

from gvsl_lightning.benchmark.training import Run


def slurm_lines(runs: Sequence[Run], command: Sequence[str], words: Sequence[str]) -> str:
    """Lines that submit the remaining runs as job arrays, the transfers after the pre-trainings.

    Args:
        runs: all runs of the plan.
        command: the command line up to the words for every run.
        words: for every run.
    """
    one = shlex.join(["python", "-m", "gvsl_lightning", *command])
    one = shlex.quote(f"{one} --only $SLURM_ARRAY_TASK_ID {shlex.join(words)}".rstrip())
    pretrainings, transfers = _remaining(runs)
    lines, dependency = [], ""
    if pretrainings:
        array = f"--array={','.join(map(str, pretrainings))}"
        lines.append(f"pretrainings=$(sbatch --parsable {array} --wrap={one})")
        # after any end: a failed pre-training keeps only its own transfers from running
        dependency = "--dependency=afterany:$pretrainings "
    if transfers:
        array = f"--array={','.join(map(str, transfers))}"
        lines.append(f"sbatch {dependency}{array} --wrap={one}")
    lines.append("# the tables, when all are done: the same command without --print")
    return "\n".join(lines) + "\n"


def sweep(runs: Sequence[Run], command: Sequence[str], words: Sequence[str]) -> str:
    """A W&B sweep over the remaining pre-trainings or, if there are none, over the transfers.

    Its arguments are those of :func:`slurm_lines`.
    """
    pretrainings, transfers = _remaining(runs)
    content = {
        "program": "gvsl_lightning",
        "command": ["python", "-m", "gvsl_lightning", *command, *words, "${args}"],
        "method": "grid",
        "parameters": {"only": {"values": pretrainings or transfers}},
    }
    note = "# The pre-trainings; when these are done, print the sweep of the transfers.\n"
    lines: str = yaml.safe_dump(content, sort_keys=False)
    return note + lines if pretrainings else lines


def _remaining(runs: Sequence[Run]) -> tuple[list[int], list[int]]:
    """Indices of pre-trainings and of transfers."""
    indices = [index for index, run in enumerate(runs) if not run.is_done()]
    pretrainings = [index for index in indices if not runs[index].task]
    return pretrainings, [index for index in indices if runs[index].task]
