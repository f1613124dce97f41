"""The configuration and the record of a run, in its folder, its checkpoints and W&B's run."""

from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import SaveConfigCallback

from gvsl_lightning.data.hashing import data_hash
from gvsl_lightning.runs.files import write_text
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.loggers import wandb_loggers
from gvsl_lightning.runs.privacy import hide_paths
from gvsl_lightning.runs.record import git_revision, package_versions, record_run


class RunConfig(SaveConfigCallback):
    """Saves ``config.yaml`` and ``record.yaml`` in the run's folder, every checkpoint and W&B.

    ``config.yaml`` is the full configuration. ``record.yaml`` holds the result of
    :func:`gvsl_lightning.runs.record.record_run`, and ``resumed_from``, the checkpoint that the run
    went on from. The command line adds this callback.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write ``config.yaml`` before training; a resumed run writes it anew."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._record: dict[str, Any] = (
            (record_run(trainer, data_hash(datamodule)) if trainer.is_global_zero else {})
            if stage == "fit"
            else {"git_revision": git_revision(), "versions": package_versions()}
        )
        folder = run_folder(trainer)
        # without a logger, a run has no folder of its own
        if stage == "fit" and trainer.is_global_zero and trainer.loggers:
            write_text(folder / self.config_filename, self._config_text())
        if trainer.is_global_zero:
            known = {**yaml.safe_load(self._config_text()), **self._record}
            for logger in wandb_loggers(trainer):
                logger.experiment.config.update(known, allow_val_change=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``record.yaml``; only now Lightning knows which checkpoint was resumed."""
        path = trainer.ckpt_path
        self._record["resumed_from"] = None if path is None else str(path)
        folder = run_folder(trainer)
        if trainer.is_global_zero and trainer.loggers:
            write_text(folder / "record.yaml", yaml.safe_dump(self._record, sort_keys=False))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the configuration as text under ``config``, the record, and the name of W&B's run.

        Args:
            trainer: of the run.
            pl_module: its task.
            checkpoint: gets the entries ``config``, ``preparation`` of the volumes, ``record`` and
                ``wandb``.
        """
        checkpoint["config"] = self._config_text()
        settings = getattr(trainer.datamodule, "preparation_settings", dict)  # type: ignore[attr-defined]
        checkpoint["preparation"] = settings()
        checkpoint["record"] = self._record
        for logger in wandb_loggers(trainer):
            checkpoint["wandb"] = logger.describe("checkpoint")

    def _config_text(self) -> str:
        text = str(self.parser.dump(self.config, skip_none=False))
        if not is_anonymous(self.config):
            return text
        content: dict[str, Any] = yaml.safe_load(text)
        content["data"]["init_args"] = hide_paths(content["data"]["init_args"])
        return str(yaml.safe_dump(content, sort_keys=False))


def is_anonymous(config: Any) -> bool:
    """Whether the data of a configuration has the option ``anonymise`` switched on."""
    data = config.get("data")
    return bool(data and (data.get("init_args") or {}).get("anonymise"))
