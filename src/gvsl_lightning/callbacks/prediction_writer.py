"""Predicted label maps as NIfTI files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BasePredictionWriter

from gvsl_lightning.callbacks.manifest import Manifest, model_hash
from gvsl_lightning.callbacks.prediction_errors import raise_prediction_errors
from gvsl_lightning.callbacks.reporting import require_task
from gvsl_lightning.data.find import require_apart
from gvsl_lightning.data.read import write_volume
from gvsl_lightning.data.source import Source, VolumeFile
from gvsl_lightning.runs.files import remove_partials, require_writable
from gvsl_lightning.runs.folder import output_folder
from gvsl_lightning.runs.gathering import gather_dict
from gvsl_lightning.tasks.segmentation import Segmentation


class PredictionWriter(BasePredictionWriter):
    """Writes predicted label maps as NIfTI files on the grid of the volumes they belong to.

    A volume keeps its name, relative to the folder that was searched (of a pattern or list, to the
    one that all volumes have in common), and its geometry (sform and qform). Probabilities, where
    the task gives them, become ``NAME_probabilities.nii.gz`` with one channel for each class. At
    the end, the volumes that could not be read are named, and the exit code is not 0.

    Args:
        folder: where to write; None: ``predictions`` in the folder of the run, which is a new one
            for each run.
        overwrite: predict volumes again that have a file there. Otherwise a file that was made of
            the same scan by the same checkpoint is kept, and any other file is an error.

    Raises:
        InputError: if a file of another scan or checkpoint is there; at the end, if a volume could
            not be predicted.
    """

    def __init__(self, folder: str | None = None, overwrite: bool = False) -> None:
        super().__init__("batch")
        self.folder = folder
        self.overwrite = overwrite
        self._folder = Path()
        self._errors: dict[str, str] = {}
        self._written: dict[str, bool] = {}
        self._kept: set[str] = set()
        self._inputs: dict[str, Source] = {}
        self._manifest: Manifest | None = None
        self._probabilities = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._errors, self._written, self._kept, self._inputs = {}, {}, set(), {}
        self._manifest = None
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "predict":
            return
        self._folder = output_folder(trainer, self.folder, "predictions")
        if datamodule is None:
            return
        require_task(self, pl_module, Segmentation)
        self.check_folder(trainer, datamodule)
        if trainer.is_global_zero:
            remove_partials(self._folder)
        options = ("overlap", "mirror", "window_size", "probabilities")
        settings = {
            **datamodule.preparation_settings(),
            **{name: pl_module.hparams[name] for name in options},
        }
        model = partial(model_hash, pl_module)
        manifest = self._manifest = Manifest(self._folder, model, settings, self.overwrite)

        def is_predicted(file: VolumeFile) -> bool:
            self._inputs[file.name] = file.image
            done = manifest.is_done(file.name, [file.image], self._files(file.name))
            if done:
                self._kept.add(file.name)
            return done

        self._probabilities = bool(pl_module.hparams["probabilities"])
        datamodule.is_predicted = is_predicted

    def check_folder(self, trainer: pl.Trainer, data: pl.LightningDataModule) -> None:
        """Check the folder before the first volume is predicted.

        Raises:
            InputError: if it lies where the volumes of the data are searched for.
            OSError: if it cannot be written to.
        """
        folder = output_folder(trainer, self.folder, "predictions")
        require_apart(folder, data)
        require_writable(folder)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        name = prediction["name"]
        if "error" in prediction:
            self._errors[name] = prediction["error"]
            return
        source, affine = prediction["source"], prediction["affine"]
        if self._manifest is not None:
            self._manifest.begin(name, [self._inputs[name]])
        if "probabilities" in prediction:
            channels = np.moveaxis(prediction["probabilities"].numpy(), 0, -1)
            write_volume(self._path(f"{name}_probabilities"), channels, source, affine)
        write_volume(self._path(name), prediction["prediction"].numpy(), source, affine)
        if self._manifest is not None:
            self._manifest.finish(name, [self._inputs[name]])
        self._written[name] = True

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        errors, written = gather_dict(self._errors), gather_dict(self._written)
        if trainer.is_global_zero:
            print(f"{len(written)} volumes written to {self._folder}")
        raise_prediction_errors(trainer, errors, len(written))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # on_predict_end is not called where nothing is left to predict
        if self._kept and trainer.is_global_zero:
            print(f"{len(self._kept)} volumes kept that were in {self._folder} already")

    def _files(self, name: str) -> list[Path]:
        more = [self._path(f"{name}_probabilities")] if self._probabilities else []
        return [self._path(name), *more]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.nii.gz"
