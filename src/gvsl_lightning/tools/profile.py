"""``python -m gvsl_lightning profile``: time of each part of a pre-training step, memory, hours."""

import ctypes
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
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning_fabric.utilities.warnings import PossibleUserWarning
from rich.console import Console
from rich.table import Table
from torch import Tensor

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

_LOADING, _VIEWS, _FORWARD, _HEADS, _HEADS_BACKWARD, _BACKWARD, _CLIPPING, _OPTIMISER = PARTS
_FLOOR = "floor"


def main(args: Sequence[str]) -> None:
    """Profile the model and the data of a configuration and print a table.

    Args:
        args: the words after ``profile``: ``--config`` and everything that ``fit`` takes, and

            - ``--repeats``: measured steps, after two that are not measured.
            - ``--json``: file for the figures, in seconds, bytes and hours.

    Raises:
        InputError: if the configuration is not for pre-training or an option is out of range.
    """
    words = [*args, "--trainer.logger=false"]
    line = CommandLine(words, run=False, add_arguments=_add_arguments)
    task, data, file = line.model, line.datamodule, line.config.json
    if not isinstance(task, PretrainTask) or not isinstance(data, PairDataModule):
        raise InputError(
            f"profile measures pre-training: give a configuration of a pre-training task and pairs "
            f"of volumes instead of {type(task).__name__} and {type(data).__name__}."
        )
    if file is not None:
        if not Path(file).name or Path(file).is_dir():
            raise InputError(f"--json is {file!r}; give the name of a file.")
        require_writable(Path(file).parent)
    profile = measure(line.trainer, task, data, line.config.repeats)
    Console().print(_table(profile))
    if file is not None:
        report = {"torch": torch.__version__, **asdict(profile), "hours": profile.hours}
        write_text(Path(file), json.dumps(report, indent=2))


@dataclass(frozen=True)
class Profile:
    """Medians over the measured steps, and the length of the configured run.

    Attributes:
        description: of network and device.
        precision: Lightning's name of it.
        shape: (N, D, H, W) of the fixed volumes of a batch.
        parts: seconds of each of `PARTS`.
        step: seconds of the whole step.
        floor: seconds of the backbone's own forward and backward pass.
        peak_memory: bytes during one step: on a GPU of all tensors, on a CPU of the whole process.
            None if the system does not report it.
        batches: of each process in the run; None if the configuration does not limit them.
        processes: devices of all nodes together.
        accumulated: batches for one step of the optimiser.
        num_workers: loader processes of each process.
    """

    description: str
    precision: str
    shape: tuple[int, ...]
    parts: dict[str, float]
    step: float
    floor: float
    peak_memory: int | None
    batches: int | None
    processes: int
    accumulated: int
    num_workers: int

    @property
    def hours(self) -> float | None:
        """Hours of the configured run, without validation, if loader processes have own cores."""
        if self.batches is None:
            return None
        update = self.parts[_CLIPPING] + self.parts[_OPTIMISER]
        loading = self.parts[_LOADING]
        computing = self.step - loading - update + update / self.accumulated
        workers = self.num_workers
        batch = max(computing, loading / workers) if workers else computing + loading
        return self.batches * batch / 3600


def count_batches(trainer: pl.Trainer, data: PairDataModule) -> int | None:
    """Training batches of each process; None if the trainer does not limit them."""
    limits = []
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        processes = trainer.num_devices * trainer.num_nodes
        batches = math.ceil(len(data.train_dataloader()) / processes)
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        limits.append(trainer.max_epochs * batches)
    return min(limits, default=None)


def measure(trainer: pl.Trainer, task: PretrainTask, data: PairDataModule, repeats: int) -> Profile:
    """Train a few steps on one device, with loading in this process."""
    data.setup("fit")
    batches, num_workers = count_batches(trainer, data), data.num_workers
    data.num_workers, data.drop_last = 0, True
    device, meter = trainer.strategy.root_device, Meter()
    short = pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
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
        short.fit(task, datamodule=data)
    if meter.shape[0] < data.batch_size:
        raise InputError.about(
            "batch_size", f"is {data.batch_size} and there are {meter.shape[0]} training volumes."
        )
    count, total = (sum(p.numel() for p in part.parameters()) for part in (task.backbone, task))
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return Profile(
        description=f"{task.backbone.name}, {count:,} parameters, and heads, {total - count:,}; "
        f"{name}; torch {torch.__version__}",
        precision=str(trainer.precision),
        shape=meter.shape,
        parts={name: statistics.median(part[name] for part in meter.parts) for name in PARTS},
        step=statistics.median(sum(part.values()) for part in meter.parts),
        floor=statistics.median(meter.floors),
        peak_memory=meter.peak_memory,
        batches=batches,
        processes=trainer.num_devices * trainer.num_nodes,
        accumulated=trainer.accumulate_grad_batches,
        num_workers=num_workers,
    )


class Meter(pl.Callback):
    """Measures the parts of training steps, and the floor after each step.

    The floor is the backbone's own forward and backward pass on the same tensors, with a trivial
    loss. The first two steps are not measured: they make the optimiser's state, compile the network
    and show the peak memory. Lists have one entry for each later step.

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
        """Let the methods of the task tell the clock which part runs."""
        task: Any = pl_module
        self._clock = _Clock(task.device)
        for method, part in (
            ("make_views", _VIEWS),
            ("training_step", _HEADS),
            ("backward", _HEADS_BACKWARD),
            ("configure_gradient_clipping", _CLIPPING),
            ("on_train_batch_end", _OPTIMISER),
        ):
            if hasattr(task, method):
                setattr(task, method, self._clock.timed(getattr(task, method), part))
        for method in ("forward", "encode"):
            setattr(task.backbone, method, self._timed_backbone(getattr(task.backbone, method)))
        self._clock.mark(_LOADING)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.shape = (len(batch["fixed"]), *batch["fixed"].shape[2:])
        self._inputs = []
        self._clock.mark(_OPTIMISER)

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
        self._clock.mark(_LOADING)

    def _timed_backbone(self, method: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """A method of the backbone that also keeps its input and marks its backward pass."""
        forward, clock = self._clock.timed(method, _FORWARD), self._clock

        @wraps(method)
        def timed(volumes: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return method(volumes)
            self._inputs.append((method, volumes.detach()))
            found = forward(volumes)
            # autograd runs the last operation first: with the gradient of a feature, the backward
            # pass of the heads is over
            for feature in _features(found):
                feature.register_hook(lambda gradient: clock.mark(_BACKWARD))
            return found

        return timed

    def _measure_floor(self, trainer: pl.Trainer, task: pl.LightningModule) -> float:
        task.zero_grad()
        self._clock.mark(_FLOOR)
        with trainer.precision_plugin.forward_context():
            means = [
                feature.float().mean()
                for method, volumes in self._inputs
                for feature in _features(method(volumes))
            ]
        torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]
        return self._clock.stop()[_FLOOR]


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
            caller = self._marks[-1][0] if self._marks else _LOADING
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


def _features(found: Any) -> Any:
    return [found] if isinstance(found, Tensor) else found


def _add_arguments(parser: Any) -> None:
    parser.prog = "python -m gvsl_lightning profile"
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="measured steps")
    parser.add_argument("--json", type=str | None, help="file for the figures")


def _table(profile: Profile) -> Table:
    table = Table(title=profile.description, title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("ratio to the floor", justify="right")
    steps = {"whole step": profile.step, "floor: backbone forward and backward": profile.floor}
    for name, seconds in {**profile.parts, **steps}.items():
        ends = name in (PARTS[-1], list(steps)[-1])
        ratio = f"{seconds / profile.floor:.3f}"
        table.add_row(name, f"{seconds:.4f}", ratio, end_section=ends)
    batches = "unknown" if profile.batches is None else f"{profile.batches:,}"
    memory = profile.peak_memory
    for name, figure in (
        ("pairs, volumes", f"{profile.shape[0]}, {'x'.join(map(str, profile.shape[1:]))}"),
        ("precision", profile.precision),
        ("voxels per second", f"{2 * math.prod(profile.shape) / profile.step:,.0f}"),
        ("peak memory, GiB", _figure(None if memory is None else memory / 2**30)),
        ("configured run: batches x processes", f"{batches} x {profile.processes}"),
        ("configured run: hours", _figure(profile.hours)),
    ):
        table.add_row(name, figure)
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


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
