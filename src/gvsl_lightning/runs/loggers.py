"""Logger for Weights & Biases and tables; figures and tables for any logger."""

import csv
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import append_rows, write_csv
from gvsl_lightning.runs.record import ARTIFACT

BEST = {
    "val/ncc_after": "max",
    "val/dice": "max",
    "val/dice_*": "max",
    "val/auroc": "max",
    "val/auroc_*": "max",
    "val/prototype_dice": "max",
    "val/probe_dice": "max",
    "val/loss": "min",
}
"""Metrics whose best value W&B's summary holds in addition to the last one."""


class VersionedWandbLogger(WandbLogger):
    """Logs to Weights & Biases, and to tables in the folder of the run.

    ``metrics.csv`` has a row for each logged step of the training, ``validation.csv`` one for each
    validation and ``test.csv`` one for each test.

    As with Lightning's other loggers, the folder of a run is ``save_dir/name/version_N``. W&B's
    files lie in its folder ``wandb``. Offline, nothing leaves the machine, and W&B needs no account
    or key; ``wandb sync save_dir/name/version_N/wandb/offline-run-*`` uploads the run later.

    The x-axis of all metrics is the trainer's step. For the metrics in :data:`BEST`, the summary
    holds the best value (``max`` or ``min``) and the ``last`` one. When training ends, the best and
    the last checkpoint become versions of the artifact ``NAME-checkpoint``.

    Args:
        save_dir: folder of all runs.
        name: of the experiment, which is a folder in ``save_dir`` and W&B's display name.
        version: number of the run or name of its folder; None: the next number.
        offline: write to the disk only.
        project: W&B's project.
        id: of a W&B run to continue; None: ``WANDB_RUN_ID``, or a new one.
        entity: W&B's user or team; None: the user who is logged in.
        group: of runs that belong together.
        job_type: kind of run.
        tags: to filter by.
        notes: one sentence on the run.
        log_model: log checkpoints and backbones as artifacts. The files are not copied.
        private: keep the command, the printed lines, the machine and the git repository from W&B.
            The command line sets it together with the data's ``anonymise``.
    """

    def __init__(
        self,
        save_dir: str | Path = "runs",
        name: str = "gvsl",
        version: int | str | None = None,
        offline: bool = True,
        project: str = "gvsl_lightning",
        id: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        log_model: bool = True,
        private: bool = False,
    ) -> None:
        import wandb  # slow to import, here and below

        self._table = _Table(save_dir, name, version)
        self._checkpoints: list[Checkpoint] = []
        self._artifacts = log_model
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        settings: dict[str, Any] = {"silent": True} if offline else {}
        if private:
            settings |= {"x_disable_meta": True, "console": "off", "disable_git": True}
        super().__init__(
            name=name,
            id=id,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=list(tags),
            notes=notes,
            # Lightning's `offline` would keep later runs of the process offline too
            mode="offline" if offline and not disabled else None,
            settings=wandb.Settings(**settings) if settings else None,
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of this option, whatever its value

    @property
    def save_dir(self) -> str:
        """Folder of all runs."""
        return self._table.save_dir

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self._table.name

    @property
    def version(self) -> int | str:  # type: ignore[override]  # as Lightning's other loggers
        """Number of the run, or the name of its folder."""
        return self._table.version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; the first access starts it.

        Raises:
            InputError: if W&B cannot start a run, such as online without a key.
        """
        if self._experiment is None:
            import wandb

            self._wandb_init["dir"] = os.path.abspath(self._table.experiment.log_dir)
            is_own = wandb.run is None
            try:
                run = super().experiment
            except wandb.errors.Error as error:
                raise InputError(
                    f"Weights & Biases starts no run ({str(error).splitlines()[0]}); correct it, "
                    "or leave out --trainer.logger.offline=false."
                ) from error
            if is_own:
                _open_runs.append(run)
            for metric, best in BEST.items():
                run.define_metric(metric, step_metric=_STEP, summary=f"{best},last")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers to W&B and the tables, images and tables to W&B."""
        super().log_metrics(metrics, step)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, _NUMBERS)}
        if numbers:
            self._table.log_metrics(numbers, step)

    def save(self) -> None:
        """Write the tables."""
        self._table.save()

    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        """Remember the callback; :meth:`finalize` logs its checkpoints."""
        if checkpoint_callback not in self._checkpoints:
            self._checkpoints.append(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the checkpoints as artifacts. The run stays open for a test that may follow."""
        self._table.finalize(status)
        checkpoints, self._checkpoints = self._checkpoints, []
        for callback in checkpoints:
            score = getattr(callback, "best_model_score", None)
            for alias in ("last", "best"):  # the newest version becomes `latest`
                path = Path(getattr(callback, f"{alias}_model_path", ""))
                if path.is_file():
                    metadata = {} if alias == "last" or score is None else {"score": float(score)}
                    self.log_files("checkpoint", [path], [alias], metadata)

    @rank_zero_only
    def log_files(
        self,
        kind: str,
        paths: Sequence[Path],
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Log files as a version of the artifact ``NAME-kind``, unless ``log_model`` is off.

        The version has the names ``latest``, the run's id and the aliases.
        """
        if self._artifacts:
            artifact = _artifact(self._artifact_name(kind), paths, metadata)
            names = [*aliases, self.experiment.id, "latest"]
            self.experiment.log_artifact(artifact, aliases=names)

    def describe(self, kind: str) -> dict[str, Any] | None:
        """``project``, run ``id`` and ``artifact`` of a kind of file, to be stored in such files.

        None in all processes but the first.
        """
        if self._experiment is None:
            return None
        name = self._artifact_name(kind)
        return {"project": self._project, "id": self._experiment.id, "artifact": name}

    @rank_zero_only
    def use_weights(self, source: str, path: Path) -> None:
        """Record the weights that a run starts from, as its input and under ``weights_from``.

        W&B compares artifacts by content, and links the run to the one that logged the weights.

        Args:
            source: name or path, see :func:`gvsl_lightning.weights.load_backbone_weights`.
            path: the file.
        """
        run, earlier_run = self.experiment, read_wandb_run(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        weights_from = {"source": source, "sha256": digest, **earlier_run}
        run.config.update({"weights_from": weights_from}, allow_val_change=True)
        if not self._artifacts:
            return
        card = path.with_suffix(".json")
        files = [path, card] if card.is_file() else [path]
        artifact = _artifact(earlier_run.get("artifact", f"{path.stem}-weights"), files)
        if run.offline:
            # `use_artifact` fails offline, as it asks the server; this is its part without a server
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        elif source.startswith(ARTIFACT):
            run.use_artifact(source.removeprefix(ARTIFACT))
        else:
            run.use_artifact(artifact)

    def _artifact_name(self, kind: str) -> str:
        """W&B's name of an artifact: ASCII; two names with other letters stay apart."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.name)
        apart = "" if self.name.isascii() else f"-{zlib.crc32(self.name.encode()):08x}"
        return f"{name}{apart}-{kind}"


class _Table(CSVLogger):
    """Lightning's, with a writer that loses no row if an error or a signal interrupts it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _TableWriter(self.log_dir)
        return self._experiment


class _TableWriter(ExperimentWriter):
    """Writes a table for each stage, with a row for each step.

    In a folder with tables of an earlier run, whose ``version`` the user gave again, those of
    training and validation keep the rows before the first new one: a run that resumes there repeats
    no step.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._begun: set[str] = set()

    def _check_log_dir_exists(self) -> None:
        """Keep ``metrics.csv``, which Lightning's deletes."""

    def save(self) -> None:
        """Append the new rows of a table in one write; with new columns, write it whole again."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for logged in self.metrics:
            rows = tables.setdefault(_table_of(logged), [])
            if rows and rows[-1].get("step") == logged.get("step"):
                rows[-1].update(logged)
            else:
                rows.append(dict(logged))
        for name, rows in tables.items():
            path = Path(self.log_dir, name)
            if name not in {*self._begun, "test.csv"}:
                _keep_before(path, rows[0]["step"])
                self._begun.add(name)
            _append(path, rows)
        self.metrics = []


def _table_of(logged: Mapping[str, Any]) -> str:
    stages = {name.partition("/")[0] for name in logged}
    stage = "validation" if "val" in stages else "test" if "test" in stages else "metrics"
    return f"{stage}.csv"


def _keep_before(path: Path, step: int) -> None:
    """Remove the rows of a table from a step on, if it exists."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    kept = [row for row in rows if int(row.get("step") or -1) < step]
    if len(kept) < len(rows):
        rank_zero_warn(f"{path}: this run writes the rows from step {step} on again")
        write_csv(path, columns, kept)


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not path.exists():
        write_csv(path, columns, rows)
        return
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        known = list(reader.fieldnames or ())
        missing = [name for name in columns if name not in known]
        if missing:
            rows = [*reader, *rows]
    if missing:
        write_csv(path, [*known, *missing], rows)
    else:
        append_rows(path, known, rows)


def finish_runs(exit_code: int) -> None:
    """Close the W&B runs that the loggers of this process started."""
    while _open_runs:
        _open_runs.pop().finish(exit_code=exit_code)


def wandb_loggers(trainer: pl.Trainer) -> list[VersionedWandbLogger]:
    """The trainer's loggers of this package."""
    return [logger for logger in trainer.loggers if isinstance(logger, VersionedWandbLogger)]


def log_figure(trainer: pl.Trainer, name: str, path: Path, figure: Figure) -> None:
    """Log a figure, which is saved at a path, to the W&B and TensorBoard loggers."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)


def log_segmentations(
    trainer: pl.Trainer,
    cases: Mapping[str, Iterable[tuple[npt.NDArray[Any], ...]]],
    captions: Sequence[str],
    class_names: Sequence[str],
) -> None:
    """Log slices of segmented cases to W&B, with masks that it draws over them.

    Args:
        trainer: with any loggers.
        cases: name of the panel -> slices, each an image in [0, 1], its label map and its
            prediction, all (rows, columns) with the rows upwards.
        captions: one for each case.
        class_names: name of every class, the background first.
    """
    names = dict(enumerate(class_names))
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        for (panel, slices), caption in zip(cases.items(), captions, strict=True):
            images: Any = [_masked_image(one, names, caption) for one in slices]
            logger.log_metrics({panel: images}, step=trainer.global_step)


def log_table(trainer: pl.Trainer, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log a table to W&B; all rows have the same columns, and NaN becomes an empty cell."""
    columns = list(rows[0]) if rows else []
    data = [
        [None if row[column] != row[column] else row[column] for column in columns] for row in rows
    ]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns, data, step=trainer.global_step)


def read_wandb_run(path: Path) -> dict[str, Any]:
    """W&B run that wrote a checkpoint or a backbone; see :meth:`VersionedWandbLogger.describe`.

    Empty if there is no such run, or the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        else:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return dict(content["wandb"] or {})
    except Exception:  # such as a file of another program
        return {}


def _masked_image(
    arrays: Sequence[npt.NDArray[Any]], class_labels: Mapping[int, str], caption: str
) -> Any:
    import wandb

    image, label, prediction = (np.flipud(array) for array in arrays)
    masks = {
        kind: {"mask_data": mask.astype(int), "class_labels": class_labels}
        for kind, mask in (("label", label), ("prediction", prediction))
    }
    shades = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return wandb.Image(shades, caption=caption, masks=masks)


_STEP = "trainer/global_step"

_NUMBERS = (int, float, Tensor)

_open_runs: list[Any] = []


def _artifact(name: str, paths: Sequence[Path], metadata: Mapping[str, Any] | None = None) -> Any:
    import wandb

    artifact = wandb.Artifact(name, "model", metadata=dict(metadata or {}))
    for path in paths:
        # immutable: W&B copies no file; absolute: the upload may run in another folder
        artifact.add_file(str(path.absolute()), name=path.name, policy="immutable")
    return artifact
