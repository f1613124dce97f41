from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layouts
from gvsl_lightning.data.regions import AroundLungMask
from gvsl_lightning.datamodules import STOIC
from gvsl_lightning.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.stoic(tmp_path_factory.mktemp("stoic"), count=10)


def module(folder: Path, **options: Any) -> STOIC:
    given = {"val": 2, "test": 4, "size": (20, 11, 16), "spacing": None, "margin": 0.0}
    return STOIC(str(folder), **(given | options))


def test_cases_and_classes(folder: Path) -> None:
    data = module(folder, augmentation=False, batch_size=1)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    found = [{batch["name"][0]: int(batch["target"][0]) for batch in loader} for loader in loaders]
    assert [len(part) for part in found] == [4, 2, 4]
    for part in found:
        assert sum(part.values()) == len(part) / 2
    assert {name: target for part in found for name, target in part.items()} == {
        str(patient): patient % 2 for patient in range(1, 11)
    }
    assert data.class_names == ["negative", "positive"]


def test_the_split_of_the_paper(tmp_path: Path) -> None:
    (tmp_path / "data" / "mha").mkdir(parents=True)
    (tmp_path / "metadata").mkdir()
    lines = ["PatientID,probCOVID,probSevere"]
    for patient in range(1, 2001):
        (tmp_path / "data" / "mha" / f"{patient}.mha").touch()
        lines.append(f"{patient},{float(patient % 5 < 3)},0.0")
    (tmp_path / "metadata" / "reference.csv").write_text("\n".join(lines))
    data = STOIC(str(tmp_path))
    data.check_cases = lambda indices: None  # type: ignore[method-assign]
    data.setup("fit")
    assert data.split is not None
    parts = (data.split.train, data.split.val, data.split.test)
    assert [len(part) for part in parts] == [1000, 400, 600]
    for part in parts:
        positive = [data.cases[index][2][0] for index in part]
        assert np.mean(positive) == pytest.approx(0.6, abs=0.01)


def test_lungs_and_intensities_against_a_slow_reference(folder: Path) -> None:
    image = next(iter(module(folder).val_dataloader()))["image"]
    lungs = layouts.chest()[layouts.LUNGS]
    expected = np.clip(lungs + 1024.0, 0, 2048) / 2048
    assert image.shape == (1, 1, 20, 11, 16)
    # stored to the left and back: in RAS two axes are reversed
    torch.testing.assert_close(
        image[0, 0], torch.from_numpy(expected[::-1, ::-1].copy()).float(), atol=1e-6, rtol=0
    )
    fine = next(iter(module(folder, spacing=(1.0, 1.0, 1.0), size=(39, 21, 31)).val_dataloader()))
    assert fine["image"][0, 0, 0, 10, 15] == pytest.approx((-820 + 1024) / 2048, abs=1e-3)
    padded = next(iter(module(folder, size=(24, 15, 20)).val_dataloader()))["image"]
    assert not padded[0, 0, :2].any()
    torch.testing.assert_close(padded[..., 2:-2, 2:-2, 2:-2], image)


def test_prediction_needs_no_table(folder: Path, tmp_path: Path) -> None:
    batches = list(module(folder).predict_dataloader())
    assert sorted(batch["name"][0] for batch in batches) == sorted(
        f"data/mha/{patient}" for patient in range(1, 11)
    )
    (tmp_path / "new.mha").symlink_to(folder / "data" / "mha" / "3.mha")
    (tmp_path / "broken.mha").write_text("nonsense")
    found = {batch["name"][0]: batch for batch in module(tmp_path).predict_dataloader()}
    known = next(batch["image"] for batch in batches if batch["name"] == ["data/mha/3"])
    assert torch.equal(found["new"]["image"], known)
    assert "broken.mha cannot be read" in found["broken"]["error"][0]


def test_lungs_by_lungmask(folder: Path) -> None:
    assert module(folder, lungs="lungmask").configure_region() == AroundLungMask(0.0)
    with pytest.raises(InputError, match="lungs is 'both'"):
        module(folder, lungs="both")


def fails(folder: Path, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        module(folder, val=1, test=1).setup("fit")
    assert "\n" not in str(raised.value)


def test_wrong_folders(tmp_path: Path) -> None:
    fails(tmp_path, r"metadata/reference.csv does not exist; download .*opendata\.aws/stoic2021")
    layouts.stoic(tmp_path, count=4)
    table = tmp_path / "metadata" / "reference.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "9,1,0"]))
    fails(tmp_path, r"data/mha/9.mha does not exist and metadata/reference.csv lists it")
    for line in ("4,1,0", "5,2,0", ",1,0", "5"):
        table.write_text("\n".join([*lines, line]))
        fails(tmp_path, "reference.csv has the line .*; every patient has one, with a PatientID")
    table.write_text(lines[0])
    fails(tmp_path, "reference.csv lists no patient; download")
