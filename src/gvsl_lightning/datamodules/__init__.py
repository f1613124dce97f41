"""Data modules: from files, or from nothing, to batches."""

from gvsl_lightning.datamodules.base import PairDataModule, PairDataset, PairSampler

__all__ = ["PairDataModule", "PairDataset", "PairSampler"]
