"""Tests of cards: preparation by hooks, no paths, wrong entries."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.transforms.transform import MapTransform

from exports import export, refusal, save
from gvsl_lightning.data.regions import Centred
from gvsl_lightning.datamodules import SegmentationDataModule
from gvsl_lightning.export.exported import load_model


@pytest.mark.parametrize(
    ("data", "hooks"),
    [
        ({"class": "CANDI", "crop": [160, 160, 128]}, 1),
        ({"class": "CANDI", "crop": None}, 0),
        ({"class": "MMWHS", "margin": 20.0}, 0),
        ({"class": "PretrainDataModule"}, 0),
        ({"lungs": "threshold", "margin": 10.0}, 1),
        ({"class": "OwnIntensities"}, 1),
        ({"class": "OwnRegion"}, 1),
        ({"class": "OwnFiles"}, 0),
        ({"class": "SomebodysDataModule"}, 1),
    ],
)
def test_hooks_of_data_modules_are_known(tmp_path: Path, data: dict[str, Any], hooks: int) -> None:
    model = load_model(save(tmp_path, data={"modality": "none", **data})[1])
    assert len(model.hooks) == hooks


class OwnIntensities(SegmentationDataModule):
    def configure_intensity(self) -> list[MapTransform]:
        return []


class OwnRegion(SegmentationDataModule):
    def configure_region(self) -> Centred:
        return Centred((8, 8, 8))


class OwnFiles(SegmentationDataModule):
    def find_files(self) -> list[Any]:
        return []


def test_card_is_passed_on_but_for_paths(tmp_path: Path) -> None:
    lineage = {"project": "owner/project", "id": "a1", "artifact": "backbone-gvsl:v3"}
    others = {
        "wandb": lineage,
        "ethics": "approved by 2/3 of the board, see https://example.org/x",
        "measured": {"dice": 0.8, "table_path": "table.csv", "from": "/home/somebody/t.csv"},
        "copied": "from ~/somebody/weights",
        "folders": ["somebody"],
    }
    task = {"class": "GVSL", "weights": "/home/somebody/w.ckpt"}
    _, weights = save(tmp_path, task=task, **others)
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
        assert found["data"]["modality"] == "ct"
        assert "somebody" not in json.dumps(found) + (out / "README.md").read_text()
        out = export(out / "backbone.safetensors", "huggingface")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data", {"patch_size": 16}, "patch_size"),
        ("data", {"spacing": "x"}, "spacing"),
        ("data", {"transforms": ["x"]}, "transforms"),
        ("backbone", {"name": "unet", "in_channels": 1, "options": 3}, "backbone.safetensors"),
    ],
)
def test_wrong_card_is_named(
    tmp_path: Path, field: str, value: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    path = weights.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    words = refusal(weights, "torchscript", capsys=capsys)
    assert str(weights) in words
    assert named in words
