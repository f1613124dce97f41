"""Checkpoints of runs that are interrupted."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.checkpoints import SafeCheckpointIO
from gvsl_lightning.runs.files import remove_partials
from gvsl_lightning.runs.folder import run_folder


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
