"""How far a run is: a bar over its steps, and a short table of the model's parts."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichModelSummary, RichProgressBar
from rich.console import Console
from rich.table import Table


class StepBar(RichProgressBar):
    """Lightning's bar over the steps of the whole run, so that its remaining time is the run's.

    It shows the loss and the newest validation scores, that of the task's ``monitor`` among them.
    Lightning's own counts the batches of an epoch.
    """

    _scores: Mapping[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.progress is not None:
            total = trainer.estimated_stepping_batches
            self.train_progress_bar_id = self.progress.add_task(
                # as wide as the word for a validation, whose bar appears below
                f"{'Training':{len(self.validation_description)}}",
                total=total,
                completed=trainer.global_step,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the bar of the run."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the monitored score on all ranks, as reading it may wait for all of them."""
        score, _ = getattr(pl_module, "monitor", None) or ("", "")
        if score in trainer.callback_metrics:
            self._scores = {score: float(trainer.callback_metrics[score])}
        super().on_validation_end(trainer, pl_module)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, **self._scores}


class PartsTable(RichModelSummary):
    """Prints the parts of a model with their parameters, before training."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        columns = dict(summary_data)
        table = Table(header_style="bold")
        table.add_column("part")
        table.add_column("type")
        table.add_column("parameters", justify="right")
        for name, kind, count in zip(
            columns["Name"], columns["Type"], columns["Params"], strict=True
        ):
            if count.strip() != "0":
                table.add_row(name, kind, count)
        console = Console()
        console.print(table)
        frozen = total_parameters - trainable_parameters
        fixed = f", {frozen:,} of them fixed" if frozen else ""
        console.print(f"{total_parameters:,} parameters{fixed}", highlight=False)
