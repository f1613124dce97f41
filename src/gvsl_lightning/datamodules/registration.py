"""Whole volumes to lay over one another: an atlas and a folder, or a list of pairs."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.data.crop import crop, crop_start
from gvsl_lightning.data.find import find_volume, find_volumes
from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.read import read_label, read_volume
from gvsl_lightning.data.source import Source, VolumeFile, anonymous, describe, identity
from gvsl_lightning.datamodules.volume_data import FileDataModule
from gvsl_lightning.errors import InputError, check_choice


class PairFiles(NamedTuple):
    """Two volumes on disk.

    Attributes:
        name: Name of the pair, such as `case_2_onto_case_1`; no two pairs share it.
        fixed: The volume whose grid the results are on.
        moving: The volume that is laid over it.
    """

    name: str
    fixed: VolumeFile
    moving: VolumeFile


class RegistrationVolume(NamedTuple):
    """A volume as it is stored, and where the network sees it.

    Attributes:
        source: The file, or the slices of the DICOM series.
        array: Stored intensities, float32, (C, X, Y, Z).
        affine: From stored voxels to mm in the RAS system, (4, 4).
        label: Stored labels, int32, (X, Y, Z), if there are any.
        grid: From the voxels that the network sees to mm in the RAS system, (4, 4).
    """

    source: Source
    array: np.ndarray
    affine: np.ndarray
    label: np.ndarray | None
    grid: np.ndarray


class RegistrationPair(NamedTuple):
    """Input of `gvsl_lightning.callbacks.RegistrationWriter`, besides the network's result.

    NumPy arrays, which Lightning neither moves to the device nor rounds to its precision.
    """

    fixed: RegistrationVolume
    moving: RegistrationVolume


class RegistrationDataModule(FileDataModule):
    """Pairs of whole volumes for `predict`, one at a time.

    Volumes are prepared as `PretrainDataModule` does; give the same options as in pre-training.
    The moving volume is then cropped or padded with zeros to the size of the fixed one, so that
    the centres of the two coincide: as in validation, that is where the network starts from. It
    sees whole volumes; `spacing` bounds their size.

    A batch holds `fixed` and `moving` (float32, (1, C, D, H, W), range [0, 1]), `fixed_name`,
    `moving_name` and `pair_name` (lists of one) and `pair`, a `RegistrationPair`. For a pair that
    cannot be read it holds the names and `error`, the sentence that says why.

    With a checkpoint of a GVSL run, an atlas is laid over every volume of a folder, its labels with
    it, by

        gvsl predict --ckpt runs/gvsl/version_0/checkpoints/best.ckpt
            --data=RegistrationDataModule --root FOLDER --data.atlas=ATLAS.nii.gz
            --data.atlas_label=ATLAS_LABEL.nii.gz
            --trainer.callbacks+=RegistrationWriter --out registered

    The checkpoint says how the volumes are prepared.

    Args:
        root: Volumes to register with the atlas; see
            `gvsl_lightning.data.find.find_volumes`. The atlas itself is left out of
            them. Not used with `pairs`.
        atlas: One volume.
        atlas_label: Its label map.
        atlas_role: `moving`: the atlas is laid over each volume, which brings its labels to every
            volume's own grid. `fixed`: each volume is laid over the atlas, which brings all of
            them to one grid.
        pairs: Instead of an atlas, a table of pairs: a CSV file with the columns `fixed`, `moving`
            and optionally `fixed_label` and `moving_label`, or a JSON file with a list of such
            objects. Paths are relative to the file's folder; each names one volume.
        label_root: Folder of label maps named like the volumes of `root`. Labels are laid over,
            and measure the registration where both volumes have them.
        **options: Options of `gvsl_lightning.datamodules.volume_data.FileDataModule`: give those of
            pre-training. The results are on the stored grid, whatever `spacing` is.

    Raises:
        InputError: Neither or both of `atlas` and `pairs` are given, or an option is wrong.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        atlas: str | None = None,
        atlas_label: str | None = None,
        atlas_role: Literal["moving", "fixed"] = "moving",
        pairs: str | None = None,
        label_root: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (atlas is None) == (pairs is None):
            raise InputError("Give either atlas and root, or pairs.")
        if atlas is not None and root is None:
            raise InputError("root is missing; give the volumes to register with the atlas.")
        check_choice("atlas_role", atlas_role, ("moving", "fixed"))
        self.root = root
        self.atlas = atlas
        self.atlas_label = atlas_label
        self.atlas_role = atlas_role
        self.pairs = pairs
        self.label_root = label_root
        self.files: list[PairFiles] = []
        self.dataset: RegistrationDataset | None = None
        self.is_registered: Callable[[PairFiles], bool] = lambda pair: False

    def setup(self, stage: str | None = None) -> None:
        """Choose the pairs and read the atlas, so that a damaged atlas ends the run at once.

        Raises:
            InputError: A path is wrong, the atlas cannot be read, or two pairs are the same.
        """
        if self.dataset is not None:
            return
        preparation = self.make_preparation()
        self.files = self.configure_pairs()
        seen: set[str] = set()
        for pair in self.files:
            if pair.name in seen:
                raise InputError(
                    f"Two pairs would be written as {pair.name}; list each once and name the files "
                    "apart."
                )
            seen.add(pair.name)
        if self.anonymise:
            volumes = [file for pair in self.files for file in (pair.fixed, pair.moving)]
            hidden = anonymous(volumes)
            self.files = [_pair(*both) for both in zip(hidden[::2], hidden[1::2], strict=True)]
        self.dataset = RegistrationDataset(self.files, preparation)
        if self.atlas is not None:
            first = self.files[0]
            self.dataset.keep(first.moving if self.atlas_role == "moving" else first.fixed)

    def configure_pairs(self) -> list[PairFiles]:
        """Choose the pairs; a hook to override."""
        if self.pairs is not None:
            return read_pairs(self.pairs)
        assert self.atlas is not None
        assert self.root is not None
        atlas = _one_volume(self.atlas, self.atlas_label)
        others = [
            file
            for file in find_volumes(self.root, self.label_root)
            if identity(file.image) != identity(atlas.image)
        ]
        if not others:
            raise InputError(f"{self.root} holds no volume but the atlas; give others.")
        if self.atlas_role == "moving":
            return [_pair(fixed=file, moving=atlas) for file in others]
        return [_pair(fixed=atlas, moving=file) for file in others]

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """One pair in each batch; one that `is_registered` is left out."""
        self.setup("predict")
        assert self.dataset is not None
        self.dataset.pairs = [pair for pair in self.files if not self.is_registered(pair)]
        return DataLoader(
            self.dataset, batch_size=1, num_workers=self.num_workers, collate_fn=_batch_of_one
        )


class RegistrationDataset(Dataset[dict[str, Any]]):
    """Reads and prepares pairs; a pair that cannot be read becomes a sentence.

    Args:
        pairs: The pairs; may be changed until the first one is read.
        preparation: From the stored volume to the network's input.
    """

    def __init__(self, pairs: Sequence[PairFiles], preparation: Preparation) -> None:
        self.pairs = pairs
        self.preparation = preparation
        self._kept: dict[Source, tuple[MetaTensor, RegistrationVolume]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def keep(self, file: VolumeFile) -> None:
        """Read a volume that is part of many pairs and keep it in memory."""
        self._kept[file.image] = self._read(file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load one pair: see `RegistrationDataModule`, without the batch's axis."""
        pair = self.pairs[index]
        names = {
            "pair_name": pair.name,
            "fixed_name": pair.fixed.name,
            "moving_name": pair.moving.name,
        }
        try:
            fixed_image, fixed = self._read(pair.fixed)
            moving_image, moving = self._read(pair.moving)
        except InputError as error:
            return {**names, "error": str(error)}
        shape = fixed_image.shape[1:]
        start = np.eye(4)
        start[:3, 3] = crop_start(moving_image.shape[1:], shape)
        return {
            **names,
            "fixed": torch.as_tensor(fixed_image.as_tensor(), dtype=torch.float32),
            "moving": crop(moving_image, shape).float(),
            "pair": RegistrationPair(fixed, moving._replace(grid=moving.grid @ start)),
        }

    def _read(self, file: VolumeFile) -> tuple[MetaTensor, RegistrationVolume]:
        if file.image in self._kept:
            return self._kept[file.image]
        stored = read_volume(file.image, self.preparation.channels)
        label = None if file.label is None else _read_label(file.label, file.image, stored)
        array = stored.numpy().copy()  # a transform may write into its input
        prepared = self.preparation({"image": stored}, file.image)["image"]
        return prepared, RegistrationVolume(
            source=file.image,
            array=array,
            affine=stored.affine.numpy(),
            label=label,
            grid=prepared.affine.numpy().astype(np.float64),
        )


def read_pairs(path: str) -> list[PairFiles]:
    """Read a table of pairs, a CSV or JSON file, in its order; see `RegistrationDataModule`."""
    file = Path(path).expanduser().absolute()
    rows = [
        {
            key: str(file.parent / Path(value).expanduser())
            for key, value in row.items()
            if value  # an empty cell is no label
        }
        for row in _read_table(file)
    ]
    volumes: dict[str, VolumeFile] = {}
    for row in rows:
        for role in ("fixed", "moving"):
            if row[role] not in volumes:
                volumes[row[role]] = _one_volume(row[role])
            label = row.get(f"{role}_label")
            if label is not None and not os.path.isfile(label):
                raise InputError(f"{label}, listed in {file}, does not exist; correct the table.")
    # together, so that files of the same name in different folders are told apart
    names = {volume.image: volume.name for volume in find_volumes(list(volumes))}

    def volume(row: Mapping[str, str], role: str) -> VolumeFile:
        image = volumes[row[role]].image
        return VolumeFile(image, names[image], row.get(f"{role}_label"))

    return [_pair(fixed=volume(row, "fixed"), moving=volume(row, "moving")) for row in rows]


_COLUMNS = ("fixed", "moving", "fixed_label", "moving_label")


def _read_table(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # as spreadsheets write it
        rows = (
            json.loads(text)
            if file.suffix.lower() == ".json"
            else list(csv.DictReader(text.splitlines()))
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); give a table of pairs.") from error
    if not isinstance(rows, list) or not rows or not all(map(_is_pair, rows)):
        raise InputError(
            f"{file} is no table of pairs; give each row fixed, moving and, if there are any, "
            "fixed_label and moving_label."
        )
    return rows


def _is_pair(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and set(row) <= set(_COLUMNS)
        and all(row.get(key) for key in _COLUMNS[:2])
        and all(isinstance(value, str | None) for value in row.values())
    )


def _one_volume(path: str, label: str | None = None) -> VolumeFile:
    volume = find_volume(path)
    if label is None:
        return volume
    label = os.path.abspath(os.path.expanduser(label))
    if not os.path.isfile(label):
        raise InputError(f"{label}, the label map of {path}, does not exist; correct the path.")
    return VolumeFile(volume.image, volume.name, label)


def _pair(fixed: VolumeFile, moving: VolumeFile) -> PairFiles:
    return PairFiles(f"{moving.name}_onto_{fixed.name}".replace("/", "_"), fixed, moving)


def _read_label(path: str, image: Source, stored: MetaTensor) -> np.ndarray:
    label = read_label(path)
    if label.shape[1:] != stored.shape[1:]:
        raise InputError(
            f"{path} has the shape {tuple(label.shape[1:])} and its image "
            f"{tuple(stored.shape[1:])}; give the label map of this image."
        )
    # NumPy files have no header to compare
    has_header = not any(str(source).endswith(".npy") for source in (path, image))
    if has_header and not np.allclose(label.affine, stored.affine, atol=1e-3):
        raise InputError(
            f"{path} does not lie where {describe(image)} does, by their affines; give the label "
            "map of this image."
        )
    whole: np.ndarray = label[0].numpy()
    return whole


def _batch_of_one(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    batch: dict[str, Any] = {}
    for key, value in item.items():
        if isinstance(value, torch.Tensor):
            batch[key] = value.unsqueeze(0)
        else:
            batch[key] = [value] if key.endswith("_name") else value
    return batch
