"""Tests of weights for nnU-Net."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exports import DATA, export, randomised, refusal, save
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.weights import save_backbone


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
    assert "CTNormalization" in out.with_name("net.pth.md").read_text()


def test_nnunet_gets_no_normalization_that_is_not_known(tmp_path: Path) -> None:
    pytest.importorskip("dynamic_network_architectures")
    _, weights = save(tmp_path, "dynunet", data={})
    out = export(weights, "nnunet")
    plans = json.loads((out.parent / "net_plans.json").read_text())
    assert "normalization_schemes" not in plans["configurations"]["3d_fullres"]
    assert "no normalization" in out.with_name("net.pth.md").read_text()


def test_nnunet_refuses_other_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dynamic_network_architectures")
    _, weights = save(tmp_path)
    assert "unet" in refusal(weights, "nnunet", capsys=capsys)
    save_backbone(build_backbone("dynunet", filters=[8, 8, 8]), weights, {})
    assert "GroupNorm" in refusal(weights, "nnunet", capsys=capsys)
    options = {"filters": [8, 8, 8], "norm_name": "instance", "res_block": True}
    save_backbone(build_backbone("dynunet", **options), weights, {})
    assert "res_block" in refusal(weights, "nnunet", capsys=capsys)
    assert not (tmp_path / "out").exists()
