"""Figures of validation pairs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from gvsl_lightning.callbacks.reporting import require_task, write_figure
from gvsl_lightning.errors import check_range
from gvsl_lightning.evaluation.matching_figures import draw_displacement, draw_matching
from gvsl_lightning.nn import geometry
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.tasks.gvsl import GVSL
from gvsl_lightning.tasks.pretraining import RestorationTask


class MatchingFigure(pl.Callback):
    """Draws validation pairs after validation: matching, displacement and restoration.

    Writes ``figures/matching_step=000300.png`` and, of a task that matches, ``displacement_...png``
    into the run's folder and hands them to a W&B or TensorBoard logger. The pairs are the first
    ones of the validation data; the task corrupts them anew (``views_of``). At the end of training,
    the final state is drawn whatever ``every_n_epochs`` is.

    Args:
        every_n_epochs: epochs from one figure to the next; 1: at every validation.
        num_pairs: pairs in a figure.

    Attributes:
        last_path: the newest figure of the matching, once there is one.

    Raises:
        InputError: if an argument is below 1, or the task neither matches nor restores.
    """

    def __init__(self, every_n_epochs: int = 1, num_pairs: int = 2) -> None:
        check_range("every_n_epochs", every_n_epochs, 1)
        check_range("num_pairs", num_pairs, 1)
        self.every_n_epochs = every_n_epochs
        self.num_pairs = num_pairs
        self.last_path: Path | None = None
        self._folder = Path()
        self._pairs: list[dict[str, Any]] = []
        self._drawn_step = -1
        self._drawn_epoch = -every_n_epochs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        require_task(self, pl_module, GVSL, RestorationTask)  # type: ignore[type-abstract]
        self._folder = run_folder(trainer) / "figures"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the pairs of the validation before."""
        self._pairs = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first pairs, each as a batch of one."""
        if dataloader_idx > 0:
            return
        missing = self.num_pairs - len(self._pairs)
        for index in range(min(missing, len(batch["fixed"]))):
            one = slice(index, index + 1)
            self._pairs.append(
                {
                    name: batch[name][one].cpu() if name in _TENSORS else batch[name][one]
                    for name in (*_TENSORS, *_NAMES)
                    if name in batch
                }
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw when the epoch is due."""
        due = trainer.current_epoch - self._drawn_epoch >= self.every_n_epochs
        due = due or self.every_n_epochs == 1
        if not trainer.sanity_checking and (due or trainer.state.fn != TrainerFn.FITTING):
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final state, unless that has been done."""
        if self._drawn_step != trainer.global_step:
            self._draw(trainer, pl_module, max(trainer.current_epoch - 1, 0))

    def _draw(self, trainer: pl.Trainer, task: pl.LightningModule, epoch: int) -> None:
        if not self._pairs:
            return
        assert isinstance(task, GVSL | RestorationTask)
        training = task.training
        task.eval()
        with torch.no_grad():
            # in every process: where they share the parameters, none computes without the others
            drawn = [_evaluate_pair(trainer, task, pair) for pair in self._pairs]
        task.train(training)
        self._drawn_step = trainer.global_step
        self._drawn_epoch = epoch
        if not trainer.is_global_zero:
            return
        common = set.intersection(*(set(tensors) for tensors, _ in drawn))
        tensors: dict[str, Any] = {
            name: torch.cat([one[name] for one, _ in drawn]) for name in common
        }
        texts: dict[str, Any] = {
            "names": [
                f"{pair['moving_name'][0]} onto {pair['fixed_name'][0]}"
                for pair in self._pairs
                if "fixed_name" in pair
            ],
            "title": f"epoch {epoch}, step {trainer.global_step}",
        }
        scores = [one for _, one in drawn]
        figures = {"matching": draw_matching(**tensors, scores=scores, **texts)}
        if "coordinates" in tensors:
            fixed, coordinates = tensors["fixed"], tensors["coordinates"]
            figures["displacement"] = draw_displacement(fixed, coordinates, **texts)
        for name, figure in figures.items():
            path = self._folder / f"{name}_step={trainer.global_step:06d}.png"
            write_figure(trainer, name, path, figure, dpi=100)
        self.last_path = self._folder / f"matching_step={trainer.global_step:06d}.png"


_TENSORS = ("fixed", "moving", "fixed_label", "moving_label")
_NAMES = ("fixed_name", "moving_name")


def _evaluate_pair(
    trainer: pl.Trainer, task: GVSL | RestorationTask, pair: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors for :func:`draw_matching`, and scores, of a batch of one pair."""
    tensors = {name: pair[name].to(task.device) for name in _TENSORS if name in pair}
    scores: dict[str, float] = {}
    precision = trainer.strategy.precision_plugin
    if isinstance(task, GVSL) and task.matching_head is not None:
        with precision.forward_context():
            matching = task.match(*precision.convert_input((tensors["fixed"], tensors["moving"])))
        scores = {name: float(value) for name, value in task.measure(tensors, matching).items()}
        tensors["coordinates"] = geometry.compose(*matching, order=task.hparams["composition"])
    if task.restoration_head is not None:
        single = isinstance(task, RestorationTask)
        views = task.views_of({"image": tensors["fixed"]} if single else tensors)
        tensors["corrupted"] = views["corrupted"]
        with precision.forward_context():
            tensors["restored"] = task.restore(precision.convert_input(tensors["corrupted"]))
    return tensors, scores
