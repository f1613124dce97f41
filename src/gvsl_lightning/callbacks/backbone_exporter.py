"""The pre-trained backbone as a file, at the end of a run."""

import copy
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy

from gvsl_lightning.nn.backbones import Backbone, build_backbone
from gvsl_lightning.runs.folder import run_folder
from gvsl_lightning.runs.loggers import wandb_loggers
from gvsl_lightning.weights import load_backbone_weights, save_backbone


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
    settings: dict[str, Any] = getattr(datamodule, "preparation_settings", dict)()
    # as a description of the data set says, where an option is None
    card |= {name: value for name, value in settings.items() if value is not None}
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if isinstance(dataset, Sized):
        card["training_items"] = len(dataset)
    return card


def _described(component: pl.LightningModule | pl.LightningDataModule) -> dict[str, Any]:
    """Class and hyper-parameters, without what the command line adds to them."""
    options = {name: value for name, value in component.hparams.items() if not name.startswith("_")}
    return {"class": type(component).__name__, **options}
