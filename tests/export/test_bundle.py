"""Tests of MONAI bundles, which run without this package."""

import json
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monai.transforms.croppad.array import ResizeWithPadOrCrop

from exports import (
    CLASSES,
    OPTIONS,
    export,
    refusal,
    save,
    save_task,
    without_this_package,
    write_volumes,
)
from gvsl_lightning.datamodules import SegmentationDataModule
from gvsl_lightning.export.exported import load_model
from gvsl_lightning.tasks import Classification, Segmentation
from gvsl_lightning.transforms.intensity import intensity_transforms

# required by MONAI's published schema, https://project-monai.github.io/schema
REQUIRED = {
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version"),
    *("required_packages_version", "task", "description", "authors", "copyright"),
    "network_data_format",
}
PREPARED: dict[str, Any] = {
    "class_names": CLASSES,
    "modality": "ct",
    "window": (-100.0, 300.0),
    "spacing": (1.0, 1.0, 1.0),
    "patch_size": (16, 16, 16),
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
TENSOR = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}


def train(folder: Path) -> tuple[Segmentation, Path, Path]:
    """A task, its checkpoint as Lightning writes it, and its volumes."""
    pl.seed_everything(0)
    images = write_volumes(folder)
    task = Segmentation(
        class_names=CLASSES,
        mode="scratch",
        backbone_options=OPTIONS["unet"],
        window_size=(16, 16, 16),
        learning_rate=1e-2,
    )
    data = SegmentationDataModule(
        root=str(images), label_root=str(folder / "labels"), val=1, batch_size=1, **PREPARED
    )
    trainer = pl.Trainer(**QUIET, max_steps=40, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(task, data)
    trainer.save_checkpoint(folder / "last.ckpt")
    return task.eval(), folder / "last.ckpt", images


def test_bundle_segments_without_this_package(tmp_path: Path) -> None:
    task, checkpoint, images = train(tmp_path)
    out = export(checkpoint, "bundle")
    metadata = json.loads((out / "configs/metadata.json").read_text())
    assert metadata.keys() >= REQUIRED
    for tensors in metadata["network_data_format"].values():
        assert all(tensor.keys() >= TENSOR for tensor in tensors.values())
    configs = {"config_file": str(out / "configs/inference.json"), "bundle_root": str(out)}
    with without_this_package():
        monai.bundle.verify_net_in_out(
            "network_def", meta_file=str(out / "configs/metadata.json"), device="cpu", **configs
        )
        monai.bundle.run(dataset_dir=str(images), output_dir=str(tmp_path), **configs)
    task._restored = True
    data = SegmentationDataModule(root=str(images), **PREPARED)
    predictions: Any = pl.Trainer(**QUIET).predict(task, data)
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
    _, weights = save(tmp_path)
    out = export(weights, "bundle", "--modality", "mri", "--spacing", "[1,1,1.5]")
    volume = np.random.default_rng(0).gamma(2, 300, (9, 8, 7)).astype(np.float32)
    volume[:3] = 0
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 1.5, 1])), tmp_path / "mr.nii")
    parser = monai.bundle.ConfigParser()
    parser.read_config(out / "configs/inference.json")
    prepared = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "mr.nii")})
    (scale,) = intensity_transforms("mri")
    expected = scale({"image": torch.from_numpy(volume)[None]})["image"]
    torch.testing.assert_close(prepared["image"].as_tensor(), expected)


def test_bundle_classifies(tmp_path: Path) -> None:
    task = Classification(
        class_names=["no", "yes"], mode="scratch", backbone_options=OPTIONS["unet"]
    ).eval()
    weights = save_task(task, tmp_path / "last.ckpt", modality="none", size=[16, 16, 16])
    images = write_volumes(tmp_path)
    out = export(weights, "bundle")
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


def test_bundle_of_a_cropping_data_module_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"class": "STOIC", "modality": "ct", "lungs": "threshold", "margin": 5.0}
    _, weights = save(tmp_path, data=data)
    words = refusal(weights, "bundle", "--modality", "ct", capsys=capsys)
    assert "lungs (threshold, margin 5.0" in words
    again = export(weights, "safetensors")
    assert "lungs (threshold, margin 5.0" in (again.with_name("net.safetensors.md").read_text())
    assert load_model(again).hooks == load_model(weights).hooks


def test_bundle_of_unknown_intensities_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path, data={})
    assert "--modality" in refusal(weights, "bundle", capsys=capsys)
    _, weights = save(tmp_path, data={"class": "Somebodys", "modality": "none"})
    assert "Somebodys" in refusal(weights, "bundle", capsys=capsys)
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
    assert "monai.transforms" in refusal(weights, "bundle", capsys=capsys)


def test_bundle_is_parsed_before_it_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"class_path": "monai.transforms.ScaleIntensityd", "init_args": {"key": "image"}}
    _, weights = save(tmp_path, data={"transforms": [spec]})
    assert "preprocessing" in refusal(weights, "bundle", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_prediction_without_mirroring_is_said(tmp_path: Path) -> None:
    task = Segmentation(
        class_names=CLASSES, mode="scratch", backbone_options=OPTIONS["unet"], mirror=True
    )
    out = export(save_task(task, tmp_path / "last.ckpt", modality="ct"), "bundle")
    for path in (out / "docs" / "README.md", out / "configs" / "metadata.json"):
        assert "mirroring" in path.read_text()
