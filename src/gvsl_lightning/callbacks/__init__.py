"""What a run shows and leaves behind: figures, the backbone, gradient norms and a last line."""

from gvsl_lightning.callbacks.drawing import draw_cases, draw_matching
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
    run_folder,
)

__all__ = [
    "BackboneExporter",
    "ClassificationReport",
    "GradientNorms",
    "MatchingFigure",
    "PredictionWriter",
    "RegistrationWriter",
    "ResumableCheckpoint",
    "RunSummary",
    "SegmentationReport",
    "draw_cases",
    "draw_matching",
    "run_folder",
]
