"""Data modules: from files, or from nothing, to batches."""

from gvsl_lightning.datamodules.base import PairDataModule, PairDataset, PairSampler
from gvsl_lightning.datamodules.decathlon import Decathlon
from gvsl_lightning.datamodules.phantom import Phantom
from gvsl_lightning.datamodules.pretrain import PretrainDataModule

__all__ = [
    "Decathlon",
    "PairDataModule",
    "PairDataset",
    "PairSampler",
    "Phantom",
    "PretrainDataModule",
]
