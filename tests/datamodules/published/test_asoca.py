from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

import layouts
from gvsl_lightning.datamodules import ASOCA
from gvsl_lightning.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layouts.asoca(tmp_path_factory.mktemp("asoca"))


def module(folder: Path, **options: Any) -> ASOCA:
    given = {"val": 2, "test": 2, "patch_size": (16, 16, 16), "margin": 2.0}
    return ASOCA(str(folder), **(given | options))


def test_normal_and_diseased_in_every_part(folder: Path) -> None:
    data = module(folder)
    data.setup("fit")
    names = [file.name for file in data.files]
    assert names == [f"{group}_{n}" for group in ("Diseased", "Normal") for n in range(1, 5)]
    assert data.split is not None
    parts = (data.split.train, data.split.val, data.split.test)
    assert [len(part) for part in parts] == [4, 2, 2]
    for part in parts:
        assert sum(names[index].startswith("Normal") for index in part) == len(part) / 2


def test_the_split_of_the_paper(tmp_path: Path) -> None:
    for group in ("Normal", "Diseased"):
        for kind in ("CTCA", "Annotations"):
            (tmp_path / group / kind).mkdir(parents=True)
            for number in range(1, 21):
                (tmp_path / group / kind / f"{group}_{number}.nrrd").touch()
    data = ASOCA(str(tmp_path))
    data.check_cases = lambda indices: None  # type: ignore[method-assign]
    data.setup("fit")
    assert data.split is not None
    assert [len(data.split.train), len(data.split.val), len(data.split.test)] == [15, 5, 20]


def test_crop_and_intensities_against_a_slow_reference(folder: Path) -> None:
    batch = next(iter(module(folder, spacing=None).val_dataloader()))
    name = batch["name"][0]
    paths = [
        folder / name.split("_")[0] / kind / f"{name}.nrrd" for kind in ("CTCA", "Annotations")
    ]
    scan, label = (SimpleITK.ReadImage(str(path)) for path in paths)
    found = []
    for voxel in np.ndindex(*batch["image"].shape[2:]):
        right, front, top, _ = batch["affine"][0] @ [*voxel, 1]
        index = scan.TransformPhysicalPointToIndex((-right, -front, top))
        expected = min(max(scan[index] + 1024, 0), 2048) / 2048
        assert float(batch["image"][(0, 0, *voxel)]) == pytest.approx(expected, abs=1e-6)
        assert int(batch["label"][(0, 0, *voxel)]) == label[index]
        found.append(index)
    where = np.argwhere(SimpleITK.GetArrayFromImage(label).transpose(2, 1, 0))
    margin = np.ceil(np.divide(2.0, label.GetSpacing()))
    assert np.array_equal(np.min(found, 0), np.maximum(where.min(0) - margin, 0))
    last = np.subtract(label.GetSize(), 1)
    assert np.array_equal(np.max(found, 0), np.minimum(where.max(0) + margin, last))


def test_prediction_takes_scans_and_no_annotations(folder: Path, tmp_path: Path) -> None:
    batches = list(module(folder, spacing=None).predict_dataloader())
    assert len(batches) == 8
    assert all(batch["image"].shape[2:] == layouts.SHAPE for batch in batches)
    assert all(Path(batch["source"][0]).parent.name == "CTCA" for batch in batches)
    (tmp_path / "new.nrrd").symlink_to(folder / "Normal" / "CTCA" / "Normal_1.nrrd")
    (batch,) = module(tmp_path).predict_dataloader()
    assert batch["name"] == ["new"]


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "away"):
        with pytest.raises(InputError, match="holds no volume of ASOCA; register for ASOCA at"):
            module(root).setup("fit")
    with pytest.raises(InputError, match="test is 20 and there are 8 cases; give a share"):
        module(folder, test=20).setup("fit")
    layouts.asoca(tmp_path, count=2)
    (tmp_path / "Normal" / "Annotations" / "Normal_1.nrrd").unlink()
    with pytest.raises(InputError, match=r"CTCA/Normal_1.nrrd has no label map; add it"):
        module(tmp_path, val=1, test=1).setup("fit")
