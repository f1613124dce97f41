"""Tests of ``python -m gvsl_lightning features``."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from gvsl_lightning.cli.main import main
from gvsl_lightning.evaluation.probes import (
    class_indices,
    class_prototypes,
    local_features,
    nearest_prototype,
    standardise,
)
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.tasks import GVSL
from gvsl_lightning.tools import features as tool
from gvsl_lightning.weights import save_backbone

OPTIONS = {"channels": [4, 8]}
FEW = ["--cases", "1", "--samples", "20"]


@pytest.fixture(autouse=True)
def _fast_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "embed", lambda vectors, seed: vectors[:, :2].numpy())
    monkeypatch.setenv("COLUMNS", "80")
    if "pictures" not in request.node.name:
        for name in ("draw_embedding", "draw_features"):
            monkeypatch.setattr(tool, name, lambda *_, **__: Figure(figsize=(0.1, 0.1)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four volumes whose labels 2 and 5 are brighter than the background."""
    folder = tmp_path / "data"
    folder.mkdir()
    entries = []
    for index, name in enumerate("abcd"):
        label = np.zeros((9, 10, 8), dtype=np.uint8)
        label[1:5, 2 : 6 + index, 2:6] = 2
        label[6:8, 2:8, 2:6] = 0 if name == "d" else 5
        image = label / 5 + 0.1 * np.random.default_rng(index).random(label.shape)
        for kind, array in (("image", image.astype(np.float32)), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}_{kind}.nii")
        entries.append({"image": f"{name}_image.nii", "label": f"{name}_label.nii"})
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Backbone:
    torch.manual_seed(5)
    backbone = build_backbone("unet", **OPTIONS)
    save_backbone(backbone, tmp_path / "backbone.safetensors", {})
    return backbone


def run(root: Path, weights: Any, *words: str) -> list[dict[str, str]]:
    out = root.parent / "out"
    main(["features", "--root", str(root), "--weights", str(weights), "--out", str(out), *words])
    with (out / "features.csv").open() as file:
        return list(csv.DictReader(file))


def read_cases(root: Path) -> list[dict[str, str]]:
    with (root.parent / "out" / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def case(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    image, label = (
        np.asarray(nibabel.load(root.parent / f"{name}_{kind}.nii").dataobj)
        for kind in ("image", "label")
    )
    scaled = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(scaled)[None].float(), torch.from_numpy(label)


def test_table_files_and_pictures(
    root: Path, trained: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = root.parent.parent / "backbone.safetensors"
    words = ["--class_names", "[left, right]", "--cases", "2", "--support", "[b_image]"]
    rows = run(root, weights, *words, "--samples", "20")
    assert [row["features"] for row in rows] == ["untrained", "pre-trained"]
    output = capsys.readouterr().out
    for row in rows:
        for column in ("prototype_dice_left", "neighbours_dice_mean", "silhouette"):
            assert f"{float(row[column]):.3f}" in output
    for words_shown in ("left", "right", "Prototype Dice", "k-NN Dice", "b_image"):
        assert words_shown in output
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    cases = read_cases(root)
    assert [(row["support"], row["case"]) for row in cases] == [
        ("b_image", "c_image"),
        ("b_image", "d_image"),
    ] * 2
    for name in ("tsne.png", "features.png"):
        assert imread(root.parent / "out" / name)[..., :3].std() > 0.05


def test_figures_are_those_of_the_pure_functions(root: Path, trained: Backbone) -> None:
    run(root, root.parent.parent / "backbone.safetensors", "--cases", "1")
    image, label = case(root, "a")
    classes = class_indices(label, torch.tensor([0, 2, 5]))
    target, truth = case(root, "d")
    features = [standardise(local_features(trained, volume)) for volume in (image, target)]
    found = nearest_prototype(features[1], *class_prototypes(features[0], classes))
    truth = class_indices(truth, torch.tensor([0, 2, 5]))
    expected = dice_scores(found[None], truth[None], (1, 2))[0]
    row = read_cases(root)[-1]
    assert list(row.values())[:3] == ["pre-trained", "a_image", "d_image"]
    shown = [float(row[f"prototype_dice_{value}"]) for value in (2, 5)]
    assert shown == pytest.approx(expected.tolist(), abs=1e-6)


def test_each_support_alone_and_the_mean(root: Path) -> None:
    words = ["--backbone_options", json.dumps(OPTIONS), "--cases", "2", "--samples", "20"]
    columns = ("prototype_dice_2", "prototype_dice_5", "neighbours_dice_2", "neighbours_dice_5")
    (both,) = run(root, "none", *words, "--support", "[a_image, b_image]")
    joint = read_cases(root)
    alone = []
    for name in ("a_image", "b_image"):
        run(root, "none", *words, "--support", f"[{name}]")
        alone += read_cases(root)
    assert len(joint) == 4
    assert all(row in joint for row in alone)
    for column in columns:
        values = [float(row[column]) for row in joint]
        assert float(both[column]) == pytest.approx(np.nanmean(values))


def test_untrained_follows_the_seed_and_not_the_process(root: Path) -> None:
    words = ["--backbone_options", json.dumps(OPTIONS), *FEW]
    first = run(root, "none", *words)
    torch.rand(3)
    assert run(root, "none", *words) == first
    assert run(root, "none", *words, "--seed", "1") != first
    assert [row["features"] for row in first] == ["untrained"]


def test_checkpoint_names_its_own_backbone(root: Path) -> None:
    task = GVSL(backbone="unet", backbone_options=OPTIONS, affine_channels=8)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(task)
    path = root.parent / "last.ckpt"
    trainer.save_checkpoint(path)
    from_checkpoint = run(root, path, *FEW)
    exported = save_backbone(task.backbone, root.parent / "backbone.safetensors", {})
    assert run(root, exported, *FEW) == from_checkpoint


def test_results_lie_beside_the_weights_unless_told_otherwise(
    root: Path, trained: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = root.parent / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run_folder = root.parent.parent
    main(["features", "--root", str(root), "--weights", str(run_folder), *FEW])
    assert (run_folder / "features" / "cases.csv").is_file()
    assert not list(work.iterdir())
    options = ["--backbone_options", json.dumps(OPTIONS), *FEW]
    main(["features", "--root", str(root), "--weights", "none", *options])
    assert [path.name for path in work.iterdir()] == ["runs"]


def test_repository_names_its_own_backbone(
    root: Path, hub: Path, trained: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    local = run(root, root.parent.parent / "backbone.safetensors", *FEW)
    save_backbone(trained, hub / "owner" / "name" / "backbone.safetensors", {})
    assert run(root, "hf:owner/name", *FEW) == local
    (hub / "owner" / "name" / "backbone.json").unlink()
    with pytest.raises(SystemExit):
        run(root, "owner/name")
    assert capsys.readouterr().err.startswith("error: owner/name ")


def test_released_checkpoint(reference_root: Path) -> None:
    path = reference_root / "official_unet_tiny.pt"
    golden = torch.load(path, weights_only=True)
    options = {"channels": golden["channels"][:5]}
    backbones = tool._backbones(str(path), "unet", options, seed=0)
    for index, expected in enumerate(golden["f_local"]):
        found = local_features(backbones["pre-trained"], golden["x"][index])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        untrained = local_features(backbones["untrained"], golden["x"][index])
        assert not torch.allclose(untrained, expected, atol=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "*_image.nii"], "a_image.nii has no label map"),
        (["--support", "[nobody]"], "nobody .* a_image, b_image, c_image"),
        (["--support", "[a_image, b_image, c_image, d_image]"], "support"),
        (["--class_names", "[a]"], "class_names"),
        (["--weights", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--root", "nowhere"], "nowhere"),
        (["--backbone", "resnet"], "'resnet'.* segresnet"),
        (["--spacing", "[1, 1, 0]"], "spacing"),
    ],
)
def test_bad_input_is_one_sentence(
    root: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root.parent)
    given = ["features", "--root", str(root), "--weights", "none"]
    given += ["--backbone_options", json.dumps(OPTIONS), *words]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(f"^error: .*{message}", lines[0])


def test_the_weights_say_how_volumes_are_prepared(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[dict[str, Any]] = []
    made = tool._LabelledVolumes.__init__

    def note(self: Any, files: Any, **options: Any) -> None:
        seen.append(options)
        made(self, files, **options)

    monkeypatch.setattr(tool._LabelledVolumes, "__init__", note)
    card = {"data": {"modality": "ct", "window": [-100.0, 300.0], "spacing": [1.0, 1.0, 1.0]}}
    path = save_backbone(build_backbone("unet", **OPTIONS), tmp_path / "net.safetensors", card)
    run(root, path, *FEW)
    expected = {"modality": "ct", "window": (-100.0, 300.0), "spacing": (1.0, 1.0, 1.0)}
    assert {name: seen[0][name] for name in expected} == expected
    with pytest.raises(SystemExit) as stopped:
        run(root, path, *FEW, "--modality", "mri")
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in sentence for word in ("mri", "ct", "net.safetensors"))
