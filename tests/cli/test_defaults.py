"""Names of shipped configurations, and the defaults that they and the task's class leave unsaid."""

from pathlib import Path

import pytest
import yaml

from gvsl_lightning.cli.main import main
from gvsl_lightning.cli.sources import config_path

CONFIGS = Path(__file__).parents[2] / "configs"


def printed_trainer(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["trainer"]


def names(trainer: dict) -> list[str]:
    return [one["class_path"].rpartition(".")[2] for one in trainer["callbacks"]]


def checkpoint(trainer: dict) -> dict:
    (options,) = [
        one["init_args"]
        for one in trainer["callbacks"]
        if one["class_path"].endswith("ResumableCheckpoint")
    ]
    return options


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gvsl_mri", "pretrain/gvsl_mri"),
        ("finetune/hippocampus", "finetune/hippocampus"),
        ("benchmark/phantom", "benchmark/phantom"),
        ("quickstart", "quickstart"),
    ],
)
def test_a_name_stands_for_a_shipped_file(
    name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(config_path(name)).samefile(CONFIGS / f"{path}.yaml")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("trainer: {}")
    assert config_path(name) == name  # a file of one's own comes first


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("hippocampus", "finetune/hippocampus, pretrain/hippocampus"),
        ("gvsl_mr", "gvsl_mri?"),
        ("configs/pretrain/simcl.yaml", "pretrain/simclr?"),
        ("nowhere/none.yaml", "path"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    name: str,
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--config", name], [f"--config={name}"]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *words])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
        assert nearest in line


@pytest.mark.parametrize(
    ("name", "monitor", "of_the_task"),
    [
        ("gvsl", "val/ncc_after", "MatchingFigure"),
        ("masked_autoencoder", "val/loss", "FeatureFigure"),
        ("byol", None, "BackboneExporter"),
        ("segmentation", "val/dice", "SegmentationReport"),
        ("classification", "val/auroc", "ClassificationReport"),
    ],
)
def test_callbacks_follow_from_the_task(
    name: str, monitor: str | None, of_the_task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = printed_trainer(["fit", "--config", name], capsys)
    assert checkpoint(trainer)["monitor"] == monitor
    assert of_the_task in names(trainer)


def test_another_task_brings_its_own_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = printed_trainer(["fit", "--config", "gvsl", "--model=SimCLR"], capsys)
    assert checkpoint(trainer)["monitor"] == "val/loss"
    assert "MatchingFigure" not in names(trainer)


def test_defaults_are_overridden_by_words_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", "gvsl"]
    default = printed_trainer(words, capsys)
    more = printed_trainer([*words, "--trainer.callbacks+=FeatureFigure"], capsys)
    assert names(more) == [*names(default), "FeatureFigure"]
    one = printed_trainer([*words, "--trainer.callbacks=RunSummary"], capsys)
    assert one["callbacks"]["class_path"].endswith("RunSummary")
    named = printed_trainer([*words, "--trainer.logger.name=mine"], capsys)["logger"]
    assert named["init_args"]["name"] == "mine"
    logger = printed_trainer([*words, "--trainer.logger=CSVLogger"], capsys)["logger"]
    assert logger["class_path"].endswith("CSVLogger")
    assert logger["init_args"]["save_dir"] == "runs"
    assert logger["init_args"]["name"] == "gvsl"
    own = tmp_path / "own.yaml"
    own.write_text("trainer: {val_check_interval: 7, callbacks+: FeatureFigure}")
    both = printed_trainer([*words, f"--config={own}"], capsys)
    assert names(both) == names(more)
    assert both["val_check_interval"] == 7


def test_a_printed_configuration_gives_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed_trainer(["fit", "--config", "gvsl"], capsys)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "gvsl", "--print_config"])
    whole = tmp_path / "whole.yaml"
    whole.write_text(capsys.readouterr().out)
    assert printed_trainer(["fit", "--config", str(whole)], capsys) == first
