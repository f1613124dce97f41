"""Every YAML under configs/ is run, shortened: a new one is tested without editing this file."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import forked
import layouts
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.cli.main import main
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.weights import load_backbone, save_backbone

FOLDER = Path(__file__).parents[2] / "configs"
TRANSFER = sorted(FOLDER.glob("finetune/*.yaml"))
PLANS = sorted(FOLDER.glob("benchmark/*.yaml"))
SWEEPS = FOLDER.glob("sweep/*.yaml")  # tests/cli/test_sweeps.py runs these
COUNT = 10
CONFIGS = sorted(set(FOLDER.glob("**/*.yaml")) - set(TRANSFER) - set(PLANS) - set(SWEEPS))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Decathlon's layout: labelled phantoms of 16x20x18 voxels at 1 mm."""
    task = tmp_path_factory.mktemp("decathlon") / "Task04_Hippocampus"
    training = []
    for index in range(COUNT):
        phantom = generate_phantom("cardiac_ct", index, (16, 20, 18))
        entry = {}
        for key, folder in (("image", "imagesTr"), ("label", "labelsTr")):
            name = f"{folder}/case_{index:02d}.nii.gz"
            (task / folder).mkdir(parents=True, exist_ok=True)
            array = np.asarray(phantom[key])
            values = array * 2048 - 1024 if key == "image" else array.astype(np.uint8)
            nib.save(nib.Nifti1Image(values, np.eye(4)), task / name)
            entry[key] = f"./{name}"
        training.append(entry)
    (task / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {}, "training": training})
    )
    return task.parent


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each published data set, small and in its layout, by its class."""
    folder = tmp_path_factory.mktemp("published")
    return {
        "MMWHS": layouts.mmwhs(folder / "mmwhs"),
        "ASOCA": layouts.asoca(folder / "asoca"),
        "CANDI": layouts.candi(folder / "candi", count=2),
        "STOIC": layouts.stoic(folder / "stoic", count=8),
    }


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _words(**parts: dict[str, Any]) -> list[str]:
    """Options of the trainer, the model and the data."""
    return [
        f"--{part}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for part, values in parts.items()
        for key, value in values.items()
    ]


def _shortened(config: dict, volumes: Path) -> list[str]:
    data = config["data"]
    init = {"patch_size": [16, 16, 16], "val_pairs": 2, "num_workers": 0, "batch_size": 2}
    if data["class_path"] == "Phantom":
        init |= {"size": [16, 16, 16], "num_train": 6, "num_val": 3}
    elif data["class_path"] == "Decathlon":
        init |= {"root": str(volumes), "val_count": 3, "test_count": 3}
    else:
        init |= {"root": str(volumes / "Task04_Hippocampus" / "imagesTr"), "val_count": 3}
    model: dict = {"backbone_options": {"channels": [8, 16]}}
    model |= {"GVSL": {"affine_channels": 8}, "DeepCluster": {"clusters": 2}}.get(
        config["model"]["class_path"], {}
    )
    trainer = {"max_steps": 1, "limit_val_batches": 1, "accelerator": "cpu", "devices": 1}
    trainer |= {"val_check_interval": 1, "logger": "CSVLogger"}
    return _words(trainer=trainer, model=model, data=init)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_leaves_a_backbone(
    path: Path, volumes: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(path.read_text())
    main(["fit", "--config", str(path), *_shortened(config, volumes)])

    run = next((work / "runs").glob("*/version_0"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["init_args"]["seed"] == saved["seed_everything"] == 0
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 1
    assert yaml.safe_load(last["config"])["model"] == saved["model"]
    backbone = load_backbone(run / "backbone.safetensors")
    assert backbone.local_channels == 8
    drawn = "Figure" in str(saved["trainer"]["callbacks"])
    assert bool(list(run.glob("figures/*.png"))) == drawn
    printed = capsys.readouterr().out
    matches = config["model"]["class_path"] == "GVSL"
    matches &= config["model"]["init_args"].get("z_matching", True)
    assert (" NCC 0." in printed) == matches
    if config["model"]["class_path"] != "GVSL":
        assert " effective rank " in printed
    assert ("figures" in printed) == drawn


@pytest.mark.parametrize("path", TRANSFER, ids=lambda path: path.stem)
def test_config_trains_on_labels_and_tests(
    path: Path,
    volumes: Path,
    published: dict[str, Path],
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = yaml.safe_load(path.read_text())
    words = ["--config", str(path), *_transfer(config, volumes, published, work)]
    main(["fit", *words])
    encoder = config["model"]["init_args"].get("pretrained") == "encoder"
    loaded = "16 of 16 encoder" if encoder else "24 of 24 backbone"
    assert f"{loaded} entries loaded" in capsys.readouterr().out
    (best,) = work.glob("runs/*/version_0/checkpoints/best.ckpt")
    main(["test", *words, f"--ckpt_path={best}"])
    table = next((work / "runs").rglob("test_cases.csv")).read_text().splitlines()
    assert len(table) == 3 + ("subject" in table[0])  # a third case, of the second one's subject
    printed = capsys.readouterr().out
    names = " ".join(config["model"]["init_args"]["class_names"][1:])
    assert all(word in printed for word in names.split())  # a long name takes several lines
    if path.stem == "classification":
        main(["predict", *words, f"--ckpt_path={best}"])
        (predictions,) = (work / "runs").rglob("predictions.csv")
        assert len(predictions.read_text().splitlines()) == COUNT + 1
    if path.stem == "segmentation":
        _check_predictions([*words, f"--ckpt_path={best}"], work, capsys)


def _check_predictions(words: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the command line win over those of the checkpoint; volumes there are kept."""
    words = ["predict", *words, "--out=predicted", "--model.probabilities=true"]
    main(words)
    files = list((work / "predicted").glob("case_*.nii.gz"))
    assert len(files) == 2 * COUNT  # label maps and probabilities
    times = {file: file.stat().st_mtime_ns for file in files}
    capsys.readouterr()
    main(words)
    assert f"{COUNT} volumes kept that were in predicted already" in capsys.readouterr().out
    assert times == {file: file.stat().st_mtime_ns for file in files}


def _transfer(config: dict, volumes: Path, published: dict[str, Path], work: Path) -> list[str]:
    """Options that make a fine-tuning short, from a backbone in the working directory."""
    network = build_backbone("unet", channels=[8, 16])
    weights = str(save_backbone(network, work / "backbone.safetensors", {}))
    task, name = volumes / "Task04_Hippocampus", config["data"]["class_path"]
    is_classification = config["model"]["class_path"] == "Classification"
    root = published.get(name) or (volumes if name == "DecathlonSegmentation" else task)
    data: dict[str, Any] = {"num_workers": 0, "batch_size": 2, "val": 1, "test": 2}
    model: dict[str, Any] = {"backbone_options": {"channels": [8, 16]}, "weights": weights}
    if name.startswith("Phantom"):
        data |= {"size": [16, 16, 16], "count": 12, "val": 4, "test": 2, "labelled": 6}
    elif is_classification:
        lines = [f"{task}/imagesTr/case_{i:02d}.nii.gz,{i % 2}" for i in range(COUNT)]
        table = work / "table.csv"
        table.write_text("\n".join(["path,label", *lines]))
        data |= {"root": str(root if name in published else table), "size": [16, 16, 16], "val": 2}
    else:
        data |= {"root": str(root), "patch_size": [16, 16, 16]}
        model |= {"window_size": [24, 32, 32]}
        if name not in published:
            data |= {"label_values": {i: min(i, 1) for i in range(8)}}
    trainer = {"max_steps": 1, "accelerator": "cpu", "devices": 1, "val_check_interval": 1}
    trainer |= {"logger": "CSVLogger"}
    return _words(trainer=trainer, model=model, data=data)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_makes_valid_runs(
    path: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PAPER_DATA", "folder")
    monkeypatch.setenv("PWD", str(work))
    shutil.copy(FOLDER / "pretrain/gvsl.yaml", work / "plan.yaml")
    shutil.copy(FOLDER / "finetune/segmentation.yaml", work / "plan_finetune.yaml")
    plan = Plan.read(path)
    given = path.stem.startswith(("hippocampus", "folder"))
    root = ["--data.root=folder"] if given else []
    runs = [run for run in plan.runs(work, root) if run.seed == plan.seeds[-1]]
    pretrainings = [run for run in runs if not run.task]
    # in every fifth of these, each task and mode occurs
    ends = (plan.baseline, list(plan.methods)[-1])
    transfers = [run for run in runs if run.task and run.method in ends]
    for run in (*pretrainings[::2], *transfers[::5]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *run.words, "--print_config"])
        assert stopped.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["seed_everything"] == run.seed
        assert config["trainer"]["logger"]["class_path"].endswith("VersionedWandbLogger")
        callbacks = [one["class_path"].rpartition(".")[2] for one in config["trainer"]["callbacks"]]
        if run.needs is None and run.task:
            expected = "linear" if plan.is_linear(run.mode) else "scratch"
            assert config["model"]["init_args"]["mode"] == expected
        if run.task:
            assert {"SegmentationReport", "ClassificationReport"} & set(callbacks)
        else:
            assert "BackboneExporter" in callbacks
        if not path.stem.startswith("phantom"):
            assert str(config["data"]["init_args"]["root"]).startswith("folder")
        else:
            assert config["data"]["class_path"].rpartition(".")[2].startswith("Phantom")
            labelled = config["data"]["init_args"].get("start", 0) >= 1000
            assert labelled == bool(run.task)
            assert config["trainer"]["accelerator"] == "cpu"


@pytest.mark.slow
def test_paper_plan_on_small_folders_of_the_published_layouts(
    published: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvsl_lightning.runs.processes.run", forked.run)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PAPER_DATA", str(published["MMWHS"].parent))
    content = yaml.safe_load((FOLDER / "benchmark" / "paper.yaml").read_text("utf-8"))
    content |= {"methods": {"Scratch": {}}, "seeds": [0], "figures": {}}
    content["modes"] = {"linear": content["modes"]["linear"]}
    content["tasks"] = {name: content["tasks"][name] for name in ("hearts", "COVID-19")}
    small = {"trainer.max_steps": 1, "trainer.val_check_interval": 1, "trainer.accelerator": "cpu"}
    small |= {"model.init_args.backbone_options": {"channels": [8, 16]}}
    small |= {"data.init_args.num_workers": 0, "data.init_args.val": 2, "data.init_args.test": 2}
    for name, task in content["tasks"].items():
        task["config"] = str(FOLDER / "benchmark" / task["config"])
        size = "size" if name == "COVID-19" else "patch_size"
        task["changes"] |= small | {f"data.init_args.{size}": [16, 16, 16]}
    plan = work / "paper.yaml"
    plan.write_text(yaml.safe_dump(content))
    main(["benchmark", "--config", str(plan), "--out", "out", "--jobs", "2"])
    table = (work / "out" / "table.md").read_text("utf-8")
    assert all(f"\\[{score}]" in table for score in (21.9, 52.7))


def test_plan_names_a_variable_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("PAPER_DATA", raising=False)
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(FOLDER / "benchmark" / "paper.yaml"), "--out", "none"])
    assert "PAPER_DATA" in capsys.readouterr().err.splitlines()[-1]
