"""Networks of other packages as backbones."""

import sys
import types
from pathlib import Path

import pytest
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.resnet import resnet10
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import Backbone, UNet, build_backbone
from gvsl_lightning.nn.wrapped import WrappedBackbone, wrap_backbone
from gvsl_lightning.tasks import GVSL, Segmentation, SimCLR
from gvsl_lightning.weights import load_backbone, load_backbone_weights, save_backbone


def unet() -> WrappedBackbone:
    network = BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 16, 4), norm=("group", {"num_groups": 2}))
    between = ["upcat_4", "upcat_3", "upcat_2"]
    return wrap_backbone(network, "down_4", "upcat_1", between, divisor=16)


def resnet() -> WrappedBackbone:
    network = resnet10(spatial_dims=3, n_input_channels=1, num_classes=2, shortcut_type="B")
    return wrap_backbone(network, "layer4", "layer1")


def small_network(in_channels: int = 1) -> Backbone:
    return UNet(in_channels, channels=(8, 16))


def unmarked(in_channels: int = 1):  # type: ignore[no-untyped-def]
    raise AssertionError("must not be called")


class Sharing(nn.Module):
    """Two names of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 6, 2, stride=2)
        self.first = nn.Conv3d(6, 6, 3, padding=1)
        self.second = self.first

    def forward(self, volume: Tensor) -> Tensor:
        return self.second(self.first(self.down(volume)))


def test_features_are_the_layers_outputs_at_any_size() -> None:
    backbone = unet().eval()
    volume = torch.rand(2, 1, 16, 32, 16)
    with torch.no_grad():
        found = backbone(volume)
        inside = backbone.net.upcat_1
        caught: list[Tensor] = []
        handle = inside.register_forward_hook(lambda _, __, output: caught.append(output))
        backbone.net(volume)
        handle.remove()
        assert torch.equal(found.local_features, caught[0])
        assert torch.equal(backbone.encode(volume), found.global_features)
        levels = backbone.pyramid(torch.rand(1, 1, 17, 20, 23))
    assert (backbone.global_channels, backbone.local_channels) == (16, 4)
    assert found.global_features.shape == (2, 16, 1, 2, 1)
    assert [tuple(level.shape[2:]) for level in levels][::2] == [(2, 2, 2), (5, 5, 6), (17, 20, 23)]
    assert not any(module._forward_hooks for module in backbone.modules())


def test_coarse_local_features_are_as_large_as_the_volume() -> None:
    features = resnet()(torch.rand(1, 1, 30, 33, 32))
    assert features.local_features.shape == (1, 64, 30, 33, 32)
    assert features.global_features.shape[1] == 512


@pytest.mark.parametrize("matching", ["regression", "correlation"])
def test_a_wrapped_network_trains_and_its_checkpoint_takes_it_again(
    tmp_path: Path, matching: str
) -> None:
    task = GVSL(backbone=unet(), matching=matching, affine_channels=8)
    batch = {"fixed": torch.rand(1, 1, 16, 16, 16), "moving": torch.rand(1, 1, 16, 16, 16)}
    task.compute_losses(task.views_of(batch))["total"].backward()
    assert all(p.grad is not None for p in task.backbone.net.down_1.parameters())
    assert {name.partition(".")[0] for name in task.state_dict()} == {
        *("backbone", "matching_head", "restoration_head")
    }
    path = tmp_path / "a.ckpt"
    torch.save(
        {
            "state_dict": task.state_dict(),
            "hyper_parameters": dict(task.hparams),
            "pytorch-lightning_version": "2.6.0",
        },
        path,
    )
    again = GVSL.load_from_checkpoint(path, backbone=unet(), weights_only=True)
    for name, value in task.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(InputError, match="wrap_backbone"):
        GVSL.load_from_checkpoint(path, weights_only=True)


def test_tasks_take_a_wrapped_network() -> None:
    volume = torch.rand(1, 1, 32, 32, 32)
    segmentation = Segmentation(["background", "a"], mode="scratch", backbone=resnet())
    assert segmentation(volume).shape == (1, 2, 32, 32, 32)
    assert SimCLR(backbone=resnet()).embed(volume).shape == (1, 512)


def test_weights_of_networks_that_share_entries(tmp_path: Path) -> None:
    backbone = wrap_backbone(Sharing(), "down", "second", divisor=2)
    path = save_backbone(backbone, tmp_path / "backbone.safetensors", {})
    other = wrap_backbone(Sharing(), "down", "second", divisor=2)
    assert load_backbone_weights(other, path).is_exact
    assert torch.equal(other.net.first.weight, backbone.net.first.weight)
    with pytest.raises(InputError, match="wrap_backbone"):
        load_backbone(path)


def test_a_path_names_a_builder_of_backbones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("own_networks")
    module.small, module.unmarked = small_network, unmarked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", module)
    backbone = build_backbone("own_networks.small", 2)
    assert (backbone.local_channels, backbone.in_channels) == (8, 2)
    path = save_backbone(backbone, tmp_path / "backbone.safetensors", {})
    assert load_backbone(path).name == "own_networks.small"
    for name in ("own_networks.unmarked", "os.system", "own_networks.missing", "no_package.a"):
        with pytest.raises(InputError, match=name):
            build_backbone(name)


def test_wrong_layers_and_networks() -> None:
    with pytest.raises(InputError, match=r"upcat_9.*upcat_1"):
        wrap_backbone(BasicUNet(3, 1, 2), "down_4", "upcat_9", divisor=16)
    with pytest.raises(InputError, match="in_channels"):
        wrap_backbone(BasicUNet(3, 2, 2), "down_4", "upcat_1", divisor=16)
    with pytest.raises(InputError, match="fc"):
        wrap_backbone(resnet().net, "fc", "layer1")
