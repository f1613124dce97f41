"""LightningModules: one file for each way of training."""

from gvsl_lightning.tasks.base import BaseTask
from gvsl_lightning.tasks.classification import Classification
from gvsl_lightning.tasks.gvsl import GVSL
from gvsl_lightning.tasks.segmentation import Segmentation
from gvsl_lightning.tasks.transfer import TransferTask

__all__ = ["GVSL", "BaseTask", "Classification", "Segmentation", "TransferTask"]
