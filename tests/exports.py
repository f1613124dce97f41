"""Small networks, their exports, and volumes, for the tests of exports."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from gvsl_lightning.cli.main import main
from gvsl_lightning.export.exporter import FORMATS
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.weights import save_backbone

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


def randomised(network: nn.Module) -> None:
    """Move all scales and shifts away from 0 and 1, which would hide a wrong one."""
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


def save_task(task: pl.LightningModule, path: Path, **data: Any) -> Path:
    """Save a checkpoint as a run of seven steps does."""
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": {
            **task.hparams,
            "_class_path": f"{type(task).__module__}.{type(task).__name__}",
        },
        "datamodule_hyper_parameters": data,
        "epoch": 0,
        "global_step": 7,
    }
    torch.save(content, path)
    return path


def export(weights: Path, format: Any, *words: str) -> Path:
    out = weights.parent / "out" / f"net{FORMATS[format].suffix}"
    main(["export", "--weights", str(weights), "--format", format, "--out", str(out), *words])
    return out


@contextmanager
def without_this_package() -> Iterator[None]:
    """Refuse every import of gvsl_lightning."""
    ours = {name: module for name, module in sys.modules.items() if name.startswith("gvsl_light")}
    sys.modules.update(dict.fromkeys(ours))  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.modules.update(ours)


def refusal(weights: Path, format: Any, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
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
