"""``python -m gvsl_lightning benchmark``: a comparison of methods by one plan, and its tables."""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from gvsl_lightning.benchmark.comparison import Comparison, caption, printed_tables, write_tables
from gvsl_lightning.benchmark.execution import Schedule
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.report import write_report
from gvsl_lightning.benchmark.submission import slurm_lines, sweep
from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.errors import InputError, check_range


def main(args: Sequence[str]) -> None:
    """Execute the runs of a plan that are not done; print and write its tables, draw its figures.

    Every method pre-trains a backbone with each seed, which is transferred to every task in every
    mode. Each run is a ``fit`` in a process of its own. The same command resumes a benchmark.

    Args:
        args: the words after ``benchmark``, see its ``--help``; unknown words go to every run.

    Raises:
        InputError: if the plan is wrong, another benchmark works in the folder, or, after all
            others are done, a run failed or none reports the scores that the plan compares.
    """
    parser = WordsParser("python -m gvsl_lightning benchmark", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the plan, a YAML file")
    parser.add_argument("--out", required=True, help="folder of the runs and the tables")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default 1, or as many as GPUs")
    parser.add_argument("--devices", default="", help="GPUs for the jobs, such as 0,1")
    parser.add_argument("--only", type=int, help="run the run of this index alone")
    parser.add_argument("--print", choices=("slurm", "sweep"), help="print instead of running")
    options, words = parser.parse_known_args(args)
    devices = [device for device in options.devices.split(",") if device]
    jobs = max(1, len(devices)) if options.jobs is None else options.jobs
    check_range("--jobs", jobs, 1)
    plan, out = Plan.read(options.config), Path(options.out)
    runs = plan.runs(out, words)
    if options.print:
        command = ["benchmark", "--config", options.config, "--out", options.out]
        write = {"slurm": slurm_lines, "sweep": sweep}[options.print]
        print(write(runs, command, words), end="")
    elif options.only is not None:
        run_only(runs, options.only, out)
    else:
        run_all(plan, runs, out, jobs, devices)


def run_all(plan: Plan, runs: Sequence[Run], out: Path, jobs: int, devices: Sequence[str]) -> None:
    """Execute all runs that are not done, and report on all that are."""
    schedule = Schedule(runs)
    with locked(out) as lock:
        schedule.execute(
            jobs, devices, [lock], lambda done: Comparison(plan, done).unreported_sentence()
        )
        comparison = Comparison(plan, [run for run in runs if run.is_done()])
        console = Console()
        for table in printed_tables(comparison):
            console.print(table)
        if comparison.results:
            console.print(caption(plan), markup=False, highlight=False)
            write_tables(comparison, out)
            with console.status("Drawing"):
                path = write_report(comparison, runs, out)
            print(f"{len(comparison.results)} of {len(runs)} runs: {out / 'table.md'}, {path}")
    if schedule.failed:
        blocked = len(schedule.blocked)
        raise InputError(
            f"{len(schedule.failed)} of {len(runs)} runs failed"
            f"{f' and {blocked} had to wait for a pre-training that failed' * bool(blocked)}, "
            f"the first one with: {next(iter(schedule.failed.values()))} Correct it and give the "
            "same command again."
        )
    if sentence := comparison.unreported_sentence():
        raise InputError(sentence)


def run_only(runs: Sequence[Run], index: int, out: Path) -> None:
    """Execute one run and print its score; other runs of the folder may run at the same time."""
    check_range("--only", index, 0, len(runs) - 1)
    run = runs[index]
    if run.needs is not None and not run.needs.is_done():
        raise InputError(
            f"Run {index} ({run}) needs the backbone of run {runs.index(run.needs)} ({run.needs}), "
            "which is not done; run that first."
        )
    with locked(out, shared=True) as all_runs, locked(out, str(index)) as this_run:
        if not run.is_done():
            run.execute({}, [all_runs, this_run])
    result = run.result()
    score = result.get("scores", {}).get(run.metric)
    scored = "" if score is None else f": {run.metric} {score:.4f}"
    print(f"Run {index} of {len(runs)} ({run}), {result['seconds']:.0f} s{scored}")


@contextmanager
def locked(out: Path, name: str = "", shared: bool = False) -> Iterator[int]:
    """Hold a lock in the folder of all runs, or the lock of one run.

    Yields the descriptor of the locked file: processes that inherit it keep the lock while they
    live.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".lock{name}", "w") as file:
        # the runs of a killed benchmark die a moment after it
        for attempt in range(_PATIENCE):
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt == _PATIENCE - 1:
                    raise InputError(
                        f"Another command works in {out}; wait for it, end it, or give another "
                        "--out."
                    ) from error
                time.sleep(0.1)
        yield file.fileno()


_PATIENCE = 30
