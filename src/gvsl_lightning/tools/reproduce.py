"""``python -m gvsl_lightning reproduce``: run a run again, from its own record, and compare."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.cli.main import CommandLine
from gvsl_lightning.data.hashing import data_hash
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import read_metrics, save_figure
from gvsl_lightning.runs.record import record_run

HELP = """\
Run a training again from its own record, and compare every value that it logged.

python -m gvsl_lightning reproduce RUN [--OPTION VALUE ...] [--KEY=VALUE ...]

RUN is the folder of a run with config.yaml, record.yaml and metrics.csv, or a checkpoint in it. The
command says what differs from then (code, versions, machine), and refuses other data. A resumed
run goes on from the same checkpoint again; one that did not end is repeated as far as it went. The
exit status is 0 where all values are the same, and 1 otherwise.

  --out FOLDER         of the second run, its metrics.csv and reproduction.png; RUN_reproduced
  --steps 100          only the first steps
  --tolerance 1e-5     largest difference that counts as the same; 0: bit by bit
  --KEY=VALUE          options of fit, for what has moved since

Examples:
  python -m gvsl_lightning reproduce runs/quickstart/version_0
  python -m gvsl_lightning reproduce runs/gvsl/version_0 --steps 100 --tolerance 1e-4 \\
    --data.init_args.root=FOLDER

More:
  --help=all           all options
"""
"""The page of ``--help``."""

Values = dict[tuple[int, str], float]
"""(Step, metric) -> value, in the order in which they were logged."""


def main(args: Sequence[str]) -> None:
    """Repeat a run, print what differs, and draw ``reproduction.png``.

    Args:
        args: the words after ``reproduce``:

            - the folder of the run, or a checkpoint in it.
            - ``--out``: folder of the second run, by default beside the first.
            - ``--steps``: repeat only so many.
            - ``--tolerance``: largest difference that counts as the same.
            - all further words go to ``fit``.

    Raises:
        InputError: the run cannot be repeated; the sentence says why.
        SystemExit: with status 1 if a value differs.
    """
    parser = WordsParser("python -m gvsl_lightning reproduce", allow_abbrev=False)
    parser.add_argument("run", help="folder of a run, or a checkpoint in it")
    parser.add_argument("--out", help="folder of the second run; by default RUN_reproduced")
    parser.add_argument("--steps", type=int, help="repeat only the first ones")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of a value; 0: bit by bit")
    options, words = parser.parse_known_args(args)
    if not 0 <= options.tolerance < math.inf:
        raise InputError(f"--tolerance is {options.tolerance}; give 0 or a positive number.")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps is {options.steps}; give 1 or more.")
    run = find_run(options.run)
    record = read_record(run)
    first = read_values(run)
    if options.steps is not None:
        first = {key: value for key, value in first.items() if key[0] < options.steps}
    if not first:
        raise InputError(f"{run} logged nothing in the first {options.steps} steps; give more.")
    out = Path(options.out or f"{run}_reproduced")
    # every process of a distributed run comes here, and the first one makes the folder
    if out.exists() and getattr(rank_zero_only, "rank", 0) == 0:
        raise InputError(f"{out} exists; give another --out, or remove it.")
    resumed = record["resumed_from"]
    if resumed is not None and not Path(resumed).is_file():
        raise InputError(
            f"{run} went on from {resumed}, which is not there; put it back, or reproduce the run "
            "that it came from."
        )
    if record["seed"] is None:
        raise InputError(f"{run} had no seed, so that it cannot be repeated; set seed_everything.")
    tested = any(name.startswith("test/") for _, name in first)
    repeated = [
        *("fit", "--config", str(run / "config.yaml"), f"--test_after_fit={tested}".lower()),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={out.parent}"),
        *(f"--trainer.logger.name={out.name}", "--trainer.logger.version="),
        *(f"--trainer.default_root_dir={out}", f"--ckpt_path={resumed or 'null'}"),
        "--trainer.max_time=null",  # the steps are known
        f"--trainer.callbacks+={Repetition.__module__}.{Repetition.__name__}",
        *(f"--trainer.callbacks.run={run}", f"--trainer.callbacks.steps={_last(first) + 1}"),
    ]
    try:
        trainer = CommandLine([*repeated, *words]).trainer
    except InputError:
        with suppress(OSError):
            out.rmdir()  # that a logger made before anything was checked
        raise
    if not trainer.is_global_zero:
        return
    second = read_values(out)
    rows = compare(first, second, options.tolerance)
    if any(row.largest for row in rows):
        Console().print(printed_comparison(rows))
    picture = out / "reproduction.png"
    save_figure(draw_runs(first, second, rows), picture, dpi=100)
    if resumed is not None:
        print(f"Both runs went on from {resumed}.")
    print(f"{verdict(rows, first)} {picture}")
    if any(row.first is not None for row in rows):
        raise SystemExit(1)


class Repetition(pl.Callback):
    """Says how a run differs from the one that it repeats, and stops where that one did.

    Args:
        run: folder of the run that is repeated.
        steps: after which to stop.

    Raises:
        InputError: if it trains on other data, or starts from other weights.
    """

    def __init__(self, run: str, steps: int) -> None:
        self.run = run
        self.steps = steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the records; keep checkpoints out of a folder that the configuration names."""
        if stage != "fit":
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.dirpath = None
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        then, now = read_record(Path(self.run)), record_run(trainer, data_hash(datamodule))
        if trainer.is_global_zero:
            Console().print(printed_records(then, now))
        for key, what in (("data_hash", "data"), ("weights_hash", "weights")):
            if then[key] != now[key]:
                raise InputError(
                    f"{self.run} had other {what} ({key} {then[key]}, now {now[key]}); restore "
                    "them as they were."
                )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop after the last step."""
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


@dataclass(frozen=True)
class Row:
    """How one metric compares.

    Attributes:
        metric: its name.
        values: how many are compared.
        largest: largest difference; infinite if a value is missing or not finite in one run alone.
        largest_step: where that is.
        first: the first step that differs by more than the tolerance; None: none does.
        pair: what the two runs logged there; None: nothing.
    """

    metric: str
    values: int
    largest: float
    largest_step: int
    first: int | None = None
    pair: tuple[float | None, float | None] = (None, None)


def find_run(path: str) -> Path:
    """Folder of a run.

    Args:
        path: the folder, or a checkpoint in it.

    Raises:
        InputError: if it is none.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    for name in ("config.yaml", "record.yaml", "metrics.csv"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}; give the folder of a training whose first logger is a "
                "VersionedWandbLogger or a CSVLogger."
            )
    return folder


def read_record(run: Path) -> dict[str, Any]:
    """What a run recorded, see :func:`gvsl_lightning.runs.record.record_run`, and ``resumed_from``.

    Args:
        run: folder of the run.

    Raises:
        InputError: if the file cannot be read.
    """
    path = run / "record.yaml"
    try:
        record = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        _ = record["seed"], record["data_hash"], record["weights_hash"], record["resumed_from"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read as the record of a run ({type(error).__name__}: {error})."
        ) from error
    return record


def read_values(run: Path) -> Values:
    """What a run logged.

    Args:
        run: folder of the run.

    Raises:
        InputError: if the file cannot be read, or holds nothing.
    """
    path = run / "metrics.csv"
    values = {
        (int(row["step"]), name): value
        for row in read_metrics(path)
        for name, value in row.items()
        if name not in ("step", "epoch")
    }
    if not values:
        raise InputError(f"{path} holds no values: the run ended before it logged any.")
    return values


def compare(first: Values, second: Values, tolerance: float = 0.0) -> list[Row]:
    """Compare two runs metric by metric.

    Args:
        first: what counts, up to its last step.
        second: may go on. In the last step of the first, which may have been interrupted in it,
            it may have more values.
        tolerance: largest difference that counts as none.

    Returns:
        A row for each metric, in the order in which they were logged.
    """
    last = _last(first)
    keys = [*first, *(key for key in second if key not in first and key[0] < last)]
    rows: dict[str, Row] = {}
    for step, metric in sorted(keys, key=lambda key: key[0]):
        pair = first.get((step, metric)), second.get((step, metric))
        difference = _difference(*pair)
        row = rows.get(metric, Row(metric, 0, 0.0, step))
        larger = difference > row.largest
        earliest = row.first is None and difference > tolerance
        rows[metric] = Row(
            metric,
            row.values + 1,
            difference if larger else row.largest,
            step if larger else row.largest_step,
            step if earliest else row.first,
            pair if earliest else row.pair,
        )
    return list(rows.values())


def verdict(rows: Sequence[Row], first: Values) -> str:
    """One sentence.

    Args:
        rows: from :func:`compare`.
        first: the values of the first run.
    """
    steps = f"steps {min(step for step, _ in first)} to {_last(first)}"
    count = f"{sum(row.values for row in rows)} values of {len(rows)} metrics in {steps}"
    worst = max(rows, key=lambda row: row.largest)
    largest = f"{worst.largest:.3g} in {worst.metric} at step {worst.largest_step}"
    if differing := [row for row in rows if row.first is not None]:
        row = min(differing, key=lambda row: row.first or 0)
        one, other = ("nothing" if value is None else f"{value:.9g}" for value in row.pair)
        return (
            f"Not the same: {row.metric} at step {row.first} was {one} and is {other}; the largest "
            f"difference is {largest}."
        )
    if worst.largest:
        return f"The same within the tolerance: {count}; the largest difference is {largest}."
    return f"The same, bit by bit: {count}."


def printed_comparison(rows: Sequence[Row]) -> Table:
    """Table of the metrics that are not the same bit by bit, for the screen."""
    table = Table("metric", "values", "largest difference", "at step", "differs from step")
    for row in rows:
        if row.largest:
            numbers = row.values, f"{row.largest:.3g}", row.largest_step
            step = "within the tolerance" if row.first is None else str(row.first)
            table.add_row(row.metric, *map(str, numbers), step)
    return table


def printed_records(then: Mapping[str, Any], now: Mapping[str, Any]) -> Table:
    """Table of what two runs depended on; of the versions only those that differ."""
    table = Table("")
    for heading in ("then", "now", ""):
        table.add_column(heading, overflow="fold")
    flat = [
        {**record, **{f"version of {k}": v for k, v in record["versions"].items()}}
        for record in (then, now)
    ]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        one, other = (str(record.get(key, "")) for record in flat)
        if key in ("versions", "resumed_from") or (one == other and key.startswith("version of ")):
            continue
        differs = "" if one == other else "differs"
        table.add_row(escape(key.replace("_", " ")), escape(one), escape(other), differs)
    return table


def draw_runs(first: Values, second: Values, rows: Sequence[Row]) -> Figure:
    """Draw the loss of both runs, and below it their difference.

    Args:
        first: values of the first run.
        second: of the second.
        rows: from :func:`compare`.
    """
    logged = {metric for _, metric in first}
    losses = ("train/loss_step", "train/loss", "val/loss")
    metric = next((name for name in losses if name in logged), rows[0].metric)
    curves = [
        {step: value for (step, name), value in values.items() if name == metric}
        for values in (first, second)
    ]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for curve, label, style in zip(curves, ("first run", "second run"), ("-", "--"), strict=True):
        shown = {step: value for step, value in curve.items() if step <= _last(first)}
        above.plot(list(shown), list(shown.values()), style, label=label)
    above.set_ylabel(metric)
    above.legend()
    common = [step for step in curves[0] if step in curves[1]]
    below.plot(common, [_difference(curves[0][step], curves[1][step]) for step in common], "k.-")
    below.set(xlabel="step", ylabel="difference")
    below.set_ylim(bottom=0)
    below.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return math.inf
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other)
    return math.inf if math.isnan(difference) else difference


def _last(values: Values) -> int:
    return max(step for step, _ in values)
