"""Appearance corruptions that the restoration head learns to undo.

Each is a module `forward(volumes, generator=None)` from floating-point (N, C, D, H, W) in [0, 1] to
a new tensor of the same shape, type and range. It gives every sample its own draw, from the
generator on the device of the volumes (None: the global one), and never waits for the device: masks
decide which samples are corrupted, not branches.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils.type_conversion import convert_to_dst_type, convert_to_tensor
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_range


class Corruption(nn.Module):
    """Local shuffling, then a non-linear intensity change, then in-painting.

    The order of the released GVSL code (He et al., CVPR 2023): in-painted noise stays uniform
    because nothing is applied after it.

    The options are those of :class:`LocalShuffling`, :class:`NonLinearIntensity` and
    :class:`InPainting`.
    """

    def __init__(
        self,
        shuffling_rate: float = 0.8,
        shuffling_density: float = 0.55,
        shuffling_edge: float = 0.05,
        nonlinear_rate: float = 0.9,
        inpainting_rate: float = 1.0,
        inpainting_boxes: int = 30,
        inpainting_stop: float = 0.05,
        inpainting_smallest: float = 0.1,
        inpainting_largest: float = 0.2,
    ) -> None:
        super().__init__()
        check_range("shuffling_rate", shuffling_rate, 0, 1)
        check_range("nonlinear_rate", nonlinear_rate, 0, 1)
        check_range("inpainting_rate", inpainting_rate, 0, 1)
        self.shuffling = LocalShuffling(shuffling_rate, shuffling_density, shuffling_edge)
        self.nonlinear = NonLinearIntensity(nonlinear_rate)
        self.inpainting = InPainting(
            inpainting_rate,
            inpainting_boxes,
            inpainting_stop,
            inpainting_smallest,
            inpainting_largest,
        )

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for part in (self.shuffling, self.nonlinear, self.inpainting):
            volumes = part(volumes, generator)
        return volumes


class LocalShuffling(nn.Module):
    """Permute voxels inside many small boxes: texture goes, anatomy at a larger scale stays.

    Boxes lie anywhere and may overlap; a voxel belongs to the last box that covers it and changes
    places with that box's other voxels only, so the multiset of intensities is kept. All channels
    of a sample move together. After Zhou et al., Models Genesis, MedIA 2021, with the box sizes and
    the rate of the released GVSL code.

    Args:
        rate: Probability in [0, 1] that a sample is shuffled.
        density: Volume of all boxes together over the volume's, positive. The default changes as
            many voxels, about two fifths, as the released code's 5,000 boxes do at 64**3.
        edge: Edge of a box over the volume's edge on the same axis, in (0, 1], rounded down; at
            least two voxels.
    """

    def __init__(self, rate: float = 0.8, density: float = 0.55, edge: float = 0.05) -> None:
        super().__init__()
        check_range("rate", rate, 0, 1)
        check_range("density", density, above=0)
        check_range("edge", edge, high=1, above=0)
        self.rate = rate
        self.density = density
        self.edge = edge

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(volumes)
        if self.rate == 0:
            return volumes.clone()
        applied = _applied(volumes, self.rate, generator)
        flat = volumes.flatten(2)
        source = self._source(volumes, generator).unsqueeze(1).expand_as(flat)
        return torch.where(applied, flat.gather(2, source).view(volumes.shape), volumes)

    def _source(self, volumes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Flat index (N, D*H*W) of the voxel that each voxel is read from."""
        samples, device, shape = len(volumes), volumes.device, volumes.shape[2:]
        edges = [min(size, max(2, int(size * self.edge))) for size in shape]
        voxels = math.prod(shape)
        boxes = max(1, round(self.density * voxels / math.prod(edges)))
        slots = torch.zeros((samples, boxes, 1), dtype=torch.int64, device=device)
        for size, edge in zip(shape, edges, strict=True):
            corner = _integers(0, size - edge, (samples, boxes, 1, 1), device, generator)
            along = corner + torch.arange(edge, device=device)
            slots = (slots.unsqueeze(3) * size + along).flatten(2)
        number = torch.arange(boxes, device=device).view(1, -1, 1).expand_as(slots)
        owner = torch.full((samples, voxels), -1, device=device)
        owner.scatter_reduce_(1, slots.flatten(1), number.flatten(1), "amax")
        owned = owner.gather(1, slots.flatten(1)).view_as(slots) == number
        keys = torch.rand(slots.shape, device=device, generator=generator)
        # keys are below 1: the owned slots come first, in random order
        order = torch.argsort(keys + ~owned, dim=2)
        rank = (owned.cumsum(2) - 1).clamp_min(0)
        drawn = slots.gather(2, order.gather(2, rank))
        # a slot that another box owns writes past the end, where it is cut off
        target = torch.where(owned, slots, voxels)
        identity = torch.arange(voxels + 1, device=device).expand(samples, -1)
        return identity.scatter(1, target.flatten(1), drawn.flatten(1))[:, :-1]


class NonLinearIntensity(nn.Module):
    """Map intensities through a random increasing curve from (0, 0) to (1, 1).

    A cubic Bezier curve whose two inner control points are uniform in the unit square; both its
    coordinates increase for any such points. Models Genesis (Zhou et al., MedIA 2021) makes half of
    the curves decrease, from (0, 1) to (1, 0); GVSL's released code makes none: the background
    stays 0.

    Args:
        rate: Probability in [0, 1] that a sample is changed.
        decreasing: Probability in [0, 1] that the curve of a changed sample decreases.
    """

    def __init__(self, rate: float = 0.9, decreasing: float = 0.0) -> None:
        super().__init__()
        check_range("rate", rate, 0, 1)
        check_range("decreasing", decreasing, 0, 1)
        self.rate = rate
        self.decreasing = decreasing

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(volumes)
        if self.rate == 0:
            return volumes.clone()
        applied = _applied(volumes, self.rate, generator)
        points = torch.rand((len(volumes), 2, 2), device=volumes.device, generator=generator)
        mapped = bezier(volumes, points)
        if self.decreasing:
            mapped = torch.where(_applied(volumes, self.decreasing, generator), 1 - mapped, mapped)
        return torch.where(applied, mapped, volumes)


class InPainting(nn.Module):
    """Replace boxes by uniform noise.

    Boxes are drawn one after another, with probability `stop` of ending after each, anywhere in
    the volume. All channels of a sample share the boxes, each has its own noise. After Zhou et
    al., Models Genesis, MedIA 2021, with the numbers of the released GVSL code.

    Args:
        rate: Probability in [0, 1] that a sample is in-painted.
        boxes: Largest number of boxes per sample, at least 1.
        stop: Probability in [0, 1] that no further box follows a box.
        smallest: Smallest edge of a box over the volume's edge on the same axis.
        largest: Upper bound of box edge / volume edge, at most 1. A box has one voxel or more along
            each axis, and `smallest` counts if the two leave no edge between them.
    """

    def __init__(
        self,
        rate: float = 1.0,
        boxes: int = 30,
        stop: float = 0.05,
        smallest: float = 0.1,
        largest: float = 0.2,
    ) -> None:
        super().__init__()
        check_range("rate", rate, 0, 1)
        check_range("stop", stop, 0, 1)
        check_range("boxes", boxes, 1)
        check_range("smallest", smallest, above=0)
        check_range("largest", largest, smallest, 1)
        self.rate = rate
        self.stop = stop
        self.boxes = boxes
        self.smallest = smallest
        self.largest = largest

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check(volumes)
        if self.rate == 0:
            return volumes.clone()
        applied = _applied(volumes, self.rate, generator)
        painted = applied & self.draw(volumes, generator)
        noise = torch.rand(
            volumes.shape, dtype=volumes.dtype, device=volumes.device, generator=generator
        )
        return torch.where(painted, noise, volumes)

    def draw(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the voxels to replace, whatever the rate: (N, 1, D, H, W) boolean."""
        corners, edges = self._boxes(volumes, generator)
        return box_union(volumes.shape[2:], corners, edges).unsqueeze(1)

    def _boxes(self, volumes: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """First voxels and edges (N, K, 3) of the boxes; edge 0 for those not drawn."""
        samples, device = len(volumes), volumes.device
        corners, edges = [], []
        for size in volumes.shape[2:]:
            low = max(1, int(size * self.smallest))
            high = max(low, int(size * self.largest) - 1)
            edge = _integers(low, high, (samples, self.boxes), device, generator)
            corners.append(_integers(0, size - edge, (samples, self.boxes), device, generator))
            edges.append(edge)
        stops = torch.rand((samples, self.boxes), device=device, generator=generator) < self.stop
        drawn = stops.cumsum(1) - stops.long() == 0
        return torch.stack(corners, 2), torch.stack(edges, 2) * drawn.unsqueeze(2)


class OutPainting(InPainting):
    """Replace all but some boxes by uniform noise.

    The options are those of :class:`InPainting`, the defaults those of the released Models Genesis
    code, whose boxes have 3/7 to 4/7 of the volume's edge.
    """

    def __init__(
        self,
        rate: float = 1.0,
        boxes: int = 5,
        stop: float = 0.05,
        smallest: float = 3 / 7,
        largest: float = 4 / 7,
    ) -> None:
        super().__init__(rate, boxes, stop, smallest, largest)

    def draw(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return ~super().draw(volumes, generator)


class GenesisCorruption(nn.Module):
    """The four transformations of Models Genesis: shuffling, intensities, in- and out-painting.

    In this order; a sample is in-painted or out-painted, never both. Rates and sizes are those of
    the released code, but for the density of the shuffling, see :class:`LocalShuffling`.

    Args:
        shuffling_rate: Probability of the local shuffling.
        nonlinear_rate: Probability of the non-linear intensity change.
        painting_rate: Probability of either painting.
        outpainting_share: Share of out-painting in them.

    Source: Zhou et al., Models Genesis, MedIA 2021, section 3.1, https://arxiv.org/abs/2004.07882.
    """

    def __init__(
        self,
        shuffling_rate: float = 0.5,
        nonlinear_rate: float = 0.9,
        painting_rate: float = 0.9,
        outpainting_share: float = 0.8,
    ) -> None:
        super().__init__()
        check_range("shuffling_rate", shuffling_rate, 0, 1)
        check_range("nonlinear_rate", nonlinear_rate, 0, 1)
        check_range("painting_rate", painting_rate, 0, 1)
        check_range("outpainting_share", outpainting_share, 0, 1)
        self.shuffling = LocalShuffling(shuffling_rate)
        self.nonlinear = NonLinearIntensity(nonlinear_rate, decreasing=0.5)
        self.painting_rate = painting_rate
        self.outpainting_share = outpainting_share
        self.inpainting = InPainting(boxes=5, smallest=1 / 6, largest=1 / 3)
        self.outpainting = OutPainting()

    def forward(self, volumes: Tensor, generator: torch.Generator | None = None) -> Tensor:
        corrupted = self.nonlinear(self.shuffling(volumes, generator), generator)
        painted = torch.where(
            _applied(volumes, self.outpainting_share, generator),
            self.outpainting(corrupted, generator),
            self.inpainting(corrupted, generator),
        )
        applied = _applied(volumes, self.painting_rate, generator)
        return torch.where(applied, painted, corrupted)


class Corruptd(RandomizableTransform, MapTransform):
    """A corruption as a MONAI dictionary transform.

    Takes part in MONAI's seeding (`set_random_state`, worker seeds). The same draw is used for all
    keys of one item; to keep the clean volume, copy it first (`CopyItemsd`).

    Args:
        keys: Keys of the volumes, each (C, D, H, W) in [0, 1].
        corruption: Any module of this file; None for :class:`Corruption` with its defaults.
        prob: Probability that anything is done to an item, besides the corruption's own rates.
        allow_missing_keys: Skip keys that an item lacks instead of raising KeyError.
    """

    def __init__(
        self,
        keys: KeysCollection,
        corruption: nn.Module | None = None,
        prob: float = 1.0,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.corruption = Corruption() if corruption is None else corruption

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a shallow copy of the item with corrupted volumes under the keys.

        Tensors and arrays keep their types, shapes and metadata.
        """
        item = dict(data)
        self.randomize(None)
        seed = int(self.R.randint(2**31))
        if not self._do_transform:
            return item
        for key in self.key_iterator(item):
            volume = convert_to_tensor(item[key], track_meta=False)
            generator = torch.Generator(volume.device).manual_seed(seed)
            corrupted = self.corruption(volume.unsqueeze(0), generator).squeeze(0)
            item[key] = convert_to_dst_type(corrupted, item[key])[0]
        return item


def bezier(volumes: Tensor, points: Tensor) -> Tensor:
    """Map intensities (N, ...), clamped to [0, 1], through Bezier curves from (0, 0) to (1, 1).

    `points` (N, 2, 2) are the inner control points (x, y) in [0, 1] of each sample. The result is
    within 1e-3 of the exact curve, except where that is almost vertical.
    """
    table = _bezier_table(points.float())
    position = volumes.float().flatten(1).clamp(0, 1) * (table.shape[1] - 1)
    left = position.long().clamp_max(table.shape[1] - 2)
    at_left = table.gather(1, left)
    mapped = torch.lerp(at_left, table.gather(1, left + 1), position - left)
    return mapped.view(volumes.shape).to(volumes.dtype)


def block_mask(
    volumes: Tensor, block: int, ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which cubic blocks of volumes (N, C, D, H, W) are masked: (N, 1, D, H, W) boolean.

    Args:
        volumes: Give the shape and the device.
        block: Edge of the blocks in voxels, 1 or more; those at the end of an axis may be cut.
        ratio: Share of the blocks that is masked, in (0, 1), the same number in every sample; at
            least one is masked, and one is not.
        generator: Source of the draws, on the device of `volumes`; None for the global one.

    Raises:
        InputError: If an option is out of range, or there is but one block.
    """
    grid = [math.ceil(size / block) for size in volumes.shape[2:]] if block > 0 else []
    if block < 1 or not 0 < ratio < 1 or math.prod(grid) < 2:
        raise InputError(
            f"block={block} and ratio={ratio} mask no part of volumes of "
            f"{tuple(volumes.shape[2:])} voxels: give a block of 1 voxel or more and smaller than "
            "the volume, and a ratio between 0 and 1."
        )
    count = math.prod(grid)
    masked = min(max(round(ratio * count), 1), count - 1)
    order = torch.rand((len(volumes), count), device=volumes.device, generator=generator)
    mask = (order.argsort(1).argsort(1) < masked).view(len(volumes), 1, *grid)
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(block, axis).narrow(axis, 0, volumes.shape[axis])
    return mask


def box_union(shape: Sequence[int], corners: Tensor, edges: Tensor) -> Tensor:
    """Mark the voxels (N, D, H, W) that lie in any of a sample's boxes.

    `corners` (N, K, 3) are the first voxels of the boxes; a box with an edge of 0 is empty.
    """
    sides = []
    for axis, size in enumerate(shape):
        first = corners[:, :, axis, None]
        position = torch.arange(size, device=corners.device)
        sides.append(((position >= first) & (position < first + edges[:, :, axis, None])).float())
    # counts of boxes, exact in any precision as far as zero or not is concerned
    return torch.einsum("nkd,nkh,nkw->ndhw", *sides) > 0


def _bezier_table(points: Tensor, entries: int = 4096) -> Tensor:
    """Ordinates (N, entries + 1) of the curves at equidistant abscissae: cheaper to look up."""
    t = torch.linspace(0, 1, entries // 4 + 1, device=points.device)
    weights = torch.stack((3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)))
    curve = (points.unsqueeze(3) * weights.view(1, 2, 1, -1)).sum(1) + t**3
    # rounding must not break the order that the search relies on
    x, y = curve.cummax(2).values.clamp(0, 1).unbind(1)
    grid = torch.linspace(0, 1, entries + 1, device=points.device).expand(len(points), -1)
    right = torch.searchsorted(x.contiguous(), grid.contiguous()).clamp(1, len(t) - 1)
    left = right - 1
    x_left, y_left = x.gather(1, left), y.gather(1, left)
    step = (x.gather(1, right) - x_left).clamp_min(torch.finfo(x.dtype).tiny)
    share = ((grid - x_left) / step).clamp(0, 1)
    table = torch.lerp(y_left, y.gather(1, right), share)
    # a curve that ends vertically rounds to abscissa 1 before its end
    table[:, -1] = 1
    return table


def _applied(volumes: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    drawn = torch.rand((len(volumes), 1, 1, 1, 1), device=volumes.device, generator=generator)
    return drawn < rate


def _integers(
    low: int,
    high: int | Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Uniform integers, both ends included; the upper one may differ per element."""
    drawn = torch.rand(shape, device=device, generator=generator)
    return low + (drawn * (high - low + 1)).long()


def _check(volumes: Tensor) -> None:
    if volumes.ndim != 5 or not volumes.is_floating_point():
        raise InputError(
            f"A corruption got a {volumes.dtype} tensor of shape {tuple(volumes.shape)}: give "
            "floating-point volumes of shape (N, C, D, H, W)."
        )
