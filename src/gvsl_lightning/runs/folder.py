"""The folder of a run and the folders in it."""

from pathlib import Path

import pytorch_lightning as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """Folder of one run, which holds ``checkpoints``; it need not exist yet.

    Unlike ``trainer.log_dir`` it is the run's own with a W&B logger too, which shares its
    ``save_dir`` among runs. Call it on all ranks, from ``setup`` on.
    """
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder, str(logger.name), version)
    return trainer.strategy.broadcast(folder)


def output_folder(trainer: pl.Trainer, folder: str | None, name: str) -> Path:
    """Folder for the files of a callback: the user's, or else ``name`` in :func:`run_folder`."""
    return run_folder(trainer) / name if folder is None else Path(folder).expanduser()
