"""``python -m gvsl_lightning profile``: where the time of a pre-training step goes.

The floor is the backbone's own forward and backward pass on the very tensors that the step gives
it, with a trivial loss, measured alternately with the step in the same process. What a step takes
beyond it is what the method costs.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from monai.data.dataset import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gvsl_lightning.backbones import Features
from gvsl_lightning.cli import CommandLine
from gvsl_lightning.datamodules.base import PairDataModule, PairDataset
from gvsl_lightning.errors import InputError
from gvsl_lightning.losses import LocalNCCLoss
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


def main(args: Sequence[str]) -> None:
    """Profile the model and the data of a configuration and print one table for each measurement.

    Args:
        args: the words after ``profile``: ``--config`` and everything that ``fit`` takes, and

            - ``--size``: edges in voxels of cubic volumes; otherwise the configured patch.
            - ``--precision``: ``fp32``, ``bf16``, ``fp16``; otherwise the configured one.
            - ``--pairs``: pairs per batch.
            - ``--repeats``: measured steps, after one that is not; medians are printed.
            - ``--threads``: CPU threads; otherwise PyTorch's own choice.
            - ``--json``: file for the figures, in seconds and bytes.

    Raises:
        InputError: if the configuration is not for pre-training or an argument is out of range.
    """
    line = CommandLine([*args, "--trainer.logger=false"], run=False, add_arguments=_add_arguments)
    options = line.config
    model, data, trainer = line.model, line.datamodule, line.trainer
    if not isinstance(model, GVSL) or not isinstance(data, PairDataModule):
        raise InputError(
            f"profile measures pre-training: give a configuration with a GVSL task and pairs of "
            f"volumes instead of {type(model).__name__} and {type(data).__name__}."
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = [(edge, edge, edge) for edge in options.size or []] or [data.patch_size]
    precisions = options.precision or [_configured_precision(trainer)]
    device = trainer.strategy.root_device
    console = Console()
    console.print(
        f"{model.hparams['backbone']}, {_parameters(model.backbone):,} parameters, and heads, "
        f"{_parameters(model) - _parameters(model.backbone):,}; {_describe(device)}; "
        f"torch {torch.__version__}"
    )
    loaded = _load(data, console)
    run = _ConfiguredRun.of(trainer, data, loaded)
    profiles = []
    for size in sizes:
        _set_size(data, size, options.pairs, None if loaded else model.hparams["in_channels"])
        for precision in precisions:
            profile = measure(
                model.to(device),
                data,
                precision=precision,
                repeats=options.repeats,
                gradient_clip_val=trainer.gradient_clip_val,
            )
            profiles.append({**profile.figures(), "hours": run.hours(profile)})
            console.print(_table(profile, run))
    if options.json is not None:
        report = {"torch": torch.__version__, "device": _describe(device), "profiles": profiles}
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2), encoding="utf-8")


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
        peak_memory: bytes, the largest of all steps: on a GPU of all tensors, on a CPU of the
            whole process. None where the system does not tell.
    """

    size: tuple[int, int, int]
    precision: str
    pairs: int
    repeats: int
    parts: dict[str, float]
    step: float
    floor: float
    ncc: float
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
        repeats: measured steps, after one that is not measured.
        gradient_clip_val: largest norm of the gradient; None or 0 clips nothing.

    Returns:
        The figures.

    Raises:
        InputError: if the device is neither a CPU nor a CUDA device, or there are fewer volumes
            than pairs in a batch.
    """
    steps = _Steps(model.train(), data, PRECISIONS[precision], gradient_clip_val)
    parts: list[dict[str, float]] = []
    floors, nccs, peaks = [], [], []
    for _ in range(repeats + 1):
        _reset_peak_memory(model.device)
        parts.append(steps.train())
        peaks.append(_peak_memory(model.device))
        floors.append(steps.floor())
        nccs.append(steps.ncc())
    parts, floors, nccs = parts[1:], floors[1:], nccs[1:]
    fixed = steps.batch["fixed"]
    return Profile(
        size=(fixed.shape[2], fixed.shape[3], fixed.shape[4]),
        precision=precision,
        pairs=len(fixed),
        repeats=repeats,
        parts={name: statistics.median(part[name] for part in parts) for name in PARTS},
        step=statistics.median(sum(part.values()) for part in parts),
        floor=statistics.median(floors),
        ncc=statistics.median(nccs),
        peak_memory=max((peak for peak in peaks if peak is not None), default=None),
    )


class _Steps:
    """Whole training steps, and beside them the floor and the NCC on the same tensors."""

    def __init__(
        self,
        model: GVSL,
        data: PairDataModule,
        dtype: torch.dtype,
        gradient_clip_val: float | None,
    ) -> None:
        self.model = model
        self.data = data
        self.dtype = dtype
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

        def run() -> None:
            with self._autocast():
                means = [
                    feature.float().mean()
                    for volumes in self._seen
                    for feature in self.model.backbone(volumes)
                ]
            torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]

        self._optimizer.zero_grad()
        return self._time(run)

    def ncc(self) -> float:
        """Seconds of the local NCC and its gradient with respect to one of the volumes."""
        moving, fixed = self.batch["moving"].clone().requires_grad_(), self.batch["fixed"]
        loss = LocalNCCLoss()
        return self._time(lambda: loss(moving, fixed).backward())

    def _time(self, function: Callable[[], None]) -> float:
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
    """How much the configuration trains; steps are None where it does not say."""

    steps: int | None
    pairs: int
    num_workers: int

    @classmethod
    def of(cls, trainer: pl.Trainer, data: PairDataModule, loaded: bool) -> "_ConfiguredRun":
        """Read trainer and data module, before the latter is changed for measuring."""
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if loaded and trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = -(-len(data.train_dataloader()) // trainer.world_size)
            limit = trainer.limit_train_batches
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            limits.append(trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches))
        steps = min(limits) * trainer.accumulate_grad_batches if limits else None
        return cls(steps, data.batch_size, data.num_workers)

    def hours(self, profile: Profile) -> float | None:
        """Hours of training alone, if loader processes have cores of their own."""
        if self.steps is None:
            return None
        loading = profile.parts["load, crop, copy to device"]
        step = profile.step
        if self.num_workers > 0:
            step = max(step - loading, loading / self.num_workers)
        return self.steps * step * (self.pairs / profile.pairs) / 3600


def _add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--size", type=PositiveInt, nargs="+", help="edges of cubic volumes, voxels"
    )
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS))
    parser.add_argument("--pairs", type=PositiveInt, default=1, help="pairs per batch")
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="measured steps")
    parser.add_argument("--threads", type=PositiveInt | None, help="CPU threads")
    parser.add_argument("--json", type=str | None, help="file for the figures")


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


def _table(profile: Profile, run: _ConfiguredRun) -> Table:
    size = "x".join(map(str, profile.size))
    pairs = f"{profile.pairs} pair" + "s" * (profile.pairs > 1)
    table = Table(
        title=f"{size}, {profile.precision}, batch of {pairs}, median of {profile.repeats}",
        title_justify="left",
    )
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("of the floor", justify="right")

    def add(name: str, seconds: float) -> None:
        table.add_row(name, f"{seconds:.4f}", f"{seconds / profile.floor:.3f}")

    for name, seconds in profile.parts.items():
        add(name, seconds)
    table.add_section()
    add("whole step", profile.step)
    add("floor: backbone forward and backward", profile.floor)
    add("NCC forward and backward", profile.ncc)
    table.add_section()
    table.add_row("voxels per second", f"{profile.voxels_per_second:,.0f}")
    memory = profile.peak_memory
    table.add_row("peak memory, GiB", "unknown" if memory is None else f"{memory / 2**30:.2f}")
    hours = run.hours(profile)
    table.add_row(
        "configured run, hours"
        + ("" if run.steps is None else f" ({run.steps:,} batches of {run.pairs})"),
        "unknown" if hours is None else f"{hours:,.2f}",
    )
    return table


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
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
