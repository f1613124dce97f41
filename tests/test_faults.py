"""Signals, full disks and memories, processes that die: nothing is lost, nothing is silent."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from faulty import Command, losses, partials
from gvsl_lightning.checkpoints import check_checkpoint
from wandb_files import read_runs

CONFIG = """
trainer:
  max_steps: 12
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
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, set[float]], float]:
    """Losses of the steps of a run that nothing happens to, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "config.yaml").write_text(CONFIG)
    command = Command(FIT, folder)
    command.wait_for(command.has_run)
    start = time.monotonic()
    assert command.status() == 0, command.printed()
    return losses(folder), time.monotonic() - start


@pytest.mark.parametrize("number", list(STATUS), ids=lambda number: number.name)
def test_a_fit_that_is_ended_goes_on_as_if_nothing_had_happened(
    number: signal.Signals, folder: Path, unbroken: tuple[dict[int, set[float]], float]
) -> None:
    expected, seconds = unbroken
    command = Command(FIT, folder)
    command.wait_for(command.has_run)
    time.sleep(random.Random(number).uniform(0, seconds))
    command.send(number)
    assert command.status() in (STATUS[number], 0), command.printed()
    go_on(command, number, folder)
    check_equal(losses(folder), expected)


def go_on(command: Command, number: int, folder: Path) -> None:
    """Check what an ended ``fit`` left, and give the command again."""
    found = sorted(folder.glob("runs/run/*/checkpoints/last.ckpt"))
    words = [*FIT, *(f"--ckpt_path={path.relative_to(folder)}" for path in found[-1:])]
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
    again = Command(words, folder)
    assert again.status() == 0, again.printed()
    assert not partials(folder)
    check_files(folder)


def check_files(folder: Path) -> None:
    for path in folder.rglob("*.ckpt"):
        check_checkpoint(path)
        torch.load(path, weights_only=True)


def check_equal(found: dict[int, set[float]], expected: dict[int, set[float]]) -> None:
    assert list(found) == list(expected)
    for step, values in found.items():
        assert all(value == pytest.approx(min(expected[step]), abs=1e-6) for value in values), step
