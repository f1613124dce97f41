"""``plan`` finds the facts of a folder and writes configurations that ``fit`` runs."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from gvsl_lightning.cli.main import main
from gvsl_lightning.data.survey import survey
from gvsl_lightning.tools import plan as tool
from small_volumes import save, save_dicom


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Volumes with label maps of the values 0, 3 and 7, two of each subject, stored as PIR."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "_measure", lambda design: (7.2, 1.5))
    affine = np.array([[0, 0, 2.0, 0], [-1, 0, 0, 0], [0, -1.0, 0, 0], [0, 0, 0, 1]])
    for number in range(6):
        name = f"sub-{number // 2}_ses-{number % 2}.nii.gz"
        generator = np.random.default_rng(number)
        write(
            tmp_path / "mr" / name,
            generator.integers(0, 900, (20, 24, 18)).astype(np.int16),
            affine,
        )
        label = np.zeros((20, 24, 18), np.uint8)
        label[4:8], label[10:12] = 3, 7
        write(tmp_path / "truth" / name, label, affine)
    return tmp_path


def test_a_survey_counts_along_the_axes_of_the_patient(folder: Path) -> None:
    facts = survey("mr", "truth")
    assert facts.count == 6
    assert facts.sizes.tolist() == [[18, 20, 24]] * 6
    assert facts.spacings.tolist() == [[2, 1, 1]] * 6
    assert facts.spacing is None
    assert facts.orientations == {"PIR": 6}
    assert (facts.subjects, facts.modality) == (3, "mri")
    assert {value: round(volume, 3) for value, volume in facts.classes.items()} == {
        0: pytest.approx(14 * 24 * 18 * 2 / 1000, abs=1e-3),
        3: pytest.approx(4 * 24 * 18 * 2 / 1000, abs=1e-3),
        7: pytest.approx(2 * 24 * 18 * 2 / 1000, abs=1e-3),
    }


def test_volumes_of_different_voxels_are_resampled_to_the_median(tmp_path: Path) -> None:
    for number, size in enumerate((0.5, 0.8, 1.1)):
        save(tmp_path / f"{number}.nii", number, np.diag([size, size, 3, 1]), shape=(40, 30, 10))
    facts = survey(str(tmp_path))
    assert facts.spacing == (0.8, 0.8, 3.0)
    assert facts.size.tolist() == pytest.approx([40, 30, 10])


@pytest.mark.parametrize(
    ("low", "high", "modality", "window"),
    [
        (-1000, 1500, "ct", (-1024, 1024)),
        (0, 800, "mri", (-1024, 1024)),
        (-3, 4, "mri", (-1024, 1024)),
    ],
)
def test_modality_by_intensities(
    tmp_path: Path, low: float, high: float, modality: str, window: tuple[float, float]
) -> None:
    values = np.random.default_rng(0).uniform(low, high, (9, 9, 9)).astype(np.float32)
    write(tmp_path / "a.nii", values, np.eye(4))
    facts = survey(str(tmp_path))
    assert (facts.modality, facts.window) == (modality, window)
    assert facts.reason


def test_ct_of_shifted_values_and_dicom(tmp_path: Path, data_root: Path) -> None:
    facts = survey(str(data_root / "openkbp_hn_ct" / "images" / "*1.nii.gz"))
    assert (facts.modality, facts.window) == ("ct", (0, 2048))
    save_dicom(tmp_path, "1.2.3", 0, 6)
    assert survey(str(tmp_path)).modality == "ct"
    facts = survey(str(data_root / "Task04_Hippocampus" / "imagesTr"))
    assert facts.modality == "mri"


def test_the_plan_is_a_configuration_that_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--root=mr", "--labels=truth", "--out=mine.yaml"])
    printed = capsys.readouterr().out
    content = yaml.safe_load(Path("mine.yaml").read_text())
    data = content["data"]["init_args"]
    assert content["trainer"]["max_steps"] == 500  # an hour of 7.2 s
    assert (data["modality"], data["patch_size"]) == ("mri", [16, 16, 24])
    quick = ["--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    main(["fit", "--config=mine.yaml", *quick])
    weights = next(Path("runs/mine").rglob("backbone.safetensors"))
    assert f"--model.weights={weights}" in printed
    tuned = yaml.safe_load(Path("mine_finetune.yaml").read_text())
    assert tuned["data"]["init_args"]["label_values"] == {0: 0, 3: 1, 7: 2}
    words = ["fit", "--config=mine_finetune.yaml", f"--model.weights={weights}"]
    main([*words, *quick, "--trainer.val_check_interval=1"])
    assert list(Path("runs/mine_finetune").rglob("best.ckpt"))


def test_a_plan_overwrites_nothing_and_one_volume_is_no_pair(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.yaml").write_text("mine")
    one = "--root=mr/sub-0_ses-0.nii.gz"
    for words, named in ((["--root=mr"], "plan.yaml"), ([one, "--out=b.yaml"], "sub-0_ses-0")):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *words])
        assert stopped.value.code == 2
        assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert Path("plan.yaml").read_text() == "mine"
    assert not Path("b.yaml").exists()


def test_a_slow_machine_gets_a_smaller_patch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        save(folder / f"big/{number}.nii", number, shape=(90, 80, 70))
    monkeypatch.setattr(tool, "_measure", lambda design: (max(design.patch_size) / 4, 1.0))
    main(["plan", "--root=big", "--hours=1.7"])
    content = yaml.safe_load(Path("plan.yaml").read_text())
    assert content["data"]["init_args"]["patch_size"] == [48, 48, 48]
