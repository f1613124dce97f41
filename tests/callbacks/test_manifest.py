"""A result that is there is kept if it would come out the same, and never handed out otherwise."""

from pathlib import Path

import numpy as np
import pytest

from checkpoints import registration_checkpoint, segmentation_checkpoint
from gvsl_lightning.callbacks.manifest import Manifest
from gvsl_lightning.cli.main import main
from gvsl_lightning.errors import InputError
from small_volumes import save

CLASSES = ["background", "a"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        save(tmp_path / f"one/{number}.nii.gz", number, shape=(12, 12, 12))
    save(tmp_path / "other/0.nii.gz", 7, shape=(12, 12, 12))
    return tmp_path


def segment(checkpoint: str, root: str = "one", *more: str) -> None:
    main(
        [
            *("predict", f"--ckpt_path={checkpoint}", "--model=Segmentation"),
            *("--model.class_names=[background,a]", "--model.window_size=[8,8,8]"),
            "--model.backbone_options={channels: [8, 16]}",
            *("--data=SegmentationDataModule", f"--data.root={root}"),
            *("--data.class_names=[background,a]", "--out=out", *QUIET),
            *("--trainer.callbacks=PredictionWriter", *more),
        ]
    )


def register(checkpoint: str, *more: str) -> None:
    main(
        [
            *("predict", f"--ckpt_path={checkpoint}", "--model=GVSL"),
            *("--model.backbone_options={channels: [8, 16]}", "--data=RegistrationDataModule"),
            *("--data.root=one", "--data.atlas=one/0.nii.gz", "--out=out", *QUIET),
            *("--trainer.callbacks=RegistrationWriter", *more),
        ]
    )


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.nii.gz"))}


def test_predictions_of_the_same_scans_and_checkpoint_are_kept(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentation_checkpoint(work / "a.ckpt", CLASSES, window_size=(8, 8, 8))
    segment("a.ckpt")
    before = times(work / "out")
    assert len(before) == 2
    capsys.readouterr()
    segment("a.ckpt")
    assert "2 volumes kept" in capsys.readouterr().out
    assert times(work / "out") == before


@pytest.mark.parametrize(
    ("checkpoint", "words", "differs"),
    [
        ("a.ckpt", ("other",), "input"),
        ("b.ckpt", ("one",), "model"),
        ("a.ckpt", ("one", "--data.modality=mri"), "settings"),
        ("a.ckpt", ("one", "--model.overlap=0.25"), "settings"),
    ],
)
def test_a_prediction_of_something_else_is_refused_and_stays(
    work: Path,
    checkpoint: str,
    words: tuple[str, ...],
    differs: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b"):
        segmentation_checkpoint(work / f"{name}.ckpt", CLASSES, window_size=(8, 8, 8))
    segment("a.ckpt")
    before = times(work / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        segment(checkpoint, *words)
    assert stopped.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(Path("out", "0.nii.gz")) in sentence
    assert differs in sentence
    assert times(work / "out") == before
    segment(checkpoint, *words, "--overwrite=true")
    assert times(work / "out")[str(work / "out/0.nii.gz")] != before[str(work / "out/0.nii.gz")]


def test_a_registration_by_another_checkpoint_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        registration_checkpoint(work / f"{name}.ckpt")
    register("a.ckpt")
    before = times(work / "out")
    register("a.ckpt")
    assert times(work / "out") == before
    with pytest.raises(SystemExit):
        register("b.ckpt")
    assert "model" in capsys.readouterr().err.strip().splitlines()[-1]
    assert times(work / "out") == before


def test_a_file_of_unknown_origin_is_refused_and_half_a_line_is_no_origin(tmp_path: Path) -> None:
    scan, result = save(tmp_path / "scan.nii.gz"), tmp_path / "out" / "scan.nii.gz"
    result.parent.mkdir()
    result.write_bytes(b"somebody's")
    manifest = Manifest(result.parent, lambda: "model", {"window": (np.float64(0), 1)})
    with pytest.raises(InputError, match=r"scan.nii.gz"):
        manifest.is_done("scan", [str(scan)], [result])
    manifest.begin("scan", [str(scan)])
    assert result.read_bytes() == b"somebody's"
    begun = Manifest(result.parent, lambda: "model", {"window": (0.0, 1)})
    assert not begun.is_done("scan", [str(scan)], [result])  # is written again
    result.write_bytes(b"ours")
    begun.finish("scan", [str(scan)])
    with (result.parent / Manifest.FILE).open("a") as file:
        file.write('{"name": "scan", "inp')
    again = Manifest(result.parent, lambda: "model", {"window": (0.0, 1)})
    assert again.is_done("scan", [str(scan)], [result])
