"""The folder of a run and the folders in it."""

from pathlib import Path

import pytorch_lightning as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """Folder of one run: where Lightning puts the run's ``checkpoints`` folder.

    Unlike ``trainer.log_dir`` it is the run's own with a W&B logger too, which shares its
    ``save_dir`` among runs. Call it on all ranks, from ``setup`` on.

    Args:
        trainer: with or without loggers.

    Returns:
        The folder, which need not exist yet.
    """
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder, str(logger.name), version)
    return trainer.strategy.broadcast(folder)


def output_folder(trainer: pl.Trainer, folder: str | None, name: str) -> Path:
    """Folder for the files of a callback.

    Args:
        trainer: of the run; see :func:`run_folder`.
        folder: as the user gives it; None: a folder inside the run's.
        name: of the folder inside the run's.
    """
    return run_folder(trainer) / name if folder is None else Path(folder).expanduser()
