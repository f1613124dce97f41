"""Folders of prepared volumes: their files, and their volumes as a dataset.

A folder of prepared volumes holds

- ``settings.json``: how the volumes were prepared, written first;
- ``volumes/NAME.npy``: the volume, (C, D, H, W), float16 or float32, to be mapped into memory;
- ``volumes/NAME.label.npy``: its label map, (1, D, H, W), the smallest integers that hold it;
- ``volumes/NAME.json``: where it comes from, its geometry and its intensities; written after the
  volume, so that a volume with this file is complete;
- ``index.json``: names, shapes, labels and original files of all volumes, written last. To open
  the folder is to read this file.

Every file is written as a whole or not at all. A copy of the folder behind a URL can be read as
well, see `gvsl_lightning.data.remote`.
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
from gvsl_lightning.data.source import PackedFiles, VolumeFile, describe, first_file
from gvsl_lightning.errors import InputError, cause_of
from gvsl_lightning.runs.files import remove_partials, write_text, write_whole
from gvsl_lightning.runs.privacy import Hide, pseudonym

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
        source: The file that it was made of, the first one of several; its pseudonym in a folder
            that was prepared with `anonymise`.
    """

    shape: tuple[int, ...] = ()
    source: str = ""


class PreparedFolder:
    """A folder of prepared volumes.

    Args:
        path: The folder, which need not exist yet, or the URL of one, which can only be read.

    Attributes:
        root: The same, absolute.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = os.fspath(path)
        self.root = root.rstrip("/") if is_url(root) else os.path.abspath(os.path.expanduser(root))
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
    def hide(self) -> Hide:
        """Makes the pseudonym of a path in a folder that was prepared with `anonymise`."""
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
            self.volume(name, tuple(shape), labelled, source)
            for name, shape, labelled, source in zip(*map(index.get, _COLUMNS), strict=True)
        ]

    def volume(
        self, name: str, shape: tuple[int, ...], labelled: bool, source: str
    ) -> PreparedVolume:
        """A volume in the folder, by the name of its original."""
        stem = f"{self.root}/volumes/{_stem(name)}"
        label = f"{stem}.label.npy" if labelled else None
        return PreparedVolume(f"{stem}.npy", name, label, shape, source)

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
            region: Part of each volume that is wanted, which must be None.
            labelled: Whether their label maps are wanted too.

        Raises:
            InputError: One is missing or has changed since, a region is wanted, or as in `volumes`.
        """
        if region is not None:
            raise InputError(
                f"A region of each volume is wanted ({type(region).__name__}) and {self.path} "
                "holds whole ones; set prepared to null, and cache to true."
            )
        by_source = {volume.source: volume for volume in self.volumes(settings)}
        hide = self.hide
        found = []
        for file in files:
            volume = by_source.get(hide(first_file(file.image)))
            if volume is None:
                raise InputError(
                    f"{describe(file.image)} is not among the volumes prepared in {self.path}; "
                    "prepare the folder that it lies in, or set prepared to null."
                )
            self._require_unchanged(volume, file, labelled, hide)
            found.append(replace(volume, name=file.name))
        return found

    def _require_unchanged(
        self, volume: PreparedVolume, file: VolumeFile, labelled: bool, hide: Hide
    ) -> None:
        known = self.sidecar(volume.name)
        sources = {"source": file.image, "label": file.label if labelled else None}
        for key, source in sources.items():
            if source is None:
                continue
            try:
                is_same = unchanged(known[key], source, hide) is not None
            except (KeyError, TypeError, OSError):
                is_same = False
            if not is_same:
                raise InputError(
                    f"{describe(source)} has changed since it was prepared in {self.path}; give "
                    "the command prepare again, with --data.label_root where there are label maps."
                )

    def _read_json(self, name: str) -> Any:
        """Content of a file of the folder; None if it is not there or damaged."""
        try:
            return json.loads(read_file(f"{self.root}/{name}"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def _differences(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Settings that are not as stored: name, stored and given value."""
        stored = self.settings
        for name, value in settings.items():
            if stored.get(name) != value:
                yield name, _json(stored.get(name)), _json(value)

    def write_index(self, volumes: Sequence[PreparedVolume]) -> bool:
        """Write which volumes there are, in the order of the names of the originals.

        Returns:
            False if the index is unchanged.
        """
        index = {
            "names": [volume.name for volume in volumes],
            "shapes": [list(volume.shape) for volume in volumes],
            "labelled": [volume.label is not None for volume in volumes],
            "origins": [volume.source for volume in volumes],
        }
        with self.locked():
            if self._read_json("index.json") == index:
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
        content = self._read_json(f"volumes/{_stem(name)}.json")
        return content if isinstance(content, dict) else {}

    def files(self, name: str) -> tuple[Path, Path, Path]:
        """Paths of a volume, of its label map and of its JSON file."""
        stem = f"{self.volumes_path}/{_stem(name)}"
        return Path(f"{stem}.npy"), Path(f"{stem}.label.npy"), Path(f"{stem}.json")

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
        InputError: The path is that of something else.
    """
    if path is None:
        return None
    if is_url(path) or not is_prepared(os.path.expanduser(path)):
        raise InputError(
            f"{path} is no local folder of prepared volumes; give one that the command prepare "
            "wrote."
        )
    return PreparedFolder(path)


class PreparedVolumes(Dataset[dict[str, Any]]):
    """Prepared volumes as a dataset.

    An item holds `name`, `image` and, if wanted, `label`: arrays that are mapped from their files,
    so that `gvsl_lightning.data.crop.crop` reads the crop only and all processes of a machine share
    the pages. Behind a URL, ranges of bytes are read: `gvsl_lightning.data.remote.RemoteArray`.

    Args:
        volumes: The volumes.
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
                "source": volume.source,
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
    """Map a stored array: parts are read when they are used; changes do not reach the file.

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


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
