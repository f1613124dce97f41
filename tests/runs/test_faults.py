"""Signals, full disks and memories, processes that die: nothing is lost, nothing is silent."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from faulty import Command, losses, partials
from gvsl_lightning.callbacks import ResumableCheckpoint
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import Phantom
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.runs.checkpoints import SafeCheckpointIO, check_checkpoint
from gvsl_lightning.runs.files import remove_partials, save_figure, write_whole
from gvsl_lightning.tasks import GVSL
from gvsl_lightning.weights import load_backbone_weights, save_backbone
from wandb_files import read_runs

CONFIG = """
trainer:
  max_steps: 9
  accelerator: cpu
  check_val_every_n_epoch: null
  val_check_interval: 3 # steps
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: VersionedWandbLogger
    init_args: {save_dir: runs, name: run}
  callbacks:
    - class_path: ResumableCheckpoint
      init_args: {monitor: val/ncc_after, mode: max, filename: best, save_last: true}
    - class_path: BackboneExporter
model:
  class_path: GVSL
  init_args:
    backbone_options: {channels: [8, 16]}
    affine_channels: 8
data:
  class_path: Phantom
  init_args:
    {size: [16, 16, 16], num_train: 5, num_val: 2, val_pairs: 1, batch_size: 1, num_workers: 1}
"""
FIT = ["fit", "--config=config.yaml"]
CHECKPOINT = "runs/run/version_0/checkpoints/last.ckpt"
QUIET = {"WANDB_MODE": "disabled"}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


def signals(quick: signal.Signals) -> pytest.MarkDecorator:
    """All three; the tests that are not slow have one."""
    marked = [pytest.param(one, marks=[pytest.mark.slow] * (one != quick)) for one in STATUS]
    return pytest.mark.parametrize("number", marked, ids=lambda number: number.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


Losses = dict[int, set[float]]


def unbroken(folder: Path, words: list[str], **environment: str) -> tuple[Losses, float]:
    """Losses of the steps of a run that nothing happens to, and the seconds that it takes."""
    (folder / "config.yaml").write_text(CONFIG)
    command = Command(words, folder, **environment)
    command.wait_for(command.has_run)
    start = time.monotonic()
    assert command.status() == 0, command.printed()
    return losses(folder), time.monotonic() - start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, float]:
    return unbroken(tmp_path_factory.mktemp("whole"), FIT, **QUIET)


@signals(signal.SIGKILL)
def test_a_fit_that_is_ended_goes_on_as_if_nothing_had_happened(
    number: signal.Signals, folder: Path, whole: tuple[Losses, float]
) -> None:
    expected, seconds = whole
    environment = QUIET if number == signal.SIGKILL else {}  # no run of W&B is closed then
    command = Command(FIT, folder, **environment)
    command.wait_for(command.has_run)
    time.sleep(random.Random(number).uniform(0, seconds))
    command.send(number)
    assert command.status() in (STATUS[number], 0), command.printed()
    go_on(command, number, folder, FIT, **environment)
    check_equal(losses(folder), expected)


@pytest.mark.slow
def test_twenty_random_moments_of_a_fit(tmp_path: Path) -> None:
    words = [*FIT, "--trainer.max_steps=40", "--trainer.val_check_interval=5"]
    (tmp_path / "whole").mkdir()
    expected, seconds = unbroken(tmp_path / "whole", words, **QUIET)
    draw, found = random.Random(0), list[tuple[signal.Signals, float, Losses, Losses]]()
    while len(found) < 20:
        number = list(STATUS)[len(found) % 3]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # a number not taken
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
        command = Command(words, folder, **QUIET)
        command.wait_for(command.has_run)
        moment = draw.uniform(0, seconds)
        time.sleep(moment)
        command.send(number)
        status = command.status()
        if status == 0:  # it was faster than the unbroken one, and at its end
            continue
        assert status == STATUS[number], command.printed()
        before = losses(folder)
        go_on(command, number, folder, words, **QUIET)
        check_equal(losses(folder), expected)
        found.append((number, moment, before, losses(folder)))
    if out := os.environ.get("GVSL_FAULT_CURVES"):
        write_curves(Path(out), expected, found)


def write_curves(
    out: Path, expected: Losses, found: list[tuple[signal.Signals, float, Losses, Losses]]
) -> None:
    """Write ``fault_curves.png``: a curve for each moment, and its difference from the unbroken."""
    true = np.array([min(values) for values in expected.values()])
    figure = Figure(figsize=(8, 5), layout="constrained")
    curve, rest = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot(list(expected), true, color="0.8", linewidth=6, label="unbroken")
    for number, _, before, after in found:
        color = f"C{list(STATUS).index(number)}"
        low = np.array([min(values) for values in after.values()])
        high = np.array([max(values) for values in after.values()])
        curve.plot(list(after), low, color=color, linewidth=0.8)
        if before:
            curve.plot(max(before), true[max(before)], "o", color=color, markersize=5)
        difference = np.maximum(abs(high - true), abs(low - true))
        rest.plot(list(after), difference, color=color, linewidth=0.8)
    for index, name in enumerate(STATUS):
        label = f"ended by {name.name}, resumed"
        curve.plot([], [], "o-", color=f"C{index}", linewidth=0.8, label=label)
    curve.set(ylabel="loss of the step")
    curve.legend(fontsize=8)
    rest.set(xlabel="step", ylabel="difference", ylim=(-1e-7, 1e-6))
    save_figure(figure, out / "fault_curves.png", dpi=80)


def go_on(
    command: Command, number: int, folder: Path, words: list[str], **environment: str
) -> None:
    """Check what an ended ``fit`` left, and give the command again."""
    found = sorted(folder.glob("runs/run/*/checkpoints/last.ckpt"))
    words = [*words, *(f"--ckpt_path={path.relative_to(folder)}" for path in found[-1:])]
    if command.process.exitcode == 0:  # it was at its end
        return
    if number != signal.SIGKILL:
        sentence = command.sentence()
        assert f"Interrupted by {signal.Signals(number).name}" in sentence
        expected = f"python -m gvsl_lightning {' '.join(words)}" if found else "same command again."
        assert sentence.endswith(expected)
        assert all(run.exit_code for run in read_runs(folder))
        assert not partials(folder)
    check_files(folder)
    again = Command(words, folder, **environment)
    assert again.status() == 0, again.printed()
    assert not partials(folder)
    check_files(folder)


def check_files(folder: Path) -> None:
    for path in folder.rglob("*.ckpt"):
        check_checkpoint(path)
        torch.load(path, weights_only=True)


def check_equal(found: Losses, expected: Losses) -> None:
    assert list(found) == list(expected)
    for step, values in found.items():
        assert all(value == pytest.approx(min(expected[step]), abs=1e-6) for value in values), step


SMALL = [*FIT, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]
SMALL += ["--trainer.logger.name=run", "--data.num_workers=0", "--trainer.max_steps=6"]


def end_of(words: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command of this process ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capfd.readouterr().err
    assert stopped.value.code == status, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


def fault(kind: str, step: int = 4) -> list[str]:
    given = f"{{class_path: faulty.Fail, init_args: {{step: {step}, fault: {kind}}}}}"
    return [f"--trainer.callbacks+={given}"]


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("gpu", "The memory of the GPU is full after step 4; lower patch_size, batch_size"),
        pytest.param(
            "memory",
            "The memory of the machine is full after step 4; lower num_workers",
            marks=pytest.mark.slow,
        ),
        ("worker", "A process that loads data was killed after step 4"),
    ],
)
def test_memory_that_is_full_says_what_to_change_and_how_to_go_on(
    kind: str,
    named: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    words = [*SMALL, f"--data.num_workers={int(kind == 'worker')}"]
    sentence = end_of([*words, *fault(kind)], 1, capfd)
    assert named in sentence
    assert sentence.endswith(f"--ckpt_path={CHECKPOINT}")
    assert torch.load(CHECKPOINT, weights_only=True)["global_step"] == 3
    if kind == "worker":
        main([*words, f"--ckpt_path={CHECKPOINT}"])
        assert list(losses(folder)) == list(range(6))
        assert all(len(values) == 1 for values in losses(folder).values())


def test_a_trial_that_is_told_to_end_twice_ends_once(folder: Path) -> None:
    command = Command([*SMALL, *fault("terms")], folder, WANDB_SWEEP_ID="sweep", **QUIET)
    assert command.status() == 0, command.printed()
    assert max(losses(folder)) == 4


def test_weights_that_are_not_finite_take_no_place_of_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    sentence = end_of([*SMALL, *fault("nan", 6)], 2, capfd)
    assert "is not finite after step 6" in sentence
    assert "runs/run/version_0/checkpoints/last.ckpt with a lower learning_rate" in sentence
    for path in folder.rglob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] == 3
        assert all(value.isfinite().all() for value in saved["state_dict"].values())
    backbone = build_backbone("unet", channels=[8, 16])
    exported = folder / "backbone.safetensors"
    save_backbone(backbone, exported, {})
    before = exported.read_bytes()
    next(backbone.parameters()).data[0] = float("inf")
    with pytest.raises(InputError, match=r"is not finite, so that .*safetensors is not written"):
        save_backbone(backbone, exported, {})
    assert exported.read_bytes() == before


def test_full_disk_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(9)}}, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(InputError, match=f"{path} cannot be written .File too large.; {path}"):
            SafeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(10**6)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_process_that_is_killed_while_it_writes_leaves_the_file_that_was_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"whole")

    def write(file: Any) -> None:
        file.write(b"half")
        file.flush()
        (tmp_path / "written").touch()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=write_whole, args=(path, write))
    process.start()
    while not (tmp_path / "written").exists():
        time.sleep(0.01)
    remove_partials(tmp_path)
    assert len(partials(tmp_path)) == 1  # it is being written
    process.kill()
    process.join()
    assert path.read_bytes() == b"whole"
    remove_partials(tmp_path)
    assert not partials(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SMALL, "--trainer.max_steps=3"])
    return folder


@pytest.fixture
def trained(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the checkpoints of a run, ``best.ckpt`` and ``last.ckpt``."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path(CHECKPOINT).parent


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_is_named_with_one_that_is_whole(
    damage: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    last = trained / "last.ckpt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(
        {"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage]
    )
    reason = {"cut": "it is cut off", "flipped": "does not match its checksum", "empty": "is empty"}
    whole = f"give {trained / 'best.ckpt'}, which is whole."
    sentence = end_of([*SMALL, f"--ckpt_path={last}"], 2, capfd)
    assert f"{last} is damaged (" in sentence
    assert reason[damage] in sentence
    assert sentence.endswith(whole)
    with pytest.raises(InputError, match=f"{last} may be corrupted or incomplete, as"):
        load_backbone_weights(build_backbone("unet", channels=[8, 16]), last)
    if damage != "cut":
        return
    # from Python, with nothing but the callback
    trainer = pl.Trainer(
        callbacks=[ResumableCheckpoint()], accelerator="cpu", logger=False, max_steps=4
    )
    task = GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8)
    data = Phantom(size=(16, 16, 16), num_train=5, num_val=2, val_pairs=1)
    with pytest.raises(InputError, match=f"{last} is damaged"):
        trainer.fit(task, datamodule=data, ckpt_path=str(last))


def test_checkpoints_of_others_have_no_checksum_or_the_same(trained: Path) -> None:
    saved = torch.load(trained / "last.ckpt", weights_only=True)
    old = trained / "old.ckpt"
    torch.save(saved, old, _use_new_zipfile_serialization=False)
    pl.Trainer(logger=False).strategy.checkpoint_io.save_checkpoint(saved, trained / "other.ckpt")
    for path in (old, trained / "other.ckpt"):
        check_checkpoint(path)
        found = SafeCheckpointIO().load_checkpoint(path)
        assert found["global_step"] == 3


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with eight volumes and, in ``task``, the checkpoint of a segmentation."""
    folder = tmp_path_factory.mktemp("volumes")
    for index in range(8):
        array = generate_phantom("cardiac_ct", index, (24, 24, 24))["image"] * 2048 - 1024
        image = nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4))
        nib.save(image, folder / f"{index}.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, text in SEGMENTATION.items():
            Path(f"{name}.yaml").write_text(text)
        main(["fit", "--config=task.yaml", "--config=fit.yaml"])
    return folder


SEGMENTATION = {
    "task": """
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, num_sanity_val_steps: 0}
model:
  class_path: Segmentation
  init_args:
    class_names: [background, a, b, c, d, e, f, g]
    backbone_options: {channels: [8, 16]}
    window_size: [16, 16, 16]
    mode: scratch
""",
    "fit": """
trainer: {max_steps: 1, val_check_interval: 1}
data:
  class_path: PhantomSegmentation
  init_args:
    class_names: [background, a, b, c, d, e, f, g]
    size: [16, 16, 16]
    patch_size: [16, 16, 16]
    count: 4
    val: 1
    test: 1
""",
    "predict": """
trainer: {callbacks: [PredictionWriter]}
data:
  class_path: SegmentationDataModule
  init_args: {num_workers: 1, class_names: [background, a, b, c, d, e, f, g]}
""",
}


@signals(signal.SIGTERM)
def test_a_preparation_that_is_ended_goes_on_where_it_was(
    number: signal.Signals, volumes: Path, tmp_path: Path
) -> None:
    words = ["prepare", f"--data.root={volumes}", "--data.modality=ct", "--out=out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert Command([*words, "--workers=1"], whole).status() == 0
    count = random.Random(number).randrange(1, 6)
    command = Command([*words, "--workers=2"], broken)
    command.wait_for(lambda: len(list(broken.rglob("volumes/*.json"))) >= count)
    end(command, number, broken)
    check_arrays(broken)
    again = Command([*words, "--workers=2"], broken)
    assert again.status() == 0, again.printed()
    assert not partials(broken)
    check_arrays(broken)
    for path in whole.rglob("volumes/*.npy"):
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes()
    assert (whole / "out/index.json").read_bytes() == (broken / "out/index.json").read_bytes()


def end(command: Command, number: signal.Signals, folder: Path) -> None:
    """Send a signal; look at the status, at what is said and at what is left."""
    command.send(number)
    assert command.status() == STATUS[number], command.printed()
    if number != signal.SIGKILL:
        told = f"error: Interrupted by {number.name}; give the same command again."
        assert command.sentence() == told
        assert not partials(folder)


def check_arrays(folder: Path) -> None:
    for path in folder.rglob("*.npy"):
        assert np.isfinite(np.load(path)).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", list(STATUS), ids=lambda number: number.name)
def test_a_prediction_that_is_ended_goes_on_where_it_was(
    number: signal.Signals, volumes: Path, tmp_path: Path
) -> None:
    words = ["predict", *(f"--config={volumes / name}.yaml" for name in ("task", "predict"))]
    words += [f"--data.root={volumes}", f"--ckpt_path={next(volumes.rglob('*.ckpt'))}"]
    count = random.Random(number).randrange(1, 6)
    command = Command(words, tmp_path)
    command.wait_for(lambda: len(list(tmp_path.rglob("predictions/[0-9]*.nii.gz"))) >= count)
    end(command, number, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in check_volumes(tmp_path)}
    assert count <= len(before) < 8
    again = Command(words, tmp_path)
    assert again.status() == 0, again.printed()
    assert not partials(tmp_path)
    assert len(check_volumes(tmp_path)) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def check_volumes(folder: Path) -> list[Path]:
    paths = list(folder.rglob("*.nii.gz"))
    for path in paths:
        assert nib.load(path).get_fdata().shape == (24, 24, 24)
    return paths


RANKS = [*FIT, "--trainer.devices=2", "--trainer.max_steps=1000", "--data.num_workers=0"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [("kill", "was killed by SIGKILL, perhaps for want of memory"), ("error", "ended with status")],
)
def test_a_rank_that_dies_ends_the_others_with_the_cause(
    rank: int, kind: str, cause: str, folder: Path
) -> None:
    given = f"{{class_path: faulty.Fail, init_args: {{step: 4, fault: {kind}, rank: {rank}}}}}"
    command = Command([*RANKS, f"--trainer.callbacks+={given}"], folder)
    command.wait_for(lambda: list(folder.rglob("last.ckpt")))
    start = time.monotonic()
    status = command.status()
    seconds = time.monotonic() - start
    print(f"{kind} of rank {rank}: {seconds:.0f} s to the end of all processes")
    assert seconds < 60
    printed = command.printed()
    if rank == 0:  # the process that was started; nobody is left to speak
        assert status == {"kill": -signal.SIGKILL, "error": 1}[kind]
        assert printed.count("ZeroDivisionError: something is wrong") == (kind == "error")
    else:
        assert status == 1
        (sentence,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert f"The process of rank 1 {cause}" in sentence
        assert sentence.endswith(f"--ckpt_path={CHECKPOINT}")
        assert printed.count("Traceback") == (kind == "error")  # its own
        assert [run.exit_code for run in read_runs(folder)] == [1]
    check_files(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", list(STATUS), ids=lambda number: number.name)
def test_a_run_of_two_ranks_that_is_ended_leaves_no_process(
    number: signal.Signals, folder: Path
) -> None:
    command = Command(RANKS, folder)
    command.wait_for(lambda: list(folder.rglob("last.ckpt")))
    command.send(number)
    assert command.status() == STATUS[number], command.printed()
    if number != signal.SIGKILL:
        assert f"Interrupted by {number.name}" in command.sentence()
        assert command.sentence().endswith(f"--ckpt_path={CHECKPOINT}")
    check_files(folder)


PLAN = """
methods: {GVSL: {config: config.yaml}}
tasks: {hearts: {config: config.yaml, metric: test/dice, monitor: val/dice}}
modes: {linear: {}}
seeds: [0]
baseline: GVSL
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", list(STATUS), ids=lambda number: number.name)
def test_a_benchmark_that_is_ended_takes_all_ranks_of_its_runs_along(
    number: signal.Signals, folder: Path
) -> None:
    (folder / "benchmark.yaml").write_text(PLAN)
    words = ["benchmark", "--config=benchmark.yaml", "--out=out", *RANKS[2:]]
    command = Command(words, folder)
    command.wait_for(lambda: list(folder.rglob("last.ckpt")))
    assert len(command.pids()) >= 3  # with two ranks
    command.send(number)
    assert command.status() == STATUS[number], command.printed()
    if number != signal.SIGKILL:
        told = f"error: Interrupted by {number.name}; give the same command again."
        assert command.sentence() == told
        assert all(run.exit_code for run in read_runs(folder))
    check_files(folder)


@pytest.mark.gpu
def test_memory_of_a_gpu_that_really_is_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
    size = ["--trainer.accelerator=gpu", "--data.size=[192, 192, 192]"]
    sentence = end_of([*SMALL, *size, "--data.num_train=2"], 1, capfd)
    assert "The memory of the GPU is full after step 0; lower patch_size, batch_size" in sentence
    assert sentence.endswith("no checkpoint was written yet: give the same command again.")
    del held
    torch.cuda.empty_cache()
    main([*SMALL, "--trainer.accelerator=gpu"])  # the same process can go on
