"""Checks and settings of a command before it builds or runs anything."""

import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
    RichModelSummary,
    RichProgressBar,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

from gvsl_lightning.callbacks import PartsTable, ResumableCheckpoint, StepBar
from gvsl_lightning.callbacks.run_config import is_anonymous
from gvsl_lightning.datamodules import CaseDataModule, PairDataModule, RegistrationDataModule
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.checkpoints import check_checkpoint
from gvsl_lightning.runs.loggers import VersionedWandbLogger, read_wandb_run
from gvsl_lightning.tasks.base import BaseTask
from gvsl_lightning.tasks.transfer import TransferTask
from gvsl_lightning.weights import read_checkpoint, require_entries


def refuse_secrets(config: Namespace) -> None:
    """Refuse options that hold a secret, which all files of a run would hold then.

    Raises:
        InputError: if an option holds the value of an environment variable named like a secret.
    """
    secrets = {n: value for n, value in os.environ.items() if _SECRET.search(n) and len(value) > 7}
    for key, value in vars(config.as_flat()).items():
        for name, secret in secrets.items():
            if secret in str(value):
                raise InputError(
                    f"{key} holds the value of the environment variable {name}, which the run's "
                    "files would hold, too; leave it out."
                )


def require_run(path: Path, model: Any, fits: bool) -> None:
    """Refuse a damaged checkpoint, and one of no run or of another model.

    Lightning would take the checkpoint's class without a word.

    Args:
        path: of the checkpoint.
        model: configuration of the model.
        fits: whether the training goes on from the checkpoint.
    """
    check_checkpoint(path)
    content = read_checkpoint(path, mmap=True)
    keys = ("hyper_parameters", "state_dict")
    parts = [content.get(key) for key in keys] if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(
            f"{path} is no checkpoint of a run, from which --ckpt_path goes on; give one, or "
            "pre-trained weights as --model.weights."
        )
    if fits and not {"optimizer_states", "loops"} <= content.keys():
        raise InputError(
            f"{path} holds weights without the state of the training, so that fit cannot go on "
            "from it; give another checkpoint, or leave --ckpt_path out."
        )
    trained = str(content["hyper_parameters"].get("_class_path", "")).rpartition(".")[2]
    wanted = model.class_path.rpartition(".")[2]
    if trained not in ("", wanted):
        takes_weights = "weights" in (model.get("init_args") or {})
        start = f", or --model.weights={path} to start from its backbone"
        raise InputError(
            f"{path} is a checkpoint of {trained} and the model is {wanted}; give one of {wanted}"
            f"{start * takes_weights}."
        )


def settle_run(config: Namespace, command: str, words: Sequence[str], path: str | None) -> None:
    """Settle folders, W&B's run and callbacks in the configuration of a command.

    In a SLURM job, the folder where Lightning leaves and looks for the checkpoint of a requeued
    ``fit`` becomes one of this command in this job, unless ``trainer.default_root_dir`` is given:
    in the working directory, Lightning's default, it would take that of any other.

    A resumed ``fit`` goes on with W&B's run of its checkpoint, a requeued one with that of its job.
    ``predict`` measures nothing and starts no run of W&B.

    Args:
        config: of the command; changed in place.
        command: fit, validate, test or predict.
        words: of the command line.
        path: of the checkpoint, if a file is given.
    """
    run_id = None
    job = SLURMEnvironment.job_id() if SLURMEnvironment.detect() else None
    if command == "fit" and job:
        run_id = f"{job}-{zlib.crc32(' '.join(words).encode()):08x}"
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path("runs", "slurm", run_id))
    if command == "fit" and path:
        run_id = read_wandb_run(Path(path)).get("id") or run_id
    logger = config.trainer.logger
    for one in logger if isinstance(logger, list) else [logger]:
        if _is(one, VersionedWandbLogger):
            _settle_logger(one, command, run_id, is_anonymous(config))
    if isinstance(config.trainer.callbacks, list):  # not a single one
        off = [kinds for option, kinds in _NEEDED.items() if config.trainer[option] is False]
        refused = [kind for kinds in off for kind in kinds]
        config.trainer.callbacks = [
            one for one in config.trainer.callbacks if not any(_is(one, kind) for kind in refused)
        ]


def check_inputs(
    model: pl.LightningModule, data: pl.LightningDataModule, command: str, path: str | None
) -> None:
    """Check checkpoint (a file or a URL), weights and data before loggers start a run.

    Volumes that are to be downloaded, or fetched by a ``prepare_data`` of another package, and
    weights in a SLURM job, which may have been requeued and need none, are checked later.

    Raises:
        InputError: if one is missing or does not fit.
    """
    untrained = isinstance(model, BaseTask) and not model.hparams.get("head_from_weights")
    if command == "predict" and not path and untrained:
        raise InputError("predict needs a trained model; add --ckpt_path=CHECKPOINT.")
    if path in ("", "best"):
        raise InputError(f"--ckpt_path is {path!r}; give the path of a checkpoint.")
    if path and "://" in path:
        _require_reachable(path)
    elif path and Path(path).is_file():
        require_entries(Path(path), model)
    elif not path and isinstance(model, TransferTask) and not SLURMEnvironment.detect():
        model.load_weights()
    is_own = isinstance(data, CaseDataModule | PairDataModule | RegistrationDataModule)
    prepares = type(data).prepare_data.__module__.partition(".")[0]
    fetches = getattr(data, "download", False) or prepares not in _OURS
    if is_own and not fetches:
        data.setup(command)
        if isinstance(model, TransferTask):
            model.check_classes(data)
        wanted = model.hparams.get("in_channels")
        channels = getattr(data, "channels", wanted)
        if wanted is not None and channels != wanted:
            raise InputError(
                f"in_channels of the model is {wanted} and channels of the data {channels}; make "
                "them equal."
            )


_OURS = ("gvsl_lightning", "pytorch_lightning")
"""Packages whose data modules are looked at before they prepare anything."""

_SECRET = re.compile("(API_?KEY|TOKEN|SECRET|PASSWORD)$")
"""Environment variables that hold secrets."""

_NEEDED = {
    "logger": (LearningRateMonitor,),
    "enable_progress_bar": (StepBar, RichProgressBar),
    "enable_model_summary": (PartsTable, RichModelSummary),
    "enable_checkpointing": (ResumableCheckpoint,),
}
"""Option of the trainer -> callbacks that the trainer refuses where the option is false."""


def _settle_logger(logger: Any, command: str, run_id: str | None, is_private: bool) -> None:
    options = logger.init_args
    options.private = options.private or is_private
    if command == "predict":
        logger.class_path = f"{CSVLogger.__module__}.{CSVLogger.__name__}"
        kept = {name: options[name] for name in ("save_dir", "name", "version")}
        logger.init_args = Namespace(**kept)  # type: ignore[no-untyped-call]
    elif command != "fit":
        options.job_type = command
    elif options.id is None and not os.environ.get("WANDB_RUN_ID"):
        options.id = run_id


def _require_reachable(url: str) -> None:
    try:
        with fsspec.open(url):
            pass
    except Exception as error:  # of the package that reads it, and of the network
        raise InputError(
            f"{url} cannot be read ({cause_of(error)}); check the address, your credentials and "
            "the network."
        ) from error


def _is(spec: Any, kind: type) -> bool:
    """Whether a setting is an object of a class."""
    return isinstance(spec, Namespace) and spec.class_path.endswith(f".{kind.__name__}")
