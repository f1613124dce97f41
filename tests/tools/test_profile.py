"""Tests of ``python -m gvsl_lightning profile``."""

import gzip
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import PretrainDataModule
from gvsl_lightning.tasks import GVSL
from gvsl_lightning.tools import profile
from gvsl_lightning.tools.profile import PARTS, Profile, measure

PAUSE = 0.3


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    folder = tmp_path / "volumes"
    folder.mkdir()
    for index in range(4):
        volume = np.random.default_rng(index).random((24, 24, 24), dtype=np.float32)
        np.save(folder / f"{index}.npy", volume)
    return folder


@pytest.fixture
def config(tmp_path: Path, volumes: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
trainer:
  max_steps: 7200
  accelerator: cpu
  devices: 1
  gradient_clip_val: 1.0
model:
  class_path: GVSL
  init_args:
    backbone_options: {{channels: [8, 16]}}
    affine_channels: 8
    schedule: cosine
data:
  class_path: PretrainDataModule
  init_args:
    root: {volumes}
    patch_size: [16, 20, 24]
    batch_size: 2
    cache: true
    val_count: 0
"""
    )
    return path


def run(config: Path, *args: str) -> list[dict[str, Any]]:
    report = config.parent / "new" / "report.json"
    main(["profile", "--config", str(config), "--repeats", "1", "--json", str(report), *args])
    profiles: list[dict[str, Any]] = json.loads(report.read_text())["profiles"]
    return profiles


def test_command_reports_every_size_and_precision(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    profiles = run(config, "--size", "8", "16", "--precision", "fp32", "bf16", "--threads", "1")
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    assert [(p["size"][0], p["precision"]) for p in profiles] == [
        (8, "fp32"),
        (8, "bf16"),
        (16, "fp32"),
        (16, "bf16"),
    ]
    for figures in profiles:
        assert figures["pairs"] == 1
        assert list(figures["parts"]) == list(PARTS)
        assert min(figures["parts"].values()) > 0
        assert sum(figures["parts"].values()) == pytest.approx(figures["step"])
        assert figures["ratio"] == pytest.approx(figures["step"] / figures["floor"])
        assert figures["ratio"] > 1
        assert 0 < figures["ncc"] < figures["step"]
        voxels = 2 * figures["size"][0] ** 3
        assert figures["voxels_per_second"] == pytest.approx(voxels / figures["step"])
        assert figures["hours"] == figures["device_hours"] == pytest.approx(hours(figures))
    output = capsys.readouterr().out
    for words in (*PARTS, "whole step", "floor", "NCC", "16x16x16", "bf16", "batch of 1 pair"):
        assert words in output
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output


def hours(figures: dict[str, Any], accumulated: int = 1, loaded: float = 1) -> float:
    """Of 7200 batches of two pairs, two batches of one pair each but for the optimiser."""
    parts = figures["parts"]
    update = parts["gradient clipping"] + parts["optimiser"]
    loading = parts["load, crop, copy to device"]
    return 2 * (2 * (figures["step"] - update - (1 - loaded) * loading) + update / accumulated)


def test_processes_and_accumulation_are_part_of_what_a_run_costs(config: Path) -> None:
    more = ["--trainer.num_nodes=2", "--trainer.devices=2", "--trainer.accumulate_grad_batches=4"]
    (figures,) = run(config, "--size", "8", *more, "--trainer.max_steps=1800")
    assert figures["run"]["batches"] == 7200
    assert figures["hours"] == pytest.approx(hours(figures, accumulated=4))
    assert figures["device_hours"] == pytest.approx(4 * figures["hours"])
    # four processes share four volumes: one batch of one pair an epoch
    (figures,) = run(
        config, "--size", "8", *more, "--trainer.max_steps=-1", "--trainer.max_epochs=7"
    )
    assert figures["run"]["batches"] == 7


def test_prepared_volumes_are_measured_as_they_train(config: Path, tmp_path: Path) -> None:
    folder, prepared = tmp_path / "nifti", tmp_path / "prepared"
    folder.mkdir()
    for index in range(3):
        volume = np.random.default_rng(index).random((24, 24, 24), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"{index}.nii.gz")
    main(["prepare", f"--data.root={folder}", f"--out={prepared}", "--workers=1"])
    (figures,) = run(
        config,
        *("--size", "8", f"--data.init_args.root={prepared}", "--data.init_args.cache=false"),
        *("--trainer.max_steps=-1", "--trainer.max_epochs=5"),
    )
    assert figures["run"]["batches"] == 10
    assert figures["parts"]["load, crop, copy to device"] > 0


def test_compares_configurations_merged_over_the_words(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    order: list[str] = []
    train = profile._Steps.train

    def recorded(steps: Any) -> Any:
        order.append(steps.precision)
        return train(steps)

    monkeypatch.setattr(profile._Steps, "train", recorded)
    half, wide = tmp_path / "half.yaml", tmp_path / "wide.yaml"
    half.write_text("trainer: {precision: bf16-mixed}")
    wide.write_text("model: {init_args: {backbone_options: {channels: [24, 48]}}}")
    columns = run(
        config, "--size", "16", "--repeats", "2", "--compare", *map(str, (config, half, wide))
    )
    assert [column["configuration"] for column in columns] == ["config", "half", "wide"]
    assert [column["precision"] for column in columns] == ["fp32", "bf16", "fp32"]
    # two steps of each warm up and tell the memory, then they take turns
    assert order[6:] == ["fp32", "bf16", "fp32"] * 2
    assert columns[0]["flops"] == columns[1]["flops"] < columns[2]["flops"] / 8
    for column in columns:
        assert column["of_first"] == pytest.approx(column["step"] / columns[0]["step"])
    assert columns[2]["of_first"] > 1
    output = capsys.readouterr().out
    assert re.search(r"config +┃ +half +┃ +wide", output)
    assert f"{columns[2]['of_first']:.3f}" in output
    assert "…" not in output


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_trace_is_valid_and_names_the_parts(config: Path, accelerator: str) -> None:
    plain, packed = config.parent / "traces" / "step.json", config.parent / "step.json.gz"
    for path in (plain, packed):
        run(config, "--size=8", f"--trainer.accelerator={accelerator}", "--trace", str(path))
    for text in (plain.read_text(), gzip.decompress(packed.read_bytes()).decode()):
        ranges = [event for event in json.loads(text)["traceEvents"] if event.get("name") in PARTS]
        ranges.sort(key=lambda event: event["ts"])
        assert {event["name"] for event in ranges} == set(PARTS)
        for before, after in itertools.pairwise(ranges):
            assert before["ts"] + before["dur"] <= after["ts"] + 1
        convolutions = [e for e in json.loads(text)["traceEvents"] if "conv" in e.get("name", "")]
        forward = next(event for event in ranges if event["name"] == "forward: backbone")
        assert any(
            forward["ts"] <= event["ts"] <= forward["ts"] + forward["dur"] for event in convolutions
        )


def test_configured_patch_precision_and_epochs_are_the_default(config: Path) -> None:
    (figures,) = run(config, "--pairs", "2", "--trainer.max_steps=-1", "--trainer.max_epochs=900")
    assert figures["size"] == [16, 20, 24]
    assert figures["precision"] == "fp32"
    # four volumes: two batches of two pairs an epoch
    assert figures["run"]["batches"] == 900 * 2
    assert figures["hours"] == pytest.approx(900 * 2 * figures["step"] / 3600)


def test_loader_processes_hide_the_loading_but_not_more_than_they_can(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, PretrainDataModule, "transfer_batch_to_device", 5)
    (figures,) = run(config, "--size", "8", "--data.init_args.num_workers=1")
    loading = figures["parts"]["load, crop, copy to device"]
    assert loading > figures["step"] / 2
    assert figures["hours"] == pytest.approx(4 * loading)
    (figures,) = run(config, "--size", "8", "--data.init_args.num_workers=100")
    loading = figures["parts"]["load, crop, copy to device"]
    assert figures["hours"] == pytest.approx(hours(figures, loaded=0))


def test_measures_on_noise_without_data(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (figures,) = run(config, "--data.init_args.root=absent", "--size", "8", "--pairs", "3")
    assert figures["pairs"] == 3
    parts = figures["parts"]
    update = parts["gradient clipping"] + parts["optimiser"]
    expected = 2 * ((figures["step"] - update) * 2 / 3 + update)
    assert figures["hours"] == pytest.approx(expected)
    output = capsys.readouterr().out
    assert "absent does not exist" in output
    assert "noise" in output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--pairs", "5"], "5 pairs"),
        (["--trainer.precision=64-true"], "precision 64-true"),
        (["--size", "8", "16", "--trace", "trace.json"], "--trace holds one step"),
        (["--compare", "absent.yaml"], "absent.yaml"),
        (["--model=pytorch_lightning.demos.boring_classes.BoringModel"], "BoringModel"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(config, *args)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def slow(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, factor: float = 1) -> None:
    """Make a function take longer."""
    original = getattr(owner, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE * factor)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slowed)


def slow_backward(module: nn.Module) -> None:
    """Make the backward pass wait where it reaches what a module gave."""

    def wait(gradient: torch.Tensor) -> None:
        time.sleep(PAUSE)

    module.register_forward_hook(lambda module, args, output: output.register_hook(wait) and None)


Slow = Callable[[pytest.MonkeyPatch, GVSL, PretrainDataModule], None]

SLOW: dict[str, Slow] = {
    "load, crop, copy to device": lambda patch, model, data: slow(
        patch, data, "transfer_batch_to_device"
    ),
    "corruption": lambda patch, model, data: slow(patch, data.corruption, "forward"),
    "spatial transform": lambda patch, model, data: slow(patch, data.spatial, "forward"),
    "forward: backbone": lambda patch, model, data: slow(patch, model.backbone, "decode"),
    "forward: heads, warp": lambda patch, model, data: slow(patch, model, "warp"),
    "forward: losses": lambda patch, model, data: slow(patch, model.similarity, "forward"),
    "backward: heads, warp, losses": lambda patch, model, data: slow_backward(
        model.get_submodule("matching_head.deformable_head.convolutions")
    ),
    "backward: backbone": lambda patch, model, data: slow_backward(
        model.get_submodule("backbone.encoder.0")
    ),
    "gradient clipping": lambda patch, model, data: slow(patch, nn.utils, "clip_grad_norm_"),
    "optimiser": lambda patch, model, data: slow(patch, torch.optim.Adam, "step"),
}


@pytest.fixture
def task() -> GVSL:
    return GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8)


@pytest.fixture
def data(volumes: Path) -> PretrainDataModule:
    return PretrainDataModule(
        root=str(volumes), patch_size=(8, 8, 8), batch_size=1, cache=True, val_count=0
    )


@pytest.mark.parametrize("part", PARTS)
def test_time_is_found_where_it_is_spent(
    monkeypatch: pytest.MonkeyPatch, task: GVSL, data: PretrainDataModule, part: str
) -> None:
    SLOW[part](monkeypatch, task, data)
    figures = measure(task, data, repeats=1, gradient_clip_val=1.0)
    assert figures.parts[part] >= PAUSE
    assert all(seconds < PAUSE for name, seconds in figures.parts.items() if name != part)
    assert figures.step >= figures.parts[part]
    assert figures.ncc < PAUSE
    assert (figures.floor >= PAUSE) == ("backbone" in part)


def test_floor_runs_the_backbone_on_what_the_step_gives_it(
    task: GVSL, data: PretrainDataModule
) -> None:
    given: list[torch.Tensor] = []
    task.backbone.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    measure(task, data, repeats=2)
    assert len(given) == 7  # a step that warms up, and three with a floor
    for step, floor in zip(given[1::2], given[2::2], strict=True):
        assert step.shape == (2, 1, 8, 8, 8)
        assert torch.equal(step, floor)
        assert floor.stride() == step.stride()


def test_steps_train_everything_and_leave_the_hyper_parameters(data: PretrainDataModule) -> None:
    task = GVSL(
        backbone_options={"channels": [8, 16]}, schedule="cosine", similarity="mind", affine=False
    )
    before = [parameter.clone() for parameter in task.parameters()]
    figures = measure(task, data, repeats=1)
    assert not any(map(torch.equal, before, task.parameters()))
    assert task.hparams["schedule"] == "cosine"
    assert figures.parts["gradient clipping"] < 1e-3


def test_only_full_batches_are_measured(task: GVSL, data: PretrainDataModule) -> None:
    data.batch_size = 3  # four volumes: every second batch has one pair
    given: list[int] = []
    task.backbone.register_forward_pre_hook(lambda module, args: given.append(len(args[0])))
    assert measure(task, data, repeats=2).pairs == 3
    assert given == [6] * 7


def test_figures_are_medians(
    monkeypatch: pytest.MonkeyPatch, task: GVSL, data: PretrainDataModule
) -> None:
    seconds = iter([3.0, 1.0, 20.0])
    monkeypatch.setattr(profile._Steps, "floor", lambda steps: next(seconds))
    assert measure(task, data, repeats=3).floor == 3


def test_operations_are_those_of_the_convolutions(task: GVSL, data: PretrainDataModule) -> None:
    figures = measure(task, data, repeats=1).figures()
    fine, coarse = 8**3, 4**3
    convolutions = fine * (1 * 8 + 8 * 8 + 24 * 8 + 8 * 8) + coarse * (8 * 16 + 16 * 16)
    first = fine * 1 * 8  # needs no gradient of the volumes
    assert figures["flops"] == 2 * 2 * 27 * (3 * convolutions - first)
    peak = figures["matmul_flops_per_second"]
    assert figures["floor_flops_per_second"] == pytest.approx(figures["flops"] / figures["floor"])
    assert figures["step_of_matmul"] == pytest.approx(figures["flops"] / figures["step"] / peak)
    assert figures["floor_of_matmul"] == pytest.approx(figures["flops"] / figures["floor"] / peak)
    assert figures["step_of_matmul"] < figures["floor_of_matmul"] < 1
    assert figures["matmul_size"] in (512, 1024, 2048, 4096, 8192, 16384)


def test_checkpointing_counts_what_is_computed_again(data: PretrainDataModule) -> None:
    def flops(**options: Any) -> int:
        task = GVSL(backbone_options={"channels": [8, 16], **options}, affine_channels=8)
        return measure(task, data, repeats=1).flops

    forward = (flops() + 2 * 2 * 27 * 8**3 * 1 * 8) // 3  # the first convolution's is missing
    assert flops(activation_checkpointing=True) == flops() + forward


@pytest.mark.skipif(sys.platform != "linux", reason="no peak memory of a process elsewhere")
def test_peak_memory_is_that_of_these_steps(
    monkeypatch: pytest.MonkeyPatch, task: GVSL, data: PretrainDataModule
) -> None:
    def peak() -> int:
        figures: Profile = measure(task, data, repeats=1)
        assert figures.peak_memory is not None
        return figures.peak_memory

    before = peak()
    with monkeypatch.context() as patch:
        compute_losses = task.compute_losses

        def wasteful(batch: dict[str, Any]) -> Any:
            np.ones(300 * 2**20, dtype=np.uint8)
            return compute_losses(batch)

        patch.setattr(task, "compute_losses", wasteful)
        assert peak() - before == pytest.approx(300 * 2**20, rel=0.1)
    assert peak() - before < 100 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="no peak memory of a process elsewhere")
def test_peak_memory_is_without_that_of_other_configurations(data: PretrainDataModule) -> None:
    small = {"backbone_options": {"channels": [8, 16]}, "affine_channels": 8}
    large = {"backbone_options": {"channels": [8, 512, 512]}, "affine_channels": 8}
    gradients_and_moments = 3 * 4 * sum(p.numel() for p in GVSL(**large).backbone.parameters())
    assert gradients_and_moments > 150 * 2**20

    def peaks(*options: dict[str, Any]) -> list[int]:
        steps = [profile._Steps(GVSL(**chosen), data, "fp32", None) for chosen in options]
        return [int(p.peak_memory or 0) for p in profile._measure_alternately(steps, 1)]

    alone, _, beside = peaks(small, large, small)
    assert abs(beside - alone) < 50 * 2**20


@pytest.mark.slow
def test_compiled_backbone_trains_alike_and_is_measured(
    config: Path, data: PretrainDataModule
) -> None:
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        task = GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8, compile=compiled)
        trainer = pl.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False
        )
        trainer.fit(task, data)
        losses[compiled] = float(trainer.callback_metrics["train/loss"])
        reloaded = GVSL(**task.hparams)
        reloaded.load_state_dict(task.state_dict())
        assert reloaded.backbone.compiled == compiled
        assert not any("_orig_mod" in key for key in task.state_dict())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    option = config.parent / "compiled.yaml"
    option.write_text("model: {init_args: {compile: true}}")
    plain, compiled = run(config, "--size", "16", "--compare", str(config), str(option))
    assert plain["flops"] == compiled["flops"]
    assert compiled["parts"]["backward: backbone"] > 0
    assert compiled["step"] < 10 * plain["step"]  # without the compiling


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda(task: GVSL, data: PretrainDataModule, precision: str) -> None:
    figures = measure(task.cuda(), data, precision, repeats=1, gradient_clip_val=1.0)
    assert min(figures.parts.values()) > 0
    assert sum(figures.parts.values()) == pytest.approx(figures.step, rel=1e-3)
    assert figures.step > figures.floor > 0
    assert figures.peak_memory is not None
    assert 0 < figures.peak_memory < 2**30
