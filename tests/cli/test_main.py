"""The command line: names, overrides, messages and the saved configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from gvsl_lightning import __version__
from gvsl_lightning.callbacks import MatchingFigure
from gvsl_lightning.cli.main import CommandLine, main

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")


def _printed_config(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_short_class_names_and_defaults_are_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    config = _printed_config(["fit", "--config", QUICKSTART], capsys)
    assert config["model"]["class_path"] == "gvsl_lightning.tasks.GVSL"
    assert config["model"]["init_args"]["weight_smoothness"] == 1.0


def test_interpolation_survives_overrides_and_a_second_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("model:\n  init_args:\n    learning_rate: 0.5\n")
    words = ["fit", "--config", QUICKSTART, "--config", str(second), "--seed_everything=7"]
    config = _printed_config([*words, "--data.num_train=9"], capsys)
    assert config["model"]["init_args"]["learning_rate"] == 0.5
    assert config["data"]["init_args"]["num_train"] == 9
    assert config["seed_everything"] == 7
    assert config["data"]["init_args"]["seed"] in (7, "${seed_everything}")


@pytest.mark.parametrize(
    "words",
    [
        ["--data.scene=liver"],
        ["--model.backbone=swin_unetr"],
        ["--data.batch_size=0"],
        ["--model.in_channels=2"],
        ["--model.matching=regression", "--model.affine_channels=28"],
        ["--model.learning_rate=-1"],
        ["--ckpt_path=nowhere.ckpt"],
    ],
)
def test_wrong_options_are_one_sentence(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", QUICKSTART, *words])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any(line.startswith("Traceback") for line in lines)


@pytest.mark.parametrize("config", ["gvsl", "hippocampus"])
def test_a_missing_root_is_one_sentence(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(CONFIGS / "pretrain" / f"{config}.yaml")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: root is missing; add --data.root=FOLDER")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that make the quickstart small, in a working directory of its own."""
    monkeypatch.setattr(MatchingFigure, "on_validation_end", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    data = {"size": [16, 16, 16], "num_train": 2, "num_val": 2, "val_pairs": 1}
    return [
        *(f"--data.{name}={value}" for name, value in data.items()),
        "--model.backbone_options={channels: [8, 16]}",
        *("--model.affine_channels=8", "--trainer.val_check_interval=1"),
        "--trainer.logger=CSVLogger",
    ]


def test_without_a_logger_no_file_of_the_working_folder_is_overwritten(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "config.yaml"
    own.write_text("# mine\n" + Path(QUICKSTART).read_text())
    fit = ["fit", f"--config={own}", *small, "--trainer.max_steps=1"]
    fit.append("--trainer.enable_checkpointing=false")
    none = ["--trainer.logger=false", "--trainer.callbacks=null"]
    main([*fit, *none])
    assert own.read_text().startswith("# mine\n")
    main([*fit, "--trainer.callbacks=LearningRateMonitor"])
    main([*fit, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    with pytest.raises(SystemExit):
        main([*fit, *none, "--test_after_fit=true"])
    assert "test_after_fit tests the best checkpoint and there is none" in capsys.readouterr().err


def test_a_tool_takes_options_of_the_model() -> None:
    words = ["--model.backbone_options={channels: [8, 16]}", "--trainer.logger=false"]
    line = CommandLine(["--config", QUICKSTART, *words], run=False)
    assert line.model.hparams["backbone_options"] == {"channels": [8, 16]}


def test_resume_validate_test_and_predict(
    small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", QUICKSTART, *small]
    main(["fit", *words, "--trainer.max_steps=1", "--test_after_fit=true"])
    assert "test/dice_after" in capsys.readouterr().out
    last = "runs/quickstart/version_0/checkpoints/last.ckpt"
    words.append(f"--ckpt_path={last}")
    main(["fit", *words, "--trainer.max_steps=2"])
    steps = torch.load("runs/quickstart/version_1/checkpoints/last.ckpt", weights_only=True)
    assert steps["global_step"] == 2
    for command, named in (("validate", "val/dice_after"), ("test", "test/dice_after")):
        capsys.readouterr()
        main([command, *words])
        assert named in capsys.readouterr().out
    main(["predict", *words])


def test_double_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", QUICKSTART, "--trainer.precision=64-true"])
    assert stopped.value.code == 2
    assert "trainer.precision" in capsys.readouterr().err


def test_a_configuration_is_utf8_in_any_locale(tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_bytes("# Größe\ntrainer: {max_steps: 7}\n".encode())
    words = [sys.executable, "-m", "gvsl_lightning", "fit", "--config", QUICKSTART]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    printed = subprocess.run(
        [*words, f"--config={config}", "--print_config"],
        env={**os.environ, **locale},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "max_steps: 7" in printed
