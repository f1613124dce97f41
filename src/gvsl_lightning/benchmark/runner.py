"""``python -m gvsl_lightning benchmark``: a comparison of methods by one plan, and its tables.

A method's backbone is pre-trained with each seed and transferred to every task in every mode. Each
run is an ordinary ``fit`` in a process of its own, with a test at its end. A run that is finished
is not run again, so that the same command goes on where it was stopped, and makes the tables at
once when nothing is left to do.
"""

import fcntl
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gvsl_lightning.benchmark.comparison import Comparison, caption, printed_tables, write_tables
from gvsl_lightning.benchmark.plan import Plan, Run
from gvsl_lightning.benchmark.report import write_report
from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs import processes

HELP = """\
Compare methods by one plan: pre-train, transfer and test each, and make the tables.

python -m gvsl_lightning benchmark --config PLAN --out FOLDER [--KEY=VALUE ...]

All options that are not listed here go to every run, as those of fit. A run that is finished is not
run again: the same command goes on where it was stopped.

  --config PLAN         YAML file of methods, tasks, modes and seeds; see configs/benchmark
  --out FOLDER          of the runs, results.csv, scores.csv, table.md and report.html
  --jobs 2              runs at a time; otherwise 1, or as many as GPUs
  --devices 0,1         GPUs that the jobs take in turn
  --only 3              run the run of this index alone, without tables
  --print slurm         print job arrays, or a W&B sweep, instead of running

Examples:
  python -m gvsl_lightning benchmark --config configs/benchmark/phantom_smoke.yaml \\
    --out runs/smoke --jobs 2
  python -m gvsl_lightning benchmark --config configs/benchmark/hippocampus_few_labels.yaml \\
    --out runs/few_labels --data.init_args.root=FOLDER
  python -m gvsl_lightning benchmark --config configs/benchmark/phantom_smoke.yaml \\
    --out runs/smoke --print slurm

More:
  --help=all            the options in short
  python -m gvsl_lightning fit --help    what goes to every run
"""
"""The page of ``--help``."""


def main(args: Sequence[str]) -> None:
    """Run what is left of a plan, print and write its tables and draw its figures.

    Args:
        args: the words after ``benchmark``:

            - ``--config``: the plan, a YAML file, see :class:`gvsl_lightning.benchmark.plan.Plan`.
            - ``--out``: folder of the runs, ``results.csv``, ``scores.csv``, ``table.md`` and
              ``report.html``.
            - ``--jobs``: runs at a time, which share the CPU threads.
            - ``--devices``: GPUs such as ``0,1``, which the jobs take in turn.
            - ``--only``: run the run of this index alone, without tables.
            - ``--print``: print what runs the runs, ``slurm`` job arrays or a W&B ``sweep``.
            - all further words go to every run, pre-training and transfer.

    Raises:
        InputError: if the plan is wrong, another benchmark works in the folder, or, after all
            others are done, a run failed or none reports what the plan compares.
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
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; give 1 or more.")
    plan, out = Plan.read(options.config), Path(options.out)
    runs = plan.runs(out, words)
    if options.print:
        command = ["benchmark", "--config", options.config, "--out", options.out]
        printed = {"slurm": slurm_lines, "sweep": sweep}[options.print](runs, command, words)
        print(printed, end="")
        return
    if options.only is not None:
        run_only(runs, options.only, out)
        return
    with locked(out) as lock:
        outcome = execute(plan, runs, jobs, devices, [lock])
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
    if outcome.failed:
        kept_from = len(outcome.waiting)
        raise InputError(
            f"{len(outcome.failed)} of {len(runs)} runs failed"
            f"{f' and {kept_from} had to wait for a pre-training that failed' * bool(kept_from)}, "
            f"the first one with: {outcome.failed[0]} Correct it and give the same command again."
        )
    if sentence := comparison.unreported():
        raise InputError(sentence)


def run_only(runs: Sequence[Run], index: int, out: Path) -> None:
    """Run one run and say what it scored, beside others of the same folder that run elsewhere.

    Args:
        runs: all runs of the plan.
        index: which one.
        out: folder of all runs.

    Raises:
        InputError: if it fails, runs already, or its pre-training is not done.
    """
    if not 0 <= index < len(runs):
        raise InputError(f"--only is {index} and the plan has the runs 0 to {len(runs) - 1}.")
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
    told = "" if score is None else f": {run.metric} {score:.4f}"
    print(f"Run {index} of {len(runs)} ({run}), {result['seconds']:.0f} s{told}")


@dataclass
class Outcome:
    """What did not come to its end.

    Attributes:
        failed: sentences of the runs that failed.
        waiting: the runs whose pre-training failed.
    """

    failed: list[str] = field(default_factory=list)
    waiting: list[Run] = field(default_factory=list)


def execute(
    plan: Plan, runs: Sequence[Run], jobs: int, devices: Sequence[str], locks: Sequence[int]
) -> Outcome:
    """Run what is not done, some at a time, with a progress bar.

    Once the first transfer is done, it is said if it does not report what the plan compares.

    Args:
        plan: what is run.
        runs: all of its runs.
        jobs: runs at a time.
        devices: GPUs that they take in turn; none: what the process sees.
        locks: see :meth:`gvsl_lightning.benchmark.plan.Run.execute`.
    """
    done = [run for run in runs if run.is_done()]
    left = [run for run in runs if run not in done]
    outcome = Outcome()
    if not left:
        return outcome
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for number in range(jobs):
        gpu = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
        places.put({**threads, **gpu})

    def work(run: Run) -> None:
        place = places.get()
        try:
            # the pre-training may have been repeated and have left the same backbone
            if not run.is_done():
                run.execute(place, locks)
        finally:
            places.put(place)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:

        def say(sentence: str) -> None:
            progress.console.print(
                sentence, style="red", highlight=False, markup=False, soft_wrap=True
            )

        def check() -> None:
            transfers = [run for run in done if run.task]
            if sentence := Comparison(plan, transfers).unreported():
                say(sentence)

        check()
        said = any(run.task for run in done)
        bar = progress.add_task("runs", total=len(runs), completed=len(done), left="")
        seconds = {run: run.result()["seconds"] for run in done}
        running: dict[Future[None], Run] = {}
        waiting, lost = list(left), set[Run]()
        try:
            while waiting or running:
                for run in list(waiting):
                    if run.needs in lost:
                        say(f"not run: {run}, whose pre-training failed")
                        outcome.waiting.append(run)
                        waiting.remove(run)
                        progress.advance(bar)
                    elif len(running) < jobs and (run.needs is None or run.needs in done):
                        running[pool.submit(work, run)] = run
                        waiting.remove(run)
                time_left = _time_left([*waiting, *running.values()], seconds, jobs)
                progress.update(bar, left=time_left)
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    run = running.pop(future)
                    try:
                        future.result()
                    except (InputError, OSError) as error:  # a full disk stops no other run
                        outcome.failed.append(str(error))
                        lost.add(run)
                        say(f"failed: {run}: {error}")
                    else:
                        done.append(run)
                        seconds[run] = run.result().get("seconds", 0.0)
                        if run.task and not said:
                            said = True
                            check()
                    progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end_running()
            raise
    return outcome


def slurm_lines(runs: Sequence[Run], command: Sequence[str], words: Sequence[str]) -> str:
    """Lines that submit what is left as job arrays, the transfers after the pre-trainings.

    Args:
        runs: all runs of the plan.
        command: the command line up to the words for every run.
        words: these.
    """
    one = shlex.join(["python", "-m", "gvsl_lightning", *command])
    one = f"{one} --only $SLURM_ARRAY_TASK_ID {shlex.join(words)}".rstrip()
    pretrainings, transfers = _left_indices(runs)
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
    """A W&B sweep over what is left: the pre-trainings or, when these are done, the transfers.

    Args:
        runs: all runs of the plan.
        command: the command line up to the words for every run.
        words: these.
    """
    pretrainings, transfers = _left_indices(runs)
    content = {
        "program": "gvsl_lightning",
        "command": ["python", "-m", "gvsl_lightning", *command, *words, "${args}"],
        "method": "grid",
        "parameters": {"only": {"values": pretrainings or transfers}},
    }
    note = "# The pre-trainings; when these are done, print the sweep of the transfers.\n"
    text: str = yaml.safe_dump(content, sort_keys=False)
    return note + text if pretrainings else text


@contextmanager
def locked(out: Path, name: str = "", shared: bool = False) -> Iterator[int]:
    """Hold a lock in the folder of all runs; the system drops it with the last process that has it.

    Args:
        out: the folder, which is made.
        name: of the lock: the index of a run, or empty for all of them.
        shared: with others that share it.

    Yields:
        Descriptor of the locked file, for the processes that are to hold it too.

    Raises:
        InputError: if another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".lock{name}", "w") as file:
        # what a killed benchmark had started dies a moment after it
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


def _left_indices(runs: Sequence[Run]) -> tuple[list[int], list[int]]:
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


def _time_left(left: Sequence[Run], seconds: Mapping[Run, float], jobs: int) -> str:
    """From what finished runs took: those of the same task and mode, else any."""
    if not (left and seconds):
        return ""
    took: dict[tuple[str, str], list[float]] = {}
    for run, one in seconds.items():
        took.setdefault((run.task, run.mode), []).append(one)
    average = [statistics.mean(seconds.values())]
    total = sum(statistics.mean(took.get((run.task, run.mode), average)) for run in left)
    minutes = total / jobs / 60
    if minutes >= 90:
        return f"about {minutes / 60:.1f} h left"
    return f"about {minutes:.0f} min left" if minutes >= 1 else "under a minute left"
