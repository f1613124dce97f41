"""Every YAML under configs/ is run, shortened: a new one is tested without editing this file."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

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
CONFIGS = sorted(set(FOLDER.glob("**/*.yaml")) - set(TRANSFER) - set(PLANS) - set(SWEEPS))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Decathlon's layout: 24 labelled phantoms of 20x24x18 voxels at 1 mm."""
    task = tmp_path_factory.mktemp("decathlon") / "Task04_Hippocampus"
    training = []
    for index in range(24):
        phantom = generate_phantom("cardiac_ct", index, (20, 24, 18))
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
    makers = {
        "MMWHS": layouts.mmwhs,
        "ASOCA": layouts.asoca,
        "CANDI": layouts.candi,
        "STOIC": layouts.stoic,
    }
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


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
    trainer = {"max_steps": 2, "limit_val_batches": 1, "accelerator": "cpu", "devices": 1}
    trainer |= {"logger.init_args.save_dir": "runs", "val_check_interval": 2}
    parts = {"trainer": trainer, "model.init_args": model, "data.init_args": init}
    return [
        f"--{part}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for part, values in parts.items()
        for key, value in values.items()
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_leaves_a_backbone(
    path: Path, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    main(["fit", "--config", str(path), *_shortened(config, volumes)])

    run = next((tmp_path / "runs").glob("*/version_0"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2
    assert saved["data"]["init_args"]["seed"] == saved["seed_everything"] == 0
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
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
def test_config_trains_on_labels_tests_and_predicts(
    path: Path,
    volumes: Path,
    published: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    task = volumes / "Task04_Hippocampus"
    backbone = save_backbone(
        build_backbone("unet", channels=[8, 16]), tmp_path / "backbone.safetensors", {}
    )
    name = config["data"]["class_path"]
    root = str(published.get(name) or (volumes if name == "DecathlonSegmentation" else task))
    count = {"MMWHS": 8, "ASOCA": 8, "CANDI": 12}.get(name, 24)
    phantom = name.startswith("Phantom")
    init = {"num_workers": 0, "batch_size": 2, "val": 2, "test": 3}
    more = {"size": [16, 16, 16], "count": 16, "val": 4, "labelled": 6}
    init |= more if phantom else {"root": root}
    model = {"backbone_options": {"channels": [8, 16]}, "weights": str(backbone)}
    if phantom:
        pass
    elif name in published:
        init |= {"size" if name == "STOIC" else "patch_size": [16, 16, 16]}
    elif config["model"]["class_path"] == "Classification":
        lines = [f"{task}/imagesTr/case_{i:02d}.nii.gz,{i % 2}" for i in range(12)]
        table = tmp_path / "table.csv"
        table.write_text("\n".join(["path,label", *lines]))
        init |= {"root": str(table), "size": [16, 16, 16]}
    else:
        init |= {"patch_size": [16, 16, 16], "label_values": {i: min(i, 1) for i in range(8)}}
    trainer = {"max_steps": 2, "accelerator": "cpu", "devices": 1, "val_check_interval": 2}
    parts = {"trainer": trainer, "model.init_args": model, "data.init_args": init}
    words = [
        f"--{part}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for part, values in parts.items()
        for key, value in values.items()
    ]
    main(["fit", "--config", str(path), *words])
    encoder = config["model"]["init_args"].get("pretrained") == "encoder"
    loaded = "16 of 16 encoder" if encoder else "24 of 24 backbone"
    assert f"{loaded} entries loaded" in capsys.readouterr().out
    run = next((tmp_path / "runs").glob("*/version_0"))
    best = run / "checkpoints" / "best.ckpt"
    main(["test", "--config", str(path), *words, f"--ckpt_path={best}"])
    assert len(next((tmp_path / "runs").rglob("test_cases.csv")).read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    names = " ".join(config["model"]["init_args"]["class_names"][1:])
    assert all(word in printed for word in names.split())  # a long name takes several lines
    if phantom:
        return
    main(["predict", "--config", str(path), *words, f"--ckpt_path={best}"])
    if config["model"]["class_path"] == "Classification":
        (predictions,) = (tmp_path / "runs").rglob("predictions.csv")
        assert len(predictions.read_text().splitlines()) == 13
    else:
        (folder,) = (tmp_path / "runs").rglob("predictions")
        files = list(folder.glob("*.nii.gz"))
        assert len(files) == count
        # what the command line says wins over what the checkpoint holds; the files are kept
        more = f"--model.init_args.probabilities=true --ckpt_path={best}".split()
        more += [f"--trainer.callbacks.folder={folder}"]
        main(["predict", "--config", str(path), *words, *more])
        assert len(list(folder.glob("*_probabilities.nii.gz"))) == count
        capsys.readouterr()
        times = {file: file.stat().st_mtime_ns for file in files}
        main(["predict", "--config", str(path), *words, *more])
        assert f"{count} volumes kept that were in {folder} already" in capsys.readouterr().out
        assert times == {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plan_makes_valid_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("PAPER_DATA", "folder")
    plan = Plan.read(path)
    given = path.stem.startswith("hippocampus")
    root = ["--data.init_args.root=folder"] if given else []
    runs = [run for run in plan.runs(tmp_path, root) if run.seed == plan.seeds[-1]]
    pretrainings = [run for run in runs if not run.task]
    # in every third of these, each task, mode and method occurs
    ends = (plan.baseline, list(plan.methods)[-1])
    transfers = [run for run in runs if run.task and run.method in ends]
    for run in (*pretrainings, *transfers[::3]):
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


def test_paper_plan_on_small_folders_of_the_published_layouts(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, folder in published.items():
        (data / name.lower()).symlink_to(folder)
    monkeypatch.setenv("PAPER_DATA", str(data))
    content = yaml.safe_load((FOLDER / "benchmark" / "paper.yaml").read_text("utf-8"))
    content |= {"methods": {"Scratch": {}}, "seeds": [0], "figures": {}}
    content["modes"] = {"linear": content["modes"]["linear"]}
    small = {"trainer.max_steps": 2, "trainer.val_check_interval": 1, "trainer.accelerator": "cpu"}
    small |= {"model.init_args.backbone_options": {"channels": [8, 16]}}
    small |= {"data.init_args.num_workers": 0}
    for name, task in content["tasks"].items():
        task["config"] = str(FOLDER / "benchmark" / task["config"])
        size = "size" if name == "COVID-19" else "patch_size"
        task["changes"] |= small | {f"data.init_args.{size}": [16, 16, 16]}
        task["changes"] |= {"data.init_args.val": 2, "data.init_args.test": 4}
    plan = tmp_path / "paper.yaml"
    plan.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    main(["benchmark", "--config", str(plan), "--out", str(out), "--jobs", "2"])
    (row,) = [
        line for line in (out / "table.md").read_text("utf-8").splitlines() if "[21.9]" in line
    ]
    assert all(f"\\[{score}]" in row for score in (21.9, 10.0, 52.7, 56.4))


def test_plan_names_a_variable_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("PAPER_DATA", raising=False)
    with pytest.raises(SystemExit):
        main(["benchmark", "--config", str(FOLDER / "benchmark" / "paper.yaml"), "--out", "none"])
    assert "PAPER_DATA" in capsys.readouterr().err.splitlines()[-1]
