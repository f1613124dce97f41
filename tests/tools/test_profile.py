"""Tests of ``python -m gvsl_lightning profile``; the clock of most tests is a number."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import PretrainDataModule
from gvsl_lightning.tasks import GVSL, SimCLR
from gvsl_lightning.tasks.pretraining import PretrainTask
from gvsl_lightning.tools import profile
from gvsl_lightning.tools.profile import PARTS, Meter, Profile, count_batches

LOAD, VIEWS, FORWARD, HEADS, HEADS_BACKWARD, BACKWARD, CLIP, OPTIMISER = PARTS


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    for index in range(4):
        volume = np.random.default_rng(index).random((16, 16, 16), dtype=np.float32)
        np.save(folder / f"{index}.npy", volume)
    return folder


@pytest.fixture
def config(tmp_path: Path, volumes: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
trainer: {{max_steps: 7200, accelerator: cpu, devices: 1, gradient_clip_val: 1.0}}
model:
  class_path: GVSL
  init_args: {{backbone_options: {{channels: [8, 16]}}, affine_channels: 8, schedule: cosine}}
data:
  class_path: PretrainDataModule
  init_args:
    root: {volumes}
    patch_size: [8, 12, 16]
    batch_size: 2
    num_workers: 1
    cache: true
    val_count: 0
"""
    )
    return path


@pytest.fixture
def data(volumes: Path) -> PretrainDataModule:
    return PretrainDataModule(
        root=str(volumes), patch_size=(8, 8, 8), batch_size=1, cache=True, val_count=0
    )


def run(config: Path, *args: str) -> dict[str, Any]:
    report = config.parent / "new" / "report.json"
    main(["profile", "--config", str(config), "--repeats", "1", "--json", str(report), *args])
    figures: dict[str, Any] = json.loads(report.read_text())
    return figures


def measure(task: PretrainTask, data: PretrainDataModule, repeats: int = 1) -> Meter:
    meter = Meter()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=repeats + 2, max_epochs=-1, gradient_clip_val=1.0,
        limit_val_batches=0, callbacks=[meter], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return meter


class Clock:
    """Seconds that pass only where a test lets them pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.patch = monkeypatch
        monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        """Let a function take longer."""
        original = getattr(owner, name)

        def slowed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, slowed)

    def slow_backward(self, module: torch.nn.Module, seconds: float) -> None:
        """Let the backward pass take longer at the outputs of a module."""

        def wait(gradient: torch.Tensor) -> None:
            self.now += seconds

        module.register_forward_hook(
            lambda module, args, output: output.register_hook(wait) and None
        )


def gvsl() -> GVSL:
    return GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8)


TASKS: dict[str, Callable[[], PretrainTask]] = {
    "GVSL": gvsl,
    "SimCLR": lambda: SimCLR(backbone_options={"channels": [8, 16]}),
}


@pytest.mark.parametrize("name", TASKS)
def test_each_interval_is_charged_to_its_part(
    monkeypatch: pytest.MonkeyPatch, data: PretrainDataModule, name: str
) -> None:
    clock, task = Clock(monkeypatch), TASKS[name]()
    clock.slow(data, "transfer_batch_to_device", 1)
    clock.slow(task, "make_views", 10)
    clock.slow(task.backbone, "encode_padded", 100)
    clock.slow(task, "training_loss", 1e3)
    clock.slow(task, "backward", 1e4)
    clock.slow_backward(task.get_submodule("backbone.encoder.0"), 1e5)
    clock.slow(task, "clip_gradients", 1e6)
    clock.slow(torch.optim.Adam, "step", 1e7)
    meter = measure(task, data, repeats=2)
    expected = dict(zip(PARTS, (1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7), strict=True))
    assert meter.parts == [expected] * 2
    assert meter.floors == [100 + 1e5] * 2


def test_steps_train_and_the_floor_sees_the_same_volumes(
    monkeypatch: pytest.MonkeyPatch, data: PretrainDataModule
) -> None:
    task, given = gvsl(), list[torch.Tensor]()
    before = [parameter.clone() for parameter in task.parameters()]
    encode = task.backbone.encode_padded
    monkeypatch.setattr(task.backbone, "encode_padded", lambda x: given.append(x) or encode(x))
    measure(task, data)
    assert len(given) == 5  # three steps, the last two of them with a floor
    for step, floor in ((1, 2), (3, 4)):
        assert given[step].shape == (2, 1, 8, 8, 8)
        assert torch.equal(given[step], given[floor])
    assert not torch.equal(given[1], given[3])
    changed = [not torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_table_and_report(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    floors = iter([1.0, 7.0, 2.0, 1.0])  # the first one belongs to the second warm-up step
    monkeypatch.setattr(Meter, "_measure_floor", lambda *_: next(floors))
    # four volumes: the second batch of an epoch would have one pair
    words = ["--trainer.precision=bf16-mixed", "--data.batch_size=3", "--repeats=3"]
    figures = run(config, *words)
    assert (figures["shape"], figures["precision"]) == ([3, 8, 12, 16], "bf16-mixed")
    assert figures["floor"] == 2.0  # the median
    assert list(figures["parts"]) == list(PARTS)
    assert all(seconds > 0 for seconds in figures["parts"].values())
    assert figures["num_workers"] == 1
    output = capsys.readouterr().out
    for words_found in (*PARTS, "whole step", "floor", "3, 8x12x16", "bf16-mixed", "7,200 x 1"):
        assert words_found in output
    assert f"{figures['step'] / 2:.3f}" in output
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output


@pytest.mark.parametrize(
    ("trainer", "batches"),
    [
        ({"max_steps": 100}, 100),
        ({"max_steps": 100, "accumulate_grad_batches": 4}, 400),
        ({"max_epochs": 7}, 7 * 5),
        ({"max_epochs": 7, "num_devices": 2, "num_nodes": 2}, 7 * 2),
        ({"max_epochs": 7, "limit_train_batches": 3}, 7 * 3),
        ({"max_epochs": 7, "limit_train_batches": 0.5}, 7 * 2),
        ({"max_epochs": 7, "max_steps": 10}, 10),
        ({}, None),
    ],
)
def test_length_of_the_configured_run(trainer: dict[str, Any], batches: int | None) -> None:
    default: dict[str, Any] = {
        "max_steps": -1, "max_epochs": -1, "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0, "num_devices": 1, "num_nodes": 1,
    }  # fmt: skip
    configured: Any = SimpleNamespace(**{**default, **trainer})
    data: Any = SimpleNamespace(train_dataloader=lambda: [None] * 5)
    assert count_batches(configured, data) == batches


@pytest.mark.parametrize(
    ("accumulated", "num_workers", "seconds"),
    [
        (1, 0, 8 + 4 + 1),
        (4, 0, 8 + 4 + 1 / 4),
        (1, 1, 8),  # loading hides the computing
        (1, 100, 4 + 1),
    ],
)
def test_hours(accumulated: int, num_workers: int, seconds: float) -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {LOAD: 8, FORWARD: 4, CLIP: 0.25, OPTIMISER: 0.75}
    length = (3600, 4, accumulated, num_workers)
    one = Profile("", "", (1, 8, 8, 8), parts, sum(parts.values()), 4, None, *length)
    assert one.hours == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.batch_size=5"], "batch_size"),
        (["--model=pytorch_lightning.demos.boring_classes.BoringModel"], "BoringModel"),
        (["--data.root=absent"], "absent"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(config, *args)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="no peak memory of a process elsewhere")
def test_peak_memory_is_that_of_one_step(
    monkeypatch: pytest.MonkeyPatch, data: PretrainDataModule
) -> None:
    def peak(wasted: int = 0) -> int:
        task = gvsl()
        loss = task.training_loss
        monkeypatch.setattr(
            task, "training_loss", lambda *a: np.ones(wasted, np.uint8).sum() * 0 + loss(*a)
        )
        memory = measure(task, data).peak_memory
        assert memory is not None
        return memory

    before = peak()
    assert peak(300 * 2**20) - before == pytest.approx(300 * 2**20, rel=0.1)
    assert abs(peak() - before) < 100 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_cuda(config: Path, precision: str) -> None:
    figures = run(config, "--trainer.accelerator=cuda", f"--trainer.precision={precision}")
    assert min(figures["parts"].values()) > 0
    assert sum(figures["parts"].values()) == pytest.approx(figures["step"], rel=1e-3)
    assert figures["floor"] > 0
    assert 0 < figures["peak_memory"] < 2**30
