"""Data modules: from files, or from nothing, to batches."""

from gvsl_lightning.datamodules.cases import CaseDataModule
from gvsl_lightning.datamodules.classification_cases import (
    ClassificationDataModule,
    ClassifiedVolumes,
    PhantomClassification,
)
from gvsl_lightning.datamodules.decathlon import Decathlon, DecathlonSegmentation
from gvsl_lightning.datamodules.pairs import PairDataModule, PairDataset, PairSampler
from gvsl_lightning.datamodules.phantom import Phantom
from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.datamodules.published.asoca import ASOCA
from gvsl_lightning.datamodules.published.candi import CANDI
from gvsl_lightning.datamodules.published.cardiac_ct import CardiacCT
from gvsl_lightning.datamodules.published.mmwhs import MMWHS
from gvsl_lightning.datamodules.published.stoic import STOIC
from gvsl_lightning.datamodules.registration import RegistrationDataModule
from gvsl_lightning.datamodules.segmentation_cases import (
    LabelledVolumes,
    PhantomSegmentation,
    SegmentationDataModule,
)
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
