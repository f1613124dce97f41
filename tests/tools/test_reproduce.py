"""``reproduce``: the same run twice is the same, and what differs is named."""

import math
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from gvsl_lightning.cli.main import main
from gvsl_lightning.runs.files import read_metrics
from gvsl_lightning.tools.reproduce import compare

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
TINY = [
    *("fit", "--config", QUICKSTART, "--data.size=[16, 16, 16]"),
    *("--data.num_train=3", "--data.num_val=2", "--data.val_pairs=2"),
    "--model.backbone_options={channels: [8, 16]}",
    *("--model.affine_channels=8", "--trainer.max_steps=5"),
    *("--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
CALLBACKS = [
    "--trainer.callbacks=[{class_path: ResumableCheckpoint, init_args: {save_last: true}}]"
]


def steps(run: Path, metric: str = "train/loss") -> list[int]:
    return [int(row["step"]) for row in read_metrics(run) if metric in row]


def refused(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", *words])
    assert stopped.value.code == status
    printed = capsys.readouterr()
    return printed.err if status == 2 else printed.out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that logs to W&B and one with two loggers that resumes it in an epoch."""
    loggers = ", ".join(
        f"{{class_path: {name}Logger, init_args: {{save_dir: {folder}, name: quickstart}}}}"
        for name, folder in (("CSV", "runs"), ("TensorBoard", "board"))
    )
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*TINY, *CALLBACKS])
        main([*TINY, *CALLBACKS, "--ckpt_path=runs/quickstart/version_0/checkpoints/last.ckpt",
              "--trainer.max_steps=7", f"--trainer.logger=[{loggers}]"])  # fmt: skip
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where a test works."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "quickstart"


def test_an_identical_run_is_told_from_a_checkpoint_in_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    main(["reproduce", "runs/quickstart/version_0/checkpoints/last.ckpt"])
    assert "The same, bit by bit: " in capsys.readouterr().out
    again = work / "version_0_reproduced"
    assert steps(again) == steps(work / "version_0") == [0, 1, 2, 3, 4]
    assert {path: path.read_bytes() for path in kept} == kept
    assert "version_0_reproduced exists" in refused(capsys, str(work / "version_0"))
    assert not list(again.rglob("wandb"))


def test_another_seed_is_seen_at_the_first_step(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["seed_everything"] = config["data"]["init_args"]["seed"] = 5
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    printed = refused(capsys, str(run), "--steps=2", "--out=again", status=1)
    assert "seed: 0 in the first run, 5 now" in printed.splitlines()
    assert "Not the same: " in printed
    assert "at step 0 was" in printed
    assert steps(Path("again")) == [0, 1]


def test_a_resumed_run_goes_on_from_the_same_checkpoint(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "version_1"
    assert steps(run) == [4, 5, 6]
    main(["reproduce", str(run), "--out=2"])
    printed = capsys.readouterr().out
    assert "Both runs went on from runs/quickstart/version_0/checkpoints/last.ckpt." in printed
    assert "The same, bit by bit: " in printed
    assert steps(Path("2")) == [4, 5, 6]
    (work / "version_0" / "checkpoints" / "last.ckpt").unlink()
    assert "version_0/checkpoints/last.ckpt" in refused(capsys, str(run), "--out=more")
    (run / "metrics.csv").unlink()
    assert f"{run} has no metrics.csv" in refused(capsys, str(run), "--out=more")


def test_steps_before_the_first_value_are_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "first 4 steps" in refused(capsys, str(work / "version_1"), "--steps=4")
    for option in ("--steps=0", "--tolerance=-1", "--tolerance=nan"):
        sentence = refused(capsys, str(work / "version_0"), option)
        assert option.partition("=")[0] in sentence


def test_an_unfinished_run_is_repeated_as_far_as_it_went(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "version_0"
    for path in (run / "metrics.csv", run / "validation.csv"):
        table = path.read_text().splitlines()
        header = table[0].split(",")
        whole = [line for line in table[1:] if int(line.split(",")[header.index("step")]) < 3]
        path.write_text("\n".join([table[0], *whole]))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (checkpoint,) = config["trainer"]["callbacks"]
    checkpoint["init_args"]["dirpath"] = str(work.parent / "elsewhere")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["reproduce", str(run), "--out=again"])
    assert "in steps 0 to 2" in capsys.readouterr().out
    assert steps(Path("again")) == [0, 1, 2]
    assert Path("again", "checkpoints", "last.ckpt").is_file()
    assert not (work.parent / "elsewhere").exists()


FIRST = {(0, "a"): 1.0, (0, "b"): math.nan, (1, "a"): 2.0}


@pytest.mark.parametrize(
    ("change", "tolerance", "sentence"),
    [
        ({}, 0, "The same, bit by bit: 3 values of 2 metrics in steps 0 to 1."),
        ({(1, "a"): 9.0, (0, "b"): 3.0}, 0, "Not the same: b at step 0"),
        ({(1, "a"): 2.5}, 0, "Not the same: a at step 1 was 2 and is 2.5; the largest "),
        ({(1, "a"): 2.5}, 0.5, "The same within the tolerance: 3 values of 2"),
        ({(0, "b"): 3.0}, 9, "Not the same: b at step 0 was nan and is 3;"),
        ({(1, "a"): None}, 9, "Not the same: a at step 1 was 2 and is nothing;"),
        ({(0, "c"): 0.0}, 9, "Not the same: c at step 0 was nothing and is 0;"),
        ({(1, "c"): 0.0, (2, "a"): 0.0}, 0, "The same, bit by bit: 3 values of 2"),
    ],
)
def test_values_are_compared_one_by_one(
    change: dict[tuple[int, str], float | None], tolerance: float, sentence: str
) -> None:
    again = {key: value for key, value in (FIRST | change).items() if value is not None}
    found, is_same = compare(FIRST, again, tolerance)
    assert found.startswith(sentence)
    assert is_same == sentence.startswith("The same")


def test_other_weights_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = work / "version_0" / "record.yaml"
    record.write_text(record.read_text().replace("weights_hash: null", "weights_hash: abcd"))
    sentence = refused(capsys, str(record.parent), "--out=again")
    assert "had other weights (weights_hash abcd, now None)" in sentence
    assert not Path("again").exists()


def test_other_data_are_refused_and_moved_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).random((4, 16, 16, 16), dtype=np.float32)
    for folder, shift in (("same", 0), ("other", 1)):
        Path(folder).mkdir()
        for number, volume in enumerate(values):
            image = nibabel.Nifti1Image(volume * (1 - shift * (number == 2) / 2), np.eye(4))
            nibabel.save(image, f"{folder}/{number}.nii.gz")
    main(
        [
            *(word for word in TINY if not word.startswith("--data")),
            *("--trainer.logger=CSVLogger", "--trainer.callbacks=null", "--trainer.max_steps=1"),
            *("--trainer.val_check_interval=1", "--data=PretrainDataModule"),
            *("--data.root=same", "--data.patch_size=[16, 16, 16]"),
        ]
    )
    run = "runs/quickstart/version_0"
    sentence = refused(capsys, run, "--data.root=other", "--out=again")
    assert sentence.startswith(f"error: {run} had other data (data_hash ")
    assert not Path("again").exists()
    Path("same").rename("moved")
    main(["reproduce", run, "--data.root=moved"])
