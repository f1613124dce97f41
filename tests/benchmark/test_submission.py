"""Lines for SLURM and sweeps for W&B, as these read them."""

import subprocess
from pathlib import Path

import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.submission import slurm_lines, sweep
from plans import finish, write


def test_lines_for_slurm_as_the_shell_reads_them(tmp_path: Path) -> None:
    words = ["--root=a b"]
    runs = Plan.read(write(tmp_path)).runs(tmp_path / "my out", words)
    lines = slurm_lines(runs, ["benchmark", "--out", "my out"], words)
    sbatch = """sbatch() { printf '%s\\n' "$@" >&2; echo 17; }\n"""
    printed = subprocess.run(
        ["bash", "-c", sbatch + lines], stderr=subprocess.PIPE, text=True, check=True
    ).stderr.splitlines()
    command = "python -m gvsl_lightning benchmark --out 'my out'"
    wrap = f"--wrap={command} --only $SLURM_ARRAY_TASK_ID '--root=a b'"
    assert printed == [
        *("--parsable", "--array=0,5", wrap),
        *("--dependency=afterany:17", "--array=1,2,3,4,6,7,8,9", wrap),
    ]


def test_sweep_as_the_agent_reads_it(tmp_path: Path) -> None:
    runs = Plan.read(write(tmp_path)).runs(tmp_path / "out", [])
    content = yaml.safe_load(sweep(runs, ["benchmark", "--out", "out"], ["--root=a"]))
    assert content["parameters"] == {"only": {"values": [0, 5]}}
    given = create_sweep_command_args({"args": {"only": {"value": 5}}})
    command = create_sweep_command(content["command"])
    place = command.index("${args}")
    command[place : place + 1] = given["args"]
    assert command[:4] == ["python", "-m", "gvsl_lightning", "benchmark"]
    assert command[4:] == ["--out", "out", "--root=a", "--only=5"]
    for index in (0, 5):
        finish(runs[index], [])
    content = yaml.safe_load(sweep(runs, [], []))
    assert content["parameters"]["only"]["values"] == [1, 2, 3, 4, 6, 7, 8, 9]
