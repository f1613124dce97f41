"""Tests of ``python -m gvsl_lightning prepare``."""

import csv
import json
import os
import signal
import time
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gvsl_lightning.cli.main import main
from gvsl_lightning.data.find import find_volumes
from gvsl_lightning.data.prepared import PreparedFolder
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.volume_writer import VolumeWriter
from gvsl_lightning.datamodules import PretrainDataModule
from gvsl_lightning.tools import prepare as tool

SHAPE = (7, 8, 9)


@pytest.fixture(autouse=True)
def _fast_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sheet" not in request.node.name:
        monkeypatch.setattr(tool, "draw_contact_sheet", lambda *_: Figure(figsize=(0.1, 0.1)))


def save(path: Path, seed: int = 0, affine: Any = None, array: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(seed).integers(1, 1000, SHAPE).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(5):
        save(tmp_path / "data" / f"case_{index}.nii", index)
    return tmp_path / "data"


def prepare(root: Path, *words: str, status: int = 0, workers: int = 1) -> PreparedFolder:
    out = root.parent / "out"
    line = ["prepare", f"--data.root={root}", f"--out={out}", f"--workers={workers}", *words]
    if status:
        with pytest.raises(SystemExit) as stopped:
            main(line)
        assert stopped.value.code == status
    else:
        main(line)
    return PreparedFolder(out)


def times(folder: PreparedFolder) -> dict[str, int]:
    paths = folder.volumes_path.rglob("[!.]*.npy")
    return {path.name: path.stat().st_mtime_ns for path in paths}


def names(folder: PreparedFolder) -> list[str]:
    return [volume.name for volume in folder.volumes({})]


def rejected(folder: PreparedFolder) -> dict[str, str]:
    with (folder.path / "rejected.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def fails(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--workers=1", *map(str, words)])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_second_run_prepares_nothing_and_says_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(root)
    assert "5 prepared, 0 up to date, 0 rejected" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.[njp]*")}
    assert len(before) == 5 * 2 + 3  # settings, index, sheet
    prepare(root)
    output = capsys.readouterr().out
    assert "nothing to prepare, 5 up to date, 0 rejected" in output
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.[njp]*")} == before
    assert names(folder) == [f"case_{index}" for index in range(5)]
    assert rejected(folder) == {}


def test_a_changed_source_is_prepared_anew_and_a_touched_one_is_not(root: Path) -> None:
    before = times(prepare(root))
    os.utime(root / "case_0.nii", (1, 1))
    content = (root / "case_1.nii").stat()
    save(root / "case_1.nii", 77)
    assert (root / "case_1.nii").stat().st_size == content.st_size
    save(root / "case_2.nii", array=np.random.default_rng(0).random((4, 5, 6)))
    (root / "case_3.nii").unlink()
    folder = prepare(root)
    after = times(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"case_1.npy", "case_2.npy"}
    assert folder.sidecar("case_0")["source"]["mtime_ns"] == [10**9]
    assert names(folder) == ["case_0", "case_1", "case_2", "case_4"]
    assert folder.volumes({})[2].shape == (1, 4, 5, 6)
    expected = PretrainDataModule(str(root), val_fraction=0.0)
    expected.setup()
    stored = np.load(folder.volumes({})[1].image)
    assert np.allclose(stored, expected.train_pairs.volumes[1]["image"], atol=1e-3)


def test_volumes_of_sources_that_are_gone_stay_unused_until_these_return(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = root.parent / "labels"
    for index in range(5):
        save(labels / f"case_{index}.nii", array=np.ones(SHAPE, np.uint8))
    words = [f"--data.label_root={labels}"]
    before = times(prepare(root, *words))
    assert "Not used" not in capsys.readouterr().out
    (root / "case_3.nii").rename(root.parent / "case_3.nii")
    content = (root / "case_4.nii").read_bytes()
    (root / "case_4.nii").write_bytes(b"")
    folder = prepare(root, *words, status=3)
    output = capsys.readouterr().out
    assert f"kept in {folder.volumes_path}: 2 volumes" in output
    assert names(folder) == ["case_0", "case_1", "case_2"]
    assert times(folder) == before
    (root.parent / "case_3.nii").rename(root / "case_3.nii")
    (root / "case_4.nii").write_bytes(content)
    folder = prepare(root, *words)
    assert "nothing to prepare, 5 up to date" in capsys.readouterr().out
    assert len(names(folder)) == 5
    assert times(folder) == before


def test_voxels_in_a_file_beside_the_header_count_too(root: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\nElementType = MET_UCHAR\n"
    (root / "a.mhd").write_text(header + "ElementDataFile = a.raw\n")
    for path in root.glob("*.nii"):
        path.unlink()
    voxels = np.arange(120, dtype=np.uint8)
    (root / "a.raw").write_bytes(voxels.tobytes())
    first = times(prepare(root))
    (root / "a.raw").write_bytes(voxels[::-1].tobytes())
    assert times(prepare(root)) != first


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--data.spacing=[1,1,2]", "prepared with spacing null, and spacing is [1.0, 1.0, 2.0]"),
        ("--dtype=float32", "prepared with dtype float16, and dtype is float32 now"),
        ("--data.label_root=ELSEWHERE", "prepared with label_root null, and label_root is "),
    ],
)
def test_other_settings_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], word: str, sentence: str
) -> None:
    elsewhere = root.parent / "elsewhere"
    save(elsewhere / "case_0.nii", array=np.ones(SHAPE, np.uint8))
    before = times(prepare(root))
    message = fails(
        capsys,
        f"--data.root={root}",
        f"--out={root.parent / 'out'}",
        word.replace("ELSEWHERE", str(elsewhere)),
    )
    assert sentence in message
    assert "give another folder to prepare into, or " in message
    assert times(PreparedFolder(root.parent / "out")) == before


def test_volumes_that_cannot_be_used_are_listed_and_leave_the_list_when_repaired(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    not_finite = np.random.default_rng(0).random(SHAPE)
    not_finite[1, 2, 3] = np.nan
    (root / "garbage.nii.gz").write_bytes(b"no volume" * 99)
    (root / "dangling.nii").symlink_to(root / "gone.nii")
    save(root / "constant.nii", array=np.full(SHAPE, 7, np.int16))
    save(root / "not_finite.nii", array=not_finite)
    save(root / "channels.nii", array=np.stack([not_finite] * 3, -1))
    save(root / "huge.nii", affine=np.diag([1, 1, 200, 1]))
    folder = prepare(root, status=3, workers=2)
    reasons = {
        "garbage.nii.gz": "cannot be read",
        "dangling.nii": "cannot be read",
        "constant.nii": "holds a single value; leave it out",
        "not_finite.nii": "holds 1 NaN values among 504",
        "channels.nii": "not that of a 3D volume with 1 channel",
        "huge.nii": "has voxels of 1 x 1 x 200 mm",
    }
    found = rejected(folder)
    assert found.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in found[name]
    assert names(folder) == [f"case_{index}" for index in range(5)]
    output = capsys.readouterr().out
    assert "5 prepared, 0 up to date, 6 rejected" in output
    assert f"rejected: {found['huge.nii']}" in output.splitlines()
    for name in set(reasons) - {"huge.nii", "constant.nii"}:
        (root / name).unlink()
    for name in ("constant.nii", "huge.nii"):
        save(root / name)
    folder = prepare(root)
    assert rejected(folder) == {}
    assert names(folder)[-2:] == ["constant", "huge"]


def test_volumes_that_preparation_spoils_are_rejected(root: Path) -> None:
    save(root / "bone.nii", array=np.random.default_rng(0).uniform(2000, 3000, SHAPE))
    save(root / "wide.nii", affine=np.diag([1, 1, 0.05, 1]))
    folder = prepare(
        root, "--data.modality=ct", "--data.window=[0,1000]", "--data.spacing=[1,1,1]", status=3
    )
    found = rejected(folder)
    assert "holds a single value after preparation" in found["bone.nii"]
    assert "fewer than 2 voxels on an axis" in found["wide.nii"]


def test_values_beyond_float16_are_rejected_unless_stored_as_float32(root: Path) -> None:
    spec = (
        '[{"class_path": "monai.transforms.ScaleIntensityd", '
        '"init_args": {"keys": "image", "minv": 0, "maxv": 1e6}}]'
    )
    folder = prepare(root, f"--data.transforms={spec}", status=3)
    assert len(rejected(folder)) == 5
    assert "--dtype=float32" in rejected(folder)["case_0.nii"]
    words = [f"--data.root={root}", f"--out={root.parent / 'wide'}", "--workers=1"]
    main(["prepare", *words, f"--data.transforms={spec}", "--dtype=float32"])
    volume = PreparedFolder(root.parent / "wide").volumes({})[0]
    assert np.load(volume.image).max() == np.float32(1e6)


def run_slowly(root: Path, workers: int, seen: Any) -> None:
    def slow(writer: VolumeWriter, file: VolumeFile) -> Any:
        time.sleep(0.1)
        return written(writer, file)

    written = VolumeWriter._write
    VolumeWriter._write = slow  # type: ignore[method-assign]
    outcomes = tool.prepare(PretrainDataModule(str(root)), str(root.parent / "out"), workers)
    seen.put(sum(outcome.is_new for outcome in outcomes))


def started(root: Path, workers: int, seen: Any) -> Any:
    process = get_context("fork").Process(target=run_slowly, args=(root, workers, seen))
    process.start()
    return process


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    except OSError:
        return False
    return state != "Z" or threads > 1  # which hold its files still


def test_a_killed_run_goes_on_where_it_was(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(5, 12):
        save(root / f"case_{index}.nii", index)
    sidecars = root.parent / "out" / "volumes"
    process = started(root, 2, SimpleQueue(ctx=get_context("fork")))
    end = time.monotonic() + 60
    while len(list(sidecars.glob("*.json"))) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(children) == 2
    while any(alive(int(child)) for child in children) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(alive(int(child)) for child in children)
    done = {path.stem for path in sidecars.glob("*.json")}
    assert 3 <= len(done) < 12
    (sidecars / f".{'0' * 32}.partial").write_bytes(b"half a volume")
    folder = PreparedFolder(root.parent / "out")
    assert not folder.index_path.exists()
    before = times(folder)
    folder = prepare(root)
    output = capsys.readouterr().out
    assert f"{12 - len(done)} prepared, {len(done)} up to date" in output
    after = times(folder)
    assert all(after[f"{name}.npy"] == before[f"{name}.npy"] for name in done)
    assert names(folder) == [file.name for file in find_volumes(str(root))]
    assert not list(folder.path.rglob("*.partial"))


def test_two_runs_at_once_share_the_work(root: Path) -> None:
    for index in range(5, 10):
        save(root / f"case_{index}.nii", index)
    seen = SimpleQueue(ctx=get_context("fork"))
    processes = [started(root, 1, seen) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    shares = [seen.get(), seen.get()]
    assert max(shares) < 10 <= sum(shares)
    folder = PreparedFolder(root.parent / "out")
    assert len(names(folder)) == 10
    assert not list(folder.path.rglob("*.partial"))
    fresh = times(folder)
    assert times(prepare(root)) == fresh


def test_the_folder_may_lie_in_the_root_but_not_be_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--data.root={root}", f"--out={root / 'prepared'}"]
    for _ in range(2):
        main(["prepare", *words, "--workers=1"])
        assert len(names(PreparedFolder(root / "prepared"))) == 5
    assert "holds the volumes themselves" in fails(capsys, f"--data.root={root}", f"--out={root}")
    sentence = fails(capsys, f"--data.root={root / 'prepared'}", f"--out={root.parent / 'out'}")
    assert "holds prepared volumes" in sentence


def test_a_configuration_of_pretraining_gives_class_and_options(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "pretrain.yaml"
    config.write_text(
        "seed_everything: 3\n"
        "model: {class_path: GVSL}\n"
        "data:\n"
        "  class_path: CardiacCT\n"
        "  init_args: {window: [0, 500], patch_size: [8, 8, 8], seed: '${seed_everything}'}\n"
    )
    folder = prepare(root, f"--config={config}", "--data.crop_foreground=0.1")
    assert folder.settings["modality"] == "ct"
    assert folder.settings["window"] == [0.0, 500.0]
    assert folder.settings["spacing"] == [1.0, 1.0, 1.0]
    assert folder.settings["crop_foreground"] == 0.1
    words = [f"--data.root={root}", f"--out={tmp_path / 'other'}", "--workers=1"]
    main(["prepare", "--data=CardiacCT", *words])
    assert PreparedFolder(tmp_path / "other").settings["window"] == [-1024.0, 1024.0]


def test_contact_sheet_shows_slices_and_does_not_fail_on_long_names(root: Path) -> None:
    array = np.zeros((20, 30, 40), np.float32)
    array[:10] = 1
    save(root / f"{'deep/' * 20}/a_rather_long_name_{'x' * 80}.nii.gz", array=array)
    folder = prepare(root)
    sheet = folder.path / "contact_sheet.png"
    picture = imread(sheet)
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert picture.std() > 0.1
    figure = tool.draw_contact_sheet(folder, folder.volumes({}))
    texts = [cell._suptitle.get_text() for cell in figure.subfigs]
    assert "case_0\n7 x 8 x 9 voxels of 1 x 1 x 1 mm" in texts
    (right, *_), *_ = (
        [axes.images[0].get_array() for axes in cell.axes]
        for cell, text in zip(figure.subfigs, texts, strict=True)
        if "20 x 30 x 40" in text
    )
    assert right.shape == (30, 20)
    assert right[:, :9].max() == 0  # the patient's right, the high indices, is on the left
    assert right[:, 11:].min() == 1


def test_settings_of_something_else_are_left_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root.parent / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"editor": "dark"}))
    message = fails(capsys, f"--data.root={root}", f"--out={out}")
    assert "settings.json of something else" in message
    assert json.loads((out / "settings.json").read_text()) == {"editor": "dark"}
    assert "root is missing" in fails(capsys, f"--out={out}")
