import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.blocks import ConvolutionBlock


def test_block_is_convolution_norm_activation() -> None:
    block, x = ConvolutionBlock(4, 16), torch.randn(2, 4, 5, 6, 7)
    assert list(block.state_dict()) == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    for parameter in block.norm.parameters():
        nn.init.normal_(parameter)
    convolved = F.conv3d(x, block.conv.weight, block.conv.bias, padding=1)
    expected = F.group_norm(convolved, 2, block.norm.weight, block.norm.bias)
    torch.testing.assert_close(block(x), torch.where(expected < 0, 0.2 * expected, expected))


@pytest.mark.parametrize(("channels", "groups"), [(28, None), (16, 3), (0, None)])
def test_unequal_groups_are_refused(channels: int, groups: int | None) -> None:
    with pytest.raises(InputError, match=str(channels)):
        ConvolutionBlock(4, channels, groups)
