"""The command line: names, overrides, messages and the saved configuration."""

from pathlib import Path

import pytest
import torch
import yaml

from gvsl_lightning import __version__
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
    config = _printed_config([*words, "--data.init_args.num_train=9"], capsys)
    assert config["model"]["init_args"]["learning_rate"] == 0.5
    assert config["data"]["init_args"]["num_train"] == 9
    assert config["seed_everything"] == 7
    assert config["data"]["init_args"]["seed"] in (7, "${seed_everything}")


@pytest.mark.parametrize(
    "words",
    [
        ["--data.init_args.scene=liver"],
        ["--model.init_args.backbone=resnet"],
        ["--model.init_args.backbone=swin_unetr"],
        ["--model.init_args.similarity_options={window: 4}"],
        ["--model.init_args.corruption={shufling_rate: 1}"],
        ["--data.init_args.batch_size=0"],
        ["--data.init_args.num_workers=-1"],
        ["--model.init_args.in_channels=2"],
        ["--model.init_args.matching=regression", "--model.init_args.affine_channels=28"],
        ["--model.init_args.backbone_options={channels: [28, 56]}"],
        ["--model.init_args.learning_rate=-1"],
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
    assert message.startswith("error: root is missing; add --data.init_args.root=FOLDER")


def test_without_a_logger_no_file_of_the_working_folder_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "config.yaml"
    own.write_text("# mine\n" + Path(QUICKSTART).read_text())
    words = ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.max_steps=1"]
    small = ["--data.init_args.size=[16, 16, 16]", "--data.init_args.num_train=2"]
    small += ["--model.init_args.backbone_options={channels: [8, 16]}"]
    small += ["--trainer.val_check_interval=1", "--trainer.enable_checkpointing=false"]
    main(["fit", "--config", str(own), *words, *small])
    assert own.read_text().startswith("# mine\n")
    one = ["--trainer.callbacks=LearningRateMonitor", "--trainer.logger=CSVLogger"]
    one += ["--trainer.logger.save_dir=runs"]
    main(["fit", "--config", str(own), *words, *small, *one])
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", QUICKSTART, *quiet, *words[2:], *small])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(own), *words, *small, "--test_after_fit=true"])
    assert "test_after_fit tests the best checkpoint and there is none" in capsys.readouterr().err


def test_a_tool_takes_options_of_the_model() -> None:
    words = ["--model.init_args.backbone_options={channels: [8, 16]}", "--trainer.logger=false"]
    line = CommandLine(["--config", QUICKSTART, *words], run=False)
    assert line.model.hparams["backbone_options"] == {"channels": [8, 16]}


def test_resume_validate_test_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    size = "--data.init_args.size=[16, 16, 16]"
    small = [size, "--data.init_args.num_train=4", "--data.init_args.num_val=2"]
    small += ["--model.init_args.backbone_options={channels: [8, 16]}"]
    small += ["--trainer.val_check_interval=2"]
    first = [*small, "--trainer.max_steps=2", "--test_after_fit=true"]
    main(["fit", "--config", QUICKSTART, *first])
    assert "test/dice_after" in capsys.readouterr().out
    last = "runs/quickstart/version_0/checkpoints/last.ckpt"
    resumed = [*small, "--trainer.max_steps=4", f"--ckpt_path={last}"]
    main(["fit", "--config", QUICKSTART, *resumed])
    steps = torch.load("runs/quickstart/version_1/checkpoints/last.ckpt", weights_only=True)
    assert steps["global_step"] == 4
    for command, named in (("validate", "val/dice_after"), ("test", "test/dice_after")):
        capsys.readouterr()
        main([command, "--config", QUICKSTART, *small, f"--ckpt_path={last}"])
        assert named in capsys.readouterr().out
    main(["predict", "--config", QUICKSTART, *small, f"--ckpt_path={last}"])
