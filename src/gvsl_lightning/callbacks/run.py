"""Callbacks of a pre-training run."""

import copy
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim import Optimizer

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.matching_figures import draw_displacement, draw_matching
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.checkpoints import SafeCheckpointIO
from gvsl_lightning.runs.files import remove_partials, save_figure
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.loggers import log_figure, wandb_loggers
from gvsl_lightning.tasks.base import gradient_norm, is_log_step, parts_of
from gvsl_lightning.tasks.gvsl import GVSL
from gvsl_lightning.tasks.pretraining import RestorationTask
from gvsl_lightning.weights import load_backbone_weights, save_backbone


class MatchingFigure(pl.Callback):
    """Draws validation pairs after validation: matching, displacement and restoration.

    Writes ``figures/matching_step=000300.png`` and, of a task that matches, ``displacement_...png``
    into the run's folder and hands them to a W&B or TensorBoard logger. The pairs are the first
    ones of the validation data; without ``fixed_corrupted`` in a batch, the volume itself is
    restored. At the end of training, the final state is drawn whatever ``every_n_epochs`` is.

    Args:
        every_n_epochs: epochs from one figure to the next; 1: at every validation.
        num_pairs: pairs in a figure.

    Attributes:
        last_path: the newest figure of the matching, once there is one.

    Raises:
        InputError: if an argument is below 1, or the task neither matches nor restores.
    """

    def __init__(self, every_n_epochs: int = 1, num_pairs: int = 2) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("num_pairs", num_pairs)):
            if value < 1:
                raise InputError(f"MatchingFigure got {name}={value}: give 1 or more.")
        self.every_n_epochs = every_n_epochs
        self.num_pairs = num_pairs
        self.last_path: Path | None = None
        self._folder = Path()
        self._pairs: list[dict[str, Any]] = []
        self._drawn_step = -1
        self._drawn_epoch = -every_n_epochs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        if not isinstance(pl_module, GVSL | RestorationTask):
            raise InputError(
                f"MatchingFigure draws what GVSL matches and what a restoration restores, and "
                f"{type(pl_module).__name__} does neither: remove it from trainer.callbacks."
            )
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
        shared = set.intersection(*(set(tensors) for tensors, _ in drawn))
        tensors: dict[str, Any] = {
            name: torch.cat([one[name] for one, _ in drawn]) for name in shared
        }
        described: dict[str, Any] = {
            "names": [
                f"{pair['moving_name'][0]} onto {pair['fixed_name'][0]}"
                for pair in self._pairs
                if "fixed_name" in pair
            ],
            "title": f"epoch {epoch}, step {trainer.global_step}",
        }
        figures = {
            "matching": draw_matching(
                **tensors, scores=[scores for _, scores in drawn], **described
            )
        }
        if "coordinates" in tensors:
            figures["displacement"] = draw_displacement(
                tensors["fixed"], tensors["coordinates"], **described
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            path = self._folder / f"{name}_step={trainer.global_step:06d}.png"
            save_figure(figure, path, dpi=100)
            log_figure(trainer, name, path, figure)
        self.last_path = self._folder / f"matching_step={trainer.global_step:06d}.png"


class ResumableCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, for runs that are interrupted.

    With ``save_last``, ``last.ckpt`` is written whenever a checkpoint is due. Lightning writes it
    only beside a new best one, and a run that resumed from it would go back to that.

    It remembers the best of a run that resumes elsewhere. A resumed run has a folder of its own,
    and Lightning forgets the best score with the folder: a worse checkpoint would count as the
    best. An earlier folder's files are left as they are.

    Files are written as a whole and compared with their checksums when they are read, see
    :class:`gvsl_lightning.runs.checkpoints.SafeCheckpointIO`; before each one, loggers write what
    they hold, so that ``metrics.csv`` has all steps of a run that was killed and resumed.

    It lets a SLURM job that is to be requeued finish its step. Lightning saves and requeues when
    the signal SIGUSR1 arrives, in whatever a process is doing then; here all processes do so
    together after the step, and the validation that follows it, in which the first of them gets
    the signal, so that the requeued run equals the unbroken one.

    Raises:
        InputError: when it should save, if what it monitors is not logged.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write and read by :class:`gvsl_lightning.runs.checkpoints.SafeCheckpointIO`."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()
        folder = run_folder(trainer)
        if stage == "fit" and trainer.is_global_zero and folder.name.startswith("version_"):
            for run in folder.parent.glob("version_*"):  # all of this name
                remove_partials(run)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let loggers write what came before: a run that resumes from here does not log it."""
        for logger in trainer.loggers:
            logger.save()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The same with a step that is logged after its checkpoint was written."""
        if trainer.global_step == self._last_global_step_saved:
            for logger in trainer.loggers:
                logger.save()

    _requeue: Callable[[int, FrameType | None], Any] | None = None
    _signalled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signal from Lightning in a SLURM job that is requeued."""
        super().on_train_start(trainer, pl_module)
        self._requeue = None
        if SLURMEnvironment.detect():
            handler = signal.getsignal(signal.SIGUSR1)
            if callable(handler):
                self._requeue = handler
                signal.signal(signal.SIGUSR1, self._note_signal)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save, as Lightning does; then requeue, unless a validation comes first."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._requeue_if_signalled(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores wherever their files lie, if the best one is still there."""
        if Path(state_dict.get("best_model_path", "")).is_file():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, as Lightning does, but the last one too; then requeue."""
        with self._in_one_sentence(trainer):
            super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)
        self._requeue_if_signalled(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, as Lightning does, but the last one too."""
        with self._in_one_sentence(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        # the first is true where this step has been saved
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _requeue_if_signalled(self, trainer: pl.Trainer) -> None:
        if self._requeue is None:
            return
        if trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            self._signalled = False
            self._requeue(signal.SIGUSR1, None)

    @contextmanager
    def _in_one_sentence(self, trainer: pl.Trainer) -> Iterator[None]:
        try:
            yield
        except MisconfigurationException as error:
            if self.monitor is None or self.monitor in trainer.callback_metrics:
                raise
            raise InputError(
                f"{type(self).__name__} monitors {self.monitor}, which is not logged; choose one "
                f"of {', '.join(sorted(trainer.callback_metrics))}."
            ) from error


class BackboneExporter(pl.Callback):
    """Writes ``backbone.safetensors`` and its card into the run's folder at the end of fit.

    The weights are those of the best checkpoint where a ``ModelCheckpoint`` kept one, else the
    last ones; the card says which. Nothing is written in ``fast_dev_run``.

    Attributes:
        last_path: the exported file, once there is one.
    """

    def __init__(self) -> None:
        self.last_path: Path | None = None
        self._folder = Path()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder, on all ranks together."""
        self._folder = run_folder(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export; by now every checkpoint is written."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        backbone = _whole_backbone(trainer, cast(Backbone, pl_module.backbone))
        if not trainer.is_global_zero:
            return
        seed = os.environ.get("PL_GLOBAL_SEED")
        card: dict[str, Any] = {
            "task": _described(pl_module),
            "data": _data_card(trainer),
            "seed": None if seed is None else int(seed),
            "weights": "end of training",
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
        }
        best = _best_checkpoint(trainer)
        if best is not None:
            checkpoint, score = best
            path = checkpoint.best_model_path
            load_backbone_weights(backbone, path)
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            card |= {
                "weights": f"best checkpoint by {checkpoint.monitor}",
                "steps": saved["global_step"],
                "epochs": saved["epoch"] + 1,
                "score": score,
            }
        loggers = wandb_loggers(trainer)
        if loggers:
            card["wandb"] = loggers[0].describe("backbone")
        self.last_path = save_backbone(backbone, self._folder / "backbone.safetensors", card)
        for logger in loggers:
            files = [self.last_path, self.last_path.with_suffix(".json")]
            logger.log_files("backbone", files, metadata=card)
        print(f"Backbone ({card['weights']}, step {card['steps']}): {self.last_path}")


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


class GradientNorms(pl.Callback):
    """Logs the gradient's norm for each part of the model, before clipping.

    ``train/grad_norm_backbone``, ``_affine_head``, ``_deformable_head``, ``_restoration_head``: one
    value for each child module, the two parts of a ``ZMatchingHead`` apart; Euclidean norm over all
    parameters that have a gradient. Computed only on steps that the trainer logs.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Log on the trainer's log steps."""
        if not is_log_step(trainer):
            return
        for name, part in parts_of(pl_module).items():
            norm = gradient_norm(part)
            if norm is not None:
                pl_module.log(
                    f"train/grad_norm_{name}", norm, on_step=True, on_epoch=True, batch_size=1
                )


_TENSORS = ("fixed", "fixed_corrupted", "moving", "fixed_label", "moving_label")
_NAMES = ("fixed_name", "moving_name")


def _evaluate_pair(
    trainer: pl.Trainer, task: GVSL | RestorationTask, pair: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors for :func:`draw_matching`, and scores, of a batch of one pair."""
    tensors = {name: pair[name].to(task.device) for name in _TENSORS if name in pair}
    corrupted = tensors.pop("fixed_corrupted", tensors["fixed"])
    scores: dict[str, float] = {}
    precision = trainer.strategy.precision_plugin
    if isinstance(task, RestorationTask):
        tensors["corrupted"] = task.views_of({"image": tensors["fixed"]})["corrupted"]
        with precision.forward_context():
            tensors["restored"] = task.restore(precision.convert_input(tensors["corrupted"]))
        return tensors, scores
    if task.matching_head is not None:
        with precision.forward_context():
            matching = task.match(*precision.convert_input((tensors["fixed"], tensors["moving"])))
        scores = {name: float(value) for name, value in task.measure(tensors, matching).items()}
        tensors["coordinates"] = geometry.compose(*matching, order=task.hparams["composition"])
    if task.restoration_head is not None:
        tensors["corrupted"] = corrupted
        with precision.forward_context():
            tensors["restored"] = task.restore(precision.convert_input(corrupted))
    return tensors, scores


def _best_checkpoint(trainer: pl.Trainer) -> tuple[ModelCheckpoint, float] | None:
    """The first checkpoint callback whose best file is there, and that file's score."""
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint) and Path(checkpoint.best_model_path).is_file():
            score = checkpoint.best_model_score
            if score is not None:
                return checkpoint, float(score)
    return None


def _whole_backbone(trainer: pl.Trainer, backbone: Backbone) -> Backbone:
    """A copy on the CPU; to be called in every process, complete in the first."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return copy.deepcopy(backbone).cpu()
    # slow to import
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(backbone, options=whole)
    rebuilt = build_backbone(backbone.name, backbone.in_channels, **backbone.options)
    if weights:
        rebuilt.load_state_dict(weights)
    return rebuilt


def _data_card(trainer: pl.Trainer) -> dict[str, Any]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    card = {} if datamodule is None else _described(datamodule)
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if isinstance(dataset, Sized):
        card["training_items"] = len(dataset)
    return card


def _described(component: pl.LightningModule | pl.LightningDataModule) -> dict[str, Any]:
    """Class and hyper-parameters, without what the command line adds to them."""
    options = {name: value for name, value in component.hparams.items() if not name.startswith("_")}
    return {"class": type(component).__name__, **options}
