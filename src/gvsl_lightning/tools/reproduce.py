"""``python -m gvsl_lightning reproduce``: run a training again from its own record, and compare."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.cli.main import CommandLine
from gvsl_lightning.data.hashing import data_hash
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.runs.files import read_metrics
from gvsl_lightning.runs.record import record_run

Values = dict[tuple[int, str], float]
"""(Step, metric) -> value, in the order in which they were logged."""


def main(args: Sequence[str]) -> None:
    """Repeat a run, and print the differences.

    Args:
        args: the words after ``reproduce``: see ``--help``; words it does not list go to ``fit``.

    Raises:
        InputError: if the run cannot be repeated.
        SystemExit: with status 1 if a value differs.
    """
    parser = WordsParser("python -m gvsl_lightning reproduce", allow_abbrev=False)
    parser.add_argument("run", help="folder of a run, or a checkpoint in it")
    parser.add_argument("--out", help="folder of the second run; by default RUN_reproduced")
    parser.add_argument("--steps", type=int, help="number of steps to repeat")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of a value; 0: bit by bit")
    options, words = parser.parse_known_args(args)
    check_range("--tolerance", options.tolerance, 0)
    if options.steps is not None:
        check_range("--steps", options.steps, 1)
    run = _find_run(options.run)
    record, first = _read_record(run), _read_values(run)
    resumed = record["resumed_from"]
    if resumed is not None and not Path(resumed).is_file():
        raise InputError(
            f"{run} went on from {resumed}, which does not exist; restore this file, or reproduce "
            "the run that wrote it."
        )
    if record["seed"] is None:
        raise InputError(f"{run} had no seed and cannot be repeated; set seed_everything.")
    if options.steps is not None:
        first = {key: value for key, value in first.items() if key[0] < options.steps}
    if not first:
        raise InputError(f"{run} logged nothing in the first {options.steps} steps; give more.")
    out = Path(options.out or f"{run}_reproduced")
    # every process of a distributed run comes here, and the first one makes the folder
    if out.exists() and getattr(rank_zero_only, "rank", 0) == 0:
        raise InputError(f"{out} exists; give another --out, or remove it.")
    try:
        trainer = CommandLine([*_command(run, first, out, resumed), *words]).trainer
    except InputError:
        with suppress(OSError):
            out.rmdir()  # a logger made it before anything was checked
        raise
    if not trainer.is_global_zero:
        return
    if resumed is not None:
        print(f"Both runs went on from {resumed}.")
    sentence, is_same = compare(first, _read_values(out), options.tolerance)
    print(f"{sentence} The second run is {out}.")
    if not is_same:
        raise SystemExit(1)


class Repetition(pl.Callback):
    """Compares the record of a run with that of the first run, and stops at the same step.

    Args:
        run: folder of the first run.
        steps: number of steps.

    Raises:
        InputError: if the run trains on other data, or starts from other weights.
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
        then, now = _read_record(Path(self.run)), record_run(trainer, data_hash(datamodule))
        before, after = ({**record, **record.get("versions", {})} for record in (then, now))
        for key in dict.fromkeys([*before, *after]):
            is_other = before.get(key) != after.get(key) and key not in ("versions", "resumed_from")
            if is_other and trainer.is_global_zero:
                print(f"{key}: {before.get(key)} in the first run, {after.get(key)} now")
        for key, name in (("data_hash", "data"), ("weights_hash", "weights")):
            if then[key] != now[key]:
                raise InputError(
                    f"{self.run} had other {name} ({key} {then[key]}, now {now[key]}); restore "
                    "them."
                )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def compare(first: Values, second: Values, tolerance: float = 0.0) -> tuple[str, bool]:
    """Compare all values of two runs.

    Args:
        first: of the first run. It may have been interrupted in its last step.
        second: of the second run. Values after the last step of the first run are ignored.
        tolerance: largest difference that counts as the same.

    Returns:
        One sentence, and whether the runs are the same. The sentence names the first value that
        differs. The difference is infinite if a value is missing or not finite in one run alone.
    """
    steps = [step for step, _ in first]
    keys = [*first, *(key for key in second if key not in first and key[0] < max(steps))]
    differences = {key: _difference(first.get(key), second.get(key)) for key in keys}
    worst = max(keys, key=lambda key: differences[key])
    largest = f"the largest difference is {differences[worst]:.3g} in {worst[1]} at step {worst[0]}"
    different = [key for key in keys if differences[key] > tolerance]
    if different:
        step, metric = key = min(different, key=lambda key: key[0])
        one, other = (f"{run[key]:.9g}" if key in run else "nothing" for run in (first, second))
        sentence = f"Not the same: {metric} at step {step} was {one} and is {other}; {largest}."
        return sentence, False
    metrics = len({metric for _, metric in keys})
    count = f"{len(keys)} values of {metrics} metrics in steps {min(steps)} to {max(steps)}"
    if differences[worst]:
        return f"The same within the tolerance: {count}; {largest}.", True
    return f"The same, bit by bit: {count}.", True


def _find_run(path: str) -> Path:
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


def _command(run: Path, first: Values, out: Path, resumed: str | None) -> list[str]:
    is_tested = any(name.startswith("test/") for _, name in first)
    steps = max(step for step, _ in first) + 1
    return [
        *("fit", "--config", str(run / "config.yaml"), f"--test_after_fit={is_tested}".lower()),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={out.parent}"),
        *(f"--trainer.logger.name={out.name}", "--trainer.logger.version="),
        *(f"--trainer.default_root_dir={out}", f"--ckpt_path={resumed or 'null'}"),
        "--trainer.max_time=null",  # the number of steps is known
        f"--trainer.callbacks+={Repetition.__module__}.{Repetition.__name__}",
        *(f"--trainer.callbacks.run={run}", f"--trainer.callbacks.steps={steps}"),
    ]


def _read_record(run: Path) -> dict[str, Any]:
    path = run / "record.yaml"
    try:
        record = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        _ = record["seed"], record["data_hash"], record["weights_hash"], record["resumed_from"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read as the record of a run ({type(error).__name__}: {error})."
        ) from error
    return record


def _read_values(run: Path) -> Values:
    values = {
        (int(row.get("step", -1)), name): value
        for row in read_metrics(run)
        for name, value in row.items()
        if name not in ("step", "epoch")
    }
    if not values or min(values)[0] < 0:
        raise InputError(f"{run} logged no values, or rows without a step; give another run.")
    return values


def _difference(one: float | None, other: float | None) -> float:
    if one is None or other is None:
        return math.inf
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other)
    return math.inf if math.isnan(difference) else difference
