"""Every YAML under configs/sweep, run as the agent of W&B does; trials that fail or end early."""

import csv
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException
from wandb import wandb_agent

from gvsl_lightning.cli import main as cli
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules.phantom import generate_phantom
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.tools.sweep import Sweep, quantile
from gvsl_lightning.weights import save_backbone
from wandb_files import read_runs

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEPS = sorted(CONFIGS.glob("sweep/*.yaml"))
PHANTOM = CONFIGS / "sweep" / "pretrain_phantom.yaml"

TRAINER = {
    "callbacks": "null",
    "max_steps": 2,
    "val_check_interval": 2,
    "accelerator": "cpu",
    "devices": 1,
}
DATA: dict[str, dict[str, Any]] = {
    "Phantom": {"size": [16, 16, 16], "num_train": 4, "num_val": 2, "val_pairs": 1},
    "PretrainDataModule": {"patch_size": [16, 16, 16], "val_count": 2, "val_pairs": 1},
    "PhantomSegmentation": {"size": [16, 16, 16], "count": 24, "val": 2, "test": 2},
    "SegmentationDataModule": {"patch_size": [16, 16, 16], "val": 2, "test": 2},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the environment variables of the sweeps name."""
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
    images = str(folder / "images")
    return {
        "FOLDER": images,
        "IMAGES": images,
        "LABELS": str(folder / "labels"),
        "BACKBONE": str(weights),
    }


@pytest.fixture(autouse=True)
def _folder(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the configurations, and the variables that W&B's agent changes."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    agent = {"WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    for name, value in {**inputs, **agent, "PATH": path, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What W&B's agent runs for parameters, without running it."""
    made: list[list[str]] = []

    def process(command: list[str], **_: Any) -> SimpleNamespace:
        made.append(command)
        return SimpleNamespace()

    def make(content: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
        monkeypatch.setattr(wandb_agent, "AgentProcess", process)
        _start(content, parameters)
        return made[-1]

    return make


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_agent_runs_the_sweep(
    path: Path, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    content = yaml.safe_load(path.read_text("utf-8"))
    base = yaml.safe_load(Path(content["command"][6]).read_text("utf-8"))
    for name in content["parameters"]:
        # what is only interpolated from another key must not be swept
        assert not str(_at(base, name)).startswith("${"), name
    small = _small(base["data"]["class_path"])
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.name=sweep"]
    sets = _parameter_sets(content)
    for index, parameters in enumerate(sets):
        words = command(content, parameters)
        assert words == Sweep.read(str(path)).words(parameters)
        assert words[:4] == ["/usr/bin/env", "python", "-m", "gvsl_lightning"]
        main([*words[4:], *small, *logger, f"--trainer.logger.save_dir={tmp_path / str(index)}"])

        run = tmp_path / str(index) / "sweep" / "version_0"
        saved = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        for name, value in parameters.items():
            arrived, expected = _at(saved, name), None if value == "null" else value
            assert arrived == expected, name
            assert isinstance(arrived, bool) == isinstance(expected, bool), name
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            logged = [row for row in csv.DictReader(file) if row.get(content["metric"]["name"])]
        assert [row["step"] for row in logged] == ["1"]


def test_every_kind_of_value_arrives(command: Callable[..., list[str]]) -> None:
    content = yaml.safe_load(PHANTOM.read_text("utf-8"))
    parameters = {
        "model.init_args.affine": False,
        "trainer.enable_model_summary": True,
        "model.init_args.backbone_options": {"channels": [8, 16]},
        "data.init_args.size": [16, 16, 16],
        "data.init_args.patch_size": "null",
        "trainer.logger.init_args.name": "two words",
        "model.init_args.learning_rate": 1e-05,
        "model.init_args.weight_smoothness": 1,
    }
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]
    words = [*command(content, parameters)[4:], *_small("Phantom"), *logger]
    main(words)
    saved = yaml.safe_load(Path("runs/two words/version_0/config.yaml").read_text("utf-8"))
    expected = {**parameters, "data.init_args.patch_size": None}
    assert {name: _at(saved, name) for name in parameters} == expected
    for name in ("model.init_args.learning_rate", "model.init_args.weight_smoothness"):
        assert isinstance(_at(saved, name), float)
    assert _at(saved, "model.init_args.affine") is False
    assert _at(saved, "trainer.enable_model_summary") is True


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.init_args.learning_rate", -1.0), ("model.init_args.learning_rat", 0.1)],
)
def test_trial_that_fails_says_why_and_exits_with_2(
    name: str, value: float, command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(yaml.safe_load(PHANTOM.read_text("utf-8")), {name: value})
    with pytest.raises(SystemExit) as stopped:
        main([*words[4:], *_small("Phantom"), "--trainer.logger=CSVLogger"])
    assert stopped.value.code == 2
    assert name.rpartition(".")[2] in capsys.readouterr().err


def test_trial_that_is_ended_early_exits_well_and_closes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    content = yaml.safe_load(PHANTOM.read_text("utf-8"))
    parameters = {**_small_values("Phantom"), "trainer.max_steps": 1_000_000}
    parameters["trainer.logger.save_dir"] = str(tmp_path / "runs")
    del parameters["trainer.callbacks"]
    agent = _start(content, parameters, "run45678")
    process = agent._run_processes["run45678"]
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("last.ckpt")):  # by then the trial validates all the time
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # as the run does itself when it is told to end, and, unaware of it, the agent
        process._popen.send_signal(signal.SIGINT)
        agent._command_stop({"run_id": "run45678"})
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    told = "".join(capfd.readouterr())
    assert "Received SIGTERM" in told
    assert "Traceback" not in told

    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] >= 2
    assert not list(tmp_path.rglob("backbone.safetensors"))  # that is for the end of training
    (run,) = read_runs(tmp_path)
    assert (run.id, run.sweep_id) == ("run45678", "sweep123")
    assert content["metric"]["name"] in run.summary
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


def test_local_agent_runs_the_same_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "--config", str(PHANTOM), "--out", "out", "--count", "1"]
    main([*words, *_small("Phantom")])
    with open("out/trials.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "0"
    assert 0 < float(row["val/dice_after"]) < 1
    saved = yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text("utf-8"))
    for name in yaml.safe_load(PHANTOM.read_text("utf-8"))["parameters"]:
        assert str(_at(saved, name)) == row[name]
    assert "1 of 1 trials: out/trials.csv" in capfd.readouterr().out


def _start(
    content: dict[str, Any], parameters: dict[str, Any], run_id: str = "run00000"
) -> wandb_agent.Agent:
    """Let W&B's agent take one command, as from its server."""
    agent = wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = list(content["command"])
    given = {name: {"value": value} for name, value in parameters.items()}
    response = agent._process_command(
        {"type": "run", "run_id": run_id, "program": content["program"], "args": given}
    )
    assert "exception" not in response, response
    return agent


def _parameter_sets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """As few as hold every listed value and both ends of every range."""
    specs = content["parameters"].items()
    number = max(len(spec.get("values", "ab")) for _, spec in specs)
    chances = [index / (number - 1) for index in range(number)]
    sets = [{name: quantile(name, spec, chance) for name, spec in specs} for chance in chances]
    for name, spec in specs:
        for value in spec.get("values", [spec.get("min"), spec.get("max")]):
            assert any(one[name] == pytest.approx(value) for one in sets)
    return sets


def _small_values(data: str) -> dict[str, Any]:
    head = {} if "Segmentation" in data else {"affine_channels": 8}
    parts = {
        "trainer": TRAINER,
        "model.init_args": {"backbone_options": {"channels": [8, 16]}, **head},
        "data.init_args": {**DATA[data], "num_workers": 0},
    }
    return {f"{part}.{key}": value for part, one in parts.items() for key, value in one.items()}


def _small(data: str) -> list[str]:
    return [f"--{name}={value}" for name, value in _small_values(data).items()]


def _at(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config
