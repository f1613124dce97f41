"""Segmentation and classification: modes, weights, learning rates and what they leave behind."""

import csv
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import SimpleITK
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, StackDataset

from gvsl_lightning.callbacks import (
    ClassificationReport,
    PredictionWriter,
    ResumableCheckpoint,
    SegmentationReport,
)
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import read_volume
from gvsl_lightning.datamodules import (
    ClassificationDataModule,
    PhantomClassification,
    PhantomSegmentation,
    SegmentationDataModule,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import BACKBONES, build_backbone
from gvsl_lightning.tasks import GVSL, Classification, Segmentation
from gvsl_lightning.weights import load_backbone_weights, save_backbone

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16]},
    "basic_unet": {"features": [8, 8, 8, 16, 16, 8]},
    "dynunet": {"filters": [8, 16, 16]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    "swin_unetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
}
CHAMBERS = 8


@pytest.fixture
def weights(tmp_path: Path) -> str:
    backbone = build_backbone("unet", channels=[8, 16])
    return str(save_backbone(backbone, tmp_path / "backbone.safetensors", {}))


def segments(**options: Any) -> PhantomSegmentation:
    given = {"size": (16, 16, 16), "count": 8, "val": 2, "test": 3, "split_by": "name"}
    return PhantomSegmentation("cardiac_ct", **(given | options))


def chests(**options: Any) -> PhantomClassification:
    given = {"size": (16, 16, 16), "count": 12, "val": 4, "test": 4, "split_by": "name"}
    return PhantomClassification(**(given | options))


def segmentation(**options: Any) -> Segmentation:
    given = {
        "class_names": segments().class_names,
        "mode": "scratch",
        "backbone_options": {"channels": [8, 16]},
        "window_size": (16, 16, 16),
        "learning_rate": 1e-2,
    }
    return Segmentation(**(given | options))


def classification(**options: Any) -> Classification:
    given = {
        "class_names": ["healthy", "lesions"],
        "mode": "scratch",
        "backbone_options": {"channels": [8, 16]},
        "learning_rate": 1e-2,
    }
    return Classification(**(given | options))


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    given: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "max_epochs": 1,
        "logger": False,
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(given | options))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    after = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


PAIRS = [(segmentation, segments), (classification, chests)]


class TestModes:
    @pytest.mark.parametrize(("task", "data"), PAIRS)
    def test_classes_of_the_data_need_not_be_given_twice(self, tmp_path, task, data):
        module = data(class_names=None)
        run = trainer(tmp_path, logger=CSVLogger(tmp_path), max_steps=1)
        run.fit(task(class_names=list(module.class_names)), module)
        assert run.global_step == 1

    def test_pretrained_encoder_before_an_untrained_decoder(self, tmp_path, weights):
        model = segmentation(
            mode="finetune", weights=weights, pretrained="encoder", learning_rate=0.0
        )
        untrained = state(model.backbone)
        trainer(tmp_path, limit_train_batches=1).fit(model, segments())
        trained = load_file(weights)
        for name, value in model.backbone.state_dict().items():
            source = untrained if name.startswith("decoder") else trained
            assert torch.equal(value, source[name]), name

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"mode": "linear", "pretrained": "encoder"}, "pretrained is encoder"),
            ({"pretrained": "encoder", "head_from_weights": True}, "pretrained is encoder"),
            ({"pretrained": "decoder"}, "pretrained is 'decoder'"),
        ],
    )
    def test_pretrained_contradicts_another_option(self, weights, options, sentence):
        with pytest.raises(InputError, match=sentence):
            segmentation(**({"mode": "finetune", "weights": weights} | options))

    @pytest.mark.parametrize(("task", "data"), PAIRS)
    def test_linear_trains_the_head_alone(self, tmp_path, weights, task, data):
        model = task(mode="linear", weights=weights)
        assert not model.backbone.training
        run = trainer(tmp_path, callbacks=[Watcher()])
        run.fit(model, data())
        saved = torch.load(save_checkpoint(run, tmp_path), weights_only=True)["state_dict"]
        from_file = build_backbone("unet", channels=[8, 16])
        from_file.load_state_dict(load_file(weights))
        assert changed(state(from_file), model.backbone) == set()
        assert all(
            torch.equal(saved[f"backbone.{name}"], value)
            for name, value in from_file.state_dict().items()
        )
        assert run.callbacks[0].head_changed
        assert run.callbacks[0].backbone_trained == [False] * run.global_step
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
            p.numel() for p in model.head.parameters()
        )

    @pytest.mark.parametrize(("task", "data"), PAIRS)
    @pytest.mark.parametrize("mode", ["finetune", "scratch"])
    def test_everything_trains_otherwise(self, tmp_path, weights, task, data, mode):
        model = task(mode=mode, weights=weights if mode == "finetune" else None)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        before = state(model)
        run = trainer(tmp_path)
        run.fit(model, data())
        assert changed(before, model) >= trained
        decoder = {name for name in before if name.startswith("backbone.decoder")}
        assert decoder & trained == (set() if task is classification else decoder)

    def test_weights_bring_their_architecture(self, tmp_path, weights):
        task = Segmentation(["background", "a"], weights=weights)
        assert task.hparams["backbone_options"]["channels"] == [8, 16]
        task.load_weights()
        assert task.weights_file is not None
        other = Segmentation(["background", "a"], weights=weights, backbone="basic_unet")
        assert other.backbone.name == "basic_unet"
        net = save_backbone(
            build_backbone("segresnet", **SMALL["segresnet"]), tmp_path / "s.safetensors", {}
        )
        assert Classification(["no", "yes"], weights=str(net)).backbone.name == "segresnet"

    def test_weights_are_loaded_and_reported(self, tmp_path, weights, capsys):
        model = segmentation(mode="finetune", weights=weights, learning_rate=0.0)
        trainer(tmp_path).fit(model, segments())
        expected = load_file(weights)
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, expected[name])
        assert "backbone.safetensors: 24 of 24 backbone entries loaded" in capsys.readouterr().out

    def test_checkpoint_reloads_without_the_weights(self, tmp_path, weights):
        model = segmentation(mode="finetune", weights=weights)
        run = trainer(tmp_path)
        run.fit(model, segments())
        path = save_checkpoint(run, tmp_path)
        Path(weights).unlink()
        loaded = Segmentation.load_from_checkpoint(path)
        assert changed(state(loaded), model) == set()
        trainer(tmp_path).test(loaded, segments(), verbose=False)

    @pytest.mark.parametrize(
        "options",
        [
            {"mode": "scratch", "weights": "x.ckpt"},
            {"mode": "finetune"},
            {"mode": "probe"},
            {"mode": "linear", "layer_decay": 0.5},
            {"mode": "finetune", "weights": "x.ckpt", "layer_decay": 0.0},
            {"mode": "finetune", "weights": "x.ckpt", "frozen_epochs": -1},
            {"class_names": ["a", "a"]},
            {"class_names": ["a"]},
            {"loss": "hinge"},
        ],
    )
    @pytest.mark.parametrize("task", [segmentation, classification])
    def test_options_that_contradict_each_other(self, task, options):
        with pytest.raises(InputError):
            task(**options)

    def test_other_classes_than_the_data(self, tmp_path):
        with pytest.raises(InputError, match="model has the classes background, a and the data"):
            trainer(tmp_path).fit(segmentation(class_names=["background", "a"]), segments())

    def test_missing_weights(self, tmp_path):
        model = segmentation(mode="finetune", weights=str(tmp_path / "none.ckpt"))
        with pytest.raises(InputError, match=r"none.ckpt does not exist"):
            trainer(tmp_path).fit(model, segments())


class TestReleased:
    """A checkpoint under the released code's names goes into every task and mode."""

    @pytest.fixture
    def released(self, reference_root: Path, tmp_path: Path) -> tuple[str, dict[str, Any]]:
        content = torch.load(reference_root / "official_unet_tiny.pt", weights_only=True)
        path = tmp_path / "GVSL_epoch_1000.pth"
        entries = {f"module.unet.{name}": value for name, value in content["state_dict"].items()}
        torch.save(entries, path)
        return str(path), content

    @pytest.mark.parametrize("mode", ["finetune", "linear"])
    @pytest.mark.parametrize(("task", "data"), PAIRS)
    def test_every_mode(self, tmp_path, released, task, data, mode, capsys):
        path, content = released
        channels = reference_channels(content["state_dict"])
        model = task(mode=mode, weights=path, backbone_options={"channels": channels})
        before = state(model.head)
        run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        run.fit(model, data())
        entries = len(model.backbone.state_dict())
        assert f"{entries} of {entries} backbone entries loaded" in capsys.readouterr().out
        assert changed(before, model.head)
        expected = task(mode="scratch", backbone_options={"channels": channels}).backbone
        load_backbone_weights(expected, path)
        assert (changed(state(expected), model.backbone) == set()) == (mode == "linear")

    def test_segmenter_with_its_head_needs_no_training(self, tmp_path, released):
        path, content = released
        channels = reference_channels(content["state_dict"])
        head = {"weight": torch.randn(CHAMBERS, channels[0], 3, 3, 3), "bias": torch.rand(CHAMBERS)}
        entries = {f"unet_pre.unet.{k}": v for k, v in content["state_dict"].items()}
        entries |= {f"out_conv.{name}": value for name, value in head.items()}
        torch.save(entries, path)
        options = {"mode": "finetune", "weights": path, "head_from_weights": True}
        model = segmentation(**options, backbone_options={"channels": channels})
        trainer(tmp_path).test(model, segments(), verbose=False)
        assert all(torch.equal(model.head.state_dict()[k], v) for k, v in head.items())
        other = segmentation(
            **options, class_names=["a", "b"], backbone_options={"channels": channels}
        )
        with pytest.raises(InputError, match="no head of this task's shape"):
            other.load_weights()

    def test_an_untrained_head_is_warned_of(self, tmp_path):
        with pytest.warns(UserWarning, match="head of Segmentation is untrained"):
            trainer(tmp_path).test(segmentation(), segments(), verbose=False)


class TestFrozenEpochs:
    STEPS = 2  # of an epoch

    def run(self, folder: Path, task: Any, data: Any, **options: Any) -> tuple[Any, pl.Trainer]:
        model_options = {name: options.pop(name) for name in ("mode", "frozen_epochs", "weights")}
        resumed = options.pop("ckpt_path", None)
        pl.seed_everything(3, verbose=False)
        model = task(learning_rate=1e-3, **model_options)
        run = trainer(folder, limit_val_batches=0, limit_train_batches=self.STEPS, **options)
        run.fit(model, data(batch_size=1), ckpt_path=resumed)
        return model, run

    def test_the_head_learns_as_on_frozen_features(self, tmp_path, weights):
        """Also behind clipping, in which a gradient of the backbone would count."""
        pair = (segmentation, segments)
        options = {"weights": weights, "max_epochs": 2, "gradient_clip_val": 1e-3}
        frozen, _ = self.run(tmp_path, *pair, mode="finetune", frozen_epochs=2, **options)
        linear, _ = self.run(tmp_path, *pair, mode="linear", frozen_epochs=0, **options)
        untouched = load_file(weights)
        assert changed(untouched, frozen.backbone) == set()
        for name, value in linear.head.state_dict().items():
            assert torch.equal(frozen.head.state_dict()[name], value), name

    @pytest.mark.parametrize(
        ("task", "data", "accumulated"), [(segmentation, segments, 1), (classification, chests, 2)]
    )
    def test_the_optimiser_knows_nothing_of_them(self, tmp_path, weights, task, data, accumulated):
        model, run = self.run(
            tmp_path,
            task,
            data,
            weights=weights,
            mode="finetune",
            frozen_epochs=2,
            max_epochs=3,
            callbacks=[gradients := Gradients()],
            accumulate_grad_batches=accumulated,
        )
        assert gradients.backbone == [False] * 2 * self.STEPS + [True] * self.STEPS
        steps = self.STEPS // accumulated
        entries = run.optimizers[0].state
        assert all(entries[part]["step"] == 3 * steps for part in model.head.parameters())
        trained = [part for part in model.backbone.parameters() if part.requires_grad]
        assert all(entries[part]["step"] == steps for part in trained)

    @pytest.mark.parametrize("stop", [1, 4, 5])  # frozen, just thawed, within a later epoch
    def test_resuming_is_exact(self, tmp_path, weights, stop):
        options = {"weights": weights, "mode": "finetune", "frozen_epochs": 2, "max_epochs": 4}
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        whole, run = self.run(
            tmp_path,
            segmentation,
            segments,
            callbacks=[saved],
            enable_checkpointing=True,
            **options,
        )
        moments = run.optimizers[0].state_dict()["state"]
        path = str(tmp_path / f"step={stop}.ckpt")
        Path(weights).unlink()
        resumed, run = self.run(tmp_path, segmentation, segments, ckpt_path=path, **options)
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        resumed_moments = run.optimizers[0].state_dict()["state"]
        assert resumed_moments.keys() == moments.keys()
        for index, entry in resumed_moments.items():
            assert all(torch.equal(value, moments[index][key]) for key, value in entry.items())


class TestLearningRates:
    def test_earlier_stages_learn_slower(self, tmp_path, weights):
        model = segmentation(mode="finetune", weights=weights, layer_decay=0.5, learning_rate=0.8)
        run = trainer(tmp_path, max_epochs=0)
        run.fit(model, segments())
        groups = run.optimizers[0].param_groups
        rates = {}
        for group in groups:
            for parameter in group["params"]:
                rates[id(parameter)] = group["lr"]
        expected = {"encoder.0": 0.1, "encoder.1": 0.2, "decoder.0": 0.4}
        for stage, rate in expected.items():
            for parameter in model.backbone.get_submodule(stage).parameters():
                assert rates[id(parameter)] == pytest.approx(rate)
        assert all(rates[id(p)] == pytest.approx(0.8) for p in model.head.parameters())
        assert len(rates) == len(list(model.parameters()))

    @pytest.mark.parametrize("name", list(BACKBONES))
    def test_every_backbone_s_trainable_parameters_get_a_gradient(self, name):
        shape = (32, 32, 32) if name == "swin_unetr" else (16, 16, 16)
        for task in (segmentation, classification):
            model = task(backbone=name, backbone_options=SMALL.get(name))
            (model(torch.rand(2, 1, *shape)).square().sum()).backward()
            for parameter_name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == parameter.requires_grad, parameter_name


class TestSegmentation:
    @pytest.mark.parametrize("loss", ["dice", "dice_ce", "focal"])
    def test_ignored_voxels_do_not_count(self, loss):
        model = segmentation(loss=loss, ignore_index=255)
        logits = torch.randn(2, CHAMBERS, 6, 6, 6)
        label = torch.randint(0, CHAMBERS, (2, 1, 6, 6, 6))
        label[:, :, :2] = 255
        other = logits.clone()
        other[:, :, :2] = torch.randn(2, CHAMBERS, 2, 6, 6)
        assert model.loss(logits, label) == pytest.approx(float(model.loss(other, label)), rel=1e-5)
        other[:, :, 3] += 1
        other[:, 0, 3] -= 3
        assert model.loss(logits, label) != pytest.approx(float(model.loss(other, label)), rel=1e-4)

    def test_dice_loss_against_its_formula(self):
        logits, label = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 1, 4, 4, 4))
        probabilities = logits.softmax(dim=1)[0].flatten(1)
        truth = torch.eye(3)[label.flatten()].T
        both = (probabilities * truth).sum(dim=1)
        dice = 2 * both / (probabilities.sum(dim=1) + truth.sum(dim=1))
        loss = segmentation(class_names=["a", "b", "c"]).loss(logits, label)
        assert float(loss) == pytest.approx(float(1 - dice.mean()), abs=1e-4)

    @pytest.mark.parametrize("loss", ["dice", "dice_ce", "focal"])
    def test_loss_falls_and_dice_rises(self, tmp_path, loss):
        pl.seed_everything(0, verbose=False)
        model = segmentation(loss=loss)
        data = segments(cache=True, labelled=2, augmentation=False)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(model, data)
        first = run.callback_metrics["train/loss"].item()
        run = trainer(tmp_path, max_epochs=25, check_val_every_n_epoch=25)
        run.fit(model, data)
        assert run.callback_metrics["train/loss"].item() < 0.8 * first
        if loss != "focal":
            assert run.callback_metrics["val/dice"].item() > 0.1

    def test_validation_dice_is_that_of_the_sliding_window(self, tmp_path):
        model, data = segmentation(), segments()
        run = trainer(tmp_path)
        run.validate(model, data, verbose=False)
        dice = {name: [] for name in model.class_names[1:]}
        with torch.no_grad():
            for batch in data.val_dataloader():
                prediction = model(batch["image"]).argmax(dim=1)
                for index, name in enumerate(model.class_names[1:], start=1):
                    found, true = prediction == index, batch["label"][:, 0] == index
                    total = int(found.sum() + true.sum())
                    if total:
                        dice[name].append(2 * int((found & true).sum()) / total)
        means = {name: sum(values) / len(values) for name, values in dice.items() if values}
        for name, mean in means.items():
            assert run.callback_metrics[f"val/dice_{name}"].item() == pytest.approx(mean, abs=1e-6)
        expected = sum(means.values()) / len(means)
        assert run.callback_metrics["val/dice"].item() == pytest.approx(expected, abs=1e-6)

    def test_report(self, tmp_path, capsys):
        model, data, report = segmentation(), segments(), SegmentationReport()
        run = trainer(tmp_path, callbacks=[report])
        run.test(model, data, verbose=False)
        rows = table(tmp_path / "test_cases.csv")
        assert [row["name"] for row in rows] == [f"cardiac_ct-{1005 + i:05d}" for i in range(3)]
        means = []
        for row in rows:
            scores = [row[f"dice {name}"] for name in model.class_names[1:]]
            defined = [float(score) for score in scores if score]
            means.append(sum(defined) / len(defined))
            assert float(row["dice mean"]) == pytest.approx(means[-1])
        assert (tmp_path / "test_cases.png").stat().st_size > 10_000
        printed = capsys.readouterr().out
        for name in model.class_names[1:]:
            assert name.split()[0] in printed
        per_class = [
            run.callback_metrics[f"test/dice_{name}"].item()
            for name in model.class_names[1:]
            if f"test/dice_{name}" in run.callback_metrics
        ]
        mean = sum(per_class) / len(per_class)
        assert run.callback_metrics["test/dice"].item() == pytest.approx(mean, abs=1e-6)

    def test_report_of_another_task(self, tmp_path):
        task = GVSL(backbone_options={"channels": [8, 16]}, affine_channels=8)
        with pytest.raises(InputError, match="SegmentationReport is for Segmentation"):
            SegmentationReport().on_test_epoch_end(trainer(tmp_path), task)


class TestMonitors:
    """A score that is undefined is no number to choose a checkpoint by."""

    @pytest.mark.parametrize(
        ("callback", "monitor"),
        [(ResumableCheckpoint, "val/auroc"), (EarlyStopping, "val/auroc_lesions")],
    )
    def test_an_undefined_score_that_is_monitored(self, tmp_path, callback, monitor):
        run = trainer(
            tmp_path,
            enable_checkpointing=callback is ResumableCheckpoint,
            callbacks=[callback(monitor=monitor, mode="max")],
        )
        sentence = f"{callback.__name__} monitors {monitor}, which is undefined, as AUROC needs"
        with pytest.raises(InputError, match=sentence) as raised:
            run.fit(classification(), chests(val=1))
        assert "\n" not in str(raised.value)

    def test_segmentation_without_any_structure(self, tmp_path):
        for kind, value in (("images", 1), ("labels", 0)):
            (tmp_path / kind).mkdir()
            for name in ("a", "b"):
                voxels = np.full((8, 8, 8), value, np.uint8)
                voxels[0, 0, 0] = 0  # a volume of a single value is refused
                image = nibabel.Nifti1Image(voxels, np.eye(4))
                nibabel.save(image, tmp_path / kind / f"{name}.nii.gz")
        data = SegmentationDataModule(
            str(tmp_path / "images"), ["background", "ball"], str(tmp_path / "labels")
        )
        run = trainer(tmp_path)
        with pytest.warns(UserWarning, match=r"Not logged: val/dice_ball, val/dice \(undefined"):
            run.validate(bright(2.0), data, verbose=False)
        assert set(run.callback_metrics) == {"val/loss"}

    def test_a_dry_run_and_the_sanity_check_need_no_score(self, tmp_path):
        checkpoint = ResumableCheckpoint(monitor="val/auroc", mode="max")
        options = {"callbacks": [checkpoint], "enable_checkpointing": True}
        trainer(tmp_path, fast_dev_run=True, **options).fit(classification(), chests(val=1))
        run = trainer(tmp_path, num_sanity_val_steps=1, **options)
        run.fit(classification(), chests(val=6))
        assert checkpoint.best_model_score is not None

    def test_a_monitor_that_nothing_logs(self, tmp_path):
        checkpoint = ResumableCheckpoint(monitor="val/aurok", mode="max")
        run = trainer(tmp_path, enable_checkpointing=True, callbacks=[checkpoint])
        sentence = (
            "monitors val/aurok, which is not logged; choose one of .*train/loss, .*val/auroc,"
        )
        with pytest.raises(InputError, match=sentence):
            run.fit(classification(), chests())


class TestClassification:
    @pytest.mark.parametrize("multi_label", [False, True])
    @pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
    def test_loss_against_its_formula(self, multi_label, loss):
        model = classification(multi_label=multi_label, loss=loss, class_names=["a", "b", "c"])
        logits = torch.randn(5, 3)
        if multi_label:
            target = torch.randint(0, 2, (5, 3)).float()
            probability = logits.sigmoid()
            true = torch.where(target > 0, probability, 1 - probability)
        else:
            target = torch.randint(0, 3, (5,))
            true = logits.softmax(dim=1)[torch.arange(5), target]
        gamma = 2 if loss == "focal" else 0
        values = -((1 - true) ** gamma) * true.log()
        count = 15 if multi_label or loss == "focal" else 5
        assert float(model._loss(logits, target)) == pytest.approx(
            float(values.sum() / count), rel=1e-4
        )

    @pytest.mark.parametrize("multi_label", [False, True])
    def test_loss_falls(self, tmp_path, multi_label):
        pl.seed_everything(0, verbose=False)
        targets = torch.tensor([0, 1] * 4)
        images = 0.5 + 0.1 * torch.rand(8, 1, 16, 16, 16)
        images[1::2, :, ::2] -= 0.4  # stripes
        target = torch.eye(2)[targets] if multi_label else targets
        data = DataLoader(StackDataset(image=images, target=target), batch_size=4, shuffle=True)
        model = classification(learning_rate=1e-3, multi_label=multi_label)
        run = trainer(tmp_path, max_epochs=30)
        run.fit(model, data, data)
        assert run.callback_metrics["train/loss"].item() < 0.3
        assert run.callback_metrics["val/auroc"].item() == 1

    def test_probe_reads_features_standardised_over_the_training_volumes(self, tmp_path, weights):
        targets = torch.tensor([0, 1] * 4)
        images = 0.5 + 0.01 * torch.rand(8, 1, 16, 16, 16)
        images[1::2, :, ::2] -= 0.01  # faint stripes: features that hardly differ
        data = DataLoader(StackDataset(image=images, target=targets), batch_size=4)
        model = classification(mode="linear", weights=weights, learning_rate=5e-2)
        trainer(tmp_path, max_epochs=5).fit(model, data)
        with torch.no_grad():
            pooled = model.backbone.encode(images).mean(dim=(2, 3, 4))
            logits = model.eval()(images)
        torch.testing.assert_close(model.standardisation.mean, pooled.mean(dim=0))
        standardised = model.standardisation(pooled)
        assert float(pooled.std(dim=0).mean()) < 0.05 * float(pooled.abs().mean())
        assert 0.7 < float(standardised.std(dim=0).median()) < 1.3
        torch.testing.assert_close(logits, model.head[1](standardised))
        assert (logits.argmax(dim=1) == targets).all()

    def test_head_of_a_probe_is_no_head_for_fine_tuning(self, tmp_path, weights):
        probe, run = classification(mode="linear", weights=weights), trainer(tmp_path)
        run.fit(probe, chests())
        run.save_checkpoint(tmp_path / "probe.ckpt")
        given = {"weights": str(tmp_path / "probe.ckpt"), "head_from_weights": True}
        with pytest.raises(InputError, match=r"probe\.ckpt has no head of this task's shape"):
            trainer(tmp_path).test(classification(mode="finetune", **given), chests())
        trainer(tmp_path).test(classification(mode="linear", **given), chests(), verbose=False)

    def test_report(self, tmp_path, capsys):
        model, report = classification(), ClassificationReport(resamples=50)
        run = trainer(tmp_path, callbacks=[report])
        run.test(model, chests(), verbose=False)
        rows = table(tmp_path / "test_cases.csv")
        assert len(rows) == 4
        assert {row["label"] for row in rows} <= {"healthy", "lesions"}
        for row in rows:
            total = float(row["probability healthy"]) + float(row["probability lesions"])
            assert total == pytest.approx(1, abs=1e-5)
        printed = capsys.readouterr().out
        assert "AUROC" in printed
        assert "lesions" in printed
        pairs = [
            (float(one["probability lesions"]), float(other["probability lesions"]))
            for one in rows
            for other in rows
            if one["label"] == "lesions" and other["label"] == "healthy"
        ]
        auroc = sum((one > other) + 0.5 * (one == other) for one, other in pairs) / len(pairs)
        assert run.callback_metrics["test/auroc_lesions"].item() == pytest.approx(auroc)

    def test_a_broken_file_does_not_stop_the_prediction_of_the_others(self, tmp_path):
        save_scans(tmp_path / "scans", np.arange(512, dtype=np.float32).reshape(8, 8, 8), np.eye(4))
        data = ClassificationDataModule(
            str(tmp_path / "scans"), class_names=["healthy", "lesions"], size=(16, 16, 16)
        )
        run = trainer(tmp_path, callbacks=[ClassificationReport()])
        with pytest.raises(InputError, match=r"1 of 3 volumes was not predicted.*b\.nii\.gz"):
            run.predict(classification(), data, return_predictions=False)
        assert [row["name"] for row in table(tmp_path / "predictions.csv")] == ["a", "c"]

    def test_validation_without_one_of_the_classes(self, tmp_path):
        run = trainer(tmp_path)
        with pytest.warns(UserWarning, match=r"Not logged: val/auroc_healthy, .*val/auroc \(undef"):
            run.validate(classification(), chests(val=1), verbose=False)
        assert set(run.callback_metrics) == {"val/loss"}

    def test_an_undefined_class_does_not_count_in_the_mean(self, tmp_path):
        targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
        data = DataLoader(StackDataset(image=torch.rand(3, 1, 16, 16, 16), target=targets))
        run = trainer(tmp_path)
        with pytest.warns(UserWarning, match=r"Not logged: val/auroc_lesions \(undefined"):
            run.validate(classification(multi_label=True), data, verbose=False)
        metrics = run.callback_metrics
        assert set(metrics) == {"val/loss", "val/auroc", "val/auroc_healthy"}
        assert metrics["val/auroc"] == metrics["val/auroc_healthy"]

    def test_validation_loss_weighs_cases_and_not_batches(self, tmp_path):
        model, images = classification(), torch.rand(3, 1, 16, 16, 16)
        target = torch.tensor([0, 1, 1])
        data = DataLoader(StackDataset(image=images, target=target), batch_size=2)
        run = trainer(tmp_path)
        run.validate(model, data, verbose=False)
        with torch.no_grad():
            expected = float(model._loss(model(images), target))
        assert run.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-5)

    def test_a_loss_that_is_not_finite_is_not_hidden(self, tmp_path):
        images = torch.stack([torch.rand(1, 16, 16, 16), torch.full((1, 16, 16, 16), torch.nan)])
        data = DataLoader(StackDataset(image=images, target=torch.tensor([0, 1])))
        run = trainer(tmp_path)
        run.validate(classification(), data, verbose=False)
        assert run.callback_metrics["val/loss"].isnan()


class TestPrediction:
    """Files whose world coordinates say where a mark is."""

    MARK = np.array([8.0, -3.0, 12.0])

    def volume(self, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        world = index @ affine[:3, :3].T + affine[:3, 3]
        return (np.linalg.norm(world - self.MARK, axis=-1) < 9).astype(np.float32)

    def affines(self) -> dict[str, np.ndarray]:
        turned = np.eye(4)
        angle = 0.4
        turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        return {
            "ras": np.eye(4),
            "lps": np.diag([-1.0, -1.0, 1.0, 1.0]),
            "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
            "anisotropic": np.diag([0.8, 1.3, 2.5, 1.0]),
            "oblique": turned @ np.diag([1.1, -0.9, 1.4, 1.0]),
            "permuted": np.array([[0, 0, 1.2, 0], [1.1, 0, 0, 0], [0, -0.9, 0, 0], [0, 0, 0, 1.0]]),
        }

    @pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
    def test_label_maps_lie_over_their_scans(self, tmp_path, spacing):
        expected = {}
        for name, affine in self.affines().items():
            shape = (25, 30, 27)
            centre = affine[:3, :3] @ (np.array(shape) / 2)
            affine[:3, 3] = self.MARK - centre + [1.3, -0.7, 0.4]
            image = nibabel.Nifti1Image(self.volume(affine, shape), affine)
            image.set_sform(affine, 2)
            image.set_qform(affine, 1)
            path = tmp_path / "scans" / "deep" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(image, path)
            expected[name] = path
        data = SegmentationDataModule(
            root=str(tmp_path / "scans"), class_names=["background", "ball"], spacing=spacing
        )
        writer = PredictionWriter(str(tmp_path / "out"))
        trainer(tmp_path, callbacks=[writer]).predict(bright(), data, return_predictions=False)
        for name, path in expected.items():
            scan, result = (
                nibabel.load(path),
                nibabel.load(tmp_path / "out" / "deep" / f"{name}.nii.gz"),
            )
            assert result.shape == scan.shape
            assert result.get_data_dtype() == np.uint8
            for form in ("sform", "qform"):
                got, got_code = getattr(result, f"get_{form}")(coded=True)
                kept, kept_code = getattr(scan, f"get_{form}")(coded=True)
                assert got_code == kept_code
                np.testing.assert_allclose(got, kept)
            found, true = np.asarray(result.dataobj) == 1, np.asarray(scan.dataobj) == 1
            if spacing is None:
                assert np.array_equal(found, true)
            world = [np.argwhere(mask) @ scan.affine[:3, :3].T for mask in (found, true)]
            assert np.abs(world[0].mean(axis=0) - world[1].mean(axis=0)).max() < 0.2
            assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_the_precision_of_the_network_moves_nothing(self, tmp_path, precision):
        affine = self.affines()["oblique"]
        affine[:3, 3] = [-113.57, 204.31, 371.93]  # bfloat16 rounds such numbers by up to 1 mm
        ball = np.zeros((21, 22, 23), np.float32)
        ball[7:12, 9:14, 5:15] = 1
        for kind, array in (("images", ball), ("labels", ball.astype(np.uint8))):
            image = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            mirror = np.array([-1.0, -1.0, 1.0])
            image.SetSpacing(spacing.tolist())
            image.SetDirection((mirror[:, None] * affine[:3, :3] / spacing).ravel().tolist())
            image.SetOrigin((mirror * affine[:3, 3]).tolist())
            (tmp_path / kind).mkdir()
            SimpleITK.WriteImage(image, str(tmp_path / kind / "a.mha"))
        data = SegmentationDataModule(
            root=str(tmp_path / "images"),
            label_root=str(tmp_path / "labels"),
            class_names=["background", "ball"],
            val=0,
            test=1,
        )
        callbacks = [PredictionWriter(str(tmp_path / "out")), SegmentationReport()]
        run = trainer(tmp_path, precision=precision, callbacks=callbacks)
        run.predict(bright(), data, return_predictions=False)
        result = nibabel.load(tmp_path / "out" / "a.nii.gz")
        np.testing.assert_allclose(result.affine, affine, atol=1e-4)
        assert np.array_equal(np.asarray(result.dataobj), ball)
        run.test(bright(), data, verbose=False)
        scores = {name: value.item() for name, value in run.callback_metrics.items()}
        assert scores["test/dice"] == 1
        assert scores["test/volume_error_mm3"] == scores["test/hd95_mm"] == 0

    def test_existing_files_are_kept_and_broken_scans_are_named_at_the_end(self, tmp_path):
        affine = np.eye(4)
        affine[:3, 3] = self.MARK - 10
        save_scans(tmp_path / "scans", self.volume(affine, (20, 20, 20)), affine)
        out = tmp_path / "out"
        out.mkdir()

        model = bright()

        def run(overwrite: bool) -> None:
            data = SegmentationDataModule(
                root=str(tmp_path / "scans"), class_names=["background", "ball"]
            )
            writer = PredictionWriter(str(out), overwrite=overwrite)
            trainer(tmp_path, callbacks=[writer]).predict(model, data, return_predictions=False)

        with pytest.raises(InputError, match=r"1 of 3 volumes was not predicted.*b\.nii\.gz"):
            run(overwrite=False)
        assert np.asarray(nibabel.load(out / "c.nii.gz").dataobj).max() == 1
        before = (out / "a.nii.gz").stat().st_mtime_ns
        with pytest.raises(InputError, match="1 of 1 volumes"):
            run(overwrite=False)
        assert (out / "a.nii.gz").stat().st_mtime_ns == before
        (out / "a.nii.gz").write_bytes(b"broken")
        with pytest.raises(InputError, match="1 of 3 volumes"):
            run(overwrite=True)
        assert np.asarray(nibabel.load(out / "a.nii.gz").dataobj).max() == 1
        assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]

    def test_the_scans_themselves_are_never_overwritten(self, tmp_path):
        affine = np.eye(4)
        path = tmp_path / "a.nii.gz"
        array = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        before = path.read_bytes()
        data = SegmentationDataModule(root=str(path), class_names=["background", "ball"])
        writer = PredictionWriter(str(tmp_path), overwrite=True)
        with pytest.raises(InputError, match="is the volume itself"):
            trainer(tmp_path, callbacks=[writer]).predict(bright(), data)
        assert path.read_bytes() == before

    def test_probabilities_sum_to_one(self, tmp_path):
        path = tmp_path / "scan.nii.gz"
        image = np.random.default_rng(0).random((9, 10, 11)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(image, np.diag([2.0, 1, 1, 1])), path)
        data = SegmentationDataModule(root=str(path), class_names=["background", "ball"])
        model = segmentation(class_names=["background", "ball"], probabilities=True, mirror=True)
        run = trainer(tmp_path, callbacks=[PredictionWriter()], logger=CSVLogger(tmp_path, "runs"))
        run.predict(model, data, return_predictions=False)
        folder = tmp_path / "runs" / "version_0" / "predictions"
        found = nibabel.load(folder / "scan_probabilities.nii.gz")
        assert found.shape == (9, 10, 11, 2)
        np.testing.assert_allclose(np.asarray(found.dataobj).sum(axis=-1), 1, atol=1e-5)
        labels = np.asarray(nibabel.load(folder / "scan.nii.gz").dataobj)
        assert np.array_equal(labels, np.asarray(found.dataobj).argmax(axis=-1))

    def test_dicom_series(self, tmp_path, data_root):
        data = SegmentationDataModule(
            root=str(data_root / "ct_dicom_series"),
            class_names=["background", "ball"],
            modality="ct",
            spacing=(4.0, 4.0, 4.0),
        )
        writer = PredictionWriter(str(tmp_path / "out"))
        trainer(tmp_path, callbacks=[writer]).predict(bright(0.55), data, return_predictions=False)
        (file,) = find_volumes(str(data_root / "ct_dicom_series"))
        scan = read_volume(file.image)
        (path,) = (tmp_path / "out").rglob("*.nii.gz")
        result = nibabel.load(path)
        assert result.shape == tuple(scan.shape[1:])
        np.testing.assert_allclose(result.affine, scan.affine.numpy(), atol=1e-4)
        found = np.asarray(result.dataobj) == 1
        assert found.any()
        assert scan[0].numpy()[found].mean() > scan[0].numpy()[~found].mean() + 100


class bright(Segmentation):  # noqa: N801  # used like the functions above
    """Says that what is brighter than a limit is the structure."""

    def __init__(self, limit: float = 0.5) -> None:
        super().__init__(
            class_names=["background", "ball"],
            mode="scratch",
            backbone_options={"channels": [8, 16]},
            window_size=(16, 16, 16),
        )
        self.limit = limit

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.limit - volume, volume - self.limit], dim=1) * 4


class Watcher(pl.Callback):
    """Notes in every step whether the backbone is in training mode, and what changed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.head = state(pl_module.head)
        self.backbone_trained: list[bool] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.backbone_trained.append(pl_module.backbone.training)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.head_changed = bool(changed(self.head, pl_module.head))


class Gradients(pl.Callback):
    """Notes after every batch whether the backbone has a gradient."""

    def __init__(self) -> None:
        self.backbone: list[bool] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        trained = [part for part in pl_module.backbone.parameters() if part.requires_grad]
        (with_gradient,) = {part.grad is not None for part in trained}
        self.backbone.append(with_gradient)


def save_scans(folder: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Three files, the second of which is broken."""
    folder.mkdir()
    for name in ("a", "c"):
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    (folder / "b.nii.gz").write_bytes(b"broken")


def save_checkpoint(run: pl.Trainer, folder: Path) -> str:
    path = str(folder / "last.ckpt")
    run.save_checkpoint(path)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def reference_channels(entries: dict[str, torch.Tensor]) -> list[int]:
    """Channels of the encoder's stages, from the released names."""
    stages = ["inc", *(f"down{number}.maxpool_conv.1" for number in range(1, 5))]
    return [len(entries[f"{stage}.double_conv.0.bias"]) for stage in stages]
