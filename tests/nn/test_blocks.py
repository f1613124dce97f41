from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.nn.blocks import Convolution, ConvolutionBlock


@pytest.mark.parametrize(("in_channels", "out_channels"), [(6, 2), (2, 6)])
def test_convolution_is_that_of_torch(in_channels: int, out_channels: int):
    convolution = Convolution(in_channels, out_channels).double()
    x = torch.rand(2, in_channels, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    variables = (x, *convolution.parameters())
    results = []
    for function in (convolution, lambda x: nn.Conv3d.forward(convolution, x)):
        value = function(x)
        weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
        results.append((value, *torch.autograd.grad((value * weights).sum(), variables)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


class TestConvolutionBlock:
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
        for activate in (ConvolutionBlock.activate, by_autograd):
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
        for activate in (ConvolutionBlock.activate, by_autograd):
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

    def test_another_norm_in_its_place_is_used(self):
        block = ConvolutionBlock(4, 8)
        block.norm = nn.Identity()  # type: ignore[assignment]
        x = torch.randn(1, 4, 4, 4, 4)
        assert torch.equal(block(x), F.leaky_relu(block.conv(x), 0.2))


def block_of_all_weights(in_channels: int, out_channels: int) -> ConvolutionBlock:
    block = ConvolutionBlock(in_channels, out_channels)
    with torch.no_grad():
        for parameter in (block.norm.weight, block.norm.bias, block.conv.bias):
            parameter.normal_()
    return block


def by_autograd(block: ConvolutionBlock, x: Tensor) -> Tensor:
    return F.leaky_relu(block.norm(x), 0.2)
