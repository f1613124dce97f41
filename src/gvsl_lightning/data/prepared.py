"""Volumes that were prepared once: how they lie on disk, how one is written, all as a dataset.

A folder of prepared volumes holds

- ``settings.json``: how the volumes were prepared, written first;
- ``volumes/NAME.npy``: the volume, (C, D, H, W), float16 or float32, to be mapped into memory;
- ``volumes/NAME.label.npy``: its label map, (1, D, H, W), the smallest integers that hold it;
- ``volumes/NAME.json``: where it comes from, its geometry and its intensities; written after the
  volume, so that a volume with this file is complete;
- ``index.json``: names, shapes and labels of all volumes, written last. Reading it is all it takes
  to open the folder.

Every file is written under another name and renamed, so that it is there as a whole or not at all.
A copy of the folder behind a URL can be read as well, see `gvsl_lightning.data.remote`.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from torch.utils.data import Dataset

from gvsl_lightning import __version__
from gvsl_lightning.data.crop import array_to_tensor
from gvsl_lightning.data.find import SETTINGS, is_prepared, is_url
from gvsl_lightning.data.fingerprint import unchanged
from gvsl_lightning.data.regions import FindRegion
from gvsl_lightning.data.remote import RemoteArray, read_file
from gvsl_lightning.data.source import PackedFiles, Source, VolumeFile, describe
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.files import remove_partials, write_text, write_whole
from gvsl_lightning.runs.privacy import Shown, pseudonym

FORMAT = 1
"""Version of the preparation: volumes of another one are not read, but prepared anew."""

DType = Literal["float16", "float32"]
_COLUMNS = ("names", "shapes", "labelled", "origins")
"""Of the index."""


@dataclass(frozen=True)
class PreparedVolume(VolumeFile):
    """One prepared volume; `image` and `label` are its files in the folder.

    Attributes:
        shape: (C, D, H, W).
        origin: The file that it was made of, the first one of several; its pseudonym in a folder
            that was prepared with `anonymise`.
    """

    shape: tuple[int, ...] = ()
    origin: str = ""


class PreparedFolder:
    """A folder of prepared volumes.

    Args:
        path: The folder, which need not exist yet, or the URL of one, which can only be read.

    Attributes:
        root: The same, absolute.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        self.root = text.rstrip("/") if is_url(text) else os.path.abspath(os.path.expanduser(text))
        self.path = Path(self.root)
        self.volumes_path = self.path / "volumes"
        self.index_path = self.path / "index.json"

    @classmethod
    def among(cls, root: str | Sequence[str] | None) -> "PreparedFolder | None":
        """The folder that a root stands for; None: it stands for other volumes."""
        roots = [root] if isinstance(root, str | os.PathLike) else root or []
        if len(roots) != 1:
            return None
        (path,) = roots
        return cls(path) if is_url(path) or is_prepared(os.path.expanduser(path)) else None

    @property
    def settings(self) -> dict[str, Any]:
        """How its volumes were prepared."""
        content = self._read_json(SETTINGS)
        if not isinstance(content, dict) or not {"prepared", "settings"} <= set(content):
            raise InputError(
                f"{self.root} holds no {SETTINGS} of prepared volumes; give the folder that "
                "`prepare` wrote, or a copy of it."
            )
        if content["prepared"] != FORMAT:
            raise InputError(
                f"{self.root} was prepared by version {content['version']} in another way than "
                "this one prepares; prepare the volumes anew, into another folder."
            )
        settings: dict[str, Any] = content["settings"]
        return settings

    @property
    def shown(self) -> Shown:
        """Makes the text that the folder holds for a path: the path, or its pseudonym."""
        return pseudonym if self.settings.get("anonymise") else str

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder one for these settings.

        Raises:
            InputError: It holds volumes prepared in another way, or is a URL.
        """
        if is_url(self.root):
            raise InputError(
                f"{self.root} is a URL; prepare the volumes into a local folder and copy that."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not is_prepared(self.path):
                if (self.path / SETTINGS).exists():
                    raise InputError(
                        f"{self.path} holds a {SETTINGS} of something else; give another folder."
                    )
                content = {"prepared": FORMAT, "version": __version__, "settings": dict(settings)}
                write_json(self.path / SETTINGS, content)
        for name, old, new in self._differences(settings):
            moved = f", or write it into its {SETTINGS} if the same files moved there"
            raise InputError(
                f"{self.path} was prepared with {name} {old}, and {name} is {new} now; give "
                f"another folder to prepare into, or {name} {old} again"
                f"{moved if name in ('root', 'label_root') else ''}."
            )

    def volumes(self, settings: Mapping[str, Any]) -> list[PreparedVolume]:
        """All volumes, sorted by the names of the originals.

        Args:
            settings: Those that the volumes must have been prepared with.

        Raises:
            InputError: They were prepared in another way, or not to the end.
        """
        for name, old, new in self._differences(settings):
            raise InputError(
                f"{self.root} was prepared with {name} {old} and is to be read with {name} {new}; "
                f"set {name} to {old}, or prepare the volumes into another folder with {name} "
                f"{new}."
            )
        index = self._read_json("index.json")
        if not isinstance(index, dict) or not set(_COLUMNS) <= set(index):
            raise InputError(
                f"{self.root} is not prepared to its end; give the command prepare again."
            )
        return [
            PreparedVolume(
                image=f"{self.root}/volumes/{stem}.npy",
                name=name,
                label=f"{self.root}/volumes/{stem}.label.npy" if labelled else None,
                shape=tuple(shape),
                origin=origin,
            )
            for name, stem, shape, labelled, origin in zip(
                index["names"],
                map(_stem, index["names"]),
                index["shapes"],
                index["labelled"],
                index["origins"],
                strict=True,
            )
        ]

    def find(
        self,
        files: Sequence[VolumeFile],
        settings: Mapping[str, Any],
        region: FindRegion | None = None,
        labelled: bool = False,
    ) -> list[PreparedVolume]:
        """The volumes that were made of files, in their order and under their names.

        Args:
            files: Volumes as `find_volumes` finds them.
            settings: Those that they must have been prepared with.
            region: Part of each volume that is wanted; prepared volumes are whole.
            labelled: Whether their label maps are wanted too.

        Raises:
            InputError: One is missing or has changed since, a region is wanted, or as in `volumes`.
        """
        if region is not None:
            raise InputError(
                f"A region of each volume is wanted ({type(region).__name__}) and {self.path} "
                "holds whole ones; set prepared to null, and cache to true."
            )
        by_origin = {volume.origin: volume for volume in self.volumes(settings)}
        shown = self.shown
        return [self._made_of(file, by_origin, labelled, shown) for file in files]

    def _made_of(
        self,
        file: VolumeFile,
        by_origin: Mapping[str, PreparedVolume],
        labelled: bool,
        shown: Shown,
    ) -> PreparedVolume:
        origin = file.image if isinstance(file.image, str) else file.image[0]
        volume = by_origin.get(shown(origin))
        if volume is None:
            raise InputError(
                f"{describe(file.image)} is not among the volumes prepared in {self.path}; prepare "
                "the folder that it lies in, or set prepared to null."
            )
        known = self.sidecar(volume.name)
        sources: list[tuple[str, Source]] = [("source", file.image)]
        if labelled:
            assert file.label is not None
            sources += [("label", file.label)]
        for key, source in sources:
            try:
                found = known[key]
                same = found is not None and unchanged(found, source, shown) is not None
            except (KeyError, TypeError, OSError):
                same = False
            if not same:
                raise InputError(
                    f"{describe(source)} has changed since it was prepared in {self.path}; give "
                    "the command prepare again, with --data.label_root where there are label maps."
                )
        return replace(volume, name=file.name)

    def _read_json(self, name: str) -> Any:
        """Content of a file of the folder; None if it is not there or damaged."""
        try:
            return json.loads(read_file(f"{self.root}/{name}"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def _differences(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Settings that are not as stored: name, stored and given value, as shown."""
        stored = self.settings
        for name, value in settings.items():
            if stored.get(name) != value:
                yield name, _shown(stored.get(name)), _shown(value)

    def write_index(self, volumes: Sequence[PreparedVolume]) -> bool:
        """Write which volumes there are, in the order of the names of the originals.

        Returns:
            False if the index is unchanged.
        """
        index = {
            "names": [volume.name for volume in volumes],
            "shapes": [list(volume.shape) for volume in volumes],
            "labelled": [volume.label is not None for volume in volumes],
            "origins": [volume.origin for volume in volumes],
        }
        with self.locked():
            with suppress(OSError, ValueError):
                if json.loads(self.index_path.read_text(encoding="utf-8")) == index:
                    return False
            write_json(self.index_path, index)
        return True

    def count_unused(self, volumes: Sequence[PreparedVolume]) -> int:
        """Number of volumes in the folder that are none of these."""
        used = {volume.image for volume in volumes}
        return sum(
            f"{folder}/{name}" not in used
            for folder, _, names in os.walk(self.volumes_path)
            for name in names
            if name.endswith(".npy") and not name.endswith(".label.npy")
        )

    def sidecar(self, name: str) -> dict[str, Any]:
        """Content of the JSON file of a volume; empty if there is none."""
        with suppress(OSError, ValueError):
            content = json.loads(self._path(name, ".json").read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
        return {}

    def files(self, name: str) -> tuple[Path, Path, Path]:
        """Paths of a volume, of its label map and of its JSON file."""
        return self._path(name, ".npy"), self._path(name, ".label.npy"), self._path(name, ".json")

    def _path(self, name: str, suffix: str) -> Path:
        return self.volumes_path / f"{_stem(name)}{suffix}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait for other processes that write the files of the folder as a whole."""
        with open(self.path / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Mark the folder as in use; a process that is alone in it removes unfinished files."""
        with open(self.path / ".writers", "w") as file:
            self._tidy(file)
            fcntl.flock(file, fcntl.LOCK_SH)
            try:
                yield
            finally:
                self._tidy(file)

    def _tidy(self, file: IO[str]) -> None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_partials(self.path)


def open_prepared(path: str | None) -> PreparedFolder | None:
    """The folder of prepared volumes at a path, if there is a path.

    Raises:
        InputError: It is none.
    """
    if path is None:
        return None
    folder = None if is_url(path) else PreparedFolder.among(path)
    if folder is None:
        raise InputError(
            f"{path} is no local folder of prepared volumes; give one that the command prepare "
            "wrote."
        )
    return folder


class PreparedVolumes(Dataset[dict[str, Any]]):
    """Prepared volumes as a dataset.

    An item holds `name`, `image` and, if wanted, `label`: arrays that are mapped from their files,
    so that `gvsl_lightning.datamodules.pairs.crop` reads a crop alone and all processes of a
    machine share what was read. Behind a URL they are read by ranges of bytes in place of that, see
    `gvsl_lightning.data.remote.RemoteArray`.

    Args:
        volumes: Which ones.
        labelled: Take `label` along.
        mapped: False: read whole volumes, as tensors of float32 and int32.
        copies: Folder into which a volume behind a URL is copied at its first access, to be mapped
            from there.
        geometry: Take `affine`, `original_affine`, `original_shape` and `source` along; see
            `gvsl_lightning.data.datasets.VolumeDataset`.
    """

    def __init__(
        self,
        volumes: Sequence[PreparedVolume],
        labelled: bool,
        mapped: bool = True,
        copies: Path | None = None,
        geometry: bool = False,
    ) -> None:
        self.volumes = PackedFiles(volumes)
        self.labelled = labelled
        self.geometry = geometry
        self.mapped = mapped
        self.copies = copies

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        volume = self.volumes[index]
        assert isinstance(volume.image, str)
        item: dict[str, Any] = {"image": self._load(volume.image), "name": volume.name}
        if self.labelled:
            assert volume.label is not None
            item["label"] = self._load(volume.label)
        if self.geometry:
            known = json.loads(read_file(f"{volume.image.removesuffix('.npy')}.json"))
            item |= {
                "affine": np.array(known["stored"]["affine"]),
                "original_affine": np.array(known["original"]["affine"]),
                "original_shape": np.array(known["original"]["shape"][1:]),
                "source": volume.origin,
            }
        return item

    def _load(self, path: str) -> Any:
        array: Any = map_array(path) if not is_url(path) else self._load_remote(path)
        return array if self.mapped else array_to_tensor(array[:, :, :, :])

    def _load_remote(self, url: str) -> RemoteArray | np.ndarray:
        try:
            if self.copies is None:
                return RemoteArray(url)
            copy = self.copies / f"{hashlib.sha256(url.encode()).hexdigest()}.npy"
            if not copy.exists():
                write_whole(copy, lambda file: file.write(read_file(url)))
        except FileNotFoundError as error:
            raise InputError(f"{url} does not exist; copy the prepared folder again.") from error
        return map_array(str(copy))


def map_array(path: str) -> np.ndarray:
    """Map a stored array: only the parts that are used are read from the file.

    Writing to the array changes nothing in the file.

    Args:
        path: Its file.

    Raises:
        InputError: The file is damaged or missing.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read ({cause_of(error)}); give the command prepare again."
        ) from error
    return array


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, one line for each key, as a whole or not at all."""
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    write_text(path, "{\n " + ",\n ".join(lines) + "\n}\n")


def _stem(name: str) -> str:
    """Path of a volume's files without suffix: none is the label map of another volume."""
    return f"{name}_" if name.rstrip("_").endswith(".label") else name


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
