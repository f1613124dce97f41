import io
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import backbones
from gvsl_lightning.nn.backbones import (
    BACKBONES,
    Backbone,
    Features,
    UNet,
    build_backbone,
)

# A new backbone is tested with its defaults until it is given small options here
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16, 32]},
    "basic_unet": {"features": [8, 8, 16, 16, 32, 8]},
    "dynunet": {"filters": [8, 16, 32]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1]},
    "swin_unetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
}
DEFAULT_CHANNELS = {
    "unet": (512, 32),
    "basic_unet": (256, 32),
    "dynunet": (320, 32),
    "segresnet": (128, 16),
    "swin_unetr": (384, 24),
}
IN_CHANNELS = 2


def small(name: str, in_channels: int = IN_CHANNELS, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(name, in_channels, **SMALL.get(name, {}), **options)


def odd_volume(backbone: Backbone) -> Tensor:
    """Smaller than, equal to and larger than the size the network is built for."""
    d = backbone.divisor
    torch.manual_seed(1)
    return torch.rand(2, backbone.in_channels, d - 1, d, max(d // 2, 3) + d)


def scalar_of(features: Features) -> Tensor:
    """A scalar that weighs every number of the features differently."""
    torch.manual_seed(2)
    return torch.stack([(value * torch.randn_like(value)).sum() for value in features]).sum()


@pytest.fixture(params=list(BACKBONES), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(name: str) -> Backbone:
    """A small network, with the gradients of one backward pass."""
    backbone = small(name)
    scalar_of(backbone(odd_volume(backbone))).backward()
    return backbone


@pytest.fixture(scope="module")
def features(backbone: Backbone) -> Features:
    with torch.no_grad():
        return backbone(odd_volume(backbone))


class TestEveryBackbone:
    def test_shapes(self, backbone, features):
        d = backbone.divisor
        assert features.local_features.shape == (
            *(2, backbone.local_channels, d - 1, d),
            max(d // 2, 3) + d,
        )
        assert features.global_features.shape == (2, backbone.global_channels, 1, 1, 2)

    def test_has_no_batch_norm_unless_asked_for(self, backbone):
        batch_norm = nn.modules.batchnorm._BatchNorm
        assert not any(isinstance(module, batch_norm) for module in backbone.modules())

    def test_encode_gives_the_global_features(self, backbone, features):
        with torch.no_grad():
            assert torch.equal(backbone.encode(odd_volume(backbone)), features.global_features)

    def test_pyramid_goes_from_the_bottleneck_to_the_local_features(self, backbone, features):
        volume = odd_volume(backbone)
        with torch.no_grad():
            levels = backbone.pyramid(volume)
        assert torch.equal(levels[0], features.global_features)
        assert torch.equal(levels[-1], features.local_features)
        stages = int(math.log2(backbone.divisor))
        strides = [2**level for level in reversed(range(stages + 1))]
        assert [tuple(level.shape[2:]) for level in levels] == [
            tuple(math.ceil(size / stride) for size in volume.shape[2:]) for stride in strides
        ]

    def test_odd_sizes_are_padded_on_both_sides(self, backbone, features):
        volume = odd_volume(backbone)
        sizes = volume.shape[2:]
        fitting = [math.ceil(size / backbone.divisor) * backbone.divisor for size in sizes]
        region = [
            slice(start, start + size)
            for start, size in zip(
                [(whole - size) // 2 for whole, size in zip(fitting, sizes, strict=True)],
                sizes,
                strict=True,
            )
        ]
        padded = volume.new_zeros(*volume.shape[:2], *fitting)
        padded[(..., *region)] = volume
        with torch.no_grad():
            expected = backbone(padded)
        assert torch.equal(features.global_features, expected.global_features)
        assert torch.equal(features.local_features, expected.local_features[(..., *region)])

    def test_samples_do_not_see_each_other(self, backbone, features):
        with torch.no_grad():
            alone = backbone(odd_volume(backbone)[1:])
        for together, one in zip(features, alone, strict=True):
            torch.testing.assert_close(together[1:], one, rtol=1e-4, atol=1e-4)

    def test_every_channel_of_the_volume_counts(self, backbone, features):
        for channel in range(IN_CHANNELS):
            volume = odd_volume(backbone)
            volume[:, channel] = 0
            with torch.no_grad():
                changed = backbone(volume)
            for got, original in zip(changed, features, strict=True):
                assert (got - original).abs().max() > 1e-3

    def test_no_parameter_is_unused(self, backbone):
        # an unused one stops multi-process training
        without = [key for key, value in backbone.named_parameters() if value.grad is None]
        assert without == []
        weights = [value for value in backbone.parameters() if value.ndim > 1]
        assert all(bool(weight.grad.any()) for weight in weights)

    def test_encode_alone_reaches_the_encoder_only(self, name):
        backbone = small(name)
        backbone.encode(odd_volume(backbone)).sum().backward()
        trained = [value.grad is not None for value in backbone.parameters()]
        assert any(trained)
        assert not all(trained)

    def test_activation_checkpointing_changes_nothing_but_memory(self, name, backbone, features):
        stored: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        other = small(name, activation_checkpointing=True)
        other.load_state_dict(backbone.state_dict())
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            checkpointed = other(odd_volume(other))
            with_checkpointing = sum(stored)
            stored.clear()
            backbone(odd_volume(backbone))
        assert with_checkpointing < 0.6 * sum(stored)
        for got, expected in zip(checkpointed, features, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        scalar_of(checkpointed).backward()
        for key, parameter in other.named_parameters():
            expected = backbone.get_parameter(key).grad
            tolerance = 1e-4 * float(expected.abs().max()) + 1e-4
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=tolerance)

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(
        "network",  # not `name`, of which the fixtures would be those of another test
        [pytest.param(n, marks=pytest.mark.slow if n == "swin_unetr" else ()) for n in BACKBONES],
    )
    def test_compiles_as_one_graph_and_changes_nothing(self, network, checkpointing, monkeypatch):
        backbone = small(network)
        features = backbone(odd_volume(backbone))
        scalar_of(features).backward()
        graphs: list[torch.fx.GraphModule] = []

        def eager(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(
            backbones,
            "_compiled",
            lambda function: torch.compile(function, backend=eager, fullgraph=True, dynamic=False),
        )
        torch.compiler.reset()
        other = small(network, activation_checkpointing=checkpointing)
        other.compiled = True
        assert list(other.state_dict()) == list(backbone.state_dict())
        other.load_state_dict(backbone.state_dict())
        results = other(odd_volume(other))
        assert len(graphs) == 1
        for got, expected in zip(results, features, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        scalar_of(results).backward()
        for key, parameter in other.named_parameters():
            expected = backbone.get_parameter(key).grad
            tolerance = 1e-4 * float(expected.abs().max()) + 1e-4
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=tolerance)
        copied = deepcopy(other)  # such as a teacher
        copied.get_parameter(next(iter(dict(copied.named_parameters())))).data.zero_()
        with torch.no_grad():
            encoded = other.encode(odd_volume(other))
            assert not torch.equal(copied.encode(odd_volume(other)), encoded)
        assert len(graphs) == 2
        torch.testing.assert_close(encoded, features.global_features, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "network",
        [pytest.param(n, marks=pytest.mark.slow if n == "swin_unetr" else ()) for n in BACKBONES],
    )
    def test_light_checkpointing_recomputes_no_product(self, network):
        weights = small(network).state_dict()
        operations, gradients, stored = {}, {}, {}
        for checkpointing in (False, "light", True):
            kept: list[int] = []

            def count(tensor: Tensor, kept: list[int] = kept) -> Tensor:
                kept.append(tensor.numel())
                return tensor

            other = small(network, activation_checkpointing=checkpointing)
            other.load_state_dict(weights)
            with FlopCounterMode(display=False) as counter:
                with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                    features = other(odd_volume(other))
                scalar_of(features).backward()
            operations[checkpointing] = counter.get_total_flops()
            stored[checkpointing] = sum(kept)
            gradients[checkpointing] = [parameter.grad for parameter in other.parameters()]
        assert operations["light"] == operations[False] < operations[True]
        assert stored["light"] < 0.6 * stored[False]  # the products are kept elsewhere
        for light, full in zip(gradients["light"], gradients[False], strict=True):
            torch.testing.assert_close(light, full, rtol=1e-4, atol=1e-5 * float(full.abs().max()))

    def test_is_rebuilt_from_name_and_options(self, name, backbone, features):
        assert backbone.name == name
        assert backbone.options == SMALL.get(name, {})
        torch.manual_seed(5)
        rebuilt = build_backbone(backbone.name, backbone.in_channels, **backbone.options)
        rebuilt.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            for got, expected in zip(rebuilt(odd_volume(backbone)), features, strict=True):
                assert torch.equal(got, expected)

    @pytest.mark.parametrize("shape", [(1, 1, 8, 8, 8), (IN_CHANNELS, 8, 8, 8)])
    def test_wrong_volume_is_named(self, name, backbone, shape):
        for compute in (backbone, backbone.encode, backbone.pyramid):
            with pytest.raises(InputError, match=name) as error:
                compute(torch.zeros(shape))
            assert str(shape) in str(error.value)


class Bare(Backbone):
    """No network: what is padded comes out as the global features, and cropped as the local."""

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        return volume, []

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        return [global_features]


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    divisor=st.sampled_from([1, 2, 4, 8, 16, 32]),
)
def test_any_size_is_padded_evenly_and_cropped_back(shape: tuple[int, ...], divisor: int) -> None:
    backbone = Bare()
    backbone.divisor = divisor
    volume = 1 + torch.rand(1, 1, *shape)
    padded, local = backbone(volume)
    assert torch.equal(local, volume)
    assert torch.equal(backbone.encode(volume), padded)
    for axis, size in enumerate(shape):
        whole = math.ceil(size / divisor) * divisor
        assert padded.shape[axis + 2] == whole
        before = (whole - size) // 2  # the odd voxel is at the end
        occupied = padded[0, 0].movedim(axis, 0).flatten(1).amax(dim=1) > 0
        assert occupied.nonzero().flatten().tolist() == list(range(before, before + size))


class TestDefaultWidths:
    @pytest.mark.parametrize("name", list(DEFAULT_CHANNELS))
    def test_channels(self, name):
        if name == "swin_unetr":
            # its constructor reads numbers back, which a network without storage has not
            backbone = build_backbone(name)
        else:
            with torch.device("meta"):
                backbone = build_backbone(name)
        assert (backbone.global_channels, backbone.local_channels) == DEFAULT_CHANNELS[name]
        assert backbone.in_channels == 1


class TestUNet:
    def test_has_the_papers_number_of_parameters(self):
        with torch.device("meta"):
            backbone = build_backbone("unet")
        assert sum(parameter.numel() for parameter in backbone.parameters()) == 23_538_144

    @pytest.mark.parametrize("suffix", ["", "_odd"])
    def test_equals_the_released_network(self, reference_root: Path, suffix: str):
        released = torch.load(reference_root / "official_unet_tiny.pt", weights_only=True)
        backbone = build_backbone("unet", channels=released["channels"][:5])
        own = backbone.state_dict()
        # both list encoder and decoder stages in the order they run
        values = list(released["state_dict"].values())
        backbone.load_state_dict(dict(zip(own, values, strict=True)))
        with torch.no_grad():
            features = backbone(released[f"x{suffix}"])
        for got, name in zip(features, ("f_global", "f_local"), strict=True):
            torch.testing.assert_close(got, released[name + suffix], rtol=0, atol=1e-5)

    def test_is_traced_and_runs_on_the_meta_device(self):
        backbone = build_backbone("unet", channels=[8, 16])
        volume = torch.rand(1, 1, 8, 8, 8)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(backbone, volume), buffer)
        buffer.seek(0)
        traced = torch.jit.load(buffer)(volume)
        torch.testing.assert_close(tuple(traced), tuple(backbone(volume)), rtol=1e-5, atol=1e-5)
        assert backbone.to("meta")(volume.to("meta")).local_features.shape == (1, 8, 8, 8, 8)

    def test_frozen_convolutions_leave_the_norms_a_gradient(self):
        backbone = build_backbone("unet", channels=[8, 16])
        backbone.requires_grad_(False)
        norms = [p.requires_grad_() for n, p in backbone.named_parameters() if "norm" in n]
        scalar_of(backbone(torch.rand(1, 1, 8, 8, 8))).backward()
        assert all(bool((norm.grad != 0).any()) for norm in norms)

    def test_fifteen_voxels_get_their_zero_at_the_end(self):
        backbone = build_backbone("unet", channels=[8, 16, 16, 16, 32])
        volume = torch.rand(1, 1, 15, 15, 15)
        inside = torch.zeros(1, 1, 16, 16, 16)
        inside[..., :15, :15, :15] = volume
        with torch.no_grad():
            got, expected = backbone(volume), backbone(inside)
        assert torch.equal(got.local_features, expected.local_features[..., :15, :15, :15])

    def test_weights_start_kaiming_normal(self):
        backbone = build_backbone("unet", channels=[64, 64])
        weight = backbone.get_parameter("encoder.1.0.conv.weight")
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 27)), rel=0.02)
        assert abs(weight.mean().item()) < 1e-3

    def test_leaky_slope_is_the_papers(self):
        stage = UNet(channels=[8, 8]).encoder[0][0]
        with torch.no_grad():
            stage.conv.weight.zero_()
            stage.conv.bias.zero_()
            stage.norm.bias.copy_(torch.tensor([-1.0, 1] * 4))
        output = stage(torch.zeros(1, 1, 2, 2, 2)).flatten(1).unique().tolist()
        assert output == pytest.approx([-0.2, 1.0])

    def test_half_precision_is_close(self):
        backbone = small("unet", in_channels=1)
        volume = torch.rand(1, 1, 8, 8, 8)
        with torch.no_grad():
            expected = backbone(volume)
            with torch.autocast("cpu", torch.bfloat16):
                got = backbone(volume)
        for half, full in zip(got, expected, strict=True):
            assert half.dtype == torch.bfloat16
            assert (half.float() - full).norm() < 0.03 * full.norm()

    def test_channels_last_on_a_cpu_changes_the_layout_only(self):
        backbone, volume = small("unet", in_channels=1), torch.rand(2, 1, 20, 24, 28)
        with torch.no_grad():
            features = backbone(volume)
            exact = backbone.double()(volume.double())
        for got, expected in zip(features, exact, strict=True):
            assert got.is_contiguous(memory_format=torch.channels_last_3d)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)

    def test_one_stage_is_refused(self):
        with pytest.raises(ValueError, match=r"\[8\]"):
            build_backbone("unet", channels=[8])


def test_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match="segresnet"):
        build_backbone("resnet")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"channels": [28, 56]}),
        ("unet", {"channels": ["a", "b"]}),
        ("basic_unet", {"features": [8, 8, 8]}),
        ("segresnet", {"init_filters": 12}),
        ("swin_unetr", {"feature_size": 13}),
        ("dynunet", {"filter": [8, 16]}),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(name: str, options: dict[str, Any]):
    with pytest.raises(InputError) as raised:
        build_backbone(name, **options)
    assert "\n" not in str(raised.value)
