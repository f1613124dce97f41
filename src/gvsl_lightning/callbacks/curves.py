"""The curves of a run as a picture."""

import pytorch_lightning as pl

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.run_curves import draw_run
from gvsl_lightning.runs.files import read_metrics, save_figure
from gvsl_lightning.runs.folder import run_folder


class Curves(pl.Callback):
    """Draws ``curves.png`` in the folder of the run at each validation, from its tables.

    It needs a logger that writes ``metrics.csv``, and draws nothing without one.
    """

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            rows = read_metrics(folder)
        except InputError:
            return
        figure = draw_run(rows)
        if figure is not None:
            save_figure(figure, folder / "curves.png", dpi=100)
