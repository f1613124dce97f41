"""Geometric Visual Similarity Learning, He et al., CVPR 2023, https://arxiv.org/abs/2303.00874."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_choice, check_range
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.heads import Matching, ProjectionHead, RestorationHead, ZMatchingHead
from gvsl_lightning.nn.losses import (
    SIMILARITIES,
    LocalNCCLoss,
    PointContrastLoss,
    SmoothnessLoss,
    build_similarity,
)
from gvsl_lightning.tasks.base import Batch, is_log_step
from gvsl_lightning.tasks.pretraining import PretrainTask, Views, build_transform, volumes_of
from gvsl_lightning.tasks.spread import Spread, matrix_spread, translation_spread
from gvsl_lightning.transforms.corruption import Corruption
from gvsl_lightning.transforms.spatial import RandomSpatialTransform

Levels = tuple[Tensor, ...]
"""Features of one batch, coarse to fine: global features first, local features last."""


class GVSL(PretrainTask):
    """Pre-train a backbone by registering pairs of volumes from its features alone.

    The appearance of the fixed volume is corrupted, then one random spatial transform moves the
    pair. The loss is ``weight_similarity * similarity(warped, fixed) + weight_smoothness *
    smoothness(displacement) + weight_restoration * MSE(restored, fixed)`` (as in the paper, with
    all weights 1). The features of the fixed volume come from its corrupted copy. The paper's
    ablations are ``z_matching: false``, ``restoration: false`` and ``affine: false``.

    Beyond the paper, ``weight_contrast`` adds a contrast of the local features at matched points
    (:class:`gvsl_lightning.nn.losses.PointContrastLoss` behind a projection), so that each place of
    the anatomy has features of its own. Use it with ``shared_spatial: false``: otherwise the
    position in the patch solves the contrast.

    A batch holds ``fixed`` and ``moving``, each (N, in_channels, D, H, W) in [0, 1]. A validation
    batch may hold ``fixed_label`` and ``moving_label``, (N, 1, D, H, W) integers, for the Dice of
    warped labels.

    Args:
        matching: ``regression`` (the paper's), or ``correlation`` of the features of all decoder
            stages, see :class:`gvsl_lightning.nn.heads.ZMatchingHead`.
        z_matching: with the Z-matching head.
        restoration: with the restoration head.
        affine: with the affine part of the Z-matching head.
        deformable: with the deformable part of the Z-matching head. Without it and without
            restoration no loss reaches the decoder: multi-process training then needs the strategy
            ``ddp_find_unused_parameters_true``.
        affine_channels: hidden channels of the affine part.
        deformable_channels: hidden channels of the deformable part.
        composition: order of the two parts, see :func:`gvsl_lightning.nn.geometry.compose`;
            ``affine_first`` is the paper's equation 12.
        similarity: loss of the warped and the fixed volume, a name in
            :data:`gvsl_lightning.nn.losses.SIMILARITIES`; ``ncc`` is the paper's.
        similarity_options: options of that loss, see :mod:`gvsl_lightning.nn.losses`.
        weight_similarity: of the similarity loss.
        weight_smoothness: of the displacement's smoothness.
        weight_restoration: of the restoration error.
        weight_contrast: of the contrast of matched points, whose gradient is some ten times that
            of the other terms; 0 leaves it out.
        contrast_points: points drawn in each pair, 2 or more; points on the background or matched
            beyond the moving volume do not count.
        contrast_temperature: see the loss.
        corruption: options of :class:`gvsl_lightning.transforms.corruption.Corruption`; true: its
            defaults, false: none.
        spatial: options of :class:`gvsl_lightning.transforms.spatial.RandomSpatialTransform`, for
            training only; true: its defaults, false: none.
        shared_spatial: one spatial transform for both volumes of a pair, as in the paper, or one
            for each.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if no head is left, the contrast has no matching, or an option is unknown or
            out of range.
    """

    monitor = ("val/ncc_after", "max")
    last_matching: Matching | None = None
    """The matching behind the last losses, until the training step has measured it."""

    def __init__(
        self,
        matching: str = "regression",
        z_matching: bool = True,
        restoration: bool = True,
        affine: bool = True,
        deformable: bool = True,
        affine_channels: int = 256,
        deformable_channels: int = 16,
        composition: geometry.Order = "displacement_first",
        similarity: str = "ncc",
        similarity_options: dict[str, Any] | None = None,
        weight_similarity: float = 1.0,
        weight_smoothness: float = 1.0,
        weight_restoration: float = 1.0,
        weight_contrast: float = 0.0,
        contrast_points: int = 256,
        contrast_temperature: float = 0.1,
        corruption: bool | dict[str, Any] = True,
        spatial: bool | dict[str, Any] = True,
        shared_spatial: bool = True,
        **base: Any,
    ) -> None:
        if not (z_matching or restoration):
            raise InputError("z_matching and restoration are both off; switch one of them on.")
        if weight_contrast and not z_matching:
            raise InputError("weight_contrast needs matched points; switch z_matching on.")
        check_range("contrast_points", contrast_points, 2)
        check_choice("similarity", similarity, SIMILARITIES)
        super().__init__(**base)

    def configure_heads(self) -> None:
        local = self.backbone.local_channels
        names = ("matching", "affine", "deformable", "affine_channels", "deformable_channels")
        options = {name: self.hparams[name] for name in names}
        self.matching_head: ZMatchingHead | None = None
        if self.hparams["z_matching"]:
            self.matching_head = ZMatchingHead(self.backbone.global_channels, local, **options)
        self.restoration_head: RestorationHead | None = None
        if self.hparams["restoration"]:
            self.restoration_head = RestorationHead(local, self.hparams["in_channels"])
        self.projection_head: ProjectionHead | None = None
        if self.hparams["weight_contrast"]:
            self.projection_head = ProjectionHead(local)

    def configure_losses(self) -> None:
        self.corruption = build_transform("corruption", Corruption, self.hparams["corruption"])
        self.spatial = build_transform("spatial", RandomSpatialTransform, self.hparams["spatial"])
        self.similarity: nn.Module = build_similarity(
            self.hparams["similarity"], **(self.hparams["similarity_options"] or {})
        )
        self.smoothness = SmoothnessLoss()
        self.contrast = PointContrastLoss(self.hparams["contrast_temperature"])

    def configure_metrics(self) -> None:
        super().configure_metrics()
        # NCC measures every validation, whatever similarity the training uses
        self.ncc_loss = LocalNCCLoss()
        self.affine_spread = Spread(matrix_spread)
        self.affine_spread_translation = Spread(translation_spread)

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``fixed``, its ``corrupted`` copy and ``moving``.

        ``volumes`` (2 N, in_channels, D, H, W) are all fixed ones, then all moving ones.
        """
        fixed, moving = _pairs(volumes)
        corrupted = fixed if self.corruption is None else self.corruption(fixed, generator)
        if self.training and self.spatial is not None:
            if self.hparams["shared_spatial"]:
                fixed, corrupted, moving = self.spatial(
                    fixed, corrupted, moving, generator=generator
                )
            else:
                fixed, corrupted = self.spatial(fixed, corrupted, generator=generator)
                (moving,) = self.spatial(moving, generator=generator)
        return {"fixed": fixed, "corrupted": corrupted, "moving": moving}

    def match(self, fixed: Tensor, moving: Tensor) -> Matching:
        """Register moving volumes to fixed ones, both (N, in_channels, D, H, W) in [0, 1].

        :meth:`warp` applies the matching.

        Raises:
            ValueError: if the task has no Z-matching head.
        """
        return self._match(*self._pair_features(fixed, moving))

    def warp(self, volume: Tensor, matching: Matching, mode: geometry.Mode = "linear") -> Tensor:
        """Sample moving volumes (N, C, D, H, W) once on the fixed grid, labels by ``nearest``."""
        coordinates = geometry.compose(*matching, order=self.hparams["composition"])
        return geometry.sample(volume, coordinates, mode)

    def restore(self, corrupted: Tensor) -> Tensor:
        """Undo the corruption of volumes (N, in_channels, D, H, W), same shape back.

        Raises:
            ValueError: if the task has no restoration head.
        """
        return self._restore(self(corrupted))

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """``total`` and each term, unweighted, under the name of its loss.

        The features of the fixed volume come from its corrupted copy in training, and for the
        matching of evaluation from the volume itself.
        """
        fixed, moving, corrupted = views["fixed"], views["moving"], views["corrupted"]
        losses: dict[str, Tensor] = {}
        fixed_features: Levels | None = None
        if self.matching_head is not None:
            seen = corrupted if self.training else fixed
            fixed_features, moving_features = self._pair_features(seen, moving)
            matching = self._match(fixed_features, moving_features)
            losses[self.hparams["similarity"]] = self.similarity(self.warp(moving, matching), fixed)
            losses["smoothness"] = self.smoothness(matching.displacement)
            if self.projection_head is not None:
                losses["contrast"] = self._contrast(
                    fixed, fixed_features, moving_features, matching
                )
            self.last_matching = matching
        if self.restoration_head is not None:
            if fixed_features is None or not self.training:
                fixed_features = self(corrupted)
            losses["restoration"] = F.mse_loss(self._restore(fixed_features), fixed.float())
        weights = {
            self.hparams["similarity"]: self.hparams["weight_similarity"],
            "smoothness": self.hparams["weight_smoothness"],
            "restoration": self.hparams["weight_restoration"],
            "contrast": self.hparams["weight_contrast"],
        }
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"total": total, **losses}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views = self.views_of(batch, batch_idx)
        losses = self.compute_losses(views)
        matching, self.last_matching = self.last_matching, None
        more: dict[str, Tensor] = {}
        if matching is not None and is_log_step(self.trainer):
            measured = self.measure(views, matching)
            measured["affine_spread"] = matrix_spread(matching.affine.detach())
            measured["affine_spread_translation"] = translation_spread(matching.affine.detach())
            more = {f"train/{name}": value for name, value in measured.items()}
        return self.training_loss(losses, batch, more)

    @torch.no_grad()
    def measure(self, batch: Batch, matching: Matching) -> dict[str, Tensor]:
        """Measure a registration.

        Returns:
            Scalars: ``ncc_before`` and ``ncc_after`` (mean squared local NCC, window 9, in [0, 1]),
            ``displacement`` (mean absolute, voxels), ``folded`` (fraction) and, where the batch has
            labels, ``dice_before`` and ``dice_after`` (mean over the structures of the fixed label;
            NaN if no pair has any).
        """
        fixed, moving = batch["fixed"], batch["moving"]
        measured = {
            "ncc_before": 1 - self.ncc_loss(moving, fixed),
            "ncc_after": 1 - self.ncc_loss(self.warp(moving, matching), fixed),
            "displacement": matching.displacement.abs().mean(),
            "folded": geometry.folded_fraction(matching.displacement).mean(),
        }
        if "fixed_label" in batch and "moving_label" in batch:
            fixed_label, moving_label = batch["fixed_label"], batch["moving_label"]
            warped_label = self.warp(moving_label, matching, "nearest")
            structures = [int(value) for value in fixed_label.unique() if value > 0]
            for name, label in (("dice_before", moving_label), ("dice_after", warped_label)):
                dice = dice_scores(label, fixed_label, structures, in_label=True)
                measured[name] = dice.nanmean(dim=1).nanmean().to(fixed)
        return measured

    def evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Log the losses too, and how well the uncorrupted pairs are registered."""
        super().evaluate(stage, batch, batch_idx)
        matching, self.last_matching = self.last_matching, None
        if matching is None:
            return
        fixed, moving = _pairs(volumes_of(batch))
        measured = self.measure({**batch, "fixed": fixed, "moving": moving}, matching)
        for name, value in measured.items():
            # pairs without labelled structures have no Dice and no weight in its mean
            weight = 0 if value.isnan() and "dice" in name else len(fixed)
            value = value.nan_to_num() if weight == 0 else value
            shown = name in ("ncc_after", "dice_after")
            self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=weight, sync_dist=True)
        for name in ("affine_spread", "affine_spread_translation"):
            spread: Spread = getattr(self, name)
            spread.update(matching.affine)
            self.log(f"{stage}/{name}", spread, batch_size=1)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Register the pairs of a batch.

        Returns:
            ``warped`` (N, C, D, H, W), ``affine`` (N, 3, 4) and ``displacement`` (N, 3, D, H, W) in
            voxels, with the batch's ``fixed_name`` and ``moving_name``. A batch without ``fixed``
            (a pair that could not be read) comes back as it is.
        """
        if "fixed" not in batch:
            return batch
        matching = self.match(batch["fixed"], batch["moving"])
        return {
            "fixed_name": batch["fixed_name"],
            "moving_name": batch["moving_name"],
            "warped": self.warp(batch["moving"], matching),
            **matching._asdict(),
        }

    def _pair_features(self, fixed: Tensor, moving: Tensor) -> tuple[Levels, Levels]:
        volumes = torch.cat([fixed, moving])
        all_levels = self.hparams["matching"] == "correlation"
        features = self.backbone.pyramid(volumes) if all_levels else self(volumes)
        halves = [level.split(len(fixed)) for level in features]
        return tuple(half[0] for half in halves), tuple(half[1] for half in halves)

    def _match(self, fixed: Levels, moving: Levels) -> Matching:
        if self.matching_head is None:
            raise ValueError("this task was built with z_matching: false and matches nothing")
        matching: Matching = self.matching_head(moving=moving, fixed=fixed)
        return matching

    def _restore(self, features: Levels) -> Tensor:
        if self.restoration_head is None:
            raise ValueError("this task was built with restoration: false and restores nothing")
        restored: Tensor = self.restoration_head(features[-1])
        return restored

    def _contrast(
        self, fixed: Tensor, fixed_features: Levels, moving_features: Levels, matching: Matching
    ) -> Tensor:
        """Contrast of the features at random matched points; the matching gets no gradient."""
        assert self.projection_head is not None
        with torch.no_grad():
            matched = geometry.compose(*matching, order=self.hparams["composition"])
        # from the step, not from the global generator, which a resumed run has not in this state
        generator = torch.Generator(fixed.device).manual_seed(self.global_step)
        size = (len(fixed), 1, self.hparams["contrast_points"])
        points = torch.randint(fixed[0, 0].numel(), size, device=fixed.device, generator=generator)

        def at_points(volumes: Tensor) -> Tensor:
            flat = volumes.flatten(2)
            return flat.gather(2, points.expand(-1, flat.shape[1], -1))

        with torch.autocast(fixed.device.type, enabled=False):
            places = at_points(matched)
            last = places.new_tensor(fixed.shape[2:]).view(1, 3, 1) - 1
            inside = ((places >= 0) & (places <= last)).all(dim=1)
            sampled = geometry.sample(moving_features[-1], places[..., None, None])
            vectors = (at_points(fixed_features[-1]).float(), sampled.flatten(2))
            ours, theirs = (self.projection_head(part.transpose(1, 2)) for part in vectors)
            loss: Tensor = self.contrast(ours, theirs, inside & (at_points(fixed) > 0).any(dim=1))
            return loss


def _pairs(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed and moving volumes (N, C, D, H, W) of all volumes of a batch."""
    if len(volumes) % 2:
        raise InputError(
            f"GVSL matches pairs of volumes and a batch holds {len(volumes)}: give batches with "
            "fixed and moving volumes."
        )
    fixed, moving = volumes.chunk(2)
    return fixed, moving
