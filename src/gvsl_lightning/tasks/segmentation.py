"""Segmentation with a pre-trained backbone."""

from typing import Any, Literal

import numpy as np
import torch
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.wrappers import MultioutputWrapper

from gvsl_lightning.errors import InputError, check_choice, check_range
from gvsl_lightning.evaluation.prediction import (
    labels_on_original_grid,
    sliding_window,
    to_original_grid,
)
from gvsl_lightning.evaluation.scores import dice_scores, score_segmentation
from gvsl_lightning.nn.losses import voxel_cross_entropy
from gvsl_lightning.tasks.transfer import TransferTask
from gvsl_lightning.tasks.validation_scores import log_scores

Batch = dict[str, Any]

LOSSES = ("dice", "dice_ce", "focal")


class Segmentation(TransferTask):
    """Assign a class to every voxel: one 3x3x3 convolution on the backbone's local features.

    The head and, as loss, Dice on the softmax are the paper's (GVSL, He et al., CVPR 2023, section
    4.1). Batches are those of
    :class:`gvsl_lightning.datamodules.segmentation_cases.LabelledVolumes`.

    Args:
        class_names: name of every class, the background first.
        loss: ``dice``, ``dice_ce`` (plus cross-entropy) or ``focal``.
        ignore_index: label value of voxels that neither train nor count.
        window_size: (D, H, W) of the sliding window over whole volumes; that of the training
            patches, as the statistics of GroupNorm depend on it. None: as large as memory allows,
            see :func:`gvsl_lightning.evaluation.prediction.choose_window`; faster.
        overlap: of neighbouring windows, as a share of their edges, in [0, 1); in validations at
            most 0.25, which takes less time.
        mirror: average the prediction over the eight mirrorings of a volume, in test and predict.
        probabilities: whether predictions come with the probability of every class.
        **transfer: see :class:`gvsl_lightning.tasks.transfer.TransferTask`.

    Raises:
        InputError: if there are fewer than two classes or an option is out of range.
    """

    monitor = ("val/dice", "max")

    def __init__(
        self,
        class_names: list[str],
        loss: Literal["dice", "dice_ce", "focal"] = "dice",
        ignore_index: int | None = None,
        window_size: tuple[int, int, int] | None = (96, 96, 96),
        overlap: float = 0.5,
        mirror: bool = False,
        probabilities: bool = False,
        **transfer: Any,
    ) -> None:
        if len(class_names) < 2:
            raise InputError(f"class_names is {class_names}; name the background and a structure.")
        check_choice("loss", loss, LOSSES)
        check_range("overlap", overlap, 0, below=1)
        check_range("window_size", min(window_size or (1,)), 1)
        super().__init__(class_names=class_names, **transfer)

    def configure_models(self) -> None:
        self.backbone = self.configure_backbone()
        classes = len(self.class_names)
        self.head = nn.Conv3d(self.backbone.local_channels, classes, 3, padding=1)

    def configure_losses(self) -> None:
        # of logits (N, classes, D, H, W) and labels (N, 1, D, H, W)
        self.loss: nn.Module = _Loss(self.hparams["loss"], self.hparams["ignore_index"])

    def configure_metrics(self) -> None:
        super().configure_metrics()
        # of Dice by counts; that of torchmetrics makes a map of each class, 2 GB for 29 classes
        mean = MeanMetric(nan_strategy="ignore")
        self.dice = MultioutputWrapper(mean, len(self.class_names) - 1, remove_nans=False)

    def forward(self, volume: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (N, classes, D, H, W) of volumes (N, in_channels, D, H, W)."""
        features = self.compute_features(lambda v: self.backbone(v).local_features, volume)
        logits: Tensor = self.head(features)
        return logits

    def predict_logits(
        self, volume: Tensor, mirror: bool = False, most_overlap: float = 1.0
    ) -> Tensor:
        """Logits of one volume of any size, (1, classes, D, H, W), by sliding window."""
        return sliding_window(
            volume,
            self,
            self.hparams["window_size"],
            min(self.hparams["overlap"], most_overlap),
            mirror,
            self.backbone.local_channels,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = {"total": self.loss(self(batch["image"]), batch["label"])}
        return self.training_loss(losses, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.predict_logits(batch["image"], most_overlap=0.25)
        label = batch["label"].cpu()
        self.log_validation_loss(self.loss(logits, label), batch)
        prediction, target = logits.argmax(dim=1, keepdim=True), label
        if self.hparams["ignore_index"] is not None:
            ignored = target == self.hparams["ignore_index"]
            prediction, target = prediction.where(~ignored, 0), target.where(~ignored, 0)
        scores = dice_scores(prediction, target, range(1, len(self.class_names)))
        self.dice.update(scores.float().to(self.device))

    def on_validation_epoch_end(self) -> None:
        """Log Dice of every class over the cases that have it, and the mean over the classes."""
        scores = self.dice.compute().tolist()
        self.dice.reset()
        named = dict(zip(self.class_names[1:], scores, strict=True))
        log_scores(self, "dice", named, "Dice needs a case with the class")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Score one case on its original grid, in mm.

        Returns:
            ``name``, ``scores`` (see :func:`gvsl_lightning.evaluation.scores.score_segmentation`),
            and ``image``, ``label``, ``prediction`` (D, H, W) on the original grid, whose
            ``affine`` (NumPy array, (4, 4)) leads to mm.
        """
        geometry = _geometry(batch)
        probabilities = self.predict_logits(batch["image"], self.hparams["mirror"]).softmax(dim=1)
        prediction = labels_on_original_grid(probabilities[0], *geometry)
        label = batch["label"][0, 0].cpu()
        if self.hparams["ignore_index"] is not None:
            ignored = label == self.hparams["ignore_index"]
            prediction, label = prediction.where(~ignored, 0), label.where(~ignored, 0)
        spacing = np.linalg.norm(batch["original_affine"][0, :3, :3], axis=0)
        return {
            "name": batch["name"][0],
            "scores": score_segmentation(prediction, label, spacing.tolist(), self.class_names),
            "image": to_original_grid(batch["image"][0, :1], *geometry)[0],
            "label": label,
            "prediction": prediction,
            "affine": batch["original_affine"][0],
        }

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Segment one volume.

        Returns:
            ``name``, ``source``, ``affine`` (NumPy array, (4, 4)) of the original grid,
            ``prediction`` (D, H, W) class indices on it and, if asked for, ``probabilities``
            (classes, D, H, W); of an unreadable volume only ``name`` and ``error``.
        """
        if "error" in batch:
            return {"name": batch["name"][0], "error": batch["error"][0]}
        geometry = _geometry(batch)
        probabilities = self.predict_logits(batch["image"], self.hparams["mirror"]).softmax(dim=1)
        predicted = {
            "name": batch["name"][0],
            "source": batch["source"][0],
            "affine": batch["original_affine"][0],
            "prediction": labels_on_original_grid(probabilities[0], *geometry),
        }
        if self.hparams["probabilities"]:
            predicted["probabilities"] = to_original_grid(probabilities[0], *geometry)
        return predicted


class _Loss(nn.Module):
    """MONAI's losses in float32, also under autocast, and without the ignored voxels."""

    def __init__(self, name: str, ignore_index: int | None) -> None:
        super().__init__()
        self.monai_loss: nn.Module = (
            FocalLoss(to_onehot_y=True, use_softmax=True, ignore_index=ignore_index)
            if name == "focal"
            else DiceLoss(to_onehot_y=True, softmax=True, ignore_index=ignore_index)
        )
        self.with_cross_entropy = name == "dice_ce"
        self.ignored = -100 if ignore_index is None else ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            loss: Tensor = self.monai_loss(logits, label)
            if self.with_cross_entropy:
                loss = loss + voxel_cross_entropy(logits, label, self.ignored)
            return loss


def _geometry(batch: Batch) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Affine of the prepared grid, affine and shape of the original one."""
    return (
        batch["affine"][0],
        batch["original_affine"][0],
        batch["original_shape"][0].tolist(),
    )
