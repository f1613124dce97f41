"""LightningModules: one file for each way of training."""

from gvsl_lightning.tasks.base import BaseTask
from gvsl_lightning.tasks.byol import BYOL
from gvsl_lightning.tasks.classification import Classification
from gvsl_lightning.tasks.context_encoder import ContextEncoder
from gvsl_lightning.tasks.deep_cluster import DeepCluster
from gvsl_lightning.tasks.denoising import Denoising
from gvsl_lightning.tasks.gvsl import GVSL
from gvsl_lightning.tasks.masked_autoencoder import MaskedAutoencoder
from gvsl_lightning.tasks.models_genesis import ModelsGenesis
from gvsl_lightning.tasks.pretraining import PretrainTask, RestorationTask
from gvsl_lightning.tasks.released import DetachedGVSL
from gvsl_lightning.tasks.rotation import Rotation
from gvsl_lightning.tasks.segmentation import Segmentation
from gvsl_lightning.tasks.simclr import SimCLR
from gvsl_lightning.tasks.simsiam import SimSiam
from gvsl_lightning.tasks.transfer import TransferTask
from gvsl_lightning.tasks.voco import VoCo

__all__ = [
    "BYOL",
    "GVSL",
    "BaseTask",
    "Classification",
    "ContextEncoder",
    "DeepCluster",
    "Denoising",
    "DetachedGVSL",
    "MaskedAutoencoder",
    "ModelsGenesis",
    "PretrainTask",
    "RestorationTask",
    "Rotation",
    "Segmentation",
    "SimCLR",
    "SimSiam",
    "TransferTask",
    "VoCo",
]
