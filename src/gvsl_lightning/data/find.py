"""Which volumes a folder, a pattern or a list stands for, and which label map belongs to which."""

import glob
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gvsl_lightning.data.dicom import find_series, is_dicom
from gvsl_lightning.data.read import read_label, read_volume
from gvsl_lightning.data.source import (
    SUFFIXES,
    Source,
    VolumeFile,
    describe,
    first_file,
    identity,
    refuse_duplicates,
)
from gvsl_lightning.errors import InputError

SETTINGS = "settings.json"
"""File by which a folder of prepared volumes is known."""

_Pair = tuple[Source, str | None]
"""A volume and its label map."""

_LABEL_FOLDER = re.compile("label|mask|seg", re.IGNORECASE)
"""Start of the name of a folder of label maps."""

_FEW_FOLDERS = 6
"""Folders of a root that are compared with each other, and that a sentence names."""


def find_volumes(
    root: str | Sequence[str],
    label_root: str | None = None,
    duplicates: Literal["keep", "drop", "refuse"] = "keep",
) -> list[VolumeFile]:
    """Find the volumes that a path, or a list of paths, stands for.

    Args:
        root: One of

            - a folder, searched recursively for NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr),
              MetaImage (.mha, .mhd), FreeSurfer (.mgz, .mgh), NumPy (.npy) and DICOM series; hidden
              files and folders, prepared volumes and folders of label maps (named `label...`,
              `mask...` or `seg...`) are left out; of a folder with the `dataset.json` of the
              Medical Segmentation Decathlon, the training images;
            - a file of one of these formats, or a glob pattern (`**` for any depth);
            - a text file, one path per line, ` #` before comments, or a JSON file: a list of
              paths or of `{"image": path, "label": path}`, or a Decathlon `dataset.json`; paths
              are relative to the file's folder;
            - a list of any of these.
        label_root: Folder of label maps; files in it are no images. A label map has the path of
            its image relative to root, or its file name where no other image or label map has
            this name. The suffix may differ.
        duplicates: How to treat a file that is found again. `keep`: it is one volume under each
            of its paths, such as links to it. `drop`: it is one volume under the first path.
            `refuse`: an error.

    Returns:
        The volumes sorted by name. The damaged DICOM files of a folder are one of them, in the
        place of the folder's only series, so that reading them is an error.

    Raises:
        InputError: A path does not exist or cannot be read, nor a list, or nothing is found.
    """
    roots = [root] if isinstance(root, str | os.PathLike) else list(root)
    found = [pair for entry in roots for pair in _find(os.fspath(entry), label_root)]
    if not found:
        raise InputError(
            f"{root} holds no volume; give a folder, pattern or list of "
            f"{', '.join(SUFFIXES)} files or DICOM series."
        )
    if duplicates == "refuse":
        refuse_duplicates(source for source, _ in found)
    labels = dict(found)
    names = _names(labels, _searched_folder(roots))
    if label_root is not None:
        labels = _match_labels(names, label_root)
    files = [VolumeFile(source, names[source], label) for source, label in labels.items()]
    files.sort(key=lambda file: file.name)
    if duplicates == "drop":
        first: dict[Any, VolumeFile] = {}
        for file in files:
            first.setdefault(identity(file.image), file)
        files = list(first.values())
    return files


def find_volume(path: str) -> VolumeFile:
    """Find the one volume that a path stands for.

    Raises:
        InputError: There is none, or there are several.
    """
    files = find_volumes(path)
    if len(files) > 1:
        some = ", ".join(describe(file.image) for file in files[:3])
        raise InputError(
            f"{path} holds {len(files)} volumes ({some}{', ...' if len(files) > 3 else ''}); give "
            "the path of one of them."
        )
    return files[0]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of fsspec, such as `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][\w+.-]*(://|::)", os.fspath(path)) is not None


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that the command `prepare` wrote."""
    try:
        content = json.loads(Path(folder, SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "prepared" in content


def lies_in(source: Source, folder: str) -> bool:
    """Whether a volume lies below a folder, which may not exist."""
    return first_file(source).startswith(os.path.join(_absolute(folder), ""))


def require_apart(folder: Path, data: Any) -> None:
    """Refuse a folder of results in which a data module would find them as volumes.

    Args:
        folder: Of the results.
        data: A data module, which may have `root` and `label_root`.

    Raises:
        InputError: The folder is, or lies in, one of these.
    """
    for name in ("root", "label_root"):
        given = getattr(data, name, None) or []
        for path in [given] if isinstance(given, str | os.PathLike) else given:
            searched = _searched_folder([path])
            if searched and lies_in(os.path.join(folder.absolute(), ""), searched):
                raise InputError(
                    f"{folder} lies in {path}, the {name} of the data, where the results would be "
                    "taken for volumes; give another folder for them."
                )


def load_json(path: str) -> Any:
    """Content of a JSON file.

    Raises:
        InputError: It is no JSON, or cannot be read.
    """
    text = _read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); correct it.") from error


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); correct that.") from error
    except ValueError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}); save it as such.") from error


def _find(root: str, label_root: str | None) -> list[_Pair]:
    """Volumes of one root, without those of `label_root` and other label maps."""
    found = list(_expand(root, None))
    if label_root is not None:
        found = [(source, label) for source, label in found if not lies_in(source, label_root)]
    folder = _searched_folder([root])
    return _without_label_maps(found, folder) if folder else found


def _without_label_maps(found: list[_Pair], root: str) -> list[_Pair]:
    """Leave out the folders of label maps in a root, with one warning."""
    folders: dict[str, list[_Pair]] = defaultdict(list)
    for pair in found:
        first, *others = Path(os.path.relpath(first_file(pair[0]), root)).parts
        folders[first if others else "."].append(pair)
    maps = {name for name in folders if _LABEL_FOLDER.match(name)}
    if not maps and 1 < len(folders) <= _FEW_FOLDERS:
        files = {
            name: {os.path.relpath(first_file(s), Path(root, name)): s for s, _ in pairs}
            for name, pairs in folders.items()
        }
        maps = {a for a, b in permutations(folders, 2) if _are_label_maps(files[a], files[b])}
    if not maps or len(maps) == len(folders):
        return found
    kept, left_out = (
        ", ".join([f"{name} ({len(folders[name])})" for name in sorted(names)][:_FEW_FOLDERS])
        for names in (folders.keys() - maps, maps)
    )
    warnings.warn(f"Volumes in {root}: {kept}; left out as label maps: {left_out}.", stacklevel=4)
    return [pair for name, pairs in folders.items() if name not in maps for pair in pairs]


def _are_label_maps(maps: Mapping[str, Source], images: Mapping[str, Source]) -> bool:
    """Whether the first files of a folder are label maps of those of the same names in another."""
    if not maps.keys() <= images.keys():
        return False
    for name in sorted(maps)[:2]:
        if not isinstance(path := maps[name], str):
            return False
        try:
            label, volume = read_label(path), read_volume(images[name])
        except InputError:
            return False
        values, levels = (np.unique(one.numpy()) for one in (label, volume))
        same_grid = label.shape == volume.shape and np.allclose(label.affine, volume.affine)
        few = 1 < len(values) <= len(levels) / 4
        if not same_grid or values[0] != 0 or not few:
            return False
    return True


def _expand(path: str, label: str | None) -> Iterator[_Pair]:
    if is_url(path):
        raise InputError(
            f"{path} is a URL, which only pre-training reads, and only as its one and only root; "
            "give the path of a local copy."
        )
    path = _absolute(path)
    if os.path.isdir(path):
        if is_prepared(path):
            raise InputError(
                f"{path} holds prepared volumes, which only pre-training reads, and only as its "
                "one and only root; give the original volumes, and this as prepared where the data "
                "are labelled."
            )
        dataset = os.path.join(path, "dataset.json")
        yield from _expand_json(dataset) if _is_decathlon(dataset) else _search(path)
    elif not os.path.lexists(path):
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise InputError(f"{path} does not exist and matches no file; correct the path.")
        for match in matches:
            if os.path.isdir(match) or match.lower().endswith(SUFFIXES):
                yield from _expand(match, label)
    elif path.endswith(".json"):
        yield from _expand_json(path)
    elif path.endswith(".txt"):
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in _read_text(path).splitlines())
        yield from _expand_entries(filter(None, lines), path)
    elif path.lower().endswith(SUFFIXES):
        yield path, label
    elif is_dicom(path):
        yield from ((source, label) for source in find_series([path]))
    else:
        raise InputError(
            f"{path} is of an unknown format; give {', '.join(SUFFIXES)}, the folder of a DICOM "
            "series, or a .txt or .json list."
        )


def _is_decathlon(path: str) -> bool:
    content = load_json(path) if os.path.isfile(path) else None
    return isinstance(content, dict) and "training" in content


def _expand_json(path: str) -> Iterator[_Pair]:
    content = load_json(path)
    entries = content.get("training") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise InputError(
            f'{path} holds neither a list nor a "training" list; write one of paths or of '
            '{"image": path, "label": path}.'
        )
    yield from _expand_entries(entries, path)


def _expand_entries(entries: Iterable[Any], path: str) -> Iterator[_Pair]:
    folder = os.path.dirname(path)
    for entry in entries:
        pair = entry if isinstance(entry, dict) else {"image": entry}
        image, label = pair.get("image"), pair.get("label")
        if not isinstance(image, str) or not isinstance(label, str | None):
            raise InputError(
                f'{path} has the entry {entry}; write a path or {{"image": path, "label": path}}.'
            )
        image = os.path.join(folder, os.path.expanduser(image))
        if not os.path.exists(image) and not glob.has_magic(image):
            raise InputError(f"{image}, listed in {path}, does not exist; correct the list.")
        yield from _expand(image, label and os.path.join(folder, os.path.expanduser(label)))


def _search(root: str) -> Iterator[_Pair]:
    dicom: list[str] = []
    for path in _walk(root):
        if path.lower().endswith(SUFFIXES):
            yield path, None
        elif is_dicom(path):
            dicom.append(path)
    yield from ((source, None) for source in find_series(dicom))


def _walk(root: str) -> Iterator[str]:
    """Files of a folder and of its subfolders; none that are hidden or of prepared volumes."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        seen.add(os.path.realpath(folder))
        if SETTINGS in files and is_prepared(folder):
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        yield from (os.path.join(folder, name) for name in sorted(files) if name[0] != ".")


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}); change its permissions or move it "
        "away."
    ) from error


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def _searched_folder(roots: Sequence[str | os.PathLike[str]]) -> str | None:
    """The folder to which names are relative, if there is a single one and no list in it."""
    root = _absolute(roots[0])
    is_searched = os.path.isdir(root) and not _is_decathlon(os.path.join(root, "dataset.json"))
    return root if len(roots) == 1 and is_searched else None


def _names(sources: Iterable[Source], folder: str | None) -> dict[Source, str]:
    """Name of every source: its path below the folder, or below the common one."""
    paths: dict[Source, str] = {}
    for source in sources:
        files = (source,) if isinstance(source, str) else source
        _require_utf8(files)
        folders = [os.path.dirname(path) for path in files]
        paths[source] = _stem(source) if isinstance(source, str) else os.path.commonpath(folders)
    common = folder or os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    wanted: dict[Source, str] = {}
    for source, path in paths.items():
        # slices may lie in the folder itself
        below = path.removeprefix(common).lstrip(os.sep)
        wanted[source] = below or os.path.basename(path)
    names: dict[Source, str] = {}
    taken: set[str] = set()
    reserved = set(wanted.values())
    for source, name in wanted.items():
        unique, number = name, 1
        while unique in taken or (number > 1 and unique in reserved):
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        names[source] = unique
    return names


def _stem(path: str) -> str:
    suffix = next((s for s in reversed(SUFFIXES) if path.lower().endswith(s)), "")
    return path[: len(path) - len(suffix)]


def _match_labels(names: dict[Source, str], label_root: str) -> dict[Source, str | None]:
    root = _absolute(label_root)
    if not os.path.isdir(root):
        raise InputError(f"{root}, the folder of labels, does not exist; correct label_root.")
    by_path: dict[str, str] = {}
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in _walk(root):
        if path.lower().endswith(SUFFIXES):
            below = os.path.relpath(_stem(path), root)
            by_path[below] = path
            by_name[os.path.basename(below)].append(path)
    images = Counter(map(os.path.basename, names.values()))
    found = {}
    for source, name in names.items():
        base = os.path.basename(name)
        is_only = images[base] == len(by_name[base]) == 1
        found[source] = by_path.get(name) or (by_name[base][0] if is_only else None)
    return found


def _require_utf8(paths: Iterable[str]) -> None:
    for path in paths:
        escaped = os.fsencode(path).decode(errors="backslashreplace")
        if escaped != path:
            raise InputError(f"The name of {escaped} is no UTF-8; rename it.")
