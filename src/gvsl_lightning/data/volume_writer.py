"""Preparing volumes and writing them into a folder of prepared volumes."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils.type_conversion import convert_to_tensor

from gvsl_lightning import __version__
from gvsl_lightning.data.fingerprint import fingerprint, unchanged
from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.prepared import FORMAT, DType, PreparedFolder, PreparedVolume, write_json
from gvsl_lightning.data.read import first_fitting, read_case
from gvsl_lightning.data.source import Source, VolumeFile, describe, first_file
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import write_whole
from gvsl_lightning.runs.privacy import Hide

PERCENTILES = (0.5, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.5)
"""Percentiles that are stored of every volume."""


@dataclass(frozen=True)
class Outcome:
    """Result of preparing one volume.

    Attributes:
        source: The file that it was read from, the first one of several.
        volume: The prepared volume; None: it was rejected, for the `reason`.
        is_new: Whether it was prepared now; otherwise it was there already.
    """

    source: str
    volume: PreparedVolume | None = None
    reason: str = ""
    is_new: bool = False


@dataclass(frozen=True)
class VolumeWriter:
    """Prepares volumes and writes them into a folder.

    Args:
        folder: The folder.
        settings: All settings, for the record; with others, a volume is prepared anew.
        preparation: From the stored volume to the prepared one.
        dtype: Type of the voxels that are stored.
        hide: Replaces paths in all that is written.
    """

    folder: PreparedFolder
    settings: Mapping[str, Any]
    preparation: Preparation
    dtype: DType = "float16"
    hide: Hide = str

    def __call__(self, file: VolumeFile) -> Outcome:
        """Write a volume unless it is there, made in the same way of the same file."""
        first = first_file(file.image)
        source = self.hide(first)
        try:
            volume = self._find(file)
            if volume is not None:
                return Outcome(source, volume)
            return Outcome(source, self._write(file), is_new=True)
        except InputError as error:
            reason = str(error)
            for path in (first, file.label, os.path.dirname(first)):
                reason = reason.replace(path, self.hide(path)) if path else reason
            return Outcome(source, reason=reason)

    @property
    def _key(self) -> str:
        """Hash of all settings but the folders."""
        kept = {k: v for k, v in self.settings.items() if k not in ("root", "label_root")}
        content = json.dumps([FORMAT, kept], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _find(self, file: VolumeFile) -> PreparedVolume | None:
        known = self.folder.sidecar(file.name)
        image, label, sidecar = self.folder.files(file.name)
        try:
            if (
                known["settings"] != self._key
                or image.stat().st_size != known["stored"]["bytes"]
                or (known["label"] is None) != (file.label is None)
                or (known["label"] is not None and not label.exists())
            ):
                return None
            source = unchanged(known["source"], file.image, self.hide)
            label_source = file.label and unchanged(known["label"], file.label, self.hide)
        except (KeyError, TypeError, OSError):
            return None
        if source is None or (file.label and label_source is None):
            return None
        if known["source"] != source or known["label"] != label_source:
            write_json(sidecar, {**known, "source": source, "label": label_source})
        return self._volume(file, known["stored"]["shape"])

    def _write(self, file: VolumeFile) -> PreparedVolume:
        label_map = file.label
        source = fingerprint(file.image, self.hide)
        label_source = label_map and fingerprint(label_map, self.hide)
        case = read_case(file, self.preparation.channels, labelled=label_map is not None)
        original = _geometry(case["image"].shape, case["image"].affine)
        prepared = self.preparation(case, file.image)
        del case
        stored_affine = getattr(prepared["image"], "affine", None)
        arrays = {
            key: np.ascontiguousarray(convert_to_tensor(prepared[key], track_meta=False).numpy())
            for key in ("image", "label")
            if key in prepared
        }
        del prepared
        voxels = arrays["image"].astype(np.float32, copy=False)
        self._require_storable(file.image, voxels)
        stored = voxels.astype(self.dtype)
        image_path, label_path, sidecar = self.folder.files(file.name)
        if label_map is not None:
            if arrays["label"].shape[1:] != stored.shape[1:]:
                raise InputError(
                    f"{label_map} has the shape {arrays['label'].shape[1:]} after preparation and "
                    f"its image {stored.shape[1:]}; give the label map of this image."
                )
            smallest = first_fitting(arrays["label"], _INTEGERS)
            _write_array(label_path, arrays["label"].astype(smallest))
        size = _write_array(image_path, stored)
        write_json(
            sidecar,
            {
                "name": file.name,
                "source": source,
                "label": label_source,
                "original": original,
                "stored": _geometry(stored.shape, stored_affine)
                | {"dtype": self.dtype, "bytes": size},
                "intensity": _statistics(stored),
                "version": __version__,
                "settings": self._key,
            },
        )
        if label_map is None:
            label_path.unlink(missing_ok=True)
        return self._volume(file, stored.shape)

    def _require_storable(self, source: Source, voxels: np.ndarray) -> None:
        limit = np.finfo(self.dtype).max
        if min(voxels.shape[1:]) < 2:
            fault = (
                f"has the shape {voxels.shape[1:]} after preparation, fewer than 2 voxels on an "
                "axis; leave it out or change spacing or crop_foreground."
            )
        elif not np.isfinite(voxels).all():
            fault = (
                "holds NaN or infinite values after preparation; leave it out or change the "
                "transforms."
            )
        elif np.abs(voxels).max() > limit:
            fault = (
                f"holds values beyond {limit} after preparation; give --dtype=float32 or "
                "transforms that lead to [0, 1]."
            )
        else:
            return
        raise InputError(f"{describe(source)} {fault}")

    def _volume(self, file: VolumeFile, shape: Sequence[int]) -> PreparedVolume:
        source = self.hide(first_file(file.image))
        return self.folder.volume(file.name, tuple(shape), file.label is not None, source)


_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)


def _write_array(path: Path, array: np.ndarray) -> int:
    write_whole(path, lambda file: np.save(file, array, allow_pickle=False))
    return path.stat().st_size


def _geometry(shape: Sequence[int], affine: Any) -> dict[str, Any]:
    """Shape (C, D, H, W), affine to RAS mm and voxel size in mm, where there is an affine."""
    matrix = None if affine is None else np.asarray(affine, dtype=np.float64)
    return {
        "shape": [int(size) for size in shape],
        "affine": None if matrix is None else matrix.tolist(),
        "spacing": None if matrix is None else np.linalg.norm(matrix[:3, :3], axis=0).tolist(),
    }


def _statistics(stored: np.ndarray) -> dict[str, Any]:
    values = stored.astype(np.float32).ravel()
    statistics: dict[str, Any] = {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
    }
    percentiles = np.percentile(values, PERCENTILES, overwrite_input=True).tolist()
    ranks = [f"{rank:g}" for rank in PERCENTILES]
    return {**statistics, "percentiles": dict(zip(ranks, percentiles, strict=True))}
