"""The last line that a run prints."""

import pytorch_lightning as pl

from gvsl_lightning.callbacks.backbone_exporter import BackboneExporter
from gvsl_lightning.callbacks.matching_figure import MatchingFigure


class RunSummary(pl.Callback):
    """Prints one line at the end of fit: how it went, and where the results are.

    Matching before and after; without matching, the validation loss and whether features collapse.
    """

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print; the last hook, so that the order of the callbacks does not matter."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [
            f"{title} {metrics[before]:.3f} -> {metrics[after]:.3f}"
            for title, before, after in (
                ("NCC", "val/ncc_before", "val/ncc_after"),
                ("Dice", "val/dice_before", "val/dice_after"),
            )
            if before in metrics and after in metrics
        ]
        if not parts:
            parts = [
                f"{title} {metrics[name]:.3f}"
                for title, name in (
                    ("validation loss", "val/loss"),
                    ("spread of the features", "val/feature_std"),
                    ("their effective rank", "val/effective_rank"),
                )
                if name in metrics
            ]
        if "val/folded" in metrics:
            parts.append(f"{100 * metrics['val/folded']:.2f} % of voxels folded")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MatchingFigure | BackboneExporter) and callback.last_path:
                kind = "figure" if isinstance(callback, MatchingFigure) else "backbone"
                parts.append(f"{kind} {callback.last_path}")
            # a FeatureFigure's, whose module imports this one
            parts += [f"figure {path}" for path in getattr(callback, "last_paths", ())]
        print(f"{trainer.global_step} steps: {', '.join(parts) or 'no validation'}")
