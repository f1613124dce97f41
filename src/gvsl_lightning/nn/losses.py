"""Losses: similarity of volumes, smoothness of displacements, contrast of feature vectors."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses.image_dissimilarity import GlobalMutualInformationLoss
from monai.losses.ssim_loss import SSIMLoss as MonaiSSIMLoss
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_choice, check_options, check_range


class SimilarityLoss(nn.Module, ABC):
    """Base of all similarities: lower is more alike.

    Every channel of every sample is one volume. Offset and scale of the intensities change nothing,
    so CT and MR need no particular range. All compute in float32, under autocast too (float64 stays
    float64). To add one, implement `compare` and set `SIMILARITIES["name"] = MySimilarity`.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean loss of all samples and channels of two batches of volumes (N, C, D, H, W).

        Raises:
            ValueError: If the shapes differ or are not (N, C, D, H, W).
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
                "must have the same shape"
            )
        _require_volumes("prediction and target", prediction)
        dtype = _working_dtype(prediction, target)
        with torch.autocast(prediction.device.type, enabled=False):
            return self.compare(
                prediction.to(dtype).flatten(0, 1).unsqueeze(1),
                target.to(dtype).flatten(0, 1).unsqueeze(1),
            )

    @abstractmethod
    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of volumes (N, 1, D, H, W) in float32 or float64, with autocast off."""


class LocalNCCLoss(SimilarityLoss):
    """One minus the mean squared local normalised cross-correlation (NCC).

    The squared correlation coefficient of prediction and target within a cubic window, averaged
    over all positions of the window: 0 when each window of one volume is a linear function of the
    other's (negative slopes included), 1 when they are unrelated. A window in which a volume is
    flat counts as unrelated: a volume with empty background does not reach 0 even with itself.

    Args:
        window: Edge of the window in voxels, odd. An axis shorter than it is used whole: with a
            volume smaller than the window on all axes, the value is the squared NCC of the whole
            volume.
        padding: `"interior"` averages over the windows that lie fully inside the volume.
            `"zero"` is the value of the released GVSL code: windows at every voxel, over a volume
            extended by zeros, which inflates the correlation at the border and makes the value
            depend on offset and scale of the intensities. Use it for comparisons only.
        eps: With `"interior"`, this fraction of the whole volume's variance is added to the
            variance of every window; windows below it count as flat. With `"zero"`, this constant
            is added to the product of the two windows' sums of squared deviations.

    Source: Avants et al. 2008, "Symmetric diffeomorphic image registration with
    cross-correlation"; squared and in a cubic window as in Balakrishnan et al. 2019 (VoxelMorph).
    """

    def __init__(self, window: int = 9, padding: str = "interior", eps: float = 1e-5) -> None:
        super().__init__()
        _check_window(window)
        check_choice("padding", padding, ("interior", "zero"))
        check_range("eps", eps, above=0)
        self.window = window
        self.padding = padding
        self.eps = eps

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.padding == "zero":
            # Subtracting the mean after padding changes no deviation within a window: the value
            # is the released code's, without its loss of digits.
            margin = (self.window // 2,) * 6
            prediction = _centre(F.pad(prediction, margin))
            target = _centre(F.pad(target, margin))
        else:
            prediction, target = _standardise(prediction), _standardise(target)
        window = [min(self.window, size) for size in prediction.shape[2:]]
        voxels = window[0] * window[1] * window[2]

        def co_deviation(a: Tensor, b: Tensor, a_sum: Tensor, b_sum: Tensor) -> Tensor:
            return box_sum(a * b, window) - a_sum * b_sum / voxels

        sums = box_sum(prediction, window), box_sum(target, window)
        cross = co_deviation(prediction, target, *sums)
        # Rounding can turn the zero of a flat window negative.
        prediction_power, target_power = (
            co_deviation(volume, volume, total, total).clamp_min(0)
            for volume, total in zip((prediction, target), sums, strict=True)
        )
        if self.padding == "zero":
            denominator = prediction_power * target_power + self.eps
        else:
            floor = self.eps * voxels
            denominator = (prediction_power + floor) * (target_power + floor)
        return 1 - (cross * cross / denominator).mean()


class MINDLoss(SimilarityLoss):
    """Mean squared difference of modality independent neighbourhood descriptors (MIND-SSC).

    The descriptor of a voxel holds 12 numbers in (0, 1]: how alike the patches around two of its
    six neighbours are, for the 12 pairs of neighbours on different axes (the self-similarity
    context). It describes structure, not intensity, and so compares volumes of different
    modalities or scanners. 0 for identical volumes, below 1 always.

    Patches of edge 2 radius + 1 are compared by their mean squared difference d; the descriptor is
    exp(-(d - min d) / v), v being the mean of the voxel's 12 distances, at least 1/1000 of its mean
    over the volume. Beyond the border the volume continues with its border voxels.

    Args:
        radius: Radius of the patches in voxels, 0 or more.
        dilation: Distance of the six neighbours in voxels, 1 or more.

    Source: Heinrich et al. 2013, "Towards realtime multimodal fusion for image-guided interventions
    using self-similarities"; the normalisation by the minimum is that of Heinrich et al. 2012,
    "MIND: modality independent neighbourhood descriptor".
    """

    def __init__(self, radius: int = 2, dilation: int = 2) -> None:
        super().__init__()
        check_range("radius", radius, low=0)
        check_range("dilation", dilation, low=1)
        self.radius = radius
        self.dilation = dilation

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.descriptor(prediction), self.descriptor(target))

    def descriptor(self, volumes: Tensor) -> Tensor:
        """Self-similarity context (N, 12, D, H, W), in (0, 1], of volumes (N, 1, D, H, W).

        The pairs are in the order of `itertools.combinations` over the neighbours -D, +D, -H, +H,
        -W, +W, without the three opposite pairs.
        """
        reach = self.dilation + self.radius
        padded = F.pad(_standardise(volumes), (reach,) * 6, mode="replicate")
        patch = (2 * self.radius + 1,) * 3

        def neighbour(axis: int, sign: int) -> Tensor:
            shifted = padded
            for other, size in enumerate(volumes.shape[2:]):
                start = self.dilation * (1 + sign) if other == axis else self.dilation
                shifted = shifted.narrow(other + 2, start, size + 2 * self.radius)
            return shifted

        neighbours = [(axis, neighbour(axis, sign)) for axis in range(3) for sign in (-1, 1)]
        distances = torch.cat(
            [
                box_sum((first - second).square(), patch) / patch[0] ** 3
                for (first_axis, first), (second_axis, second) in itertools.combinations(
                    neighbours, 2
                )
                if first_axis != second_axis
            ],
            dim=1,
        )
        variance = distances.mean(1, keepdim=True)
        floor = 1e-3 * variance.mean(_SPATIAL, keepdim=True) + _CONSTANT_VARIANCE
        closest = distances.amin(1, keepdim=True)
        return torch.exp((closest - distances) / torch.maximum(variance, floor))


class MutualInformationLoss(SimilarityLoss):
    """Negative mutual information (in nat) of the intensities, from Parzen-window histograms.

    MONAI's `GlobalMutualInformationLoss` on volumes rescaled to [0, 1] by their own minimum and
    maximum: 0 for independent volumes, minus the entropy, at least -log(bins), for identical ones.
    It holds about 8 x bins numbers per voxel until the backward pass.

    Args:
        bins: Number of histogram bins, 2 or more.
        sigma_ratio: Width of the Parzen window as a fraction of a bin's.

    Source: Guo 2019, "Multi-modal image registration with unsupervised deep learning",
    https://dspace.mit.edu/handle/1721.1/123142, section 3.1, equations 3.1 to 3.5.
    """

    def __init__(self, bins: int = 23, sigma_ratio: float = 0.5) -> None:
        super().__init__()
        check_range("bins", bins, low=2)
        check_range("sigma_ratio", sigma_ratio, above=0)
        self.loss = GlobalMutualInformationLoss(num_bins=bins, sigma_ratio=sigma_ratio)

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.loss(_rescale(prediction), _rescale(target))
        return loss


class SSIMLoss(SimilarityLoss):
    """One minus the mean structural similarity (SSIM) in a Gaussian window.

    MONAI's `SSIMLoss` on volumes rescaled to [0, 1] by their own minimum and maximum, over the
    windows that lie fully inside the volume. 0 for identical volumes, 2 at most.

    MONAI convolves densely: the cost grows with the cube of the window, and on a GPU where PyTorch
    may use TF32 in convolutions (its default) the gradient is exact to about 1 % only.

    Args:
        window: Edge of the window in voxels, odd. An axis shorter than it is used whole.
        sigma: Standard deviation of the Gaussian in voxels.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural
    similarity", equation 13, with its constants k1 = 0.01 and k2 = 0.03.
    """

    def __init__(self, window: int = 11, sigma: float = 1.5) -> None:
        super().__init__()
        _check_window(window)
        check_range("sigma", sigma, above=0)
        self.window = window
        self.sigma = sigma

    def compare(self, prediction: Tensor, target: Tensor) -> Tensor:
        window = [min(self.window, size) for size in prediction.shape[2:]]
        ssim = MonaiSSIMLoss(spatial_dims=3, win_size=window, kernel_sigma=self.sigma)
        loss: Tensor = ssim(_rescale(prediction), _rescale(target))
        return loss


class SmoothnessLoss(nn.Module):
    """Mean squared forward difference of a displacement along the three axes, in voxel units.

    The squared differences u(p + 1 voxel) - u(p) of all three components are averaged over the
    volume for each axis, then over the axes: one ninth of the mean squared Frobenius norm of the
    displacement's Jacobian. 0 for a translation; 4 a^2 for a checkerboard of +-a, the most that
    its amplitude allows, where central differences see nothing. An axis of one voxel counts as
    smooth.

    Source: Balakrishnan et al. 2019, "VoxelMorph: a learning framework for deformable medical image
    registration", the spatial gradients of its smoothness term.
    """

    def forward(self, displacement: Tensor) -> Tensor:
        """Roughness, 0 or more, of a displacement (N, 3, D, H, W) in voxels.

        Raises:
            ValueError: If the shape is not (N, 3, D, H, W).
        """
        _require_volumes("displacement", displacement)
        if displacement.shape[1] != 3:
            raise ValueError(
                f"displacement {tuple(displacement.shape)} must have 3 components: (N, 3, D, H, W)"
            )
        displacement = displacement.to(_working_dtype(displacement))
        differences = [displacement.diff(dim=axis) for axis in _SPATIAL]
        means = [step.square().sum() / max(1, step.numel()) for step in differences]
        return torch.stack(means).mean()


class PointContrastLoss(nn.Module):
    """InfoNCE of feature vectors at points that a registration matches, both ways.

    Each point's vector should be more alike, by cosine similarity, to its match than to the vectors
    of all other points of that pair: the cross-entropy of the softmax over the points, 0 at best
    and log(points) where all vectors are equal. It computes in float32 whatever the input.

    Args:
        temperature: Divisor of the similarities, above 0: the lower, the more the closest other
            points count.

    Source: equation 4 of van den Oord et al. 2018, "Representation learning with contrastive
    predictive coding", https://arxiv.org/abs/1807.03748. That a deformable registration finds the
    matches is the idea of He et al. 2025, "Homeomorphism prior for false positive and negative
    problem in medical image dense contrastive representation learning" (GEMINI),
    https://arxiv.org/abs/2502.05282, whose soft weighting of negatives is left out.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_range("temperature", temperature, above=0)
        self.temperature = temperature

    def forward(self, fixed: Tensor, moving: Tensor, valid: Tensor) -> Tensor:
        """Mean loss of the valid points; 0 if there are none.

        Args:
            fixed: Vectors (N, points, C) of the fixed volumes.
            moving: Vectors of the same shape at the matching points of the moving volumes.
            valid: (N, points) boolean; the other points are left out.
        """
        with torch.autocast(fixed.device.type, enabled=False):
            ours, theirs = (F.normalize(vectors.float(), dim=2) for vectors in (fixed, moving))
            logits = ours @ theirs.transpose(1, 2) / self.temperature
            # the smallest number, not minus infinity: a row of those has no gradient but NaN
            lowest = torch.finfo(logits.dtype).min
            losses = [
                -rows.masked_fill(~valid.unsqueeze(1), lowest)
                .log_softmax(dim=2)
                .diagonal(dim1=1, dim2=2)
                .where(valid, 0)
                for rows in (logits, logits.transpose(1, 2))
            ]
            return torch.stack(losses).mean(dim=0).sum() / valid.sum().clamp_min(1)


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy between two views of each sample.

    Each view should be more alike, by cosine similarity, to the other view of its sample than to
    all views of the other samples. Near 0 at best, at a low temperature; computes in float32
    whatever the input.

    Args:
        temperature: Divisor of the similarities, above 0.

    Source: equation 1 of Chen et al., SimCLR, ICML 2020, https://arxiv.org/abs/2002.05709.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_range("temperature", temperature, above=0)
        self.temperature = temperature

    def forward(self, first: Tensor, second: Tensor, samples: Tensor | None = None) -> Tensor:
        """Mean loss of the 2 N views; 0 for a single sample, which has no negatives.

        Args:
            first: Vectors (N, C) of one view of each sample, of all processes together.
            second: Vectors of the other view, the same shape.
            samples: Integers (N,). Views of samples with equal numbers are not used as negatives.
                None: all samples differ.
        """
        if samples is None:
            samples = torch.arange(len(first), device=first.device)
        with torch.autocast(first.device.type, enabled=False):
            vectors = F.normalize(torch.cat([first, second]).float(), dim=1)
            logits = vectors @ vectors.T / self.temperature
            partner = torch.arange(len(vectors), device=logits.device).roll(len(first))
            numbers = samples.repeat(2)
            left_out = (numbers[:, None] == numbers).scatter(1, partner[:, None], False)
            return F.cross_entropy(logits.masked_fill(left_out, -torch.inf), partner)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of one minus the cosine similarity of vectors (N, C); the target gets no gradient.

    In float32, in [0, 2]. One more than the loss of SimSiam (Chen and He, CVPR 2021, equation 1),
    and half of BYOL's (Grill et al., NeurIPS 2020, equation 2).
    """
    with torch.autocast(prediction.device.type, enabled=False):
        return 1 - F.cosine_similarity(prediction.float(), target.detach().float(), dim=1).mean()


def voxel_cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of logits (N, classes, D, H, W) and labels (N, 1, D, H, W).

    Voxels with the label `ignore_index` do not count.
    """
    label = label[:, 0].long()
    if torch.are_deterministic_algorithms_enabled():  # on a GPU the loss of maps is not
        logits, label = logits.movedim(1, -1).flatten(0, -2), label.flatten()
    return F.cross_entropy(logits, label, ignore_index=ignore_index)


SIMILARITIES: dict[str, type[SimilarityLoss]] = {
    "ncc": LocalNCCLoss,
    "mind": MINDLoss,
    "mi": MutualInformationLoss,
    "ssim": SSIMLoss,
}
"""Name -> class."""


def build_similarity(name: str, **options: Any) -> SimilarityLoss:
    """Build a similarity by its name in `SIMILARITIES`, with options of its class.

    Raises:
        InputError: If there is no such similarity or option, or an option's value is out of range.
    """
    check_choice("similarity", name, SIMILARITIES)
    check_options("similarity_options", name, options, SIMILARITIES[name])
    return SIMILARITIES[name](**options)


def box_sum(volumes: Tensor, window: Sequence[int]) -> Tensor:
    """Sum over every box of `window` voxels that lies fully inside, twice differentiable.

    (N, C, D, H, W) to (N, C, D - window[0] + 1, H - window[1] + 1, W - window[2] + 1). The sums are
    made of shifted copies in doubling steps (1, 2, 4, 8, ...): a convolution may use TF32, and a
    cumulative sum loses precision on a long axis.
    """
    summed: Tensor = _BoxSum.apply(volumes, tuple(window))  # type: ignore[no-untyped-call]
    return summed


def _check_window(window: int) -> None:
    check_range("window", window, low=3)
    if window % 2 == 0:
        raise InputError.about("window", f"is {window}; give an odd number of voxels.")


_SPATIAL = (2, 3, 4)
# Smallest variance that a volume of variance 1 is divided by: a constant volume gives 0, not NaN.
_CONSTANT_VARIANCE = 1e-8
# A volume whose values spread by less than this many rounding errors is constant.
_CONSTANT_ROUNDINGS = 8


class _BoxSum(torch.autograd.Function):
    """Own backward pass: that of autograd makes a whole volume of zeros for every shifted copy."""

    @staticmethod
    def forward(ctx: Any, volumes: Tensor, window: tuple[int, int, int]) -> Tensor:
        ctx.window = window
        for axis, length in zip(_SPATIAL, window, strict=True):
            volumes = _sliding_sum(volumes, length, axis)
        return volumes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A voxel lies in all boxes that begin at it or up to a window's length before it.
        margin = [length - 1 for length in reversed(ctx.window) for _ in range(2)]
        return box_sum(F.pad(gradients[0], margin), ctx.window), None


def _sliding_sum(volumes: Tensor, length: int, axis: int) -> Tensor:
    """Sums of `length` consecutive voxels, from sums of 1, 2, 4, ... voxels (binary digits)."""
    positions = volumes.shape[axis] - length + 1
    partial, span, covered = volumes, 1, 0
    total: Tensor | None = None
    while True:
        if length & span:
            piece = partial.narrow(axis, covered, positions)
            total = piece if total is None else total + piece
            covered += span
            if covered == length:
                return total
        reach = partial.shape[axis] - span
        partial = partial.narrow(axis, 0, reach) + partial.narrow(axis, span, reach)
        span *= 2


def _centre(volumes: Tensor) -> Tensor:
    return volumes - volumes.mean(_SPATIAL, keepdim=True)


def _standardise(volumes: Tensor) -> Tensor:
    """Mean 0 and variance 1 per volume; a constant volume becomes 0 and passes no gradient."""
    mean = volumes.mean(_SPATIAL, keepdim=True)
    centred = volumes - mean
    variance = centred.square().mean(_SPATIAL, keepdim=True)
    constant = variance <= (_CONSTANT_ROUNDINGS * torch.finfo(volumes.dtype).eps * mean).square()
    return centred * variance.masked_fill(constant, 1).rsqrt().masked_fill(constant, 0)


def _rescale(volumes: Tensor) -> Tensor:
    """Minimum 0 and maximum 1 per volume; a constant volume becomes 0 and passes no gradient."""
    low = volumes.amin(_SPATIAL, keepdim=True)
    high = volumes.amax(_SPATIAL, keepdim=True)
    span = high - low
    largest = torch.maximum(low.abs(), high.abs())
    constant = span <= _CONSTANT_ROUNDINGS * torch.finfo(volumes.dtype).eps * largest
    return (volumes - low) * span.masked_fill(constant, 1).reciprocal().masked_fill(constant, 0)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def _require_volumes(what: str, volumes: Tensor) -> None:
    if volumes.ndim != 5:
        raise ValueError(f"{what} {tuple(volumes.shape)} must be (N, C, D, H, W)")
