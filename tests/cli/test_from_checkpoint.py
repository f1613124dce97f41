"""A checkpoint settles model and preparation of the commands that evaluate it."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from gvsl_lightning.cli.main import main
from small_volumes import save

FIT = [
    *("fit", "--model=Segmentation", "--model.mode=scratch", "--model.window_size=[8,8,8]"),
    *("--model.class_names=[background,a]", "--model.backbone_options={channels: [4, 8]}"),
    *("--data=SegmentationDataModule", "--data.root=images", "--data.label_root=labels"),
    *("--data.class_names=[background,a]", "--data.label_values={0: 0, 7: 1}"),
    *("--data.modality=mri", "--data.spacing=[2,2,2]", "--data.patch_size=[8,8,8]"),
    *("--data.val=1", "--data.test=1", "--data.num_workers=0", "--trainer.max_steps=1"),
    *("--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"),
    *("--trainer.logger.name=mine", "--trainer.enable_progress_bar=false"),
    *("--trainer.callbacks=ResumableCheckpoint", "--trainer.callbacks.save_last=true"),
    "--trainer.val_check_interval=1",
]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number in range(4):
            save(folder / f"images/{number}.nii.gz", number, shape=(12, 14, 16))
            label = np.zeros((12, 14, 16), np.uint8)
            label[3:8] = 7
            (folder / "labels").mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / f"labels/{number}.nii.gz")
        main(FIT)
    return folder


@pytest.fixture
def work(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def checkpoint(folder: Path) -> str:
    return str(next(folder.rglob("last.ckpt")).relative_to(folder))


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_predict_needs_a_checkpoint_and_a_folder_alone(work: Path) -> None:
    main(["predict", "--ckpt", checkpoint(work), "--root", "images", *QUIET])
    (folder,) = work.glob("runs/mine/*/predictions")
    assert sorted(path.name for path in folder.glob("*.nii.gz")) == [
        f"{number}.nii.gz" for number in range(4)
    ]


def test_test_needs_a_checkpoint_alone(work: Path) -> None:
    main(["test", f"--ckpt={checkpoint(work)}", *QUIET])
    (table,) = work.rglob("test_cases.csv")
    assert "dice a" in table.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("data.modality=ct", ("ct", "mri")),
        ("data.spacing=[1,1,1]", ("[1, 1, 1]", "[2.0, 2.0, 2.0]")),
        ("data.init_args.spacing=null", ("None", "[2.0, 2.0, 2.0]")),
        ("model.class_names=[background,b]", ("b", "a")),
        ("data.label_values={0: 0, 8: 1}", ("8", "7")),
    ],
)
@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_contradiction_is_refused_with_both_values(
    command: str,
    option: str,
    values: tuple[str, str],
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = refused([command, "--ckpt", checkpoint(work), f"--{option}", *QUIET], capsys)
    assert all(value in sentence for value in (*values, "last.ckpt"))


def test_a_contradiction_in_a_file_is_named_with_the_file(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "other.yaml").write_text("data: {init_args: {modality: ct}}")
    words = ["predict", "--config", "other.yaml", "--ckpt", checkpoint(work), "--root", "images"]
    assert "other.yaml" in refused(words, capsys)
    (work / "same.yaml").write_text("data: {init_args: {modality: mri, spacing: [2, 2, 2]}}")
    words[2] = "same.yaml"
    main([*words, "--out=same", *QUIET])
    assert len(list((work / "same").glob("*.nii.gz"))) == 4


def test_predict_without_a_checkpoint_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", *FIT[1:], "--out=random"]
    assert "--ckpt_path" in refused(words, capsys)
    assert not Path("random").exists()


def test_a_checkpoint_that_is_not_there_is_named(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere.ckpt" in refused(["predict", "--ckpt", "nowhere.ckpt", "--root=images"], capsys)
