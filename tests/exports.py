"""Small networks, their exports, and volumes, for the tests of exports."""

import os
import subprocess
import sys
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
