"""How much vectors differ from one another: near zero where features or a head have collapsed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import CatMetric


class Spread(CatMetric):
    """Applies a function to the vectors of all batches and processes together.

    Args:
        function: takes vectors (N, ...), returns a scalar.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(nan_strategy="disable")
        self.function = function

    def compute(self) -> Tensor:
        vectors: Any = super().compute()
        return self.function(vectors)


def feature_std(embeddings: Tensor) -> Tensor:
    """How far vectors (N, C) are spread over the sphere, a scalar.

    The standard deviation of the entries of the normalised vectors, averaged over the C entries,
    times the root of C: 0 if all vectors are equal (collapse), about 1 if they point anywhere.
    Source: Chen and He, SimSiam, CVPR 2021, section 4.1, https://arxiv.org/abs/2011.10566.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    spread: Tensor = directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5
    return spread


def effective_rank(embeddings: Tensor) -> Tensor:
    """In how many directions vectors (N, C) differ, a scalar from 1 to min(N - 1, C).

    The exponential of the entropy of the singular values of the centred vectors, divided by their
    sum (Roy and Vetterli, EUSIPCO 2007). Singular values at the level of rounding do not count, so
    the rank of equal vectors is 1. NaN if a vector is not finite.
    """
    # in double precision, which not every device has
    vectors = embeddings.detach().cpu().double()
    if not vectors.isfinite().all():
        return embeddings.new_tensor(torch.nan)
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    values = values.where(values > _ROUNDING * torch.linalg.matrix_norm(vectors), 0)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum().exp().to(embeddings)
    return rank


def matrix_spread(affines: Tensor) -> Tensor:
    """Standard deviation of affine maps (N, 3, 4), averaged over the matrix's entries."""
    return affines[..., :3].std(dim=0, correction=0).mean()


def translation_spread(affines: Tensor) -> Tensor:
    """Standard deviation of affine maps (N, 3, 4), averaged over the translation's entries."""
    return affines[..., 3].std(dim=0, correction=0).mean()


_ROUNDING = 1e-5
"""Relative rounding error of float32 vectors, with a margin."""
