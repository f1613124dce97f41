"""Norms of the gradient, part by part."""

import pytorch_lightning as pl
from torch.optim import Optimizer

from gvsl_lightning.runs.gradients import gradient_norms
from gvsl_lightning.tasks.base import is_log_step


class GradientNorms(pl.Callback):
    """Logs the gradient's norm for each part of the model, before clipping.

    ``train/grad_norm_backbone``, ``_affine_head``, ``_deformable_head``, ``_restoration_head``, see
    :func:`gvsl_lightning.runs.gradients.gradient_norms`. Computed only on steps that the trainer
    logs.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not is_log_step(trainer):
            return
        for name, norm in gradient_norms(pl_module).items():
            pl_module.log(f"train/grad_norm_{name}", norm, batch_size=1)
