"""Geometric Visual Similarity Learning, He et al., CVPR 2023, https://arxiv.org/abs/2303.00874."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.backbones import Features
from gvsl_lightning.nn.heads import Matching, ProjectionHead, RestorationHead, ZMatchingHead
from gvsl_lightning.nn.losses import (
    LocalNCCLoss,
    PointContrastLoss,
    SmoothnessLoss,
    build_similarity,
)
from gvsl_lightning.tasks.base import Batch, is_log_step
from gvsl_lightning.tasks.pretraining import PretrainTask


class GVSL(PretrainTask):
    """Pre-train a backbone by registering pairs of volumes from its features alone.

    The loss is ``weight_similarity * similarity(warped, fixed) + weight_smoothness *
    smoothness(displacement) + weight_restoration * MSE(restored, fixed)`` (as in the paper, with
    all weights 1). The fixed volume's features come from its corrupted copy. The paper's ablations
    are ``z_matching: false``, ``restoration: false`` and ``affine: false``.

    Beyond the paper, ``weight_contrast`` adds a contrast of the local features at matched points
    (:class:`gvsl_lightning.nn.losses.PointContrastLoss` behind a projection), which makes them tell
    one place of the anatomy from all others. Let the two volumes move apart then
    (``shared_spatial: false`` of the data module): else the position in the patch is enough.

    A batch holds ``fixed``, ``fixed_corrupted`` and ``moving``, each (N, in_channels, D, H, W) in
    [0, 1]; a validation batch needs no ``fixed_corrupted`` and may hold ``fixed_label`` and
    ``moving_label``, (N, 1, D, H, W) integers, which measure the registration and train nothing.

    Args:
        z_matching: with the Z-matching head.
        restoration: with the restoration head.
        affine: with the affine part of the Z-matching head.
        deformable: with the deformable part of the Z-matching head. Without it and without
            restoration no loss reaches the decoder: multi-process training then needs the strategy
            ``ddp_find_unused_parameters_true``.
        affine_channels: hidden channels of the affine part.
        deformable_channels: hidden channels of the deformable part.
        composition: how the two parts make one map, see :func:`gvsl_lightning.nn.geometry.compose`;
            ``affine_first`` is the paper's equation 12.
        similarity: what the warped and the fixed volume are compared by: ``ncc`` (the paper's),
            ``mind``, ``mi`` or ``ssim``.
        similarity_options: options of that loss, see :mod:`gvsl_lightning.nn.losses`.
        weight_similarity: of the similarity loss.
        weight_smoothness: of the displacement's smoothness.
        weight_restoration: of the restoration error.
        weight_contrast: of the contrast of matched points; 0 leaves it out. Its gradient is some
            ten times that of the other terms.
        contrast_points: points that are drawn in each pair; those on the background or matched
            beyond the moving volume take no part.
        contrast_temperature: see the loss.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if both the Z-matching and the restoration head are switched off, or there is
            a contrast without matching.
    """

    def __init__(
        self,
        z_matching: bool = True,
        restoration: bool = True,
        affine: bool = True,
        deformable: bool = True,
        affine_channels: int = 256,
        deformable_channels: int = 16,
        composition: geometry.Order = "displacement_first",
        similarity: Literal["ncc", "mind", "mi", "ssim"] = "ncc",
        similarity_options: dict[str, Any] | None = None,
        weight_similarity: float = 1.0,
        weight_smoothness: float = 1.0,
        weight_restoration: float = 1.0,
        weight_contrast: float = 0.0,
        contrast_points: int = 256,
        contrast_temperature: float = 0.1,
        **base: Any,
    ) -> None:
        if not (z_matching or restoration):
            raise InputError("z_matching and restoration are both off; switch one of them on.")
        if weight_contrast and not z_matching:
            raise InputError("weight_contrast needs matched points; switch z_matching on.")
        if contrast_points < 2:
            raise InputError(f"contrast_points is {contrast_points}; give 2 or more.")
        super().__init__(**base)

    def configure_models(self) -> None:
        """Create the backbone and the heads."""
        self.backbone = self.configure_backbone()
        self.matching_head = (
            ZMatchingHead(
                self.backbone.global_channels,
                self.backbone.local_channels,
                affine=self.hparams["affine"],
                deformable=self.hparams["deformable"],
                affine_channels=self.hparams["affine_channels"],
                deformable_channels=self.hparams["deformable_channels"],
            )
            if self.hparams["z_matching"]
            else None
        )
        self.restoration_head = (
            RestorationHead(self.backbone.local_channels, self.hparams["in_channels"])
            if self.hparams["restoration"]
            else None
        )
        self.projection_head = (
            ProjectionHead(self.backbone.local_channels)
            if self.hparams["weight_contrast"]
            else None
        )

    def configure_losses(self) -> None:
        """Create the similarity, the smoothness and the contrast loss."""
        self.similarity: nn.Module = build_similarity(
            self.hparams["similarity"], **(self.hparams["similarity_options"] or {})
        )
        self.smoothness = SmoothnessLoss()
        self.contrast = PointContrastLoss(self.hparams["contrast_temperature"])

    def configure_metrics(self) -> None:
        """NCC is the measure of every validation, whatever the training compares by."""
        self.ncc_loss = LocalNCCLoss()

    def match(self, fixed: Tensor, moving: Tensor) -> Matching:
        """Register moving volumes to fixed ones.

        Args:
            fixed: (N, in_channels, D, H, W) in [0, 1].
            moving: the same shape.

        Returns:
            The matching; :meth:`warp` applies it.

        Raises:
            ValueError: if the task has no Z-matching head.
        """
        return self._match(*self._pair_features(fixed, moving))

    def warp(self, volume: Tensor, matching: Matching, mode: geometry.Mode = "linear") -> Tensor:
        """Lay moving volumes or labels over the fixed grid; sampled once.

        Args:
            volume: (N, C, D, H, W).
            matching: as from :meth:`match`.
            mode: ``nearest`` for labels.

        Returns:
            (N, C, D, H, W).
        """
        coordinates = geometry.compose(*matching, order=self.hparams["composition"])
        return geometry.sample(volume, coordinates, mode)

    def restore(self, corrupted: Tensor) -> Tensor:
        """Undo the corruption of volumes (N, in_channels, D, H, W), same shape back.

        Raises:
            ValueError: if the task has no restoration head.
        """
        return self._restore(self(corrupted))

    def compute_losses(self, batch: Batch) -> tuple[dict[str, Tensor], Matching | None]:
        """Losses of a batch: ``total`` and each term, unweighted, and the matching behind them."""
        fixed, moving = batch["fixed"], batch["moving"]
        losses: dict[str, Tensor] = {}
        matching = None
        if self.matching_head is None:
            fixed_features = self(batch["fixed_corrupted"])
        else:
            fixed_features, moving_features = self._pair_features(batch["fixed_corrupted"], moving)
            matching = self._match(fixed_features, moving_features)
            losses[self.hparams["similarity"]] = self.similarity(self.warp(moving, matching), fixed)
            losses["smoothness"] = self.smoothness(matching.displacement)
            if self.projection_head is not None:
                losses["contrast"] = self._contrast(
                    fixed, fixed_features, moving_features, matching
                )
        if self.restoration_head is not None:
            losses["restoration"] = F.mse_loss(self._restore(fixed_features), fixed.float())
        weights = {
            self.hparams["similarity"]: self.hparams["weight_similarity"],
            "smoothness": self.hparams["weight_smoothness"],
            "restoration": self.hparams["weight_restoration"],
            "contrast": self.hparams["weight_contrast"],
        }
        total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        return {"total": total, **losses}, matching

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; see the class for the loss."""
        losses, matching = self.compute_losses(batch)
        more: dict[str, Tensor] = {}
        if matching is not None and is_log_step(self.trainer):
            measured = self.measure(batch, matching)
            more = {f"train/{name}": value for name, value in measured.items()}
            more |= _affine_spread("train", matching.affine.detach())
        return self.training_loss(losses, batch, more)

    @torch.no_grad()
    def measure(self, batch: Batch, matching: Matching) -> dict[str, Tensor]:
        """How good a registration is.

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

    def on_validation_epoch_start(self) -> None:
        """Forget the matchings and embeddings of the last validation."""
        super().on_validation_epoch_start()
        self._affines: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the training objective, and how well the uncorrupted pairs are registered."""
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log how much the affine maps differ between pairs: a head that ignores them shows 0."""
        super().on_validation_epoch_end()
        self._log_affine_spread("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """See :meth:`validation_step`."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """See :meth:`on_validation_epoch_end`."""
        super().on_test_epoch_end()
        self._log_affine_spread("test")

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

    def _pair_features(self, fixed: Tensor, moving: Tensor) -> tuple[Features, Features]:
        features = self(torch.cat([fixed, moving]))
        halves = [tensor.split(len(fixed)) for tensor in features]
        return Features(*(half[0] for half in halves)), Features(*(half[1] for half in halves))

    def _match(self, fixed: Features, moving: Features) -> Matching:
        if self.matching_head is None:
            raise ValueError("this task was built with z_matching: false and matches nothing")
        matching: Matching = self.matching_head(moving=moving, fixed=fixed)
        return matching

    def _restore(self, features: Features) -> Tensor:
        if self.restoration_head is None:
            raise ValueError("this task was built with restoration: false and restores nothing")
        restored: Tensor = self.restoration_head(features.local_features)
        return restored

    def _contrast(
        self, fixed: Tensor, fixed_features: Features, moving_features: Features, matching: Matching
    ) -> Tensor:
        """Contrast at random points of what the matching found, which it does not train."""
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
            sampled = geometry.sample(moving_features.local_features, places[..., None, None])
            vectors = (at_points(fixed_features.local_features).float(), sampled.flatten(2))
            ours, theirs = (self.projection_head(part.transpose(1, 2)) for part in vectors)
            loss: Tensor = self.contrast(ours, theirs, inside & (at_points(fixed) > 0).any(dim=1))
            return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        self.watch(batch["fixed"])
        losses, _ = self.compute_losses({"fixed_corrupted": batch["fixed"], **batch})
        metrics = self.name_evaluated(stage, losses, batch)
        if self.matching_head is not None:
            matching = self.match(batch["fixed"], batch["moving"])
            self._affines.append(matching.affine)
            measured = self.measure(batch, matching)
            metrics.update({f"{stage}/{name}": value for name, value in measured.items()})
        for name, value in metrics.items():
            # pairs without labelled structures have no Dice and no weight in its mean
            weight = 0 if value.isnan() and "dice" in name else len(batch["fixed"])
            self.log(
                name,
                value.nan_to_num() if weight == 0 else value,
                batch_size=weight,
                sync_dist=True,
            )

    def _log_affine_spread(self, stage: str) -> None:
        if not self._affines:
            return
        affines: Tensor = self.all_gather(torch.cat(self._affines))  # type: ignore[assignment]
        self.log_dict(_affine_spread(stage, affines.reshape(-1, 3, 4)), sync_dist=True)


def _affine_spread(stage: str, affines: Tensor) -> dict[str, Tensor]:
    """Standard deviation over the pairs, mean over the matrix's and the translation's entries."""
    spread = affines.std(dim=0, correction=0)
    return {
        f"{stage}/affine_spread": spread[:, :3].mean(),
        f"{stage}/affine_spread_translation": spread[:, 3].mean(),
    }
