"""Data modules: from files, or from nothing, to batches."""

from gvsl_lightning.datamodules.asoca import ASOCA
from gvsl_lightning.datamodules.base import PairDataModule, PairDataset, PairSampler
from gvsl_lightning.datamodules.candi import CANDI
from gvsl_lightning.datamodules.cardiac_ct import CardiacCT
from gvsl_lightning.datamodules.cases import CaseDataModule
from gvsl_lightning.datamodules.classification import (
    ClassificationDataModule,
    ClassifiedVolumes,
    PhantomClassification,
)
from gvsl_lightning.datamodules.decathlon import Decathlon, DecathlonSegmentation
from gvsl_lightning.datamodules.mmwhs import MMWHS
from gvsl_lightning.datamodules.phantom import Phantom
from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.datamodules.registration import RegistrationDataModule
from gvsl_lightning.datamodules.segmentation import (
    LabelledVolumes,
    PhantomSegmentation,
    SegmentationDataModule,
)
from gvsl_lightning.datamodules.stoic import STOIC
from gvsl_lightning.datamodules.stream import StreamDataModule

__all__ = [
    "ASOCA",
    "CANDI",
    "MMWHS",
    "STOIC",
    "CardiacCT",
    "CaseDataModule",
    "ClassificationDataModule",
    "ClassifiedVolumes",
    "Decathlon",
    "DecathlonSegmentation",
    "LabelledVolumes",
    "PairDataModule",
    "PairDataset",
    "PairSampler",
    "Phantom",
    "PhantomClassification",
    "PhantomSegmentation",
    "PretrainDataModule",
    "RegistrationDataModule",
    "SegmentationDataModule",
    "StreamDataModule",
]
