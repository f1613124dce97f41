"""Files of runs for Weights & Biases, read back."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
import wandb
import yaml

from checkpoints import segmentation_checkpoint
from gvsl_lightning.callbacks import MatchingFigure
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from gvsl_lightning.phantom import generate_phantom
from gvsl_lightning.runs.files import TABLES, read_metrics
from gvsl_lightning.runs.loggers import BEST, VersionedWandbLogger
from gvsl_lightning.weights import load_backbone_weights
from wandb_files import OfflineRun, read_runs

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = [
    "--model.backbone_options={channels: [8, 16]}",
    "--data.size=[16,16,16]",
]
PRETRAIN = [
    *("fit", f"--config={CONFIGS / 'quickstart.yaml'}", *TINY),
    *("--model.affine_channels=8", "--trainer.log_every_n_steps=1"),
    *("--data.num_train=4", "--data.num_val=3", "--data.val_pairs=2"),
    "--trainer.val_check_interval=1",
]
SEGMENT = [
    *("fit", f"--config={CONFIGS / 'finetune' / 'phantom_segmentation.yaml'}", *TINY),
    *("--data.count=7", "--data.val=1", "--data.test=3"),
    *("--data.labelled=2", "--trainer.log_every_n_steps=1"),
    *("--trainer.max_steps=1", "--trainer.val_check_interval=1"),
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without W&B's keys; runs in it draw no figures, which take long."""
    monkeypatch.setattr(MatchingFigure, "on_validation_end", lambda *_: None)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OfflineRun, OfflineRun]:
    """A folder, a pre-training in it, and a fine-tuning from its backbone with a test."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        figures = ["--trainer.callbacks+=FeatureFigure", "--trainer.callbacks.points=30"]
        main([*PRETRAIN, "--trainer.max_steps=2", *figures])
        weights = "runs/quickstart/version_0/backbone.safetensors"
        main([*SEGMENT, f"--model.weights={weights}", "--test_after_fit=true"])
    first, second = read_runs(folder)
    return folder, first, second


class TestPretraining:
    def test_is_named(self, runs):
        _, run, _ = runs
        assert (run.project, run.name) == ("gvsl_lightning", "quickstart")
        assert run.job_type == "pretrain"
        assert run.exit_code == 0

    def test_whole_configuration_and_what_it_depends_on(self, runs):
        folder, run, _ = runs
        written = folder / "runs" / "quickstart" / "version_0" / "config.yaml"
        for key, value in yaml.safe_load(written.read_text()).items():
            assert run.config[key] == value
        assert run.config["model"]["init_args"]["affine_channels"] == 8
        checkpoint = torch.load(written.parent / "checkpoints" / "last.ckpt", weights_only=True)
        record = yaml.safe_load((written.parent / "record.yaml").read_text())
        assert checkpoint["record"] == record
        for key in record.keys() - {"resumed_from"}:
            assert run.config[key] == record[key]
        assert run.config["seed"] == 0
        assert len(run.config["data_hash"]) == 16
        assert {"torch", "monai", "pytorch-lightning"} <= run.config["versions"].keys()
        assert run.config["versions"]["torch"] == torch.__version__

    def test_metrics_are_those_of_the_table(self, runs):
        folder, run, _ = runs
        rows = read_metrics(folder / "runs" / "quickstart" / "version_0")
        for metric in ("train/loss", "val/ncc_after", "val/dice_after", "val/prototype_dice"):
            table = {int(row["step"]): row[metric] for row in rows if metric in row}
            assert table
            assert run.values(metric) == pytest.approx(table)
        assert any("train/grad_norm_backbone" in row for row in rows)
        assert not any("matching" in row for row in rows)

    def test_axis_and_best_values(self, runs):
        _, run, _ = runs
        for metric, best in BEST.items():
            definition = run.metrics[metric]
            assert definition.step_metric == "trainer/global_step"
            assert getattr(definition.summary, best)
        for metric, best in (("val/ncc_after", max), ("val/loss", min)):
            values = run.values(metric)
            assert len(values) == 2
            assert run.summary[metric] == pytest.approx(
                {best.__name__: best(values.values()), "last": values[max(values)]}
            )

    @pytest.mark.parametrize("panel", ["matching", "displacement", "features", "tsne"])
    def test_pictures(self, runs, panel):
        _, run, _ = runs
        files = run.files(panel)
        assert len(files) == 2  # one for each validation
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

    def test_checkpoints_and_backbone_are_artifacts_where_they_lie(self, runs):
        folder, run, _ = runs
        made = folder / "runs" / "quickstart" / "version_0"
        expected = {
            ("quickstart-backbone", (run.id, "latest")): ["backbone.json", "backbone.safetensors"],
            ("quickstart-checkpoint", (run.id, "last", "latest")): ["checkpoints/last.ckpt"],
            ("quickstart-checkpoint", (run.id, "best", "latest")): ["checkpoints/best.ckpt"],
        }
        for artifact in run.artifacts:
            aliases = sorted(artifact.aliases, key=lambda alias: (alias != run.id, alias))
            names = expected.pop((artifact.name, tuple(aliases)))
            files = sorted(entry.local_path for entry in artifact.manifest.contents)
            assert files == [str(made / name) for name in names]
            assert artifact.type == "model"
            assert not artifact.use_after_commit
        assert not expected
        score = json.loads(run.artifacts[-1].metadata)["score"]
        assert score == pytest.approx(max(run.values("val/ncc_after").values()))
        card = json.loads((made / "backbone.json").read_text())
        known = {"project": "gvsl_lightning", "id": run.id, "artifact": "quickstart-backbone"}
        assert card["wandb"] == known


class TestTransfer:
    def test_lineage(self, runs):
        _, pretraining, run = runs
        (used,) = [artifact for artifact in run.artifacts if artifact.use_after_commit]
        made = pretraining.artifacts[0]
        assert (used.name, used.digest) == (made.name, made.digest)
        origin = run.config["weights_from"]
        assert origin["id"] == pretraining.id
        assert origin["source"] == "runs/quickstart/version_0/backbone.safetensors"
        assert (run.job_type, run.group) == ("transfer", pretraining.group)
        assert run.id != pretraining.id
        assert run.project == pretraining.project

    def test_table_of_cases(self, runs):
        folder, _, run = runs
        (file,) = run.files("test/cases")
        table = json.loads(file.read_text())
        with open(
            folder / "runs" / "phantom_segmentation" / "version_0" / "test_cases.csv"
        ) as file:
            rows = list(csv.DictReader(file))
        assert table["columns"] == list(rows[0])
        for logged, written in zip(table["data"], rows, strict=True):
            assert logged[0] == written["name"]
            for value, text in zip(logged[1:], list(written.values())[1:], strict=True):
                assert value is None if text == "" else value == pytest.approx(float(text))

    def test_segmentations_with_masks_and_class_names(self, runs):
        _, _, run = runs
        scores = {}
        for kind in ("worst", "median", "best"):
            (panel,) = [row[f"test/{kind}"] for row in run.history if f"test/{kind}" in row]
            assert panel["count"] == 3  # planes
            scores[kind] = float(panel["captions"][0].rpartition("Dice ")[2])
            for masks in panel["all_masks"]:
                for name in ("label", "prediction"):
                    path = run.path.parent / "files" / masks[name]["path"]
                    assert path.read_bytes().startswith(b"\x89PNG")
            for file in run.files(f"test/{kind}"):
                shades = plt.imread(file)[..., :3]
                assert shades.max() - shades.min() > 0.15
            assert "myocardium" in json.dumps(run.config["_wandb"])
        assert scores["worst"] <= scores["median"] <= scores["best"]
        assert len(run.files("test/sheet")) == 1

    def test_scores_of_the_test_are_in_the_same_run(self, runs):
        _, _, run = runs
        assert "last" in run.summary["val/dice"]
        assert math.isfinite(run.summary["test/dice"])


def test_resuming_continues_the_same_run_also_with_several_loggers(runs, work):
    folder, first, _ = runs
    last = folder / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    more = ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=board"]
    main([*PRETRAIN, "--trainer.max_steps=3", f"--ckpt_path={last}", *more])
    (second,) = read_runs(work)
    assert second.id == first.id
    assert [*first.values("train/loss"), *second.values("train/loss")] == [0, 1, 2]
    assert list(work.glob("board/**/events.out.tfevents.*"))


def test_agents_choose_the_id(runs, work, monkeypatch):
    wandb.teardown()  # W&B looks at its variables once in a process
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    folder, _, _ = runs
    last = folder / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    main([*PRETRAIN, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    assert [run.id for run in read_runs(work)] == ["chosen"]


def test_failure_closes_the_run(work, capsys):
    wrong = "--trainer.callbacks.monitor=val/none"
    with pytest.raises(SystemExit):
        main(
            [*PRETRAIN, "--trainer.max_steps=1", "--trainer.callbacks+=ResumableCheckpoint", wrong]
        )
    assert "val/none" in capsys.readouterr().err
    (run,) = read_runs(work)
    assert run.exit_code == 2  # that of the process
    assert wandb.run is None


@pytest.mark.parametrize(
    ("logger", "written"),
    [
        ("CSVLogger", "runs/quickstart/version_0/metrics.csv"),
        ("TensorBoardLogger", "runs/quickstart/version_0/events.out.tfevents.*"),
        ("false", "checkpoints/last.ckpt"),
    ],
)
def test_other_loggers_by_one_override(work, logger, written):
    main([*PRETRAIN, "--trainer.max_steps=1", f"--trainer.logger={logger}"])
    (path,) = work.glob(written)
    assert list(path.parents[path.parent.name == "checkpoints"].glob("backbone.safetensors"))
    assert not list(work.rglob("*.wandb"))


def test_validation_is_a_run_of_its_own(runs, work):
    folder, first, _ = runs
    best = folder / "runs" / "quickstart" / "version_0" / "checkpoints" / "best.ckpt"
    main(["validate", *PRETRAIN[1:], f"--ckpt_path={best}"])
    (run,) = read_runs(work)
    assert run.job_type == "validate"
    assert run.id != first.id
    assert run.summary["val/ncc_after"]["max"] == pytest.approx(
        max(first.values("val/ncc_after").values())
    )


def test_online_without_a_key_is_one_sentence(work, capsys):
    wandb.teardown()
    with pytest.raises(SystemExit) as stopped:
        main([*PRETRAIN, "--trainer.max_steps=2", "--trainer.logger.offline=false"])
    assert stopped.value.code == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert "--trainer.logger.offline=false" in line


def test_prediction_starts_no_run(work):
    volumes = work / "volumes"
    volumes.mkdir()
    for index in range(2):
        image = generate_phantom("cardiac_ct", index, (16, 16, 16))["image"]
        nib.save(nib.Nifti1Image(np.asarray(image), np.eye(4)), volumes / f"{index}.nii.gz")
    config = CONFIGS / "finetune" / "segmentation.yaml"
    words = [f"--config={config}", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    words += ["--data.patch_size=[16,16,16]", f"--data.root={volumes}"]
    words += [f"--ckpt_path={segmentation_checkpoint(work / 'task.ckpt', ['background', 'heart'])}"]
    words += ["--model.class_names=[background, heart]", TINY[0]]
    main(["predict", *words])
    (folder,) = work.rglob("predictions")
    assert len(list(folder.glob("*.nii.gz"))) == 2
    assert not list(work.rglob("*.wandb"))


class TestArtifactAsWeights:
    @pytest.fixture
    def server(self, runs, tmp_path, monkeypatch) -> list[str]:
        """Stands for W&B's server, which holds one artifact; the names that were asked for."""
        folder = runs[0] / "runs" / "quickstart" / "version_0"
        asked = []

        class Artifact:
            def download(self) -> str:
                (tmp_path / "artifact").mkdir()
                for file in folder.glob("backbone.*"):
                    shutil.copy(file, tmp_path / "artifact")
                return str(tmp_path / "artifact")

        class Api:
            def artifact(self, name: str) -> Artifact:
                asked.append(name)
                if name != "me/gvsl/quickstart-backbone:best":
                    raise wandb.errors.CommError("not found\nin no project")
                return Artifact()

        monkeypatch.setattr(wandb, "Api", Api)
        return asked

    def test_fine_tuning_downloads_it(self, runs, server, work, capsys):
        main([*SEGMENT, "--model.weights=wandb:me/gvsl/quickstart-backbone:best"])
        assert "24 of 24 backbone entries loaded" in capsys.readouterr().out
        assert server == ["me/gvsl/quickstart-backbone:best"]
        (run,) = read_runs(work)
        (used,) = [artifact for artifact in run.artifacts if artifact.use_after_commit]
        assert used.digest == runs[1].artifacts[0].digest
        assert run.config["weights_from"]["source"].startswith("wandb:")

    def test_no_account(self, work):
        with pytest.raises(InputError, match="`wandb login`"):
            load_backbone_weights(torch.nn.Identity(), "wandb:me/project/name:best")  # type: ignore[arg-type]


def test_artifacts_of_names_in_other_alphabets_are_ascii_and_apart(tmp_path: Path) -> None:
    names = [
        VersionedWandbLogger(tmp_path, name)._artifact_name("backbone")
        for name in ("größe", "grüße", "heart", "心臓")
    ]
    assert names[2] == "heart-backbone"
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)


def test_tables_have_a_row_for_a_step_and_a_resumed_run_repeats_none(work):
    folder = work / "runs" / "gvsl" / "version_0"

    def log(first, last, value):
        logger = VersionedWandbLogger(version=0)
        for step in range(first, last):
            logger.log_metrics({"train/loss": value, "epoch": 0}, step)
            logger.log_metrics({"train/grad_norm": value}, step)
            if step % 2:
                logger.log_metrics({"val/dice": value, "epoch": 0}, step)
        logger.log_metrics({"test/dice": value}, last)
        logger.save()
        logger.experiment.finish()

    log(0, 6, 1.0)
    with pytest.warns(UserWarning, match="metrics.csv"):
        log(4, 8, 2.0)  # a checkpoint after step 3, as the run was killed after step 5
    tables = {}
    for name in TABLES:
        with open(folder / name, newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(all(row.values()) for row in rows)  # no empty cell
        tables[name] = [
            (int(row["step"]), float(row[key])) for row in rows for key in row if "/" in key
        ]
    trained = [(step, 1.0 if step < 4 else 2.0) for step in range(8)]
    assert tables["metrics.csv"] == [row for row in trained for _ in range(2)]
    assert tables["validation.csv"] == trained[1::2]
    assert tables["test.csv"] == [(6, 1.0), (8, 2.0)]
