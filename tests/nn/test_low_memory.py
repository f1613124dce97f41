"""The low-memory U-Net equals the plain one; the slow test prints what it saves and costs."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.nn.backbones import Backbone, UNet, build_backbone
from gvsl_lightning.nn.blocks import ConvolutionBlock
from gvsl_lightning.nn.low_memory import LowMemoryBlock

CHANNELS = [8, 16, 32]


def plain_and_low_memory() -> list[Backbone]:
    """Two networks in float64 with the same weights."""
    plain = build_backbone("unet", channels=CHANNELS).double()
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    low_memory = build_backbone("unet", channels=CHANNELS, low_memory=True).double()
    low_memory.load_state_dict(plain.state_dict())
    return [plain, low_memory]


@pytest.mark.parametrize("trained", ["", "encoder", "decoder", "norm"])
def test_outputs_and_gradients_equal_the_plain_ones(trained: str) -> None:
    volume = torch.rand(2, 1, 8, 12, 16, dtype=torch.float64)
    results = []
    for backbone in plain_and_low_memory():
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(trained in name)
        features = backbone(volume)
        weighted = [(x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in features]
        parameters = [each for each in backbone.parameters() if each.requires_grad]
        results.append((*features, *torch.autograd.grad(sum(weighted), parameters)))
    for plain, low_memory in zip(*results, strict=True):
        torch.testing.assert_close(low_memory, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_determinism")
def test_nothing_changes_deterministically() -> None:
    volume = torch.rand(1, 1, 8, 8, 8, dtype=torch.float64)
    _, backbone = plain_and_low_memory()
    gradients = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        loss = backbone(volume).local_features.square().mean()
        gradients.append(torch.autograd.grad(loss, backbone.encoder.parameters()))
    torch.testing.assert_close(*gradients)


def test_keeps_one_map_of_each_block() -> None:
    backbone = UNet(channels=CHANNELS, low_memory=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    volume = torch.rand(1, 1, 32, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = backbone(volume)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    # volume, blocks of three sizes, the pooled maps and where their voxels came from (64 bit)
    half, quarter = 8, 64
    maps = 1 + 4 * 8 + (4 * 16 + 3 * 8) / half + (2 * 32 + 3 * 16) / quarter
    assert sum(kept.values()) < 4 * (maps * volume.numel() + parameters) * 1.02
    del features  # the kept tensors live until here, so that every address counts once


class TestLowMemoryBlock:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
    def test_gradients_are_those_of_autograd(self, layout, dtype):
        torch.manual_seed(0)
        block = block_of_all_weights(4, 16).to(dtype)
        x = torch.randn(2, 16, 5, 6, 7, dtype=dtype).contiguous(memory_format=layout)
        x.requires_grad_()
        wanted = torch.randn(2, 16, 5, 6, 7, dtype=dtype)
        inputs = [x, *block.norm.parameters()]
        got = torch.autograd.grad((block.activate(x) * wanted).sum(), inputs)
        expected = torch.autograd.grad((by_autograd(block, x) * wanted).sum(), inputs)
        for one, other in zip(got, expected, strict=True):
            tolerance = 1e-4 if dtype is torch.float32 else 1e-9
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("low", [0.5, 0.05])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_hardly_worse_than_autograd_in_lower_precision(self, dtype, low):
        torch.manual_seed(0)
        block = block_of_all_weights(16, 16)
        with torch.no_grad():
            block.norm.weight.uniform_(low, 1.5)
            block.norm.weight[::2] *= -1
        x, wanted = torch.randn(2, 16, 12, 12, 12), torch.rand(2, 16, 12, 12, 12)
        exact = deepcopy(block).double()
        y = by_autograd(exact, exact.conv(x.double()))
        expected = torch.autograd.grad((y * wanted).sum(), list(exact.parameters()))
        errors: list[list[float]] = []
        for activate in (LowMemoryBlock.activate, by_autograd):
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                y = activate(block, block.conv(x))
            got = torch.autograd.grad((y * wanted).sum(), list(block.parameters()))
            errors.append(
                [
                    float((one - right).norm() / right.norm())
                    for one, right in zip(got, expected, strict=True)
                ]
            )
        for ours, theirs in zip(*errors, strict=True):
            assert ours < 1.1 * theirs + (1e-5 if dtype is torch.float32 else 0.02)

    @pytest.mark.parametrize("weight", [0, 1e-6, -1e-4, 1e-2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_weight_lost_beside_its_bias_spoils_no_gradient(self, dtype, weight):
        torch.manual_seed(0)
        block = block_of_all_weights(16, 16)
        with torch.no_grad():
            block.norm.weight[0], block.norm.bias[0] = weight, 0.3
        x, wanted = torch.randn(2, 16, 12, 12, 12), torch.rand(2, 16, 12, 12, 12)
        gradients = []
        for activate in (LowMemoryBlock.activate, by_autograd):
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                y = activate(block, block.conv(x))
            gradients.append(torch.autograd.grad((y * wanted).sum(), list(block.parameters())))
        ours, theirs = gradients
        allowed = 1e-3 if dtype is torch.float32 else 0.1
        for one, other in zip(ours, theirs, strict=True):
            rows = [each.flatten(1) if each.ndim > 1 else each[:, None] for each in (one, other)]
            difference = (rows[0] - rows[1]).norm(dim=1) / rows[1].norm(dim=1).max()
            assert float(difference[1:].max()) < allowed
            assert float(rows[0][0].norm()) < 1.5 * float(rows[1][0].norm()) + 1e-6


def block_of_all_weights(in_channels: int, out_channels: int) -> LowMemoryBlock:
    block = LowMemoryBlock(in_channels, out_channels)
    with torch.no_grad():
        for parameter in (block.norm.weight, block.norm.bias, block.conv.bias):
            parameter.normal_()
    return block


def by_autograd(block: ConvolutionBlock, x: Tensor) -> Tensor:
    return F.leaky_relu(block.norm(x), 0.2)


STEPS = """
import resource, sys, time
import torch
from gvsl_lightning.nn.backbones import build_backbone

torch.set_num_threads(1)
backbone = build_backbone("unet", **eval(sys.argv[1]))
optimizer, volume = torch.optim.Adam(backbone.parameters()), torch.rand(1, 1, 80, 80, 80)
for _ in range(2):
    start = time.process_time()
    optimizer.zero_grad()
    backbone(volume).local_features.square().mean().backward()
    optimizer.step()
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_table_of_memory_and_time() -> None:
    """Print the table of docs/scaling.md: steps of the full width, each kind in a new process."""
    kinds = {
        "plain": "{}",
        "`low_memory: true`": "{'low_memory': True}",
        "`activation_checkpointing: light`": "{'activation_checkpointing': 'light'}",
        "`activation_checkpointing: true`": "{'activation_checkpointing': True}",
    }
    figures = {}
    for kind, options in kinds.items():
        command = [sys.executable, "-c", STEPS, options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures[kind] = [float(figure) for figure in output.split()]
    plain_time, plain_memory = figures["plain"]
    for kind, (seconds, memory) in figures.items():
        print(f"| {kind} | {memory:.1f} GiB | {seconds / plain_time:.2f} |")
    assert figures["`low_memory: true`"][1] < plain_memory
