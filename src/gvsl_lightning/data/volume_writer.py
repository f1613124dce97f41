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
from gvsl_lightning.data.read import read_case
from gvsl_lightning.data.source import Source, VolumeFile, describe
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs.files import write_whole
from gvsl_lightning.runs.privacy import Shown

PERCENTILES = (0.5, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.5)
"""Percentiles that are stored of every volume."""


@dataclass(frozen=True)
class Outcome:
    """Result of preparing one volume.

    Attributes:
        source: The file that it was read from, the first one of several.
        volume: The prepared volume; None: it was rejected.
        reason: Why it was rejected.
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
        folder: Where to.
        settings: How they are prepared, for the record.
        preparation: From the stored volume to the prepared one.
        dtype: Type of the voxels that are stored.
        shown: Makes the text that is written for the path of a file.
    """

    folder: PreparedFolder
    settings: Mapping[str, Any]
    preparation: Preparation
    dtype: DType = "float16"
    shown: Shown = str

    def __call__(self, file: VolumeFile) -> Outcome:
        """Write a volume unless it is there, made in the same way of the same file."""
        source = self._origin(file)
        try:
            volume = self._find(file)
            if volume is not None:
                return Outcome(source, volume)
            return Outcome(source, self._write(file), is_new=True)
        except InputError as error:
            reason = str(error)
            first = file.image if isinstance(file.image, str) else file.image[0]
            for path in (first, file.label, os.path.dirname(first)):
                reason = reason.replace(path, self.shown(path)) if path else reason
            return Outcome(source, reason=reason)

    def _origin(self, file: VolumeFile) -> str:
        return self.shown(file.image if isinstance(file.image, str) else file.image[0])

    @property
    def _key(self) -> str:
        """Hash of all settings but the folders."""
        kept = {k: v for k, v in self.settings.items() if k not in ("root", "label_root")}
        text = json.dumps([FORMAT, kept], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

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
            source = unchanged(known["source"], file.image, self.shown)
            label_source = file.label and unchanged(known["label"], file.label, self.shown)
        except (KeyError, TypeError, OSError):
            return None
        if source is None or (file.label and label_source is None):
            return None
        if known["source"] != source or known["label"] != label_source:
            write_json(sidecar, {**known, "source": source, "label": label_source})
        return self._volume(file, known["stored"]["shape"])

    def _write(self, file: VolumeFile) -> PreparedVolume:
        label_map = file.label
        source = fingerprint(file.image, self.shown)
        label_source = label_map and fingerprint(label_map, self.shown)
        case = read_case(file, self.preparation.channels, labelled=label_map is not None)
        read = case["image"]
        affine = read.affine.numpy().copy()
        original = _geometry(tuple(read.shape), affine)
        prepared = self.preparation(dict(case), file.image)
        del case, read
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
            _write_array(label_path, _smallest_integers(arrays["label"]))
        size = _write_array(image_path, stored)
        write_json(
            sidecar,
            {
                "name": file.name,
                "source": source,
                "label": label_source,
                "original": original,
                "stored": {
                    **_geometry(stored.shape, stored_affine),
                    "dtype": self.dtype,
                    "bytes": size,
                },
                "intensity": _statistics(stored),
                "version": __version__,
                "settings": self._key,
            },
        )
        if label_map is None:
            label_path.unlink(missing_ok=True)
        return self._volume(file, stored.shape)

    def _require_storable(self, source: Source, voxels: np.ndarray) -> None:
        if min(voxels.shape[1:]) < 2:
            raise InputError(
                f"{describe(source)} has the shape {voxels.shape[1:]} after preparation, fewer "
                "than 2 voxels on an axis; leave it out or change spacing or crop_foreground."
            )
        if not np.isfinite(voxels).all():
            raise InputError(
                f"{describe(source)} holds NaN or infinite values after preparation; leave it out "
                "or change the transforms."
            )
        limit = np.finfo(self.dtype).max
        if np.abs(voxels).max() > limit:
            raise InputError(
                f"{describe(source)} holds values beyond {limit} after preparation; give --dtype="
                "float32 or transforms that lead to [0, 1]."
            )

    def _volume(self, file: VolumeFile, shape: Sequence[int]) -> PreparedVolume:
        image, label, _ = self.folder.files(file.name)
        return PreparedVolume(
            image=str(image),
            name=file.name,
            label=None if file.label is None else str(label),
            shape=tuple(shape),
            origin=self._origin(file),
        )


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


def _smallest_integers(label: np.ndarray) -> np.ndarray:
    low, high = label.min(), label.max()
    kinds = (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64)
    limits = (np.iinfo(kind) for kind in kinds)
    fitting = (one for one in limits if one.min <= low and high <= one.max)
    return np.ascontiguousarray(label, dtype=next(fitting).dtype)


def _statistics(stored: np.ndarray) -> dict[str, Any]:
    values = stored.astype(np.float32).ravel()
    statistics = {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
    }
    percentiles = np.percentile(values, PERCENTILES, overwrite_input=True)
    named = {
        f"{rank:g}": float(value) for rank, value in zip(PERCENTILES, percentiles, strict=True)
    }
    return {**statistics, "percentiles": named}
