"""A SLURM job that is preempted goes on, requeued, as if nothing had happened."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from gvsl_lightning.cli.main import main
from gvsl_lightning.runs.files import read_metrics
from wandb_files import read_runs

ROOT = Path(__file__).parents[2]
CONFIG = """
trainer:
  max_steps: 8
  accelerator: cpu
  check_val_every_n_epoch: null
  val_check_interval: 2 # steps
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: VersionedWandbLogger
    init_args: {save_dir: runs, name: run}
  callbacks:
    - class_path: ResumableCheckpoint
      init_args: {monitor: val/ncc_after, mode: max}
    - class_path: BackboneExporter
    - class_path: preempted.SignalInStep
      init_args: {step: 3}
model:
  class_path: GVSL
  init_args:
    backbone_options: {channels: [8, 16]}
    affine_channels: 8
data:
  class_path: Phantom
  init_args: {size: [16, 16, 16], num_train: 10, num_val: 2, val_pairs: 2, batch_size: 1}
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job of one process, with stand-ins for SLURM's commands."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}")
    job = {"JOB_ID": "1234", "JOB_NAME": "gvsl", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    job |= dict.fromkeys(("NNODES", "NTASKS", "NTASKS_PER_NODE", "CPUS_PER_TASK"), "1")
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def logged(version: int, name: str) -> list[float]:
    rows = read_metrics(Path("runs", "run", f"version_{version}"))
    return [row[name] for row in rows if name in row]


def check_requeued(step: int) -> None:
    """The first run went on after the job was requeued, which makes it the unbroken run, too."""
    assert Path("scontrol.txt").read_text() == "requeue 1234\n"
    losses, scores = logged(0, "train/loss"), logged(0, "val/ncc_after")
    assert (len(set(losses)), len(set(scores))) == (8, 4)
    assert logged(1, "train/loss") == losses[step:]
    assert logged(1, "val/ncc_after") == scores[step // 2 :]
    backbones = [Path("runs", "run", f"version_{n}", "backbone.safetensors") for n in (0, 1)]
    assert backbones[0].read_bytes() == backbones[1].read_bytes()
    first, second = (run.id for run in read_runs(Path()))
    assert first == second
    assert first.startswith("1234-")


@pytest.mark.parametrize(
    "step",
    [3, pytest.param(4, marks=pytest.mark.slow)],  # a validation follows the fourth one
)
def test_a_requeued_job_equals_the_unbroken_one(job: Path, step: int) -> None:
    words = ["fit", "--config", "config.yaml", f"--trainer.callbacks.step={step - 1}"]
    main(words)
    (checkpoint,) = job.rglob("hpc_ckpt_*.ckpt")
    assert checkpoint.name == "hpc_ckpt_1.ckpt"
    assert checkpoint.parent.parent == job / "runs" / "slurm"
    main(words)
    check_requeued(step)
    assert list(job.rglob("hpc_ckpt_*.ckpt")) == [checkpoint]


@pytest.mark.parametrize("change", ["command", pytest.param("job", marks=pytest.mark.slow)])
def test_no_checkpoint_of_another_run_is_taken(
    job: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    words = ["fit", "--config", "config.yaml", "--trainer.max_steps=4"]
    main(words)
    assert list(job.rglob("hpc_ckpt_*.ckpt"))
    if change == "command":
        words.append("--seed_everything=1")
    else:
        monkeypatch.setenv("SLURM_JOB_ID", "1235")
    main(words)
    assert len(logged(1, "train/loss")) == 4
    assert len({run.id for run in read_runs(job)}) == 2


def test_an_interactive_shell_is_no_job(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    main(["fit", "--config", "config.yaml", "--trainer.max_steps=1", "--trainer.callbacks.step=9"])
    assert not Path("runs", "slurm").exists()


@pytest.mark.slow
def test_script_with_two_processes_of_which_one_gets_the_signal(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    script = ["bash", str(ROOT / "configs" / "slurm" / "pretrain.sh")]
    script += ["--config", "config.yaml", "--trainer.callbacks.rank=1"]
    for _ in range(2):
        with subprocess.Popen(script, start_new_session=True) as started:
            try:
                assert started.wait(timeout=600) == 0
            except BaseException:
                os.killpg(started.pid, signal.SIGKILL)
                raise
    assert [path.name for path in job.rglob("hpc_ckpt_*.ckpt")] == ["hpc_ckpt_1.ckpt"]
    check_requeued(4)
