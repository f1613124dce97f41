"""Bad volumes, label maps, series, lists and folders at every command that reads them.

A bad input ends in one sentence that names the file, and leaves no result of it; an odd one
but sound works, with the right values.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
import yaml

import bad_volumes as bad
from checkpoints import registration_checkpoint, segmentation_checkpoint
from gvsl_lightning.cli.main import COMMANDS, main
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.read import read_volume
from gvsl_lightning.errors import InputError

SHAPE = bad.SHAPE

Capture = pytest.CaptureFixture[str]

# --- The commands -------------------------------------------------------------------------------

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]
GVSL = ["--model=GVSL", "--model.backbone_options={channels: [8, 16]}"]
CLASSES = "class_names=[background,one,two]"
SEGMENTATION = [
    "--model=Segmentation",
    f"--model.{CLASSES}",
    "--model.mode=scratch",
    "--model.window_size=[16,16,16]",
    "--model.backbone_options={channels: [8, 16]}",
]


@cache
def checkpoint(kind: str) -> Path:
    """Of an untrained network."""
    path = Path(tempfile.mkdtemp(), f"{kind}.ckpt")
    if kind == "registration":
        return registration_checkpoint(path)
    names = ["background", "one", "two"]
    return segmentation_checkpoint(path, names, window_size=(16, 16, 16))


def pretrain(data: Path, out: Path) -> list[str]:
    """Every volume is read: two train, two validate."""
    return [
        "fit",
        *GVSL,
        "--data=PretrainDataModule",
        f"--data.root={data / 'images'}",
        "--data.patch_size=[16,16,16]",
        "--data.batch_size=1",
        "--data.val_count=2",
        *QUIET,
    ]


def segment(data: Path, out: Path) -> list[str]:
    return [
        "fit",
        *SEGMENTATION,
        "--data=SegmentationDataModule",
        f"--data.root={data / 'images'}",
        f"--data.label_root={data / 'labels'}",
        f"--data.{CLASSES}",
        "--data.patch_size=[16,16,16]",
        "--data.val=2",
        "--data.split_by=name",
        *QUIET,
    ]


def classify(data: Path, out: Path) -> list[str]:
    rows = [
        {"path": str(path), "label": ["well", "ill"][place % 2]}
        for place, path in enumerate(
            sorted(p for p in (data / "images").iterdir() if p.name != "again")
        )
    ]
    (data / "table.json").write_text(json.dumps(rows))
    return [
        "fit",
        "--model=Classification",
        "--model.class_names=[well,ill]",
        "--model.mode=scratch",
        "--model.backbone_options={channels: [8, 16]}",
        "--data=ClassificationDataModule",
        f"--data.root={data / 'table.json'}",
        "--data.class_names=[well,ill]",
        "--data.size=[16,16,16]",
        "--data.val=1",
        *QUIET,
    ]


def prepare(data: Path, out: Path) -> list[str]:
    roots = [f"--data.root={data / 'images'}", f"--data.label_root={data / 'labels'}"]
    return ["prepare", *roots, f"--out={out}", "--workers=1"]


def predict(data: Path, out: Path) -> list[str]:
    return [
        "predict",
        *SEGMENTATION,
        "--data=SegmentationDataModule",
        f"--data.root={data / 'images'}",
        f"--data.{CLASSES}",
        f"--ckpt_path={checkpoint('segmentation')}",
        "--trainer.callbacks=PredictionWriter",
        f"--trainer.callbacks.folder={out}",
        *QUIET,
    ]


def register(data: Path, out: Path) -> list[str]:
    return [
        "predict",
        *GVSL,
        "--data=RegistrationDataModule",
        f"--data.root={data / 'images'}",
        f"--data.label_root={data / 'labels'}",
        f"--data.atlas={data / 'images' / 'a.nii.gz'}",
        f"--data.atlas_label={data / 'labels' / 'a.nii.gz'}",
        f"--ckpt_path={checkpoint('registration')}",
        "--trainer.callbacks=RegistrationWriter",
        f"--trainer.callbacks.folder={out}",
        *QUIET,
    ]


def features(data: Path, out: Path) -> list[str]:
    return [
        "features",
        f"--root={data / 'images'}",
        f"--label_root={data / 'labels'}",
        "--weights=none",
        "--backbone_options={channels: [8, 16]}",
        "--samples=20",
        f"--out={out}",
    ]


Command = Callable[[Path, Path], list[str]]
IMAGES: tuple[Command, ...] = (pretrain, segment, classify, prepare, predict, register, features)
"""All that read volumes. `export` reads none: see `test_a_volume_is_no_weights`."""
LABELS: tuple[Command, ...] = (segment, prepare, register, features)
"""All that read every label map."""
LISTERS: tuple[Command, ...] = (pretrain, segment, prepare, predict, register, features)
"""All whose root may be a list of volumes."""

# --- The cases ----------------------------------------------------------------------------------


class Case(NamedTuple):
    """A fault of the volume `b` in a folder of good ones, or of its label map.

    Attributes:
        make: makes it and returns its path.
        says: what the sentence says behind that path; nothing where it works.
        commands: those that it concerns.
        root: of the volumes: a folder or a list.
        affine: where the volume lies, and its label map; None: in its folder's usual place.
    """

    make: Callable[[Path], Path]
    says: str = ""
    commands: tuple[Command, ...] = IMAGES
    root: str = "images"
    affine: np.ndarray | None = None

    def words(self, command: Command, data: Path, out: Path) -> list[str]:
        words = command(data, out)
        return words if self.root == "images" else rooted(words, data / self.root)


def image(data: Path) -> Path:
    return data / "images" / "b.nii.gz"


def label(data: Path) -> Path:
    return data / "labels" / "b.nii.gz"


def other(data: Path, name: str) -> Path:
    """Path of a volume that takes the place of `b`."""
    image(data).unlink()
    return data / "images" / name


def nifti(array: np.ndarray, name: str = "b.nii.gz", **options: Any) -> Callable[[Path], Path]:
    return lambda data: bad.write(other(data, name), array, **options)


def both(shape: tuple[int, ...], **options: Any) -> Callable[[Path], Path]:
    """Volume and label map alike."""

    def make(data: Path) -> Path:
        bad.write(label(data), bad.labels(shape), **options)
        return bad.write(image(data), bad.intensities(0, shape), **options)

    return make


def label_map(array: np.ndarray, **options: Any) -> Callable[[Path], Path]:
    return lambda data: bad.write(label(data), array, **options)


def content(of: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """A file with other bytes."""

    def make(data: Path) -> Path:
        path = of(data)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def renamed(name: str) -> Callable[[Path], Path]:
    def make(data: Path) -> Path:
        label(data).rename(data / "labels" / f"{name.partition('.')[0]}.nii.gz")
        return image(data).rename(data / "images" / name)

    return make


def link(to: Callable[[Path], Path], name: str = "b.nii.gz") -> Callable[[Path], Path]:
    def make(data: Path) -> Path:
        target = to(data)
        path = other(data, name) if name == "b.nii.gz" else data / "images" / name
        path.symlink_to(target)
        return path

    return make


def dicom(**options: Any) -> Callable[[Path], Path]:
    """A series, and a label map on its grid."""

    def make(data: Path) -> Path:
        bad.write(label(data), bad.labels(), bad.DICOM_AFFINE)
        return bad.series(other(data, "b"), **options)

    return make


def listing(name: str, text: str | bytes) -> Callable[[Path], Path]:
    def make(data: Path) -> Path:
        path = data / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def listed(name: str, text: str | bytes, says: str) -> Case:
    return Case(listing(name, text), says, LISTERS, name)


def single(data: Path) -> Path:
    return bad.write(data / "one" / "b.nii.gz", bad.intensities()).parent


def empty(data: Path) -> Path:
    (data / "empty").mkdir()
    (data / "empty" / "notes.txt").write_text("nothing")
    return data / "empty"


def looped(data: Path) -> Path:
    (data / "images" / "again").symlink_to(data / "images")
    return image(data)


def mixed(data: Path) -> Path:
    path = dicom()(data)
    return bad.series(path, prefix="other")


def unlabelled(data: Path) -> Path:
    label(data).unlink()
    return image(data)


def label_of(array: np.ndarray) -> Callable[[Path], Path]:
    """Another label map of the volume, whose path it is."""

    def make(data: Path) -> Path:
        bad.write(label(data), array)
        return image(data)

    return make


def latin_1(data: Path) -> Path:
    """The path as it is shown."""
    os.rename(image(data), os.fsencode(data / "images") + b"/caf\xe9.nii.gz")
    return data / "images" / r"caf\xe9.nii.gz"


def uncompressed(data: bytes) -> bytes:
    return gzip.decompress(data)


def changed(value: float, dtype: Any = np.float32) -> np.ndarray:
    array = bad.intensities().astype(dtype)
    array[3, 3, 3:6] = value
    return array


def patched(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[0, 0, 0] = value
    return array


RGB = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
LARGE = (1e4 * bad.intensities() + 1e5).astype(np.uint64)
HUGE: dict[str, Any] = {"version": 2, "dim": [3, 100_000, 100_000, 100_000, 1, 1, 1, 1]}
NO_SFORM: dict[str, Any] = {"sform_code": 0, "qform_code": 1}
PLANE = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
FLIPPED = np.diag([-1.5, 1.5, 2.0, 1.0])
MOVED = bad.AFFINE + np.array([[0, 0, 0, 5], [0] * 4, [0] * 4, [0] * 4])
UNREAD = "cannot be read ("
SHAPED = "not that of a 3D volume with 1 channel; convert it"
PLACED = "correct its header or leave it out."

ERRORS: dict[str, Case] = {
    # files
    "truncated nii.gz": Case(content(image, lambda b: b[:-900]), f"{UNREAD}Compressed file ended"),
    "truncated nii": Case(
        content(nifti(bad.intensities(), "b.nii"), lambda b: b[:-900]),
        f"{UNREAD}its header says 6,720 bytes and it has",
    ),
    "truncated in its header": Case(content(image, lambda b: b[:60]), UNREAD),
    "empty": Case(content(image, lambda _: b""), UNREAD),
    "nii named nii.gz": Case(content(image, uncompressed), "not compressed: rename it to .nii."),
    "nii.gz named nii": Case(renamed("b.nii"), "it is compressed: rename it to .nii.gz."),
    "text named nii.gz": Case(content(image, lambda _: b"no volume\n" * 99), UNREAD),
    "wrong magic": Case(nifti(bad.intensities(), magic=b"xyz"), UNREAD),
    "unknown type": Case(nifti(bad.intensities(), datatype=9999), UNREAD),
    "larger header than data": Case(
        nifti(bad.intensities(), dim=[3, 40, 40, 40, 1, 1, 1, 1]),
        f"{UNREAD}Expected 256000",
        (pretrain, classify, prepare, predict, register, features),
    ),
    "huge header, nii": Case(
        nifti(bad.intensities(), "b.nii", **HUGE),
        f"{UNREAD}its header says 4,000,000,000,000,000 bytes and it has",
    ),
    "huge header, nii.gz": Case(nifti(bad.intensities(), **HUGE), f"{UNREAD}its header says 4,000"),
    "huge header, mha": Case(
        lambda d: bad.write_itk(other(d, "b.mha"), b"= 12 14 10", b"= 100000 100000 100000"),
        f"{UNREAD}its header says 1,000,000,000,000,000 bytes",
    ),
    "huge header, nrrd": Case(
        lambda d: bad.write_itk(other(d, "b.nrrd"), b": 12 14 10", b": 100000 100000 100000"),
        f"{UNREAD}its header says 1,000,000,000,000,000 bytes",
    ),
    "huge header, npy": Case(
        lambda d: bad.write_npy(other(d, "b.npy"), bad.intensities(), b"(12, 14,", b"(99999, 99,"),
        UNREAD,
    ),
    "truncated nrrd": Case(
        lambda d: bad.write_itk(other(d, "b.nrrd"), cut=900), UNREAD, (pretrain, predict, classify)
    ),
    "truncated npy": Case(
        content(lambda d: bad.write_npy(other(d, "b.npy"), bad.intensities()), lambda b: b[:-9]),
        UNREAD,
    ),
    "pickled npy": Case(
        lambda d: bad.write_npy(other(d, "b.npy"), np.array([{"a": 1}], object)), UNREAD
    ),
    "dangling link": Case(link(lambda d: d / "nowhere.nii.gz"), UNREAD),
    "link to itself": Case(link(image), UNREAD),
    # voxels
    "NaN": Case(nifti(changed(np.nan)), "holds 3 NaN values among 1,680; replace them by numbers"),
    "infinite": Case(nifti(changed(-np.inf)), "holds 3 infinite values among 1,680; replace"),
    "beyond float32": Case(nifti(changed(1e300, np.float64)), "holds 3 infinite values among"),
    "all zero": Case(nifti(np.zeros(SHAPE, np.int16)), "holds a single value; leave it out."),
    "constant": Case(nifti(np.full(SHAPE, 7.5, np.float32)), "holds a single value; leave it out."),
    "2D": Case(nifti(bad.intensities(0, (12, 14))), f"has the shape (12, 14), {SHAPED}"),
    "4D": Case(nifti(bad.intensities(0, (*SHAPE, 3))), f"has the shape (12, 14, 10, 3), {SHAPED}"),
    "one voxel thick": Case(both((12, 14, 1)), f"has the shape (12, 14, 1), {SHAPED}"),
    "negative size": Case(
        nifti(bad.intensities(), dim=[3, -5, 14, 10, 1, 1, 1, 1]),
        f"{UNREAD}its header says the shape (-5, ",
    ),
    "RGB": Case(nifti(RGB), "has voxels that are colours; convert it to real numbers"),
    "complex": Case(nifti(bad.intensities().astype(np.complex64)), "that are complex numbers;"),
    "text": Case(
        lambda d: bad.write_npy(other(d, "b.npy"), np.full(SHAPE, "a")), "of the type <U1"
    ),
    # places
    "0 mm": Case(
        nifti(bad.intensities(), pixdim=[1, 0, 0, 0, 1, 1, 1, 1], **NO_SFORM),
        f"has voxels of 0 x 0 x 0 mm, not between 0.01 and 100; {PLACED}",
    ),
    "1e6 mm": Case(nifti(bad.intensities(), affine=np.diag([1e6, 1e6, 1e6, 1])), PLACED),
    "1e-6 mm": Case(nifti(bad.intensities(), affine=np.diag([1e-6, 1, 1, 1])), PLACED),
    "NaN mm": Case(
        nifti(bad.intensities(), pixdim=[1, np.nan, 1, 1, 1, 1, 1, 1], **NO_SFORM), PLACED
    ),
    "singular affine": Case(
        nifti(bad.intensities(), srow_x=[1, 0, 0, 0], srow_z=[1, 0, 0, 0]), PLACED
    ),
    "axes in one plane": Case(
        nifti(bad.intensities(), affine=np.array(PLANE, float)), "has axes that lie in one plane; "
    ),
    "affine of zeros": Case(
        nifti(bad.intensities(), **{f"srow_{axis}": [0, 0, 0, 0] for axis in "xyz"}), PLACED
    ),
    "NaN in the affine": Case(
        nifti(bad.intensities(), srow_z=[np.nan, 0, 0, 0]), "has an affine that is not finite; "
    ),
    # series
    "missing slices": Case(
        dicom(positions=[0, 2, 4, 6, 10, 12, 14]), "has slices between 2 and 4 mm apart"
    ),
    "slices there twice": Case(
        dicom(positions=[0, 2, 4, 4, 6, 8, 10]), "has slices between 0 and 2 mm apart"
    ),
    "gantry tilt": Case(dicom(tilt=15), "has slices that are tilted by 15 degrees (gantry tilt);"),
    "no pixel data": Case(dicom(pixels=False), UNREAD),
    "truncated slice at the end": Case(
        content(lambda d: dicom()(d) / "slice009.dcm", lambda b: b[:-200]),
        UNREAD,
        (pretrain, classify, prepare, predict, register),
    ),
    # label maps
    "label: truncated": Case(content(label, lambda b: b[:-20]), UNREAD, LABELS),
    "label: another shape": Case(
        label_map(bad.labels((12, 14, 11))), "has the shape (12, 14, 11) and its image", LABELS
    ),
    "label: moved by 5 mm": Case(label_map(bad.labels(), affine=MOVED), " lie", LABELS),
    "label: mirrored affine": Case(label_map(bad.labels(), affine=FLIPPED), " lie", LABELS),
    "label: halves": Case(
        label_map(bad.labels().astype(np.float32) / 2),
        "holds the value 0.5, which is no whole number; give a label map.",
        LABELS,
    ),
    "label: NaN": Case(
        label_map(patched(bad.labels().astype(np.float32), np.nan)),
        "holds 1 NaN values among 1,680",
        LABELS,
    ),
    "label: unknown value": Case(
        label_map(patched(bad.labels(), 77)),
        "holds the value 77, which is none of 0, 1, 2; correct label_values or class_names.",
        (segment,),
    ),
    "label: negative value": Case(
        label_map(patched(bad.labels().astype(np.int16), -1)), "holds the value -1", (segment,)
    ),
    "label: RGB": Case(label_map(RGB), "has voxels that are colours", LABELS),
    "label: 4D": Case(label_map(bad.labels((*SHAPE, 2))), SHAPED, LABELS),
    # lists and folders
    "list: missing path": listed("list.txt", "images/a.nii.gz\nno.nii.gz", "no.nii.gz, listed in"),
    "list: missing path in JSON": listed("list.json", '["no.nii.gz"]', "no.nii.gz, listed in"),
    "list: broken JSON": listed("list.json", '[{"image": "images/a.nii.gz"', "is not valid JSON ("),
    "list: no list": listed("list.json", '{"images": []}', "neither a list nor a "),
    "list: entry without image": listed(
        "list.json", '[{"img": "a"}]', "has the entry {'img': 'a'}"
    ),
    "list: number for a path": listed("list.json", "[1]", "has the entry 1; write a path"),
    "list: empty JSON": listed("list.json", "[]", "holds no volume; give a folder"),
    "list: comments alone": listed("list.txt", "# nothing\n\n", "holds no volume; give a folder"),
    "list: not UTF-8": listed("list.txt", b"images/\xff\xfe.nii.gz", "is no text in UTF-8 ("),
    "list: spreadsheet": listed("list.xlsx", b"PK", "is of an unknown format; give .nii"),
    "decathlon: training is no list": listed(
        "dataset.json", '{"training": 3}', "neither a list nor"
    ),
    "folder: missing": Case(
        lambda d: d / "nowhere",
        "does not exist and matches no file; correct the path.",
        LISTERS,
        "nowhere",
    ),
    "folder: no volume": Case(empty, "holds no volume; give a folder", LISTERS, "empty"),
    "folder: one volume": Case(
        single, "holds one volume and a pair needs at least two", (pretrain,), "one"
    ),
    "folder: one volume and its copy by link": Case(
        link(lambda d: d / "images" / "a.nii.gz", "z.nii.gz"),
        "a.nii.gz, which is the same on disk; leave out one of the two.",
        (segment, classify, features),
    ),
    # names
    "name in latin-1": Case(
        latin_1, "is no UTF-8; rename it.", (pretrain, segment, prepare, predict)
    ),
}

TEXT = "# four volumes\n" + "\n".join(f"./images/{name}.nii.gz # {name}" for name in "abcd")
PATHS = json.dumps([f"images/{name}.nii.gz" for name in "abcdb"])
UNPLACED = np.array([[-1.5, 0, 0, 8.25], [0, 1.5, 0, -9.75], [0, 0, 2, -9], [0, 0, 0, 1]])
"""Where nibabel puts a volume of which a header says nothing: its centre is the origin."""
STORED = bad.slices().astype(np.float32) - 1024

WORKS: dict[str, tuple[Case, np.ndarray]] = {
    "good": (Case(image), bad.intensities(1)),
    "uint64": (Case(nifti(LARGE)), LARGE),
    "4D of one volume": (Case(nifti(bad.intensities()[..., None])), bad.intensities()),
    "scale that is no number": (
        Case(nifti(LARGE.astype(np.int32), scl_slope=np.inf, scl_inter=np.nan)),
        LARGE,
    ),
    "neither sform nor qform": (
        Case(both(SHAPE, sform_code=0, qform_code=0), affine=UNPLACED),
        bad.intensities(),
    ),
    "negative voxel size beside an sform": (
        Case(nifti(bad.intensities(), pixdim=[1, -1.5, -1.5, 2, 1, 1, 1, 1])),
        bad.intensities(),
    ),
    "smaller than a patch": (Case(both((3, 4, 5))), bad.intensities(0, (3, 4, 5))),
    "suffix in capitals": (Case(renamed("b.NII.GZ")), bad.intensities(1)),
    "spaces and other alphabets": (Case(renamed("b schädel Ωμέγα.nii.gz")), bad.intensities(1)),
    "list with spaces": (
        Case(listing("my list.txt", TEXT), "", (pretrain, prepare, predict), "my list.txt"),
        bad.intensities(1),
    ),
    "path listed twice": (
        Case(listing("list.json", PATHS), "", (pretrain, prepare, predict), "list.json"),
        bad.intensities(1),
    ),
    "second link to a volume": (
        Case(
            lambda d: link(lambda d: image(d), "z.nii.gz")(d).with_name("b.nii.gz"),
            "",
            (pretrain, prepare),
        ),
        bad.intensities(1),
    ),
    "link of a folder to itself": (Case(looped), bad.intensities(1)),
    "series": (Case(dicom(), affine=bad.DICOM_AFFINE), STORED),
    "two series in a folder": (
        Case(mixed, "", (pretrain, predict), affine=bad.DICOM_AFFINE),
        STORED,
    ),
    "label: float": (Case(label_of(bad.labels().astype(np.float32))), bad.intensities(1)),
    "label: background alone": (Case(label_of(np.zeros(SHAPE, np.int8))), bad.intensities(1)),
    "label: value of no class": (
        Case(label_of(patched(bad.labels(), 77)), "", (pretrain, prepare, predict, register)),
        bad.intensities(1),
    ),
    "label: none": (
        Case(unlabelled, "", (pretrain, prepare, predict, register)),
        bad.intensities(1),
    ),
}


# --- What happens -------------------------------------------------------------------------------


def rooted(words: list[str], root: Path | str) -> list[str]:
    """The words with another root."""
    return [re.sub(r"^(--(data\.)?root)=.*", rf"\1={root}", word) for word in words]


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def every(cases: Mapping[str, Any], usual: Command, everywhere: str) -> list[Any]:
    """Each case at all of its commands; slow but for the usual one, and one case everywhere."""
    params = []
    for number, (name, found) in enumerate(cases.items()):
        case = found if isinstance(found, Case) else found[0]
        commands = case.commands
        quick = usual if usual in commands else commands[number % len(commands)]
        for command in commands:
            marks = [] if command is quick or name == everywhere else [pytest.mark.slow]
            identity = f"{command.__name__}: {name}"
            params.append(pytest.param(command, found, id=identity, marks=marks))
    return params


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return bad.folder(tmp_path / "data")


def refused(words: list[str], capfd: Capture, status: int = 2) -> str:
    """The sentence of a command that ends with a status within ten seconds."""
    capfd.readouterr()
    start = time.process_time()  # on a machine that others use, too
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert time.process_time() - start < 10
    assert stopped.value.code == status
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert printed.err.endswith(f"{errors[0]}\n")
    assert "Traceback" not in printed.err + printed.out
    return errors[0].removeprefix("error: ")


def results(*folders: Path) -> list[str]:
    """Files that look like results, other than those of the good volumes."""
    kinds = (".nii.gz", ".npy", ".safetensors", ".ckpt", ".png", "cases.csv", "features.csv")
    files = [str(path.relative_to(one)) for one in folders for path in one.rglob("*")]
    good = re.compile(r"volumes/[acd]\.|^[acd]\.nii|a_onto_[cd]/|contact_sheet")
    return [
        file
        for file in files
        if (file.endswith(kinds) or ".partial" in file) and not good.search(file)
    ]


@pytest.mark.parametrize(("command", "case"), every(ERRORS, features, "NaN"))
def test_one_sentence_and_no_result(
    command: Command, case: Case, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    path, out = case.make(data), tmp_path / "out"
    is_volume = case.root == "images" and "UTF-8" not in case.says
    status = 3 if command is prepare and is_volume else 2
    sentence = refused(case.words(command, data, out), capfd, status)
    assert str(path) in sentence
    assert case.says in sentence
    assert results(out, tmp_path / "cwd") == []


@pytest.mark.parametrize(("command", "found"), every(WORKS, prepare, "good"))
def test_it_works(
    command: Command, found: tuple[Case, np.ndarray], data: Path, tmp_path: Path
) -> None:
    case, expected = found
    path, out = case.make(data), tmp_path / "out"
    path = image(data) if case.root != "images" else path
    name = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    (volume,) = [file for file in find_volumes(str(data / "images")) if file.name == name]
    main(case.words(command, data, out))
    read = read_volume(volume.image)
    np.testing.assert_allclose(read[0], expected.astype(np.float32), rtol=1e-6)
    affine = bad.AFFINE if case.affine is None else case.affine
    np.testing.assert_allclose(read.affine, affine, atol=1e-5)
    if command in (predict, register):
        place = f"{name}.nii.gz" if command is predict else f"a_onto_{name}/warped.nii.gz"
        written = nibabel.load(out / place)
        assert written.shape == expected.shape
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    if command is prepare:
        assert json.loads((out / "index.json").read_text())["names"] == sorted(
            ["a", name, "c", "d"]
        )
        stored = np.load(out / "volumes" / f"{name}.npy")[0].astype(np.float32)
        scaled = (expected - expected.min()) / float(expected.max() - expected.min())
        turned = scaled[
            tuple(slice(None, None, int(sign)) for sign in np.sign(np.diag(affine)[:3]))
        ]
        np.testing.assert_allclose(stored, turned, atol=1e-3)
    if command is features:
        assert name in (out / "cases.csv").read_text(encoding="utf-8")


# --- Single commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "make", "says"),
    [
        ("atlas", content(lambda d: d / "images" / "a.nii.gz", lambda b: b[:-900]), UNREAD),
        ("atlas", lambda d: d / "nowhere.nii.gz", "does not exist"),
        ("atlas", lambda d: d / "images", "holds 4 volumes ("),
        ("atlas_label", lambda d: d / "no.nii.gz", "does not exist; correct the path."),
        ("label_root", lambda d: d / "nowhere", "does not exist; correct label_root."),
    ],
)
def test_a_bad_atlas_ends_the_registration_before_it_starts(
    option: str,
    make: Callable[[Path], Path],
    says: str,
    data: Path,
    tmp_path: Path,
    capfd: Capture,
) -> None:
    path = make(data)
    sentence = refused([*register(data, tmp_path / "out"), f"--data.{option}={path}"], capfd)
    assert str(path) in sentence
    assert says in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"train": ["a", "b"], "test": ["b"]}, "names the case 'b' 2 times; name it once."),
        ({"train": ["a", "e"]}, "names the case 'e' and there is none of this name; the first"),
        ({"val": ["a"]}, "Of 4 cases none is left for training"),
        (["a"], "cannot be read as {"),
        (None, "cannot be read as {"),
    ],
)
def test_bad_splits(split: Any, says: str, data: Path, tmp_path: Path, capfd: Capture) -> None:
    path = data / "split.json"
    if split is not None:
        path.write_text(json.dumps(split))
    sentence = refused([*segment(data, tmp_path), f"--data.split_file={path}"], capfd)
    assert says in sentence
    assert str(path) in sentence or "none is left" in says


def test_validation_volumes_do_not_train(data: Path, tmp_path: Path, capfd: Capture) -> None:
    words = [word for word in pretrain(data, tmp_path) if "val_count" not in word]
    sentence = refused([*words, f"--data.val_root={data / 'images'}"], capfd)
    assert sentence.startswith("A pair needs at least two training volumes and there is none;")


@pytest.mark.parametrize(
    "command", [pretrain, prepare, *map(slow, (segment, classify, predict, register))]
)
def test_a_volume_of_fewer_channels(
    command: Command, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    for name in "acd":
        bad.write(data / "images" / f"{name}.nii.gz", bad.intensities(0, (*SHAPE, 2)))
    words = command(data, tmp_path / "out")
    words += ["--data.channels=2"] if command is prepare else CHANNELS
    sentence = refused(words, capfd, 3 if command is prepare else 2)
    assert f"{image(data)} has the shape (12, 14, 10), not that of a 3D volume with 2" in sentence
    assert results(tmp_path / "out", tmp_path / "cwd") == []


CHANNELS = ["--data.channels=2", "--model.in_channels=2"]


@pytest.mark.parametrize("command", [pretrain, prepare, slow(predict)])
def test_worker_processes(command: Command, data: Path, tmp_path: Path, capfd: Capture) -> None:
    nifti(changed(np.nan))(data)
    words = [word for word in command(data, tmp_path / "out") if "--workers" not in word]
    words.append("--workers=2" if command is prepare else "--data.num_workers=2")
    sentence = refused(words, capfd, 3 if command is prepare else 2)
    assert f"{image(data)} holds 3 NaN values among 1,680" in sentence
    assert results(tmp_path / "out", tmp_path / "cwd") == []


@pytest.mark.parametrize(
    ("command", "count"),
    [(prepare, 3), (predict, 1), slow(register, 3)],
)
def test_earlier_results_stay(
    command: Command, count: int, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "out"
    main(command(data, out))
    made = [path for path in out.rglob("*") if re.search(r"(/|a_onto_)b[./]", str(path))]
    before = {path: path.read_bytes() for path in made if path.is_file()}
    assert len(before) == count
    nifti(changed(np.nan))(data)
    again = [] if command is prepare else ["--trainer.callbacks.overwrite=true"]
    refused([*command(data, out), *again], capfd, 3 if command is prepare else 2)
    assert {path: path.read_bytes() for path in before} == before


def test_several_bad_volumes_are_all_named(data: Path, tmp_path: Path, capfd: Capture) -> None:
    nifti(changed(np.nan))(data)
    (data / "images" / "c.nii.gz").write_bytes(b"")
    for command, lines in ((predict, "not predicted: "), (register, "not registered: ")):
        with pytest.raises(SystemExit):
            main(command(data, tmp_path / "out"))
        *told, last = [line for line in capfd.readouterr().err.splitlines() if ".nii.gz" in line]
        assert [str(data / "images" / name) in line for line, name in zip(told, BAD, strict=True)]
        assert all(line.startswith(lines) for line in told)
        assert last.startswith("error: 2 of ")
    assert "2 of 4 volumes were rejected, the first one because " in refused(
        prepare(data, tmp_path / "prepared"), capfd, 3
    )


BAD = ("b.nii.gz", "c.nii.gz")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("volumes/b.npy", lambda _: None, "b.npy cannot be read ("),
        ("index.json", lambda _: b"{}", "is not prepared to its end; give the command prepare"),
        ("settings.json", lambda _: b'{"prepared": 1}', "holds no settings.json of prepared"),
    ],
)
def test_damaged_prepared_volumes(
    file: str, change: Callable[[bytes], bytes], says: str, data: Path, capfd: Capture
) -> None:
    out = data / "prepared"
    main([word for word in prepare(data, out) if "label_root" not in word])
    written = change((out / file).read_bytes())
    (out / file).unlink()
    if written is not None:
        (out / file).write_bytes(written)
    assert says in refused(rooted(pretrain(data, out), out), capfd)


@pytest.mark.parametrize("command", [prepare, slow(pretrain)])
@pytest.mark.parametrize("what", ["file", "folder", "list", "label_root"])
def test_without_permission(
    what: str, command: Command, unprivileged: Path, capfd: Capture
) -> None:
    data, out = bad.folder(unprivileged / "data"), unprivileged / "out"
    root = data / "list.txt" if what == "list" else data / "images"
    (data / "list.txt").write_text("images/*.nii.gz")
    kept = {
        "file": image(data),
        "folder": data / "images" / "more",
        "list": data / "list.txt",
        "label_root": data / "labels",
    }[what]
    if what == "folder":
        bad.write(kept / "e.nii.gz", bad.intensities())
    kept.chmod(0)
    words = rooted(command(data, out), root)
    if command is pretrain and what == "label_root":
        words.append(f"--data.label_root={kept}")
    with as_nobody():
        sentence = refused(words, capfd, 3 if (command, what) == (prepare, "file") else 2)
    assert str(kept) in sentence
    assert "ermission denied" in sentence


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that others can write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        monkeypatch.chdir(folder)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            path.chmod(0o777)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Not as root, who may do everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_volume_is_no_weights(data: Path, tmp_path: Path, capfd: Capture) -> None:
    words = ["--format=onnx", f"--out={tmp_path / 'out.onnx'}"]
    sentence = refused(["export", f"--weights={image(data)}", *words], capfd)
    assert str(image(data)) in sentence
    assert not (tmp_path / "out.onnx").exists()


# --- The sentence and the traceback -------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, -1])
def test_debug_lets_the_traceback_through(place: int, data: Path, tmp_path: Path) -> None:
    image(data).write_bytes(b"")
    words = pretrain(data, tmp_path)
    words.insert(place % (len(words) + 1), "--debug")
    with pytest.raises(InputError, match=r"b\.nii\.gz cannot be read"):
        main(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_debug(command: str, capfd: Capture) -> None:
    words = [command, "--nonsense=1", "--config=nowhere.yaml"]
    refused(words, capfd)
    with pytest.raises(InputError):
        main([*words, "--debug"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "a.nii"), "a.nii cannot be used (Permission "),
        (OSError(28, "No space left on device", "a.nii"), "a.nii cannot be written (No space left"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    fail_with(error, monkeypatch)
    assert refused(["features"], capfd).startswith(says)
    with pytest.raises(type(error)):
        main(["features", "--debug"])


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("a"), OSError("a"), TypeError("a")])
def test_an_error_of_the_program_is_not_hidden(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    with pytest.raises(type(error), match="a"):
        main(["features"])


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: Any) -> None:
        raise error

    monkeypatch.setattr("gvsl_lightning.tools.features.main", fail)


# --- Processes of their own ---------------------------------------------------------------------


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "gvsl_lightning"]
    return subprocess.run([*program, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_ends_with_the_sentence(workers: int, data: Path, tmp_path: Path) -> None:
    nifti(changed(np.nan))(data)
    ended = run([*pretrain(data, tmp_path / "out"), f"--data.num_workers={workers}"])
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {image(data)} holds 3 NaN values")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_benchmark_on_bad_volumes(data: Path, tmp_path: Path, capfd: Capture) -> None:
    path = nifti(changed(np.nan))(data)
    configs = Path(__file__).parent.parent / "configs"
    plan = yaml.safe_load((configs / "benchmark" / "phantom_smoke.yaml").read_text())
    plan["methods"] = {"GVSL": {"config": str(configs / "pretrain" / "gvsl.yaml")}}
    plan["baseline"] = "GVSL"
    plan["pretrain"] = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "data.init_args.root": str(data / "images"),
        "data.init_args.patch_size": [16, 16, 16],
        "data.init_args.val_count": 2,
        "data.init_args.num_workers": 0,
        "model.init_args.backbone_options": {"channels": [8, 16]},
    }
    plan["tasks"] = {"hearts": plan["tasks"]["hearts"]}
    plan["tasks"]["hearts"]["config"] = str(configs / "finetune" / "phantom_segmentation.yaml")
    plan["modes"], plan["seeds"] = {"linear": plan["modes"]["linear"]}, [0]
    plan["figures"] = {}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    words = ["benchmark", f"--config={tmp_path / 'plan.yaml'}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 1 of 2 runs failed and 1 had to wait for a pre-training that")
    assert str(path) in last
    assert results(tmp_path / "out") == []
