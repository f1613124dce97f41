"""``python -m gvsl_lightning profile``: time of each part of a pre-training step, memory, hours.

The steps are those of a Lightning trainer. After each of them the floor is measured: the backbone's
own forward and backward pass on the same tensors, with a trivial loss. What a step takes beyond the
floor is the cost of the method.
"""

import ctypes
import gc
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning_fabric.utilities.warnings import PossibleUserWarning
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.cli.main import CommandLine
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import require_writable, write_text
from gvsl_lightning.tasks.pretraining import PretrainTask

PARTS = (
    "load, crop, copy to device",
    "views",
    "forward: backbone",
    "forward: heads, losses",
    "backward: heads, losses",
    "backward: backbone",
    "gradient clipping",
    "optimiser",
)
"""Parts of a step in their order."""

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Short names of Lightning's precisions."""

_PROGRAM = "python -m gvsl_lightning profile"


def main(args: Sequence[str]) -> None:
    """Profile the model and the data of one or more configurations and print tables.

    Args:
        args: the words after ``profile``: ``--config`` and everything that ``fit`` takes, and

            - ``--compare``: configuration files, one column each. Each one is merged over all other
              words. The first one is what the others are compared with.
            - ``--size``: edges in voxels of cubic volumes; otherwise the configured patch.
            - ``--precision``: keys of `PRECISIONS`; otherwise the configured precision.
            - ``--repeats``: measured steps, after two that are not measured.
            - ``--json``: file for the figures, in seconds, bytes and hours.

    Raises:
        InputError: if a configuration is not for pre-training or an option is out of range.
    """
    words, files = _split_compared(args)
    options = _read(words, files[0])[0].config
    _require_file("--json", options.json)
    console, groups = Console(), []
    for size, precision in product(options.size or [None], options.precision or [None]):
        more = [f"--data.init_args.patch_size={[size] * 3}"] if size else []
        more += [f"--trainer.precision={PRECISIONS[precision]}"] if precision else []
        groups.append([_profile(words, file, more, options.repeats) for file in files])
        console.print(_table(groups[-1]))
    if options.json is not None:
        profiles = [{**asdict(one), "hours": one.hours} for group in groups for one in group]
        report = {"torch": torch.__version__, "profiles": profiles}
        write_text(Path(options.json), json.dumps(report, indent=2))


@dataclass(frozen=True)
class Run:
    """Length of the configured run.

    Attributes:
        batches: of each process; None if the configuration does not limit them.
        processes: devices of all nodes together.
        accumulated: batches for one step of the optimiser.
        num_workers: loader processes of each process.
    """

    batches: int | None
    processes: int
    accumulated: int
    num_workers: int

    @classmethod
    def of(cls, trainer: pl.Trainer, data: PairDataModule) -> "Run":
        """Read trainer and data module, which is set up."""
        processes = trainer.num_devices * trainer.num_nodes
        accumulated = trainer.accumulate_grad_batches
        limits = [trainer.max_steps * accumulated] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = math.ceil(len(data.train_dataloader()) / processes)
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(trainer.max_epochs * batches)
        return cls(min(limits, default=None), processes, accumulated, data.num_workers)


@dataclass(frozen=True)
class Profile:
    """Medians over the measured steps of one configuration.

    Attributes:
        configuration: its name.
        description: of network and device.
        precision: Lightning's name of it.
        shape: (N, D, H, W) of the fixed volumes of a batch.
        parts: seconds of each of `PARTS`.
        step: seconds of the whole step.
        floor: seconds of the backbone's own forward and backward pass.
        peak_memory: bytes during one step: on a GPU of all tensors, on a CPU of the whole process.
            None if the system does not report it.
        run: length of the configured run.
    """

    configuration: str
    description: str
    precision: str
    shape: tuple[int, ...]
    parts: dict[str, float]
    step: float
    floor: float
    peak_memory: int | None
    run: Run

    @property
    def hours(self) -> float | None:
        """Hours of the configured run, without validation, if loader processes have own cores."""
        if self.run.batches is None:
            return None
        update = self.parts["gradient clipping"] + self.parts["optimiser"]
        loading = self.parts["load, crop, copy to device"]
        computing = self.step - loading - update + update / self.run.accumulated
        workers = self.run.num_workers
        batch = max(computing, loading / workers) if workers else computing + loading
        return self.run.batches * batch / 3600


class Meter(pl.Callback):
    """Measures the parts of training steps, and the floor after each of them.

    The first two steps are not measured: they make the optimiser's state, compile the network and
    show the peak memory. Results are lists with one entry for each later step.

    Attributes:
        parts: seconds of each part.
        floors: seconds of the floor.
        shape: see `Profile`.
        peak_memory: see `Profile`.
    """

    def __init__(self) -> None:
        self.parts: list[dict[str, float]] = []
        self.floors: list[float] = []
        self.shape: tuple[int, ...] = ()
        self.peak_memory: int | None = None
        self._inputs: list[tuple[Callable[[Tensor], Any], Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the methods of the task tell the clock which part runs.

        Raises:
            InputError: if the device is neither a CPU nor a CUDA device.
        """
        task: Any = pl_module
        self._clock = clock = _Clock(task.device)
        for owner, method, part in (
            (task, "make_views", "views"),
            (task, "training_step", "forward: heads, losses"),
            (task, "backward", "backward: heads, losses"),
            (task, "configure_gradient_clipping", "gradient clipping"),
            (task, "on_train_batch_end", "optimiser"),
        ):
            if hasattr(owner, method):
                setattr(owner, method, clock.timed(getattr(owner, method), part))
        for method in ("forward", "encode"):
            setattr(task.backbone, method, self._watched(getattr(task.backbone, method)))
        clock.mark(PARTS[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.shape = (len(batch["fixed"]), *batch["fixed"].shape[2:])
        self._inputs = []
        self._clock.mark("optimiser")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        parts = dict.fromkeys(PARTS, 0.0) | self._clock.stop()
        if trainer.global_step == 1:
            _reset_peak_memory(pl_module.device)
        else:
            if trainer.global_step == 2:
                self.peak_memory = _peak_memory(pl_module.device)
            floor = self._measure_floor(trainer, pl_module)
            if trainer.global_step > 2:
                self.parts.append(parts)
                self.floors.append(floor)
        self._clock.mark(PARTS[0])

    def _watched(self, method: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """A method of the backbone that also keeps its input and marks its backward pass."""
        timed, clock = self._clock.timed(method, "forward: backbone"), self._clock

        @wraps(method)
        def watched(volumes: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return method(volumes)
            self._inputs.append((method, volumes.detach()))
            found = timed(volumes)
            # autograd runs the last operation first: with the gradient of a feature, the backward
            # pass of the heads is over
            for feature in [found] if isinstance(found, Tensor) else found:
                feature.register_hook(lambda gradient: clock.mark("backward: backbone"))
            return found

        return watched

    def _measure_floor(self, trainer: pl.Trainer, task: pl.LightningModule) -> float:
        task.zero_grad()
        self._clock.mark("floor")
        with trainer.precision_plugin.forward_context():
            means = []
            for method, volumes in self._inputs:
                found = method(volumes)
                features = [found] if isinstance(found, Tensor) else found
                means += [feature.float().mean() for feature in features]
        torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]
        return self._clock.stop()["floor"]


class _Clock:
    """Charges each interval to the mark that starts it.

    On a CUDA device the marks are events in its stream: measuring does not make it wait.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise InputError(
                f"profile cannot measure on {device}: add --trainer.accelerator=cpu or cuda."
            )
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        if self._cuda:
            if not self._marks:
                torch.cuda.synchronize()
            moment: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))

    def timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The method as a part of its own within the part that calls it."""

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            caller = self._marks[-1][0] if self._marks else PARTS[0]
            self.mark(part)
            result = method(*args, **kwargs)
            self.mark(caller)
            return result

        return timed

    def stop(self) -> dict[str, float]:
        """Seconds of each part since the first mark."""
        self.mark("")
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            duration = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[part] = seconds.get(part, 0.0) + duration
        self._marks = []
        return seconds


def _profile(words: Sequence[str], file: str, more: Sequence[str], repeats: int) -> Profile:
    """Train a few steps of a configuration on one device, with loading in this process."""
    line, task, data = _read([*words, *more], file)
    configured, device = line.trainer, line.trainer.strategy.root_device
    data.setup("fit")
    run = Run.of(configured, data)
    data.num_workers, data.drop_last = 0, True
    meter = Meter()
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=configured.precision,
        gradient_clip_val=configured.gradient_clip_val,
        gradient_clip_algorithm=configured.gradient_clip_algorithm,
        max_steps=repeats + 2,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # about loading in this process
        trainer.fit(task, datamodule=data)
    if meter.shape[0] < data.batch_size:
        raise InputError.about(
            "batch_size", f"is {data.batch_size} and there are {meter.shape[0]} training volumes."
        )
    counts = [sum(p.numel() for p in module.parameters()) for module in (task, task.backbone)]
    profile = Profile(
        configuration=Path(file).stem if file else "configured",
        description=f"{task.backbone.name}, {counts[1]:,} parameters, and heads, "
        f"{counts[0] - counts[1]:,}; {_name_of(device)}; torch {torch.__version__}",
        precision=str(configured.precision),
        shape=meter.shape,
        parts={name: statistics.median(part[name] for part in meter.parts) for name in PARTS},
        step=statistics.median(sum(part.values()) for part in meter.parts),
        floor=statistics.median(meter.floors),
        peak_memory=meter.peak_memory,
        run=run,
    )
    del line, task, data, trainer, meter, configured
    gc.collect()  # the memory of this configuration must not count for the next one
    return profile


def _read(words: Sequence[str], file: str) -> tuple[CommandLine, PretrainTask, PairDataModule]:
    more = [*(["--config", file] if file else []), "--trainer.logger=false"]
    line = CommandLine([*words, *more], run=False, add_arguments=_add_arguments)
    task, data = line.model, line.datamodule
    if not isinstance(task, PretrainTask) or not isinstance(data, PairDataModule):
        raise InputError(
            f"profile measures pre-training: give a configuration of a pre-training task and pairs "
            f"of volumes instead of {type(task).__name__} and {type(data).__name__}."
        )
    return line, task, data


def _split_compared(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the files of --compare from the words of every configuration."""
    parser = WordsParser(_PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--compare", nargs="+", default=[""])
    compared, words = parser.parse_known_args(list(args))
    return words, compared.compare


def _add_arguments(parser: Any) -> None:
    parser.prog = _PROGRAM
    parser.add_argument("--compare", nargs="+", help="configurations, one column each")
    parser.add_argument(
        "--size", type=PositiveInt, nargs="+", help="edges of cubic volumes, voxels"
    )
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS))
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="measured steps")
    parser.add_argument("--json", type=str | None, help="file for the figures")


def _table(columns: Sequence[Profile]) -> Table:
    table = Table(
        title="\n".join(dict.fromkeys(column.description for column in columns)),
        caption="seconds, and in brackets their ratio to the floor",
        title_justify="left",
    )
    table.add_column("")
    for column in columns:
        table.add_column(column.configuration, justify="right", overflow="fold")

    def add(name: str, cell: Callable[[Profile], str]) -> None:
        table.add_row(name, *map(cell, columns))

    def add_seconds(name: str, seconds: Callable[[Profile], float]) -> None:
        add(name, lambda one: f"{seconds(one):.4f} ({seconds(one) / one.floor:.3f})")

    add("pairs, volumes", lambda one: f"{one.shape[0]}, {'x'.join(map(str, one.shape[1:]))}")
    add("precision", lambda one: one.precision)
    table.add_section()
    for part in PARTS:
        add_seconds(part, lambda one, part=part: one.parts[part])  # type: ignore[misc]
    table.add_section()
    add_seconds("whole step", lambda one: one.step)
    add_seconds("floor: backbone forward and backward", lambda one: one.floor)
    if len(columns) > 1:
        add(
            "whole step / that of the first column", lambda one: f"{one.step / columns[0].step:.3f}"
        )
    add("voxels per second", lambda one: f"{2 * math.prod(one.shape) / one.step:,.0f}")
    add("peak memory, GiB", lambda one: _figure(one.peak_memory, 2**30))
    table.add_section()
    add("configured run: batches x processes", lambda one: _batches(one.run))
    add("configured run: hours", lambda one: _figure(one.hours))
    return table


def _batches(run: Run) -> str:
    return "unknown" if run.batches is None else f"{run.batches:,} x {run.processes}"


def _figure(value: float | None, unit: float = 1) -> str:
    if value is None:
        return "unknown"
    return f"{value / unit:,.0f}" if value >= 1000 * unit else f"{value / unit:.3g}"


def _require_file(option: str, file: str | None) -> None:
    """Check the place of a file before the measurement."""
    if file is None:
        return
    if not Path(file).name or Path(file).is_dir():
        raise InputError(f"{option} is {file!r}; give the name of a file.")
    require_writable(Path(file).parent)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # freed memory that the C library keeps would count
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    # https://docs.kernel.org/filesystems/proc.html: 5 resets the peak; elsewhere it only grows
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(peak[1]) * 1024
    return None


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
