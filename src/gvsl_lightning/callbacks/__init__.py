"""What a run shows and leaves behind: figures, tables, volumes, the backbone and a last line."""

from gvsl_lightning.callbacks.online import FeatureFigure, OnlineProbe
from gvsl_lightning.callbacks.registration import RegistrationWriter
from gvsl_lightning.callbacks.results import (
    ClassificationReport,
    PredictionWriter,
    SegmentationReport,
)
from gvsl_lightning.callbacks.run import (
    BackboneExporter,
    GradientNorms,
    MatchingFigure,
    ResumableCheckpoint,
    RunSummary,
)
from gvsl_lightning.evaluation.case_figures import draw_cases
from gvsl_lightning.evaluation.feature_figures import draw_embedding, draw_features
from gvsl_lightning.evaluation.matching_figures import draw_displacement, draw_matching
from gvsl_lightning.runs.folder import run_folder

__all__ = [
    "BackboneExporter",
    "ClassificationReport",
    "FeatureFigure",
    "GradientNorms",
    "MatchingFigure",
    "OnlineProbe",
    "PredictionWriter",
    "RegistrationWriter",
    "ResumableCheckpoint",
    "RunSummary",
    "SegmentationReport",
    "draw_cases",
    "draw_displacement",
    "draw_embedding",
    "draw_features",
    "draw_matching",
    "run_folder",
]
