"""Tests of ``python -m gvsl_lightning export``."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from exports import (
    CLASSES,
    OPTIONS,
    SIZES,
    export,
    randomised,
    refusal,
    save,
    save_task,
    without_this_package,
)
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from gvsl_lightning.export import exporter as tool
from gvsl_lightning.export.exported import Model, largest_difference, load_model
from gvsl_lightning.nn.backbones import BACKBONES, UNet, build_backbone
from gvsl_lightning.tasks import GVSL, Classification, Segmentation
from gvsl_lightning.weights import load_backbone, load_backbone_weights, read_head


@pytest.fixture
def segmented(tmp_path: Path) -> tuple[Segmentation, Path]:
    task = Segmentation(class_names=CLASSES, mode="scratch", backbone_options=OPTIONS["unet"])
    randomised(task)
    data = {"modality": "ct", "window": [-100.0, 300.0], "spacing": [1.0, 1.0, 1.0]}
    return task.eval(), save_task(task, tmp_path / "last.ckpt", **data)


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone, weights = save(tmp_path)
    session = onnxruntime.InferenceSession(export(weights, "onnx"))
    names = [output.name for output in session.get_outputs()]
    assert names == ["global_features", "local_features"]
    for number, size in enumerate(SIZES, start=1):
        volume = torch.rand(number, 1, *size)
        found = session.run(None, {"volume": volume.numpy()})
        for one, other in zip(found, backbone(volume), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["torchscript", pytest.param("pt2", marks=pytest.mark.slow)])
def test_pytorch_computes_the_same_without_this_package(tmp_path: Path, format: str) -> None:
    backbone, weights = save(tmp_path)
    out = export(weights, format)
    volumes = [torch.rand(batch + 1, 1, *size) for batch, size in enumerate(SIZES)]
    with without_this_package(), torch.no_grad():
        script = format == "torchscript"
        program = torch.jit.load(out) if script else torch.export.load(out).module()
        results = [program(volume) for volume in volumes]
    for found, volume in zip(results, volumes, strict=True):
        torch.testing.assert_close(found, tuple(backbone(volume)), rtol=0, atol=1e-4)


def test_safetensors_keep_the_head_for_prediction(
    segmented: tuple[Segmentation, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    task, checkpoint = segmented
    path = export(checkpoint, "safetensors")
    assert "0.0e+00" in capsys.readouterr().out
    head = read_head(path, "head")
    torch.testing.assert_close(head["weight"], task.head.weight.detach(), rtol=0, atol=0)
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(path)(volume), task.backbone(volume))
        torch.testing.assert_close(load_model(path).compute(volume)[0], task(volume))


def test_exported_segmentation_gives_its_logits(segmented: tuple[Segmentation, Path]) -> None:
    task, checkpoint = segmented
    network = torch.jit.load(export(checkpoint, "torchscript"))
    assert "flip" not in str(network.inlined_graph)  # a formula for this machine's training
    card = checkpoint.with_name("out").joinpath("net.ts.md").read_text()
    for words in (", ".join(CLASSES), "softmax", "1 x 1 x 1 mm", "-100 to 300 HU", "Steps: 7"):
        assert words in card
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
    out = export(save_task(task, tmp_path / "last.ckpt"), "torchscript")
    volume = torch.rand(2, 1, 19, 24, 17)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(out)(volume), task(volume))
    assert "sigmoid" in out.with_name("net.ts.md").read_text()


def test_pretraining_checkpoint_gives_its_backbone(tmp_path: Path) -> None:
    task = GVSL(backbone_options=OPTIONS["unet"]).eval()
    out = export(save_task(task, tmp_path / "last.ckpt"), "huggingface")
    volume = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(out)(volume), task.backbone(volume))


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


def test_network_tied_to_this_device_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    encode = UNet.encode_padded

    def tied(self: UNet, volume: Tensor) -> Any:
        return encode(self, volume + torch.zeros(volume.shape, device=volume.device))

    monkeypatch.setattr(UNet, "encode_padded", tied)
    for format in ("torchscript", "bundle"):
        assert "choose pt2 or onnx" in refusal(weights, format, capsys=capsys)
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


@pytest.mark.parametrize(
    ("format", "card"), [("huggingface", "README.md"), ("bundle", "docs/README.md")]
)
def test_existing_export_is_kept_or_replaced(
    tmp_path: Path, format: str, card: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    out = export(weights, format)
    (out / card).write_text("mine")
    assert str(out) in refusal(weights, format, capsys=capsys)
    assert (out / card).read_text() == "mine"
    export(weights, format, "--overwrite", "true")
    assert (out / card).read_text() != "mine"
    (out / "notes.txt").write_text("mine")
    for overwrite in ([], ["--overwrite", "true"]):  # a folder with anything else is kept
        words = refusal(weights, format, *overwrite, capsys=capsys)
        assert str(out) in words
        assert "--overwrite" not in words
    assert (out / "notes.txt").read_text() == "mine"


def test_weights_are_not_replaced_by_their_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = export(save(tmp_path)[1], "huggingface")
    file = hub / "backbone.safetensors"
    before = file.read_bytes()
    for format, out in (("safetensors", file), ("huggingface", hub)):
        words = [f"--weights={out}", f"--format={format}", f"--out={out}", "--overwrite=true"]
        with pytest.raises(SystemExit):
            main(["export", *words])
        assert "--weights" in capsys.readouterr().err
        assert file.read_bytes() == before


def test_card_of_something_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net.ts.md").write_text("mine")
    assert "net.ts.md" in refusal(weights, "torchscript", capsys=capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["net.ts.md"]


def test_export_that_differs_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)

    def wrong(model: Model, path: Path) -> float:
        path.write_text("network")
        return largest_difference(model, lambda v: [out + 1e-3 for out in model.compute(v)])

    monkeypatch.setitem(tool.FORMATS, "torchscript", tool._Kind(wrong, ".ts"))
    assert "1e-04" in refusal(weights, "torchscript", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_comparison_sees_shapes_and_nan(tmp_path: Path) -> None:
    model = load_model(save(tmp_path)[1])
    for change in (lambda out: out[:, :-1], lambda out: out * float("nan")):
        with pytest.raises(InputError, match="global_features"):
            largest_difference(model, lambda v, change=change: map(change, model.compute(v)))
    assert largest_difference(model, model.compute) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--push_to_hub", "a/b"],
        ["--spacing", "[1, 0, 1]"],
        ["--spacing", "[1, .nan, 1]"],
        ["--window", "[300, 300]"],
        ["--window", "[-.inf, 300]"],
        ["--size", "[16, 0, 16]"],
    ],
)
def test_wrong_option_is_named(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    assert words[0].strip("-") in refusal(weights, "torchscript", *words, capsys=capsys)


def test_old_pytorch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = save(tmp_path)
    monkeypatch.delattr(torch.export.Dim, "DYNAMIC")
    assert torch.__version__ in refusal(weights, "pt2", capsys=capsys)
