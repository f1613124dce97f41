"""LightningModules: one file for each way of training."""

from gvsl_lightning.tasks.base import BaseTask
from gvsl_lightning.tasks.gvsl import GVSL

__all__ = ["GVSL", "BaseTask"]
