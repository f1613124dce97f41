"""Rotation prediction, Gidaris et al., ICLR 2018, https://arxiv.org/abs/1803.07728."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.tasks.pretraining import GlobalTask, Views

ROTATIONS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = tuple(
    (order, flipped)
    for order in itertools.permutations((0, 1, 2))
    for count in range(4)
    for flipped in itertools.combinations((0, 1, 2), count)
    # a permutation and flips make a rotation where their signs agree
    if (sum(order[i] > order[j] for i in range(3) for j in range(i + 1, 3)) + count) % 2 == 0
)
"""The 24 rotations of the cube: order of the axes, then the axes that are flipped. First: none."""


class Rotation(GlobalTask):
    """Recognise how a volume was turned.

    In 3D here: the classes are all 24 rotations that map a cube onto itself (the paper's are the
    four of a square), and the largest central cube of a volume is turned. A linear layer on
    the standardised global features classifies; the encoder alone is trained.
    """

    def configure_heads(self) -> None:
        self.classifier = nn.Linear(self.backbone.global_channels, len(ROTATIONS))

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``turned``, each by a random rotation, and its ``rotation`` in :data:`ROTATIONS`."""
        # drawn on the host, where it decides what is done
        host = torch.Generator().manual_seed(generator.initial_seed())
        rotation = torch.randint(len(ROTATIONS), (len(volumes),), generator=host)
        cubes = central_cube(volumes)
        turned = [rotate(cube, n) for cube, n in zip(cubes, rotation.tolist(), strict=True)]
        return {
            "turned": torch.stack(turned),
            "rotation": rotation.to(volumes.device, non_blocking=True),
        }

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Cross-entropy; log(24) = 3.18 where nothing is recognised."""
        logits: Tensor = self.classifier(self.embed_standardised(views["turned"]))
        return {"total": F.cross_entropy(logits.float(), views["rotation"])}


def rotate(volume: Tensor, index: int) -> Tensor:
    """Turn a cube (C, D, D, D) by one of :data:`ROTATIONS`."""
    order, flipped = ROTATIONS[index]
    turned = volume.permute(0, *(1 + axis for axis in order))
    return turned.flip([1 + axis for axis in flipped])


def central_cube(volumes: Tensor) -> Tensor:
    """The largest cube in the middle of volumes (N, C, D, H, W)."""
    edge = min(volumes.shape[2:])
    for axis in (2, 3, 4):
        volumes = volumes.narrow(axis, (volumes.shape[axis] - edge) // 2, edge)
    return volumes
