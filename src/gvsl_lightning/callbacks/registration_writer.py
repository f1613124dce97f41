"""Files of registered pairs: warped image and label, displacement field, a table of measures."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter

from gvsl_lightning.callbacks.manifest import Manifest, model_hash
from gvsl_lightning.callbacks.registration_table import (
    Row,
    measure_labels,
    read_rows,
    summarise,
    write_rows,
)
from gvsl_lightning.data.find import require_apart
from gvsl_lightning.data.read import write_volume
from gvsl_lightning.data.source import Source
from gvsl_lightning.datamodules.registration import (
    PairFiles,
    RegistrationDataModule,
    RegistrationPair,
    RegistrationVolume,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.fields import displacement_field, resample
from gvsl_lightning.nn.geometry import Order, identity_affine
from gvsl_lightning.nn.heads import Matching
from gvsl_lightning.runs.files import remove_partials, require_writable
from gvsl_lightning.runs.folder import output_folder
from gvsl_lightning.runs.privacy import Hide, pseudonym
from gvsl_lightning.tasks.gvsl import GVSL

IMAGE, LABEL, FIELD, TABLE = (
    "warped.nii.gz",
    "warped_label.nii.gz",
    "displacement.nii.gz",
    "registration.csv",
)


class RegistrationWriter(BasePredictionWriter):
    """Writes the results of `predict` for the pairs of a `RegistrationDataModule`.

    For each pair, `FOLDER/MOVING_onto_FIXED/` gets, all on the stored grid of the fixed volume
    (its shape and affine; sform and qform too where it is a NIfTI file):

    - `warped.nii.gz`: the moving volume laid over the fixed one, float32. The stored intensities
      are sampled once, linearly, by the whole map.
    - `warped_label.nii.gz`: the same with its labels, by the nearest voxel, in the smallest type.
    - `displacement.nii.gz`: the map as ITK, ANTs, 3D Slicer and ITK-SNAP read it: shape
      (X, Y, Z, 1, 3), intent vector, float32, at each voxel the way in mm in the LPS system from
      this point of the fixed volume to the point of the moving one. With SimpleITK, this makes
      `warped.nii.gz`:

          field = SimpleITK.ReadImage("displacement.nii.gz", SimpleITK.sitkVectorFloat64)
          grid = SimpleITK.ReadImage("warped.nii.gz")
          transform = SimpleITK.DisplacementFieldTransform(field)
          SimpleITK.Resample(moving, grid, transform, SimpleITK.sitkLinear)

    `FOLDER/registration.csv` has a row for each pair. "Before" is the alignment of the centres
    that the network starts from. An undefined value is an empty cell and enters no mean.

    - `ncc_before`, `ncc_after`: mean squared local NCC of the prepared volumes, as in validation.
    - `folded`: fraction of voxels where the deformation folds, as in validation.
    - `dice_before`, `dice_after`: mean over the structures of the fixed label map, on the stored
      grid; then the same for each structure, `dice_before_1`, ...
    - `hd95_mm_before`, `hd95_mm_after`: 95 % Hausdorff distance in mm; the mean is over the
      structures where it is defined before and after, that is, neither map is without them.

    A pair that has its row and its files, made of the same volumes by the same checkpoint, is kept:
    with a `folder`, the same command finishes an interrupted run. Files of other volumes or another
    checkpoint are an error. A pair that cannot be read is left out and named at the
    end. `Trainer.predict` returns nothing, so that memory does not grow with the pairs.

    Args:
        folder: Where to write, made if missing; None: `registration` in the folder of the run,
            which is a new one for each run.
        overwrite: Make the pairs anew that are there already.
        outside: Value of the warped image where the moving volume ends, such as -1024 for CT.

    Raises:
        InputError: When the run ends, if a pair could not be registered; before it starts, if task
            or data are of the wrong kind, there are several processes, or the folder has another
            table.
    """

    def __init__(
        self, folder: str | None = None, overwrite: bool = False, outside: float = 0.0
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._folder = Path()
        self.overwrite = overwrite
        self.outside = outside
        self._rows: dict[str, Row] = {}
        self._chosen: list[str] = []
        self._pairs: dict[str, PairFiles] = {}
        self._manifest: Manifest | None = None
        self._kept = 0
        self._failures: dict[str, str] = {}
        self._hide: Hide = str

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        if not isinstance(pl_module, GVSL) or pl_module.matching_head is None:
            raise InputError(
                f"RegistrationWriter needs a GVSL task with z_matching, and this is "
                f"{type(pl_module).__name__}; give the configuration of one."
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RegistrationDataModule) or data.dataset is None:
            raise InputError(
                f"RegistrationWriter needs a RegistrationDataModule and the data is a "
                f"{type(data).__name__}; set data to RegistrationDataModule."
            )
        if trainer.world_size > 1:
            raise InputError(
                f"RegistrationWriter writes from one process and there are {trainer.world_size}; "
                "set trainer.devices to 1."
            )
        self.check_folder(trainer, data)
        self._folder = output_folder(trainer, self.folder, "registration")
        trainer.predict_loop.return_predictions = False
        self._hide = pseudonym if data.anonymise else str
        pairs = data.files
        self._chosen = [pair.name for pair in pairs]
        self._pairs = {pair.name: pair for pair in pairs}
        self._failures, self._kept, self._manifest = {}, 0, None
        self._rows = read_rows(self._folder / TABLE)
        if self.overwrite:
            for name in self._chosen:
                self._rows.pop(name, None)
        settings = {
            **data.preparation.settings(),
            "composition": pl_module.hparams["composition"],
            "outside": self.outside,
        }
        model = partial(model_hash, pl_module)
        manifest = self._manifest = Manifest(self._folder, model, settings, self.overwrite)

        def is_registered(pair: PairFiles) -> bool:
            done = manifest.is_done(pair.name, _inputs(pair), self._results(pair))
            if done and pair.name in self._rows:
                self._kept += 1
                return True
            self._rows.pop(pair.name, None)
            return False

        data.is_registered = is_registered
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_partials(self._folder)

    def check_folder(self, trainer: pl.Trainer, data: pl.LightningDataModule) -> None:
        """Check the folder before the first pair is registered.

        Raises:
            InputError: if it lies where the volumes of the data are searched for.
            OSError: if it cannot be written to.
        """
        folder = output_folder(trainer, self.folder, "registration")
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
        assert isinstance(pl_module, GVSL)
        name = batch["pair_name"][0]
        if "error" in batch:
            self._failures[name] = batch["error"]
            write_rows(self._folder / TABLE, self._rows)
            return
        pair: RegistrationPair = batch["pair"]
        matching = Matching(prediction["affine"], prediction["displacement"])
        order = pl_module.hparams["composition"]
        field = _field(pair, matching, order)
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        files = self._pairs[name]
        assert self._manifest is not None
        self._manifest.begin(name, _inputs(files))
        warped = resample(
            pair.moving.array, pair.moving.affine, field, pair.fixed.affine, outside=self.outside
        )
        place = (pair.fixed.source, pair.fixed.affine)
        write_volume(folder / IMAGE, np.moveaxis(warped, 0, -1), *place)
        write_volume(folder / FIELD, field[:, :, :, None], *place, vector=True)
        measured = pl_module.measure(batch, matching)
        row: Row = {
            "pair": name,
            "fixed": self._hide(_path(pair.fixed)),
            "moving": self._hide(_path(pair.moving)),
            **{key: float(measured[key]) for key in ("ncc_before", "ncc_after", "folded")},
        }
        if pair.moving.label is not None:
            start = Matching(
                identity_affine(1, matching.affine.device), torch.zeros_like(matching.displacement)
            )
            before = _warped_label(pair, _field(pair, start, order))
            after = _warped_label(pair, field)
            smallest = np.result_type(*map(np.min_scalar_type, (after.min(), after.max())))
            write_volume(folder / LABEL, after.astype(smallest), *place)
            if pair.fixed.label is not None:
                spacing = np.linalg.norm(pair.fixed.affine[:3, :3], axis=0)
                row |= measure_labels(pair.fixed.label, before, after, spacing)
        self._rows[name] = row
        write_rows(self._folder / TABLE, self._rows)
        self._manifest.finish(name, _inputs(files))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # on_predict_end is not called where nothing is left to do
        if stage != "predict":
            return
        rows = [self._rows[name] for name in self._chosen if name in self._rows]
        print(summarise(rows, self._kept, len(self._failures), self._folder))
        if self._failures:
            reasons = [f"[{name}] {reason}" for name, reason in self._failures.items()]
            first = ""
            if len(reasons) > 1:
                first = ", the first one"
                for reason in reasons:
                    print(f"not registered: {reason}", file=sys.stderr)
            raise InputError(
                f"{len(reasons)} of {len(self._chosen)} pairs could not be registered, the others "
                f"are in {self._folder}{first}: {reasons[0]}"
            )

    def _results(self, pair: PairFiles) -> list[Path]:
        files = [IMAGE, FIELD] if pair.moving.label is None else [IMAGE, FIELD, LABEL]
        return [self._folder / pair.name / file for file in files]


def _inputs(pair: PairFiles) -> list[Source]:
    volumes = (pair.fixed, pair.moving)
    return [one for volume in volumes for one in (volume.image, volume.label) if one is not None]


def _field(pair: RegistrationPair, matching: Matching, order: Order) -> np.ndarray:
    """The map of a matching on the stored grid of the fixed volume."""
    shape = pair.fixed.array.shape[1:]
    return displacement_field(
        matching, order, pair.fixed.grid, pair.moving.grid, pair.fixed.affine, shape
    )


def _warped_label(pair: RegistrationPair, field: np.ndarray) -> np.ndarray:
    assert pair.moving.label is not None
    warped: np.ndarray = resample(
        pair.moving.label[None], pair.moving.affine, field, pair.fixed.affine, "nearest"
    )[0]
    return warped


def _path(volume: RegistrationVolume) -> str:
    return volume.source if isinstance(volume.source, str) else os.path.dirname(volume.source[0])
