"""Any 3D network as a backbone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.backbones import OWN, Backbone


class WrappedBackbone(Backbone):
    """A network of another package, whose features are the outputs of named layers.

    The outputs are caught by forward hooks while the network runs as a whole; what it computes
    behind the layers is not used. Without activation checkpointing.

    Args:
        module: takes volumes (N, in_channels, D, H, W).
        layers: names of submodules, coarse to fine, as
            :meth:`torch.nn.Module.get_submodule` takes them. The first one gives the global
            features and the last one the local ones, which are upsampled where they are smaller
            than the volume.
        in_channels: channels of the volumes.
        divisor: volumes are padded to a multiple of it.

    Raises:
        InputError: if there is no such layer, a layer gives no map (N, C, d, h, w), or the network
            takes no volume of twice the divisor.
    """

    decoder_parts = ()

    def __init__(
        self, module: nn.Module, layers: Sequence[str], in_channels: int = 1, divisor: int = 32
    ) -> None:
        super().__init__(in_channels)
        self.name = f"{OWN}{type(module).__name__}"
        self.divisor = divisor
        self.layers = tuple(layers)
        known = dict(module.named_modules(remove_duplicate=False))
        for layer in self.layers:
            if layer not in known or not layer:
                names = ", ".join(name for name in known if name and "." not in name)
                raise InputError(
                    f"{type(module).__name__} has no layer {layer!r}; its parts are {names}."
                )
        self.net = module
        self.global_channels, self.local_channels = self._channels()

    def encode_padded(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        with _outputs(self.net, self.layers) as found:
            self.net(volume)
        levels = [found[layer] for layer in self.layers]
        size = volume.shape[2:]
        if levels[-1].shape[2:] != size:
            levels[-1] = F.interpolate(levels[-1], size=size, mode="trilinear", align_corners=False)
        return levels[0], levels[1:]

    def decode(self, global_features: Tensor, skips: list[Tensor]) -> list[Tensor]:
        return skips

    def _channels(self) -> tuple[int, int]:
        training = self.net.training
        self.net.eval()
        device = next((p.device for p in self.net.parameters()), torch.device("cpu"))
        volume = torch.zeros(1, self.in_channels, *[2 * self.divisor] * 3, device=device)
        name = type(self.net).__name__
        try:
            with torch.no_grad(), _outputs(self.net, self.layers) as found:
                self.net(volume)
        except Exception as error:
            raise InputError(
                f"{name} takes no volume of shape {tuple(volume.shape)} ({error}); correct "
                "in_channels or divisor."
            ) from error
        finally:
            self.net.train(training)
        for layer, output in found.items():
            if not isinstance(output, Tensor) or output.ndim != 5:
                raise InputError(
                    f"The layer {layer} of {name} gives no map (N, C, d, h, w); choose another one."
                )
        return found[self.layers[0]].shape[1], found[self.layers[-1]].shape[1]


def wrap_backbone(
    module: nn.Module,
    global_layer: str,
    local_layer: str,
    between: Sequence[str] = (),
    in_channels: int = 1,
    divisor: int = 32,
) -> WrappedBackbone:
    """Make a backbone of any 3D network, such as one of MONAI.

    Args:
        module: takes volumes (N, in_channels, D, H, W).
        global_layer: name of the submodule whose output are the global features.
        local_layer: name of the submodule whose output are the local features.
        between: names of submodules for the levels between, coarse to fine, which the correlation
            of features uses.
        in_channels: channels of the volumes.
        divisor: volumes are padded to a multiple of it; the network's total stride.

    Raises:
        InputError: see :class:`WrappedBackbone`.
    """
    return WrappedBackbone(module, [global_layer, *between, local_layer], in_channels, divisor)


@contextmanager
def _outputs(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Collect the outputs of layers while the module runs."""
    found: dict[str, Any] = {}

    def catch(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[layer] = output

        return hook

    handles = [module.get_submodule(x).register_forward_hook(catch(x)) for x in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
