"""Classification with a pre-trained encoder."""

from typing import Any, Literal

import torch
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn
from torchmetrics import CatMetric

from gvsl_lightning.errors import InputError, check_choice
from gvsl_lightning.evaluation.scores import score_class
from gvsl_lightning.nn.heads import RunningStandardisation
from gvsl_lightning.tasks.pretraining import pool
from gvsl_lightning.tasks.transfer import TransferTask
from gvsl_lightning.tasks.validation_scores import log_scores

Batch = dict[str, Any]


class Classification(TransferTask):
    """Assign classes to volumes: one linear layer on the pooled global features.

    Only the encoder runs (GVSL, He et al., CVPR 2023, section 4.1). In mode ``linear`` the layer
    reads features standardised by their mean and variance over all training volumes (MAE, He et
    al., CVPR 2022, appendix A.1): one learning rate then fits every method. Batches are those of
    :class:`gvsl_lightning.datamodules.classification_cases.ClassifiedVolumes`.

    Args:
        class_names: name of every class.
        multi_label: whether any number of classes applies, instead of exactly one.
        loss: ``cross_entropy`` (binary for each class with ``multi_label``) or ``focal``.
        **transfer: see :class:`gvsl_lightning.tasks.transfer.TransferTask`.

    Raises:
        InputError: if there are too few classes or an option is unknown.
    """

    monitor = ("val/auroc", "max")

    def __init__(
        self,
        class_names: list[str],
        multi_label: bool = False,
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        **transfer: Any,
    ) -> None:
        if len(class_names) < (1 if multi_label else 2):
            raise InputError(f"class_names is {class_names}; name every class.")
        check_choice("loss", loss, ("cross_entropy", "focal"))
        super().__init__(class_names=class_names, **transfer)

    def configure_models(self) -> None:
        self.backbone = self.configure_backbone()
        channels = self.backbone.global_channels
        self.head: nn.Module = nn.Linear(channels, len(self.class_names))
        if self.linear:
            self.head = nn.Sequential(RunningStandardisation(channels, momentum=0), self.head)
        self.backbone.freeze_decoder()

    @property
    def standardisation(self) -> RunningStandardisation:
        """First part of the head in mode ``linear``."""
        part = self.head.get_submodule("0")
        assert isinstance(part, RunningStandardisation)
        return part

    def configure_losses(self) -> None:
        name, several = self.hparams["loss"], self.hparams["multi_label"]
        if name == "focal":
            self.loss: nn.Module = FocalLoss(to_onehot_y=not several, use_softmax=not several)
        else:
            self.loss = nn.BCEWithLogitsLoss() if several else nn.CrossEntropyLoss()

    def configure_metrics(self) -> None:
        super().configure_metrics()
        self.predicted = CatMetric(nan_strategy="disable")
        self.targets = CatMetric()

    def forward(self, volume: Tensor) -> Tensor:  # type: ignore[override]
        """Logits (N, classes) of volumes (N, in_channels, D, H, W)."""
        features = self.compute_features(self.backbone.encode, volume)
        pooled = pool(features)
        if self.linear and self.training:
            self.standardisation.update(self.gather(pooled))
        logits: Tensor = self.head(pooled)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of every class, float32."""
        logits = logits.float()
        return logits.sigmoid() if self.hparams["multi_label"] else logits.softmax(dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = {"total": self._loss(self(batch["image"]), batch["target"])}
        return self.training_loss(losses, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, target = self(batch["image"]), batch["target"]
        self.log_validation_loss(self._loss(logits, target), batch)
        self.predicted.update(self.probabilities(logits))
        if target.ndim == 1:
            target = nn.functional.one_hot(target, len(self.class_names))
        self.targets.update(target)

    def on_validation_epoch_end(self) -> None:
        """Log AUROC of every class that has both kinds of cases, and the mean over these."""
        # on a GPU the cumulative sum that AUROC takes is not deterministic
        predicted, targets = self.predicted.compute().cpu(), self.targets.compute().cpu()
        self.predicted.reset()
        self.targets.reset()
        scores = {
            name: score_class("auroc", one, true)
            for name, one, true in zip(self.class_names, predicted.T, targets.T, strict=True)
        }
        log_scores(self, "auroc", scores, "AUROC needs cases with and without the class")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``name``, ``probabilities`` (N, classes) and ``target`` of labelled volumes."""
        probabilities = self.probabilities(self(batch["image"]))
        return {
            "name": batch["name"],
            "probabilities": probabilities.cpu(),
            "target": batch["target"].cpu(),
        }

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``name`` and ``probabilities`` (N, classes), or the ``error`` of unreadable volumes."""
        if "error" in batch:
            return {"name": batch["name"], "error": batch["error"]}
        return {
            "name": batch["name"],
            "probabilities": self.probabilities(self(batch["image"])).cpu(),
        }

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            focal = isinstance(self.loss, FocalLoss)
            column = focal and not self.hparams["multi_label"]
            loss: Tensor = self.loss(logits.float(), target[:, None] if column else target)
            return loss
