"""Every YAML under configs/sweep as W&B's agent runs it; a trial that W&B ends early."""

import re
import signal
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from gvsl_lightning.cli import main as cli
from gvsl_lightning.cli.main import CommandLine, main
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.runs.files import read_metrics
from gvsl_lightning.weights import save_backbone
from wandb_files import read_runs

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
PHANTOM = ROOT / "configs" / "sweep" / "pretrain_phantom.yaml"

TRAINER = {"callbacks": "null", "max_steps": 2, "val_check_interval": 2, "accelerator": "cpu"}
DATA: dict[str, dict[str, Any]] = {
    "Phantom": {"size": [16, 16, 16], "num_train": 4, "num_val": 2, "val_pairs": 1},
    "PretrainDataModule": {"patch_size": [16, 16, 16], "val_count": 2, "val_pairs": 1},
    "PhantomSegmentation": {"size": [16, 16, 16], "count": 24, "val": 2, "test": 2},
    "SegmentationDataModule": {"patch_size": [16, 16, 16], "val": 2, "test": 2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of the sweeps and the files that they name."""
    folder = tmp_path_factory.mktemp("inputs")
    for index in range(24):
        phantom = generate_phantom("cardiac_ct", index, (16, 16, 16))
        volumes = {"images": phantom["image"] * 2048 - 1024, "labels": phantom["label"] > 0}
        for name, array in volumes.items():
            (folder / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4))
            nib.save(image, folder / name / f"{index:02d}.nii.gz")
    backbone = build_backbone("unet", channels=[8, 16])
    weights = save_backbone(backbone, folder / "backbone.safetensors", {})
    images, labels = str(folder / "images"), str(folder / "labels")
    return {"FOLDER": images, "IMAGES": images, "LABELS": labels, "BACKBONE": str(weights)}


@pytest.fixture(autouse=True)
def _work(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for name, value in {**inputs, "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_runs_as_the_agent_runs_it(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text("utf-8"))
    assert sweep["program"] == "gvsl_lightning"
    first, *others = trials(sweep)
    words = command(sweep, first)
    assert words[:5] == ["${env}", "python", "-m", "gvsl_lightning", "fit"]
    base = yaml.safe_load(Path(words[6]).read_text("utf-8"))
    small = words_of(small_options(base["data"]["class_path"]))
    main([*words[4:], *small, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"])
    assert [step for step, row in logged() if sweep["metric"]["name"] in row] == [1]
    check_arrival(yaml.safe_load(next(Path("runs").rglob("config.yaml")).read_text()), first)
    for trial in others:
        line = CommandLine([*command(sweep, trial)[5:], *small, *LIGHT], run=False)
        check_arrival(yaml.safe_load(line.parser.dump(line.config, skip_none=False)), trial)
        for name in trial:
            # a key that other keys are computed from may be swept, a computed key may not
            assert not str(value_at(base, name)).startswith("${"), name


def test_every_kind_of_value_arrives() -> None:
    sweep = yaml.safe_load(PHANTOM.read_text("utf-8"))
    trial = {
        "model.affine": False,
        "trainer.enable_model_summary": True,
        "model.backbone_options": {"channels": [8, 16]},
        "data.size": [16, 16, 16],
        "data.patch_size": "null",
        "trainer.default_root_dir": "two words",
        "model.learning_rate": 1e-05,
        "model.weight_smoothness": 1,
    }
    line = CommandLine([*command(sweep, trial)[5:], *LIGHT], run=False)
    check_arrival(yaml.safe_load(line.parser.dump(line.config, skip_none=False)), trial)


def test_optuna_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    page = (ROOT / "docs" / "sweeps.md").read_text("utf-8")
    (example,) = re.findall(r"```python optuna\n(.*?)```", page, flags=re.DOTALL)
    assert "n_trials=20" in example
    small = words_of(small_options("Phantom"))
    monkeypatch.setattr(cli, "main", lambda words: main([*words, *small]))
    exec(example.replace("n_trials=20", "n_trials=1"), {"__name__": "__main__"})
    assert len(list(Path("runs", "optuna").glob("*/metrics.csv"))) == 1


@pytest.mark.slow
def test_trial_that_is_ended_early_exits_well_and_closes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_RUN_ID", "run45678")
    sweep = yaml.safe_load(PHANTOM.read_text("utf-8"))
    trial = {**small_options("Phantom"), "trainer.max_steps": 1_000_000}
    del trial["trainer.callbacks"]
    process = subprocess.Popen(
        [sys.executable, *command(sweep, trial)[2:], "--trainer.logger.save_dir=runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("last.ckpt")):  # from then on the trial validates
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # a trial that W&B ends interrupts itself; the agent, unaware of it, terminates it, too
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in printed

    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] >= 2
    assert not list(tmp_path.rglob("backbone.safetensors"))  # written at the end of training
    (run,) = read_runs(tmp_path)
    assert (run.id, run.sweep_id) == ("run45678", "sweep123")
    assert sweep["metric"]["name"] in run.summary
    assert run.exit_code == 0


def test_second_signal_does_not_keep_a_run_from_being_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(args: Any) -> None:
        raise SIGTERMException

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setattr(cli, "CommandLine", stop)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["fit"])
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not stopped.value.code


LIGHT = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.accelerator=cpu"]


def command(sweep: dict[str, Any], trial: dict[str, Any]) -> list[str]:
    """The words of a trial, as W&B's agent makes them."""
    given = {"args": {name: {"value": value} for name, value in trial.items()}}
    words = create_sweep_command(list(sweep["command"]))
    assert words[-1] == "${args}"
    return [*words[:-1], *create_sweep_command_args(given)["args"]]


def trials(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """As few trials as hold every listed value and both ends of every range."""
    ends = {
        name: spec["values"] if "values" in spec else [spec["min"], spec["max"]]
        for name, spec in sweep["parameters"].items()
    }
    count = max(map(len, ends.values()))
    columns = [list(islice(cycle(values), count)) for values in ends.values()]
    return [dict(zip(ends, values, strict=True)) for values in zip(*columns, strict=True)]


def check_arrival(config: dict[str, Any], trial: dict[str, Any]) -> None:
    for name, value in trial.items():
        expected, arrived = None if value == "null" else value, value_at(config, name)
        assert arrived == expected, name
        assert isinstance(arrived, bool) == isinstance(expected, bool), name


def small_options(data: str) -> dict[str, Any]:
    head = {} if "Segmentation" in data else {"affine_channels": 8}
    parts = {
        "trainer": TRAINER,
        "model": {"backbone_options": {"channels": [8, 16]}, **head},
        "data": {**DATA[data], "num_workers": 0},
    }
    return {f"{part}.{key}": value for part, one in parts.items() for key, value in one.items()}


def words_of(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def logged() -> list[tuple[int, dict[str, float]]]:
    (path,) = Path("runs").rglob("metrics.csv")
    return [(int(row["step"]), row) for row in read_metrics(path.parent)]


def value_at(config: Any, name: str) -> Any:
    """The value of a key in its short form, without ``init_args``."""
    for key in name.split("."):
        config = config if isinstance(config, dict) else {}
        config = config.get(key, config.get("init_args", {}).get(key))
    return config
