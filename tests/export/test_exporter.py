"""Tests of ``python -m gvsl_lightning export``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monai.transforms.croppad.array import ResizeWithPadOrCrop
from monai.transforms.transform import MapTransform
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import SegmentationDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.export import exporter as tool
from gvsl_lightning.export.exported import Model, largest_difference, load_model
from gvsl_lightning.nn.backbones import BACKBONES, Backbone, UNet, build_backbone
from gvsl_lightning.tasks import GVSL, Classification, Segmentation
from gvsl_lightning.weights import load_backbone, load_backbone_weights, read_head, save_backbone

OPTIONS: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16]},
    "basic_unet": {"features": [8, 8, 8, 16, 16, 8]},
    "dynunet": {"filters": [8, 16, 16], "norm_name": ["instance", {"affine": True}]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1]},
    "swin_unetr": {"feature_size": 12},
}
SIZES = [(16, 16, 16), (19, 24, 17)]
CLASSES = ["background", "organ", "lesion"]
DATA = {
    "class": "PretrainDataModule",
    "root": "/home/somebody/patients",
    "modality": "ct",
    "window": [-100.0, 300.0],
    "spacing": [1.0, 1.0, 2.0],
    "patch_size": [16, 16, 16],
}
FILES = {
    "safetensors": "net.safetensors",
    "huggingface": "net",
    "torchscript": "net.ts",
    "pt2": "net.pt2",
    "onnx": "net.onnx",
    "bundle": "net",
    "nnunet": "net.pth",
}

# runs as a process of its own, where this package cannot be imported
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gvsl_lightning":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
"""


def randomised(network: nn.Module) -> None:
    """No parameter at its start, where a wrong one would not be seen."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)


def save(folder: Path, name: str = "unet", **card: Any) -> tuple[Backbone, Path]:
    torch.manual_seed(1)
    backbone = build_backbone(name, **OPTIONS[name])
    randomised(backbone)
    path = folder / "backbone.safetensors"
    save_backbone(backbone, path, {"data": DATA, "steps": 7, **card})
    return backbone.eval(), path


def export(weights: Path, format: str, *words: str) -> Path:
    out = weights.parent / "out" / FILES[format]
    main(["export", "--weights", str(weights), "--format", format, "--out", str(out), *words])
    return out


def run_alone(script: str, *arguments: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", ALONE + script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def refusal(weights: Path, format: str, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        export(weights, format, *words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def write_volumes(folder: Path, count: int = 2) -> Path:
    """CT-like volumes, oblique and otherwise than RAS, with voxels that are no cubes."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(count):
        random = np.random.default_rng(index)
        label = np.zeros((20, 18, 14), dtype=np.uint8)
        label[4:12, 5:14, 3:10], label[6:9, 7:10, 4:8] = 1, 2
        image = (label * 120 + random.normal(0, 20, label.shape)).astype(np.float32)
        turned = Rotation.from_euler("zx", [20, 10], degrees=True).as_matrix()
        affine = np.eye(4)
        affine[:3, :3] = turned @ np.diag([-1.0, 1.0, 1.5])
        for kind, array in (("images", image), ("labels", label)):
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / kind / f"v{index}.nii.gz")
    return folder / "images"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Segmentation, Path, Path]:
    """A task, its checkpoint as Lightning writes it, and its volumes."""
    pl.seed_everything(0)
    folder = tmp_path_factory.mktemp("segmentation")
    images = write_volumes(folder)
    task = Segmentation(
        class_names=CLASSES,
        mode="scratch",
        backbone_options=OPTIONS["unet"],
        window_size=(16, 16, 16),
        learning_rate=1e-2,
    )
    data = SegmentationDataModule(
        root=str(images),
        label_root=str(folder / "labels"),
        class_names=CLASSES,
        modality="ct",
        window=(-100.0, 300.0),
        spacing=(1.0, 1.0, 1.0),
        patch_size=(16, 16, 16),
        val=1,
        batch_size=1,
    )
    trainer = pl.Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return task.eval(), folder / "last.ckpt", images


def test_other_programs_compute_the_same_without_this_package(tmp_path: Path) -> None:
    backbone, weights = save(tmp_path)
    volumes = [torch.rand(batch + 1, 1, *size) for batch, size in enumerate(SIZES)]
    with torch.no_grad():
        expected = [tuple(backbone(volume)) for volume in volumes]
    torch.save({"volumes": volumes, "expected": expected}, tmp_path / "expected.pt")
    files = [export(weights, format) for format in ("torchscript", "pt2", "onnx")]
    script = """
import onnxruntime, torch
known = torch.load(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[4])
programs = [
    torch.jit.load(sys.argv[2]),
    torch.export.load(sys.argv[3]).module(),
    lambda volume: map(torch.from_numpy, session.run(None, {"volume": volume.numpy()})),
]
for program in programs:
    for volume, expected in zip(known["volumes"], known["expected"], strict=True):
        for found, wanted in zip(program(volume), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
names = [output.name for output in session.get_outputs()]
assert names == ["global_features", "local_features"], names
"""
    run_alone(script, tmp_path / "expected.pt", *files)


def test_safetensors_keep_the_head_for_prediction(
    segmented: tuple[Segmentation, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    task, checkpoint, _ = segmented
    path = export(checkpoint, "safetensors")
    assert "segmentation as safetensors, differs from PyTorch by 0.0e+00" in capsys.readouterr().out
    head = read_head(path, "head")
    torch.testing.assert_close(head["weight"], task.head.weight.detach(), rtol=0, atol=0)
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(volume), task.backbone(volume))
        torch.testing.assert_close(load_model(path).compute(volume)[0], task(volume))


def test_card_says_how_to_prepare_and_what_comes_out(
    segmented: tuple[Segmentation, Path, Path],
) -> None:
    out = export(segmented[1], "torchscript", "--overwrite", "true")
    card = out.with_name("net.ts.md").read_text()
    for words in (
        "background, organ, lesion",
        "`logits`: (N, 3, D, H, W); softmax",
        "1 x 1 x 1 mm",
        "-100 to 300 HU",
        "RAS",
        "Steps: 40",
        'torch.jit.load("net.ts")',
        "Licence",
    ):
        assert words in card


def test_exported_segmentation_gives_its_logits(
    segmented: tuple[Segmentation, Path, Path], tmp_path: Path
) -> None:
    task, checkpoint, _ = segmented
    network = torch.jit.load(export(checkpoint, "torchscript", "--overwrite", "true"))
    assert "flip" not in str(network.inlined_graph)  # a formula for this machine's training
    for size in SIZES:
        volume = torch.rand(3, 1, *size)
        with torch.no_grad():
            torch.testing.assert_close(network(volume), task(volume), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["scratch", "linear"])
def test_exported_classification_gives_its_logits(tmp_path: Path, mode: Any) -> None:
    task = Classification(
        class_names=["no", "yes"], mode=mode, backbone_options=OPTIONS["unet"], multi_label=True
    ).eval()
    if mode == "linear":
        task.standardisation.update(torch.rand(5, 16))
    hparams = {**task.hparams, "_class_path": "gvsl_lightning.tasks.Classification"}
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": hparams,
        "epoch": 0,
        "global_step": 1,
    }
    torch.save(content, tmp_path / "last.ckpt")
    out = export(tmp_path / "last.ckpt", "torchscript")
    volume = torch.rand(2, 1, 19, 24, 17)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(out)(volume), task(volume))
    assert "sigmoid makes them probabilities" in out.with_name("net.ts.md").read_text()


def test_pretraining_checkpoint_gives_its_backbone(tmp_path: Path) -> None:
    task = GVSL(backbone_options=OPTIONS["unet"]).eval()
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    out = export(tmp_path / "last.ckpt", "huggingface")
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(out)(volume), task.backbone(volume))


def test_bundle_of_a_cropping_data_module_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"class": "STOIC", "modality": "ct", "lungs": "threshold", "margin": 5.0}
    _, weights = save(tmp_path, data=data)
    words = refusal(weights, "bundle", "--modality", "ct", capsys=capsys)
    assert "Cropped beforehand by STOIC, to AroundLungs(margin=5.0" in words
    again = export(weights, "safetensors")
    assert "Cropped beforehand by STOIC, to AroundLungs(margin=5.0" in (
        again.with_name("net.safetensors.md").read_text()
    )
    assert load_model(again).hooks == load_model(weights).hooks


@pytest.mark.parametrize(
    ("data", "hooks"),
    [
        ({"class": "CANDI", "crop": [160, 160, 128]}, 1),
        ({"class": "CANDI", "crop": None}, 0),
        ({"class": "CANDI"}, 1),
        ({"class": "MMWHS", "margin": 20.0}, 0),
        ({"class": "PretrainDataModule"}, 0),
        ({"lungs": "threshold", "margin": 10.0}, 1),
        ({"class": "OwnIntensities"}, 1),
        ({"class": "OwnFiles"}, 0),
        ({"class": "SomebodysDataModule"}, 1),
    ],
)
def test_hooks_of_data_modules_are_known(tmp_path: Path, data: dict[str, Any], hooks: int) -> None:
    model = load_model(save(tmp_path, data={"modality": "none", **data})[1])
    assert len(model.hooks) == hooks
    assert all(data.get("class", "lungs") in sentence for sentence in model.hooks)


class OwnIntensities(SegmentationDataModule):
    def configure_intensity(self) -> list[MapTransform]:
        return []


class OwnFiles(SegmentationDataModule):
    def find_files(self) -> list[Any]:
        return []


def test_bundle_of_own_intensities_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path, data={"class": "OwnIntensities", "modality": "none"})
    words = refusal(weights, "bundle", capsys=capsys)
    assert "Intensities by OwnIntensities.configure_intensity" in words
    assert export(weights, "bundle", "--modality", "ct").is_dir()


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "os.system", "init_args": {"command": "exit 1"}},
        {"class_path": "monai.transforms.io.array.os.system", "init_args": {"command": "exit 1"}},
        {"class_path": "monai.transforms.Lambdad", "init_args": {"keys": "image", "func": "$id"}},
        {"class_path": "monai.transforms.ToTensord", "init_args": {"keys": {"_target_": "id"}}},
    ],
)
def test_bundle_runs_nothing_that_a_card_names(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path, data={"transforms": [spec]})
    assert "transforms of monai.transforms" in refusal(weights, "bundle", capsys=capsys)


def test_bundle_is_parsed_before_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"class_path": "monai.transforms.ScaleIntensityd", "init_args": {"key": "image"}}
    _, weights = save(tmp_path, data={"transforms": [spec]})
    assert "the bundle calls preprocessing" in refusal(weights, "bundle", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_prediction_without_mirroring_is_said(tmp_path: Path) -> None:
    task = Segmentation(
        class_names=CLASSES, mode="scratch", backbone_options=OPTIONS["unet"], mirror=True
    )
    save_backbone(
        task.backbone,
        tmp_path / "net.safetensors",
        {"task": dict(task.hparams), "data": {"modality": "ct"}},
        task.head,
    )
    out = export(tmp_path / "net.safetensors", "bundle")
    for path in (out / "docs" / "README.md", out / "configs" / "metadata.json"):
        assert "predicts without mirroring" in path.read_text()


def test_card_is_passed_on_but_for_paths(tmp_path: Path) -> None:
    lineage = {"project": "owner/project", "id": "a1", "artifact": "backbone-gvsl:v3"}
    others = {
        "wandb": lineage,
        "ethics": "approved by 2/3 of the board, see https://example.org/x",
        "measured": {"dice": 0.8, "table_path": "table.csv", "from": "/home/somebody/t.csv"},
        "copied": "from ~/somebody/weights",
        "folders": ["somebody"],
    }
    _, weights = save(tmp_path, **others)
    card = json.loads(weights.with_suffix(".json").read_text())
    card["versions"]["torch"], card["date"] = "2.9.0", "2026-01-01"
    weights.with_suffix(".json").write_text(json.dumps(card))
    out = export(weights, "huggingface")
    for _ in range(2):  # also of what was exported before
        found = json.loads((out / "backbone.json").read_text())
        assert found["wandb"] == lineage
        assert found["ethics"] == others["ethics"]
        assert found["measured"] == {"dice": 0.8}
        assert found["trained_with"] == {"versions": card["versions"], "date": "2026-01-01"}
        assert found["versions"]["torch"] == torch.__version__
        assert "somebody" not in json.dumps(found)
        out = export(out / "backbone.safetensors", "huggingface")


def test_no_paths_leave_the_machine(tmp_path: Path) -> None:
    _, weights = save(tmp_path, task={"class": "GVSL", "weights": "/home/somebody/w.ckpt"})
    out = export(weights, "huggingface")
    assert all(
        "somebody" not in path.read_text() for path in (out / "backbone.json", out / "README.md")
    )
    assert json.loads((out / "backbone.json").read_text())["data"]["modality"] == "ct"


def test_hugging_face_folder_is_read_and_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    module: Any = ModuleType("huggingface_hub")
    module.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    backbone, weights = save(tmp_path)
    out = export(weights, "huggingface", "--push_to_hub", "owner/name")
    assert calls == [
        ("owner/name", {"private": True, "exist_ok": True}),
        ("owner/name", ["README.md", "backbone.json", "backbone.safetensors"]),
    ]
    assert (out / "README.md").read_text().startswith("---\nlicense: ")
    again = build_backbone("unet", **OPTIONS["unet"])
    load_backbone_weights(again, out)
    for network in (again, load_backbone(out)):
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, backbone.state_dict()[name], rtol=0, atol=0)


# what MONAI's published schema requires, https://project-monai.github.io/schema
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
SCHEMA = {
    "type": "object",
    "required": [
        "schema",
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "changelog": {"type": "object"},
        "required_packages_version": {"type": "object"},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}

RUN_BUNDLE = """
import monai.bundle
bundle, volumes, results = sys.argv[1:]
configs = {"config_file": f"{bundle}/configs/inference.json", "bundle_root": bundle}
meta = f"{bundle}/configs/metadata.json"
monai.bundle.verify_net_in_out("network_def", meta_file=meta, device="cpu", **configs)
monai.bundle.run(dataset_dir=volumes, output_dir=results, **configs)
"""


def test_bundle_segments_without_this_package(
    segmented: tuple[Segmentation, Path, Path], tmp_path: Path
) -> None:
    task, checkpoint, images = segmented
    out = export(checkpoint, "bundle")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    # a schema that is there already is not downloaded
    monai.bundle.verify_metadata(
        meta_file=str(out / "configs/metadata.json"), filepath=tmp_path / "schema.json"
    )
    run_alone(RUN_BUNDLE, out, images, tmp_path)
    data = SegmentationDataModule(
        root=str(images),
        class_names=CLASSES,
        modality="ct",
        window=(-100.0, 300.0),
        spacing=(1.0, 1.0, 1.0),
        patch_size=(16, 16, 16),
    )
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    task._restored = True
    predictions: Any = trainer.predict(task, data)
    assert len(predictions) == 2
    for ours in predictions:
        theirs = nibabel.load(tmp_path / f"{ours['name'].partition('.')[0]}_seg.nii.gz")
        scan = nibabel.load(ours["source"])
        np.testing.assert_allclose(theirs.affine, scan.affine, atol=1e-5)
        labels, expected = np.asarray(theirs.dataobj), ours["prediction"].numpy()
        for index in range(len(CLASSES)):
            found, wanted = labels == index, expected == index
            assert wanted.any()
            assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.999


def test_bundle_prepares_mr_as_this_package_does(tmp_path: Path) -> None:
    from monai.bundle import ConfigParser

    from gvsl_lightning.transforms.intensity import intensity_transforms

    _, weights = save(tmp_path)
    out = export(weights, "bundle", "--modality", "mri", "--spacing", "[1,1,1.5]")
    volume = np.random.default_rng(0).gamma(2, 300, (9, 8, 7)).astype(np.float32)
    volume[:3] = 0
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 1.5, 1])), tmp_path / "mr.nii")
    parser = ConfigParser()
    parser.read_config(out / "configs/inference.json")
    prepared = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "mr.nii")})
    (scale,) = intensity_transforms("mri")
    expected = scale({"image": torch.from_numpy(volume)[None]})["image"]
    torch.testing.assert_close(prepared["image"].as_tensor(), expected)


def test_bundle_classifies(tmp_path: Path) -> None:
    task = Classification(
        class_names=["no", "yes"], mode="scratch", backbone_options=OPTIONS["unet"]
    ).eval()
    hparams = dict(task.hparams)
    data = {"modality": "none", "size": [16, 16, 16]}
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": hparams,
        "datamodule_hyper_parameters": data,
        "epoch": 0,
        "global_step": 1,
    }
    torch.save(content, tmp_path / "last.ckpt")
    images = write_volumes(tmp_path)
    out = export(tmp_path / "last.ckpt", "bundle")
    settings = {"bundle_root": str(out), "dataset_dir": str(images), "output_dir": str(tmp_path)}
    monai.bundle.run(config_file=str(out / "configs/inference.json"), **settings)
    rows = [row.split(",") for row in (tmp_path / "predictions.csv").read_text().splitlines()]
    volume = nibabel.as_closest_canonical(nibabel.load(images / "v1.nii.gz")).get_fdata()
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    fitted = ResizeWithPadOrCrop((16, 16, 16))(torch.from_numpy(volume).float()[None])
    with torch.no_grad():
        expected = task(fitted.as_tensor()[None]).softmax(dim=1)[0]
    assert rows[1][0].endswith("v1.nii.gz")
    found = torch.tensor([float(cell) for cell in rows[1][1:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_nnunet_computes_the_same(tmp_path: Path, affine: bool) -> None:
    """As nnU-Net loads them: by name, everything but the segmentation layers."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(1)
    options = {"filters": [8, 16, 24], "norm_name": ["instance", {"affine": affine}]}
    backbone = build_backbone("dynunet", **options).eval()
    randomised(backbone)
    data = {**DATA, "patch_size": [16, 18, 16]}
    save_backbone(backbone, tmp_path / "backbone.safetensors", {"data": data})
    out = export(tmp_path / "backbone.safetensors", "nnunet")
    network = unet.PlainConvUNet(
        1, 3, [8, 16, 24], nn.Conv3d, 3, [1, 2, 2], [2, 2, 2], 5, [2, 2], True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    ).eval()  # fmt: skip
    weights = torch.load(out, weights_only=True)["network_weights"]
    own = network.state_dict()
    assert own.keys() - weights.keys() == {name for name in own if ".seg_layers." in name}
    network.load_state_dict({**own, **weights})
    volume = torch.rand(2, 1, 16, 8, 12)
    seen: list[Tensor] = []
    network.decoder.stages[-1].register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        network(volume)
        features = backbone(volume)
        torch.testing.assert_close(seen[0], features.local_features, rtol=0, atol=1e-5)
        bottleneck = network.encoder(volume)[-1]
        torch.testing.assert_close(bottleneck, features.global_features, rtol=0, atol=1e-5)
    plans = json.loads((out.parent / "net_plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 16, 24]
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    assert configuration["spacing"] == [1.0, 1.0, 2.0]
    assert configuration["patch_size"] == [16, 20, 16]
    assert "not to 0 to 1" in out.with_name("net.pth.md").read_text()


def test_nnunet_gets_no_normalization_that_is_not_known(tmp_path: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    _, weights = save(tmp_path, "dynunet", data={})
    out = export(weights, "nnunet")
    plans = json.loads((out.parent / "net_plans.json").read_text())
    assert "normalization_schemes" not in plans["configurations"]["3d_fullres"]
    assert "name no normalization" in out.with_name("net.pth.md").read_text()


def test_nnunet_refuses_other_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dynamic_network_architectures")
    _, weights = save(tmp_path)
    assert "computes what unet does" in refusal(weights, "nnunet", capsys=capsys)
    save_backbone(build_backbone("dynunet", filters=[8, 8, 8]), weights, {})
    assert "has GroupNorm and nnU-Net" in refusal(weights, "nnunet", capsys=capsys)
    options = {"filters": [8, 8, 8], "norm_name": "instance", "res_block": True}
    save_backbone(build_backbone("dynunet", **options), weights, {})
    assert "built with res_block" in refusal(weights, "nnunet", capsys=capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchscript", "pt2", "onnx"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_backbone_is_exported(
    tmp_path: Path, name: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each export compares itself, at a tolerance of 1e-4."""
    _, weights = save(tmp_path, name)
    if (name, format) == ("swin_unetr", "torchscript"):  # its attention mask stays on the CPU
        assert "choose pt2 or onnx" in refusal(weights, format, capsys=capsys)
    else:
        assert export(weights, format, "--size", "[40, 32, 32]").is_file()


def test_backbone_of_monai_is_exported(tmp_path: Path) -> None:
    _, weights = save(tmp_path, "segresnet")
    assert export(weights, "pt2").is_file()


def test_network_tied_to_this_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    encode = UNet.encode_padded

    def tied(self: UNet, volume: Tensor) -> Any:
        return encode(self, volume + torch.zeros(volume.shape, device=volume.device))

    monkeypatch.setattr(UNet, "encode_padded", tied)
    for format, words in (("torchscript", ()), ("bundle", ("--modality", "ct"))):
        assert "choose pt2 or onnx" in refusal(weights, format, *words, capsys=capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fixed_network_takes_its_size(tmp_path: Path) -> None:
    backbone, weights = save(tmp_path, "swin_unetr")
    out = export(weights, "pt2", "--size", "[24, 32, 20]")
    volume = torch.rand(1, 1, 24, 32, 20)
    network = torch.export.load(out).module()
    with torch.no_grad():
        torch.testing.assert_close(network(volume), tuple(backbone(volume)))
    assert "24 x 32 x 20" in out.with_name("net.pt2.md").read_text()


def test_existing_export_is_kept_or_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    out = export(weights, "huggingface")
    (out / "README.md").write_text("mine")
    assert f"{out} exists" in refusal(weights, "huggingface", capsys=capsys)
    assert (out / "README.md").read_text() == "mine"
    export(weights, "huggingface", "--overwrite", "true")
    assert (out / "README.md").read_text() != "mine"
    (out / "backbone.safetensors").unlink()
    words = refusal(weights, "huggingface", "--overwrite", "true", capsys=capsys)
    assert "nothing that such an export wrote" in words
    out.rename(tmp_path / "old")
    bundle = export(weights, "bundle")
    (bundle / "docs" / "README.md").write_text("mine")
    export(weights, "bundle", "--overwrite", "true")
    assert (bundle / "docs" / "README.md").read_text() != "mine"
    out.with_name("net.ts").mkdir()
    words = refusal(weights, "torchscript", "--overwrite", "true", capsys=capsys)
    assert "nothing that such an export wrote" in words


@pytest.mark.parametrize("overwrite", [(), ("--overwrite", "true")])
def test_run_folder_is_never_replaced(
    tmp_path: Path, overwrite: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    run = tmp_path / "out" / "net"
    (run / "checkpoints").mkdir(parents=True)
    kept = {run / "checkpoints" / "best.ckpt", run / "metrics.csv", run / "README.md"}
    for path in (*kept, run / "backbone.json", run / "backbone.safetensors"):
        path.write_text("mine")
    for format in ("huggingface", "bundle"):
        words = refusal(weights, format, *overwrite, capsys=capsys)
        assert "or holds more: give another --out." in words
        assert "--overwrite" not in words
    assert all(path.read_text() == "mine" for path in kept)


def test_weights_are_not_replaced_by_their_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = export(save(tmp_path)[1], "huggingface")
    for weights, format, out in (
        (hub / "backbone.safetensors", "safetensors", hub / "backbone.safetensors"),
        (hub, "huggingface", hub),
    ):
        before = (hub / "backbone.safetensors").read_bytes()
        words = ["--format", format, "--out", str(out), "--overwrite", "true"]
        with pytest.raises(SystemExit):
            main(["export", "--weights", str(weights), *words])
        assert "is or holds what --weights names" in capsys.readouterr().err
        assert (hub / "backbone.safetensors").read_bytes() == before


def test_place_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    (tmp_path / "out").write_text("a file")
    words = refusal(weights, "torchscript", capsys=capsys)
    assert "net.ts cannot be made, as" in words
    assert "out is no folder; give another path" in words


def test_card_of_something_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net.ts.md").write_text("mine")
    assert "net.ts.md exists" in refusal(weights, "torchscript", capsys=capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["net.ts.md"]


def test_export_that_differs_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)

    def wrong(model: Model, path: Path) -> float:
        path.write_text("network")
        return largest_difference(model, lambda v: [out + 1e-3 for out in model.compute(v)])

    monkeypatch.setitem(tool.FORMATS, "torchscript", tool._Kind(wrong, ".ts"))
    assert "more than 1e-04" in refusal(weights, "torchscript", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_comparison_sees_shapes_and_nan(tmp_path: Path) -> None:
    model = load_model(save(tmp_path)[1])
    with pytest.raises(InputError, match="differ"):
        largest_difference(model, lambda v: [out[:, :-1] for out in model.compute(v)])
    with pytest.raises(InputError, match="differ"):
        largest_difference(model, lambda v: [out * float("nan") for out in model.compute(v)])
    assert largest_difference(model, model.compute) == 0


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = save(tmp_path)
    missing = tmp_path / "missing.ckpt"
    assert f"{missing} does not exist" in refusal(missing, "onnx", capsys=capsys)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"not a checkpoint")
    assert "broken.ckpt" in refusal(broken, "onnx", capsys=capsys)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(weights.read_bytes())
    assert "does not say which network" in refusal(alone, "onnx", capsys=capsys)
    words = refusal(weights, "torchscript", "--push_to_hub", "a/b", capsys=capsys)
    assert "push_to_hub" in words
    with pytest.raises(SystemExit):
        main(["export", "--weights", str(weights), "--format", "onnx", "--out", "net.bin"])
    assert "end in .onnx" in capsys.readouterr().err
    save_backbone(build_backbone("unet", **OPTIONS["unet"]), weights, {})
    assert "give --modality" in refusal(weights, "bundle", capsys=capsys)


@pytest.mark.parametrize(
    "words",
    [
        ("--spacing", "[1, 0, 1]"),
        ("--spacing", "[1, .nan, 1]"),
        ("--window", "[300, 300]"),
        ("--size", "[16, 0, 16]"),
    ],
)
def test_option_out_of_range_is_named(
    tmp_path: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    assert f"{words[0]} is " in refusal(weights, "torchscript", *words, capsys=capsys)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data", {"patch_size": 16}, "patch_size is 16"),
        ("data", {"spacing": "x"}, "spacing is 'x'"),
        ("data", {"transforms": ["x"]}, "transforms is ['x']"),
        ("backbone", {"name": "unet", "in_channels": 1, "options": 3}, "describe a network"),
    ],
)
def test_wrong_card_is_named(
    tmp_path: Path, field: str, value: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    path = weights.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    words = refusal(weights, "torchscript", capsys=capsys)
    assert f"The card of {weights}" in words
    assert named in words


def test_old_pytorch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    monkeypatch.delattr(torch.export.Dim, "DYNAMIC")
    words = refusal(weights, "pt2", capsys=capsys)
    assert f"than {torch.__version__}; exports are tested with 2.13." in words
