"""``python -m gvsl_lightning profile``: where the time of a pre-training step goes.

The floor is the backbone's own forward and backward pass on the very tensors that the step gives
it, with a trivial loss, measured alternately with the step in the same process. What a step takes
beyond it is what the method costs. The floor is compared with a matrix product in turn, the fastest
that the device does. Several configurations are measured alternately too, so that whatever else the
machine does is fair to all.
"""

import ctypes
import errno
import gzip
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from monai.data.dataset import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gvsl_lightning.cli.diagnosis import WordsParser
from gvsl_lightning.cli.main import CommandLine
from gvsl_lightning.datamodules.pairs import (
    PairDataModule,
    PairDataset,
    PairSampler,
    resumable_loader,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Features
from gvsl_lightning.nn.losses import LocalNCCLoss
from gvsl_lightning.runs.files import require_writable, write_text, write_whole
from gvsl_lightning.tasks.gvsl import GVSL

PARTS = (
    "load, crop, copy to device",
    "corruption",
    "spatial transform",
    "forward: backbone",
    "forward: heads, warp",
    "forward: losses",
    "backward: heads, warp, losses",
    "backward: backbone",
    "gradient clipping",
    "optimiser",
)
"""Parts of a step in their order."""

PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Names of precisions; the two halves run under autocast, as Lightning's ``bf16-mixed`` does."""

_LIGHTNING_PRECISIONS = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}

HELP = """\
Measure where the time of a pre-training step goes, and what a whole run takes.

python -m gvsl_lightning profile --config FILE [--OPTION VALUE ...] [--KEY=VALUE ...]

Besides what is listed here, it takes all options of fit.

  --config FILE           settings of a pre-training
  --size 64 96            edges in voxels of cubic volumes; otherwise the configured patch
  --precision fp32 bf16   or fp16; otherwise the configured one
  --pairs 1               pairs of a batch
  --repeats 3             measured steps
  --threads 2             CPU threads
  --compare FILE FILE     settings to measure alternately, each merged over all others
  --json FILE             all figures
  --trace FILE            one step for chrome://tracing or ui.perfetto.dev

Examples:
  python -m gvsl_lightning profile --config configs/pretrain/gvsl.yaml --data.init_args.root=FOLDER
  python -m gvsl_lightning profile --config configs/quickstart.yaml --size 32 48 \\
    --precision fp32 bf16
  python -m gvsl_lightning profile --config configs/pretrain/gvsl.yaml --size 64 \\
    --compare configs/pretrain/gvsl.yaml configs/pretrain/without_restoration.yaml

More:
  --help=all              all options, those of fit as well
  python -m gvsl_lightning fit --help    the options of fit
"""
"""The page of ``--help``."""

_PROGRAM = "python -m gvsl_lightning profile"


def main(args: Sequence[str]) -> None:
    """Profile the model and the data of one or more configurations and print tables.

    Args:
        args: the words after ``profile``: ``--config`` and everything that ``fit`` takes, and

            - ``--compare``: configuration files, each of them one column: merged over all other
              words, as one more ``--config`` at their end. The first is what the others are
              compared with.
            - ``--size``: edges in voxels of cubic volumes; otherwise the configured patch.
            - ``--precision``: ``fp32``, ``bf16``, ``fp16``; otherwise the configured one.
            - ``--pairs``: pairs per batch.
            - ``--repeats``: measured steps, after two that are not; medians are printed.
            - ``--threads``: CPU threads; otherwise PyTorch's own choice.
            - ``--json``: file for the figures, in seconds, bytes and operations.
            - ``--trace``: file for a Chrome trace of one more step, which ``chrome://tracing`` and
              https://ui.perfetto.dev open; compressed if it ends in ``.gz``.

    Raises:
        InputError: if a configuration is not for pre-training or an argument is out of range.
    """
    words, files = _take_compared(args)
    lines = [
        CommandLine(
            [*words, *(["--config", file] if file else []), "--trainer.logger=false"],
            run=False,
            add_arguments=_add_arguments,
        )
        for file in files or [""]
    ]
    options = lines[0].config
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes: list[Any] = [(edge, edge, edge) for edge in options.size or []] or [None]
    precisions: list[Any] = options.precision or [None]
    if options.trace is not None and len(lines) * len(sizes) * len(precisions) > 1:
        raise InputError(
            "--trace holds one step: give one configuration, one --size and one --precision."
        )
    for name in ("json", "trace"):
        _require_file(f"--{name}", options[name])
    console = Console()
    configurations = [
        _Configuration.of(line, Path(file).stem, console)
        for line, file in zip(lines, files or ["configured"], strict=True)
    ]
    groups = []
    for size in sizes:
        for precision in precisions:
            steps = [
                configuration.steps(size, precision, options.pairs)
                for configuration in configurations
            ]
            profiles = _measure_alternately(steps, options.repeats)
            groups.append(
                [
                    _figures(configuration, profile, profiles[0])
                    for configuration, profile in zip(configurations, profiles, strict=True)
                ]
            )
            console.print(_table(groups[-1]))
    if options.json is not None:
        report = {
            "torch": torch.__version__,
            "device": _describe(configurations[0].device),
            "profiles": list(chain.from_iterable(groups)),
        }
        write_text(Path(options.json), json.dumps(report, indent=2))
    if options.trace is not None:
        Path(options.trace).parent.mkdir(parents=True, exist_ok=True)
        steps[0].trace(Path(options.trace))


@dataclass(frozen=True)
class Profile:
    """Medians over the repeats.

    Attributes:
        size: (D, H, W) of the volumes.
        precision: a key of `PRECISIONS`.
        pairs: pairs of volumes in a batch.
        repeats: measured steps.
        parts: seconds of each of `PARTS`, measured inside the whole steps.
        step: seconds of the whole step.
        floor: seconds of the backbone's own forward and backward pass.
        ncc: seconds of forward and backward pass of the local NCC of this many volumes.
        flops: floating-point operations of the backbone's convolutions and matrix products, forward
            and backward, on what the step gives it; what activation checkpointing computes again
            counts again.
        matmul_size: edge of the square matrices of the product that stands for what the device can
            do.
        matmul_flops_per_second: of that product, in this precision, at its best.
        peak_memory: bytes, of one step: on a GPU of all tensors, on a CPU of the whole process,
            without the tensors of configurations that it is compared with, but with the volumes
            that they cache. None where the system does not tell.
    """

    size: tuple[int, int, int]
    precision: str
    pairs: int
    repeats: int
    parts: dict[str, float]
    step: float
    floor: float
    ncc: float
    flops: int
    matmul_size: int
    matmul_flops_per_second: float
    peak_memory: int | None

    @property
    def ratio(self) -> float:
        """The whole step over the floor."""
        return self.step / self.floor

    @property
    def voxels_per_second(self) -> float:
        """Voxels of both volumes of a pair that are trained on in a second."""
        d, h, w = self.size
        return 2 * self.pairs * d * h * w / self.step

    def figures(self) -> dict[str, Any]:
        """All figures under the names of the attributes and properties."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "voxels_per_second": self.voxels_per_second,
            "floor_flops_per_second": self.flops / self.floor,
            "step_flops_per_second": self.flops / self.step,
            "floor_of_matmul": self.flops / self.floor / self.matmul_flops_per_second,
            "step_of_matmul": self.flops / self.step / self.matmul_flops_per_second,
        }


def measure(
    model: GVSL,
    data: PairDataModule,
    precision: str = "fp32",
    repeats: int = 3,
    gradient_clip_val: float | None = None,
) -> Profile:
    """Profile training steps of a task on batches of a data module, which train its weights.

    Args:
        model: the task, on the device to measure.
        data: the data; batches are loaded in this process.
        precision: a key of `PRECISIONS`.
        repeats: measured steps, after two that are not measured.
        gradient_clip_val: largest norm of the gradient; None or 0 clips nothing.

    Returns:
        The figures.

    Raises:
        InputError: if the device is neither a CPU nor a CUDA device, or there are fewer volumes
            than pairs in a batch.
    """
    steps = _Steps(model, data, precision, gradient_clip_val)
    return _measure_alternately([steps], repeats)[0]


def _measure_alternately(configurations: "Sequence[_Steps]", repeats: int) -> list[Profile]:
    """Profile configurations in turn."""
    warm = []
    for steps in configurations:
        if steps.model.backbone.compiled:
            torch.compiler.reset()  # it gives up after eight shapes
    for steps in configurations:
        steps.train()  # makes the optimiser's state, and compiles
        others = {
            tensor for other in configurations if other is not steps for tensor in other.held()
        }
        warm.append((steps.peak_memory(_size_in_bytes(others)), steps.flops(), steps.matmul_size()))
    rounds: list[list[tuple[dict[str, float], float, float, float]]] = [[] for _ in configurations]
    for _ in range(repeats):
        for steps, (_, _, size), measured in zip(configurations, warm, rounds, strict=True):
            measured.append((steps.train(), steps.floor(), steps.ncc(), steps.matmul(size)))
    profiles = []
    for steps, (memory, flops, size), measured in zip(configurations, warm, rounds, strict=True):
        parts, floors, nccs, matmuls = zip(*measured, strict=True)
        fixed = steps.batch["fixed"]
        profiles.append(
            Profile(
                size=(fixed.shape[2], fixed.shape[3], fixed.shape[4]),
                precision=steps.precision,
                pairs=len(fixed),
                repeats=repeats,
                parts={name: statistics.median(part[name] for part in parts) for name in PARTS},
                step=statistics.median(sum(part.values()) for part in parts),
                floor=statistics.median(floors),
                ncc=statistics.median(nccs),
                flops=flops,
                matmul_size=size,
                matmul_flops_per_second=2 * size**3 / min(matmuls),
                peak_memory=memory,
            )
        )
    return profiles


class _Steps:
    """Whole training steps, and beside them the floor and the NCC on the same tensors."""

    def __init__(
        self,
        model: GVSL,
        data: PairDataModule,
        precision: str,
        gradient_clip_val: float | None,
    ) -> None:
        self.model = model.train()
        self.data = data
        self.precision = precision
        self.dtype = dtype = PRECISIONS[precision]
        self.gradient_clip_val = gradient_clip_val
        self.batch: dict[str, Any] = {}
        self._clock = _Clock(model.device)
        self._seen: list[Tensor] = []
        self._optimizer = _optimizer(model)
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=dtype is torch.float16)
        loader = data.train_dataloader()
        if data.train_pairs is None or len(data.train_pairs) < data.batch_size:
            raise InputError(
                f"There are fewer training volumes than the {data.batch_size} pairs of a batch; "
                "give fewer --pairs or more volumes."
            )
        self._batches = (
            batch
            for batch in chain.from_iterable(repeat(loader))
            if len(batch["fixed"]) == data.batch_size
        )

    def train(self) -> dict[str, float]:
        """One step as Lightning takes it; returns the seconds of each part."""
        mark = self._clock.mark
        with self._instrumented():
            mark("load, crop, copy to device")
            batch = self.data.on_before_batch_transfer(next(self._batches), 0)
            batch = self.data.transfer_batch_to_device(batch, self.model.device, 0)
            mark("spatial transform")
            self.batch = self.data.on_after_batch_transfer(batch, 0)
            mark("forward: heads, warp")
            with self._autocast():
                losses, _ = self.model.compute_losses(self.batch)
            mark("optimiser")
            self._optimizer.zero_grad()
            mark("backward: heads, warp, losses")
            self._scaler.scale(losses["total"]).backward()  # type: ignore[no-untyped-call]
            mark("gradient clipping")
            if self.gradient_clip_val:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_val)
            mark("optimiser")
            self._scaler.step(self._optimizer)
            self._scaler.update()
            seconds = self._clock.stop()
        return dict.fromkeys(PARTS, 0.0) | seconds

    def floor(self) -> float:
        """Seconds of the backbone alone, on what the last step gave it."""
        self._optimizer.zero_grad()
        return self._time(self._run_backbone)

    def flops(self) -> int:
        """Floating-point operations of what `floor` measures."""
        compiled, self.model.backbone.compiled = self.model.backbone.compiled, False
        with FlopCounterMode(display=False) as counter:
            self._run_backbone()
        self.model.backbone.compiled = compiled
        return int(counter.get_total_flops())

    def matmul_size(self) -> int:
        """The smallest power of two from 512 whose product keeps the device busy for 10 ms."""
        size = 512
        while size < 16384 and self.matmul(size) < 0.01:
            size *= 2
        return size

    def matmul(self, size: int) -> float:
        """Seconds of the product of two square matrices, the least of three."""
        a, b = torch.rand(2, size, size, device=self.model.device).to(self.dtype)
        before = torch.get_float32_matmul_precision()
        if self.model.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            torch.set_float32_matmul_precision("high")  # as in the convolutions
        torch.mm(a, b)
        seconds = min(self._time(lambda: torch.mm(a, b)) for _ in range(3))
        torch.set_float32_matmul_precision(before)
        return seconds

    def peak_memory(self, others: int) -> int | None:
        """Largest memory of one more step, less what others hold meanwhile; all in bytes."""
        _reset_peak_memory(self.model.device)
        self.train()
        peak = _peak_memory(self.model.device)
        return None if peak is None else peak - others

    def held(self) -> Iterator[Tensor]:
        """Tensors that stay between two steps, on the device."""
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            yield from (tensor,) if tensor.grad is None else (tensor, tensor.grad)
        states = chain.from_iterable(state.values() for state in self._optimizer.state.values())
        for tensor in chain(states, self.batch.values(), self._seen):
            if isinstance(tensor, Tensor):
                yield tensor

    def trace(self, path: Path) -> None:
        """Write a Chrome trace of one more step, with its parts as ranges."""
        self._clock.tracing = True
        with torch.profiler.profile(record_shapes=True) as profiler:
            self.train()
        self._clock.tracing = False
        with TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            plain = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(plain))
            if not plain.is_file():  # PyTorch raises nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            content = plain.read_bytes()
        packed = gzip.compress(content) if path.suffix == ".gz" else content
        write_whole(path, lambda file: file.write(packed))

    def _run_backbone(self) -> None:
        with self._autocast():
            means = [
                feature.float().mean()
                for volumes in self._seen
                for feature in self.model.backbone(volumes)
            ]
        torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]

    def ncc(self) -> float:
        """Seconds of the local NCC and its gradient with respect to one of the volumes."""
        moving, fixed = self.batch["moving"].clone().requires_grad_(), self.batch["fixed"]
        loss = LocalNCCLoss()
        return self._time(lambda: loss(moving, fixed).backward())

    def _time(self, function: Callable[[], object]) -> float:
        self._clock.mark("")
        function()
        return self._clock.stop()[""]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type,
            dtype=None if self.dtype is torch.float32 else self.dtype,
            enabled=self.dtype is not torch.float32,
        )

    @contextmanager
    def _instrumented(self) -> Iterator[None]:
        """Let the modules tell the clock which part runs, and keep what the backbone is given."""
        self._seen = []
        with ExitStack() as stack:
            for module, part in self._modules():
                for handle in self._clock.attach(module, part):
                    stack.callback(handle.remove)
            backbone = self.model.backbone
            for handle in (
                backbone.register_forward_pre_hook(self._keep),
                backbone.register_forward_hook(self._mark_backward),
            ):
                stack.callback(handle.remove)
            yield

    def _modules(self) -> Iterator[tuple[nn.Module, str]]:
        if self.data.corruption is not None:
            yield self.data.corruption, "corruption"
        yield self.model.backbone, "forward: backbone"
        for module in self.model.children():
            if not any(True for _ in module.parameters()):
                yield module, "forward: losses"

    def _keep(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self._seen.append(args[0].detach())

    def _mark_backward(self, module: nn.Module, args: tuple[Tensor], features: Features) -> None:
        def reached(gradient: Tensor) -> None:
            self._clock.mark("backward: backbone")

        # autograd runs what came last first: once a feature's gradient is there, the heads are done
        for feature in features:
            feature.register_hook(reached)  # type: ignore[no-untyped-call]


def _optimizer(model: GVSL) -> torch.optim.Optimizer:
    # the cosine schedule asks a running trainer for its last step, and no schedule costs anything
    schedule, model.hparams["schedule"] = model.hparams["schedule"], "constant"
    configured = cast(dict[str, Any], model.configure_optimizers())
    model.hparams["schedule"] = schedule
    return cast(torch.optim.Optimizer, configured["optimizer"])


class _Clock:
    """Gives the time between marks to the part that the first of two neighbouring marks names.

    On a CUDA device the marks are events in its stream, so that measuring does not make it wait.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise InputError(
                f"profile cannot measure on {device}: add --trainer.accelerator=cpu or cuda."
            )
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.tracing = False
        self._range: torch.profiler.record_function | None = None

    def mark(self, part: str) -> None:
        """Begin a part and end the one before."""
        if self._cuda and not self._marks:
            torch.cuda.synchronize()
        moment: Any
        if self._cuda:
            moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self.tracing and part:
            self._range = torch.profiler.record_function(part)
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def attach(self, module: nn.Module, part: str) -> list[torch.utils.hooks.RemovableHandle]:
        """Make a module's forward pass a part of its own within what surrounds it."""
        outer: list[str] = []

        def begin(*_: Any) -> None:
            outer.append(self._marks[-1][0])
            self.mark(part)

        def end(*_: Any) -> None:
            self.mark(outer.pop())

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

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


@dataclass(frozen=True)
class _ConfiguredRun:
    """How much the configuration trains.

    Attributes:
        batches: of each process; None where the configuration does not say.
        pairs: in each of them.
        processes: all of them together.
        accumulated: batches behind one step of the optimiser.
        num_workers: loader processes of each process.
    """

    batches: int | None
    pairs: int
    processes: int
    accumulated: int
    num_workers: int

    @classmethod
    def of(cls, trainer: pl.Trainer, data: PairDataModule, loaded: bool) -> "_ConfiguredRun":
        """Read trainer and data module, before the latter is changed for measuring."""
        processes = trainer.num_devices * trainer.num_nodes
        accumulated = trainer.accumulate_grad_batches
        limits = [trainer.max_steps * accumulated] if trainer.max_steps > 0 else []
        if loaded and trainer.max_epochs is not None and trainer.max_epochs > 0:
            assert data.train_pairs is not None
            sampler = PairSampler(len(data.train_pairs), num_replicas=processes)
            batches = len(
                resumable_loader(data.train_pairs, sampler, None, data.drop_last, data.batch_size)
            )
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(trainer.max_epochs * batches)
        return cls(
            min(limits, default=None), data.batch_size, processes, accumulated, data.num_workers
        )

    def hours(self, profile: Profile) -> float | None:
        """Hours of training alone, if loader processes have cores of their own."""
        if self.batches is None:
            return None
        larger = self.pairs / profile.pairs
        update = profile.parts["gradient clipping"] + profile.parts["optimiser"]
        loading = profile.parts["load, crop, copy to device"] * larger
        computing = (profile.step - update) * larger - loading + update / self.accumulated
        if self.num_workers > 0:
            return self.batches * max(computing, loading / self.num_workers) / 3600
        return self.batches * (computing + loading) / 3600


@dataclass(frozen=True)
class _Configuration:
    """What is measured in one column."""

    name: str
    model: GVSL
    data: PairDataModule
    device: torch.device
    patch_size: tuple[int, int, int]
    precision: str | None
    gradient_clip_val: float | None
    loaded: bool
    run: _ConfiguredRun

    @classmethod
    def of(cls, line: CommandLine, name: str, console: Console) -> "_Configuration":
        """Check a configuration, set its data up and say what it is."""
        model, data, trainer = line.model, line.datamodule, line.trainer
        if not isinstance(model, GVSL) or not isinstance(data, PairDataModule):
            raise InputError(
                f"profile measures pre-training: give a configuration with a GVSL task and pairs "
                f"of volumes instead of {type(model).__name__} and {type(data).__name__}."
            )
        device = trainer.strategy.root_device
        console.print(
            f"{name}: {model.hparams['backbone']}, {_parameters(model.backbone):,} parameters, and "
            f"heads, {_parameters(model) - _parameters(model.backbone):,}; {_describe(device)}; "
            f"torch {torch.__version__}"
        )
        loaded = _load(data, console)
        return cls(
            name,
            model.to(device),
            data,
            device,
            data.patch_size,
            None if line.config.precision else _configured_precision(trainer),
            trainer.gradient_clip_val,
            loaded,
            _ConfiguredRun.of(trainer, data, loaded),
        )

    def steps(self, size: tuple[int, int, int] | None, precision: str | None, pairs: int) -> _Steps:
        """Steps of this size and precision; None: the configured one."""
        channels = None if self.loaded else self.model.hparams["in_channels"]
        _set_size(self.data, size or self.patch_size, pairs, channels)
        chosen = precision or self.precision
        assert chosen is not None
        return _Steps(self.model, self.data, chosen, self.gradient_clip_val)


def _figures(configuration: _Configuration, profile: Profile, first: Profile) -> dict[str, Any]:
    """What is reported of a configuration: see `Profile`, and how much its run takes."""
    run, hours = configuration.run, configuration.run.hours(profile)
    return {
        "configuration": configuration.name,
        **profile.figures(),
        "of_first": profile.step / first.step,
        "run": asdict(run),
        "hours": hours,
        "device_hours": None if hours is None else hours * run.processes,
    }


def _take_compared(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words from the files behind --compare, which are no words of one configuration."""
    parser = WordsParser(_PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--compare", nargs="+", default=[])
    compared, words = parser.parse_known_args(list(args))
    return words, compared.compare


def _add_arguments(parser: Any) -> None:
    parser.prog = _PROGRAM
    parser.add_argument(
        "--compare", nargs="+", help="configurations to measure alternately, one column each"
    )
    parser.add_argument(
        "--size", type=PositiveInt, nargs="+", help="edges of cubic volumes, voxels"
    )
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS))
    parser.add_argument("--pairs", type=PositiveInt, default=1, help="pairs per batch")
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="measured steps")
    parser.add_argument("--threads", type=PositiveInt | None, help="CPU threads")
    parser.add_argument("--json", type=str | None, help="file for the figures")
    parser.add_argument("--trace", type=str | None, help="file for a Chrome trace of a step")


def _configured_precision(trainer: pl.Trainer) -> str:
    precision = str(trainer.precision)
    if precision not in _LIGHTNING_PRECISIONS:
        raise InputError(
            f"profile knows no precision {precision}: add --precision with {', '.join(PRECISIONS)}."
        )
    return _LIGHTNING_PRECISIONS[precision]


def _load(data: PairDataModule, console: Console) -> bool:
    """Set the data up; False where there is none, which must not keep anyone from measuring."""
    try:
        data.setup("fit")
    except InputError as error:
        console.print(f"Measuring on noise, without loading, as there is no data: {error}")
        return False
    return True


def _set_size(
    data: PairDataModule, size: tuple[int, int, int], pairs: int, noise_channels: int | None
) -> None:
    """Make the data module give batches of this size, loaded in this process."""
    data.batch_size, data.num_workers = pairs, 0
    if noise_channels is not None:
        count = max(2, pairs)
        volumes = [
            {"image": torch.rand(noise_channels, *size), "name": "noise"} for _ in range(count)
        ]
        pairs_of_noise = [(index, (index + 1) % count, 0) for index in range(count)]
        data.train_pairs = PairDataset(cast(Any, Dataset(volumes)), size, pairs_of_noise)
    assert data.train_pairs is not None
    data.train_pairs.patch_size = size


def _table(columns: list[dict[str, Any]]) -> Table:
    """One column for each of `_figures`."""
    pairs = columns[0]["pairs"]
    table = Table(
        title=f"batch of {pairs} pair{'s' * (pairs > 1)}, median of {columns[0]['repeats']}, "
        "seconds (of the floor)",
        title_justify="left",
    )
    table.add_column("")
    for column in columns:
        table.add_column(column["configuration"], justify="right", overflow="fold")

    def add(name: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *map(cell, columns))

    def add_seconds(name: str, of: Callable[[dict[str, Any]], float]) -> None:
        add(name, lambda column: f"{of(column):.4f} ({of(column) / column['floor']:.3f})")

    def add_rate(name: str, key: str) -> None:
        add(
            f"{name}, GFLOP/s (of the product)",
            lambda column: (
                f"{column[f'{key}_flops_per_second'] / 1e9:,.1f} ({column[f'{key}_of_matmul']:.3f})"
            ),
        )

    add("volumes", lambda column: "x".join(map(str, column["size"])))
    add("precision", lambda column: str(column["precision"]))
    table.add_section()
    for part in PARTS:
        add_seconds(part, lambda column, part=part: column["parts"][part])  # type: ignore[misc]
    table.add_section()
    add_seconds("whole step", lambda column: column["step"])
    add_seconds("floor: backbone forward and backward", lambda column: column["floor"])
    add_seconds("NCC forward and backward", lambda column: column["ncc"])
    if len(columns) > 1:
        add("whole step, of the first column's", lambda column: f"{column['of_first']:.3f}")
    table.add_section()
    add("voxels per second", lambda column: f"{column['voxels_per_second']:,.0f}")
    add("backbone, GFLOP", lambda column: f"{column['flops'] / 1e9:,.1f}")
    add_rate("floor", "floor")
    add_rate("whole step", "step")
    add(
        "matrix product, GFLOP/s (edge)",
        lambda column: f"{column['matmul_flops_per_second'] / 1e9:,.1f} ({column['matmul_size']})",
    )
    add(
        "peak memory, GiB",
        lambda column: (
            "unknown" if column["peak_memory"] is None else f"{column['peak_memory'] / 2**30:.2f}"
        ),
    )
    table.add_section()
    runs = [column["run"] for column in columns]
    table.add_row(
        "configured run: batches x pairs x processes",
        *(
            "unknown"
            if run["batches"] is None
            else f"{run['batches']:,} x {run['pairs']} x {run['processes']}"
            for run in runs
        ),
    )
    for name, key in (("hours", "hours"), ("hours x processes", "device_hours")):
        add(
            f"configured run: {name}",
            lambda column, key=key: (  # type: ignore[misc]
                "unknown" if column[key] is None else _short(column[key])
            ),
        )
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _require_file(option: str, file: str | None) -> None:
    """Look at the place of a file before what it is to hold is measured."""
    if file is None:
        return
    if not Path(file).name or Path(file).is_dir():
        raise InputError(f"{option} is {file!r}; give the name of a file.")
    require_writable(Path(file).parent)


def _size_in_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # what was freed but kept to be used again would count
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    # https://docs.kernel.org/filesystems/proc.html: 5 resets the peak; elsewhere it only grows
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else None


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
