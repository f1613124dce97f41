"""Callbacks: progress, figures, tables, volumes, the exported backbone and a last line."""

from gvsl_lightning.callbacks.backbone_exporter import BackboneExporter
from gvsl_lightning.callbacks.classification_report import ClassificationReport
from gvsl_lightning.callbacks.curves import Curves
from gvsl_lightning.callbacks.gradient_norms import GradientNorms
from gvsl_lightning.callbacks.matching_figure import MatchingFigure
from gvsl_lightning.callbacks.online import FeatureFigure, OnlineProbe
from gvsl_lightning.callbacks.prediction_writer import PredictionWriter
from gvsl_lightning.callbacks.progress import PartsTable, StepBar
from gvsl_lightning.callbacks.registration_writer import RegistrationWriter
from gvsl_lightning.callbacks.resumable_checkpoint import ResumableCheckpoint
from gvsl_lightning.callbacks.run_summary import RunSummary, TransferSummary
from gvsl_lightning.callbacks.segmentation_report import SegmentationReport
from gvsl_lightning.evaluation.case_figures import draw_cases
from gvsl_lightning.evaluation.feature_figures import draw_embedding, draw_features
from gvsl_lightning.evaluation.matching_figures import draw_displacement, draw_matching
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.non_finite import NonFiniteGuard
from gvsl_lightning.runs.seeding import BatchSeeding

__all__ = [
    "BackboneExporter",
    "BatchSeeding",
    "ClassificationReport",
    "Curves",
    "FeatureFigure",
    "GradientNorms",
    "MatchingFigure",
    "NonFiniteGuard",
    "OnlineProbe",
    "PartsTable",
    "PredictionWriter",
    "RegistrationWriter",
    "ResumableCheckpoint",
    "RunSummary",
    "SegmentationReport",
    "StepBar",
    "TransferSummary",
    "draw_cases",
    "draw_displacement",
    "draw_embedding",
    "draw_features",
    "draw_matching",
    "run_folder",
]
