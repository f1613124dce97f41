"""VoCo, Wu et al., CVPR 2024, https://arxiv.org/abs/2402.17300."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.nn.heads import ProjectionHead
from gvsl_lightning.tasks.pretraining import GlobalTask, Views


class VoCo(GlobalTask):
    """Predict where in a volume a random crop lies, by its likeness to the crops of a grid.

    A crop's likeness to each base crop of the grid (cosine, negative ones count as 0) is to be the
    share of the crop that the base crop holds; base crops are to be unlike each other. It is a 3D
    method; adapted are the size of the crops, which follows from the volume's, LayerNorm in place
    of BatchNorm, and that base crops come from the network itself without gradient (the paper's
    formula) and not from a moving average of it (its code). The encoder alone is trained.

    Args:
        grid: numbers of base crops along D, H, W; volumes are RAS, so the default divides the axial
            plane as in the paper.
        crops: random crops of each volume.
        projection_channels: of the projection (three layers).
        weight_regularization: of the likeness among base crops.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if an option is out of range, or, at the first batch, a volume is smaller than
            the grid.
    """

    def __init__(
        self,
        grid: tuple[int, int, int] = (4, 4, 1),
        crops: int = 4,
        projection_channels: int = 256,
        weight_regularization: float = 1.0,
        **base: Any,
    ) -> None:
        if len(grid) != 3 or min(grid) < 1 or max(grid) < 2:
            raise InputError.about(
                "grid", f"is {tuple(grid)}; give three numbers of base crops, at least two in all."
            )
        check_range("crops", crops, 1)
        super().__init__(**base)

    def configure_heads(self) -> None:
        width = self.hparams["projection_channels"]
        self.projection_head = ProjectionHead(
            self.backbone.global_channels, width, width, layers=3, norm=True
        )

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``bases`` (N, K, C, d, h, w), ``crops`` (N, M, C, d, h, w), ``shares`` (N, M, K)."""
        grid = self.hparams["grid"]
        edges = [size // number for size, number in zip(volumes.shape[2:], grid, strict=True)]
        if min(edges) < 1:
            raise InputError(
                f"Volumes of {tuple(volumes.shape[2:])} voxels hold no grid of {tuple(grid)} "
                "crops; choose a smaller grid."
            )
        starts = [torch.arange(number) * edge for number, edge in zip(grid, edges, strict=True)]
        corners = torch.cartesian_prod(*starts)
        bases = [[_cut(volume, corner, edges) for corner in corners] for volume in volumes]
        # drawn on the host, where they index
        host = torch.Generator().manual_seed(generator.initial_seed())
        free = torch.tensor(
            [(number - 1) * edge + 1 for number, edge in zip(grid, edges, strict=True)]
        )
        size = (len(volumes), self.hparams["crops"], 3)
        places = (torch.rand(size, generator=host) * free).long()
        crops = [
            [_cut(volume, place, edges) for place in chosen]
            for volume, chosen in zip(volumes, places, strict=True)
        ]
        return {
            "bases": torch.stack([torch.stack(row) for row in bases]),
            "crops": torch.stack([torch.stack(row) for row in crops]),
            "shares": overlaps(places, corners, torch.tensor(edges)).to(
                volumes.device, non_blocking=True
            ),
        }

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """``prediction`` and ``regularization``, unweighted, and their weighted sum."""
        samples, number = views["bases"].shape[:2]
        cut = torch.cat([views["bases"], views["crops"]], dim=1)
        projected = self.projection_head(self.embed_standardised(cut.flatten(0, 1)))
        with torch.autocast(cut.device.type, enabled=False):
            vectors = F.normalize(projected.float(), dim=1).view(samples, cut.shape[1], -1)
            bases, crops = vectors[:, :number], vectors[:, number:]
            likeness = F.relu(crops @ bases.detach().transpose(1, 2))
            distances = (views["shares"] - likeness).abs()
            prediction = -torch.log((1 - distances).clamp_min(1e-6)).mean()
            among = (bases @ bases.transpose(1, 2)).abs()
            others = ~torch.eye(number, dtype=torch.bool, device=among.device)
            regularization = among[:, others].mean()
        weight = self.hparams["weight_regularization"]
        return {
            "total": prediction + weight * regularization,
            "prediction": prediction,
            "regularization": regularization,
        }


def overlaps(places: Tensor, corners: Tensor, edges: Tensor) -> Tensor:
    """Share of each crop that lies in each base crop.

    Args:
        places: (..., M, 3) first voxels of the crops.
        corners: (K, 3) first voxels of the base crops.
        edges: (3,) of all of them.

    Returns:
        (..., M, K) in [0, 1].
    """
    distance = (places.unsqueeze(-2) - corners).abs()
    return ((edges - distance).clamp_min(0) / edges).prod(dim=-1)


def _cut(volume: Tensor, place: Tensor, edges: list[int]) -> Tensor:
    for axis, (start, edge) in enumerate(zip(place.tolist(), edges, strict=True)):
        volume = volume.narrow(axis + 1, start, edge)
    return volume
