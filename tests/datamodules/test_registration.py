import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from gvsl_lightning.datamodules import PretrainDataModule, RegistrationDataModule
from gvsl_lightning.errors import InputError

OBLIQUE = np.array([[0.0, -1.8, 0.6, 5], [1.2, 0.0, 0.0, -7], [0.0, 0.9, 1.2, 11], [0, 0, 0, 1]])


def save(path: Path, seed: int = 0, shape=(12, 13, 14), affine=None, high: int = 1000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, high, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def batches(**options: Any) -> list[dict[str, Any]]:
    module = RegistrationDataModule(**options)
    module.setup("predict")
    return list(module.predict_dataloader())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        save(tmp_path / f"images/case_{index}.nii.gz", index, (12 + index, 13, 14 - index))
        save(tmp_path / f"labels/case_{index}.nii.gz", index, (12 + index, 13, 14 - index), None, 3)
    return tmp_path


@pytest.mark.parametrize("role", ["moving", "fixed"])
def test_an_atlas_meets_every_other_volume(folder: Path, role: str) -> None:
    found = batches(
        root=str(folder / "images"),
        label_root=str(folder / "labels"),
        atlas=str(folder / "images/case_1.nii.gz"),
        atlas_label=str(folder / "labels/case_1.nii.gz"),
        atlas_role=role,
    )
    other = "fixed" if role == "moving" else "moving"
    assert [batch[f"{role}_name"] for batch in found] == [["case_1"]] * 2
    assert [batch[f"{other}_name"] for batch in found] == [["case_0"], ["case_2"]]
    expected = {"moving": "case_1_onto_case_2", "fixed": "case_2_onto_case_1"}[role]
    assert found[1]["pair_name"] == [expected]
    for batch in found:
        for one in ("fixed", "moving"):
            volume = getattr(batch["pair"], one)
            stored = nibabel.load(volume.source)
            assert np.array_equal(volume.array[0], stored.get_fdata())
            label = nibabel.load(volume.source.replace("images", "labels"))
            assert np.array_equal(volume.label, label.get_fdata())
            assert batch[one].shape == (1, 1, *batch["pair"].fixed.array.shape[1:])
            assert batch[one].dtype == torch.float32
            assert 0 <= batch[one].min() < batch[one].max() <= 1


def test_a_link_to_the_atlas_is_the_atlas(folder: Path) -> None:
    (folder / "images" / "link.nii.gz").symlink_to(folder / "images" / "case_1.nii.gz")
    atlas = str(folder / "images" / "case_1.nii.gz")
    found = batches(root=str(folder / "images"), atlas=atlas)
    assert [batch["fixed_name"] for batch in found] == [["case_0"], ["case_2"]]


SCALED = [
    {
        "class_path": "monai.transforms.ScaleIntensityRanged",
        "init_args": {"keys": "image", "a_min": 0, "a_max": 1000, "b_min": 0, "b_max": 1},
    }
]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "oblique"])
@pytest.mark.parametrize("spacing", [None, (1.4, 1.0, 2.5)])
def test_what_the_network_sees_lies_where_its_grid_says(
    tmp_path: Path, codes: str, spacing: tuple[float, float, float] | None
) -> None:
    """Against SimpleITK's resampling of the stored files onto the grids."""
    paths = []
    for seed, shape in enumerate(((16, 15, 18), (19, 12, 14))):
        array = np.zeros(shape, np.float32)
        inner = tuple(size - 5 for size in shape)
        array[2:-3, 4:-1, 1:-4] = np.random.default_rng(seed).uniform(200, 1000, inner)
        image = nibabel.Nifti1Image(array, np.diag([1.0, 1.5, 2.0, 1.0]))
        if codes == "oblique":
            image = nibabel.Nifti1Image(array, OBLIQUE)
        else:
            image = image.as_reoriented(nibabel.orientations.axcodes2ornt(codes))
        paths.append(str(tmp_path / f"{seed}.nii.gz"))
        nibabel.save(image, paths[-1])
    (batch,) = batches(
        root=paths[0], atlas=paths[1], spacing=spacing, crop_foreground=0.01, transforms=SCALED
    )
    for role in ("fixed", "moving"):
        seen, volume = batch[role][0, 0].numpy(), getattr(batch["pair"], role)
        steps = np.linalg.norm(volume.grid[:3, :3], axis=0)
        if spacing is not None:
            assert np.allclose(steps, spacing, atol=1e-4)
        grid = SimpleITK.Image(*seen.shape, SimpleITK.sitkFloat32)
        grid.SetSpacing(steps.tolist())
        mirror = np.array([-1.0, -1.0, 1.0])
        grid.SetDirection((mirror[:, None] * volume.grid[:3, :3] / steps).ravel().tolist())
        grid.SetOrigin((mirror * volume.grid[:3, 3]).tolist())
        stored = SimpleITK.ReadImage(volume.source, SimpleITK.sitkFloat32)
        reference = SimpleITK.Resample(stored, grid, SimpleITK.Transform(), SimpleITK.sitkLinear)
        expected = SimpleITK.GetArrayFromImage(reference).transpose(2, 1, 0) / 1000
        assert (expected > 0.2).mean() > 0.3
        assert np.abs(seen - expected).max() < 0.011


def test_the_moving_volume_is_centred_as_in_validation(folder: Path) -> None:
    images = str(folder / "images")
    shape = (13, 13, 13)
    shutil.copytree(images, folder / "training")
    validation = PretrainDataModule(
        str(folder / "training"),
        val_root=images,
        val_pairs=6,
        patch_size=(4, 4, 4),
        val_patch_size=shape,
    )
    validation.setup()
    crops = {pair["moving_name"]: pair["moving"] for pair in validation.validation_pairs}
    atlas = str(folder / "images/case_1.nii.gz")
    assert nibabel.load(atlas).shape == shape
    for batch in batches(root=images, atlas=atlas, atlas_role="fixed"):
        assert torch.equal(batch["moving"][0], crops[batch["moving_name"][0]])


def table(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns), *(",".join(row.get(c, "") for c in columns) for row in rows)]
        path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.csv"])
def test_a_table_of_pairs(folder: Path, name: str) -> None:
    save(folder / "images/deep/case_0.nii.gz", 8)
    rows = [
        {
            "fixed": "images/case_0.nii.gz",
            "moving": str(folder / "images/case_2.nii.gz"),
            "fixed_label": "labels/case_0.nii.gz",
        },
        {"fixed": "images/deep/case_0.nii.gz", "moving": "images/case_0.nii.gz"},
    ]
    first, second = batches(pairs=table(folder, name, rows))
    assert first["pair_name"] == ["case_2_onto_case_0"]
    assert second["pair_name"] == ["case_0_onto_deep_case_0"]
    assert first["pair"].fixed.label.max() == 2
    assert first["pair"].moving.label is None
    assert second["pair"].fixed.label is None


def fails(sentence: str, **options: Any) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        RegistrationDataModule(**options).setup("predict")
    assert len(str(raised.value).splitlines()) == 1


def test_wrong_tables_and_options(folder: Path) -> None:
    image = "images/case_0.nii.gz"
    for rows, sentence in (
        ([{"fixed": image}], "is no table of pairs"),
        ([{"fixed": image, "moving": image, "fixed_lable": "x"}], "is no table of pairs"),
        ([{"fixed": image, "moving": "images"}], "images holds 3 volumes"),
        ([{"fixed": image, "moving": "nowhere.nii"}], "nowhere.nii does not exist"),
        ([{"fixed": image, "moving": image, "moving_label": "x.nii"}], "x.nii, listed in .*pairs"),
        ([{"fixed": image, "moving": image}] * 2, "Two pairs .* case_0_onto_case_0"),
    ):
        for name in ("pairs.json", "pairs.csv"):
            fails(sentence, pairs=table(folder, name, rows))
    (folder / "pairs.json").write_text("[")
    fails("pairs.json cannot be read", pairs=str(folder / "pairs.json"))
    images = str(folder / "images")
    fails("atlas", root=images)
    fails("atlas", root=images, atlas=image, pairs="x.json")
    fails("root is missing", atlas=image)
    fails("atlas_role is 'middle'", root=images, atlas=image, atlas_role="middle")
    fails("images holds 3 volumes .*give the path of one", root=images, atlas=images)
    only = str(folder / image)
    fails("holds no volume but the atlas", root=only, atlas=only)
    fails("no.nii, the label map of", root=images, atlas=only, atlas_label="no.nii")


def test_a_broken_volume_is_a_sentence_and_a_broken_atlas_ends_it(folder: Path) -> None:
    images, broken = str(folder / "images"), folder / "images/case_1.nii.gz"
    packed = broken.read_bytes()
    broken.write_bytes(packed[: len(packed) // 2])
    options = {"root": images, "atlas": str(folder / "images/case_0.nii.gz")}
    for workers in (0, 1):
        first, second = batches(**options, num_workers=workers)
        assert set(first) == {"pair_name", "fixed_name", "moving_name", "error"}
        assert "case_1.nii.gz cannot be read" in first["error"]
        assert second["fixed"].shape == (1, 1, 14, 13, 12)
        assert isinstance(second["pair"].fixed.array, np.ndarray)
    fails("case_1.nii.gz cannot be read", root=images, atlas=str(broken))


def test_labels_that_do_not_fit_are_sentences(folder: Path) -> None:
    moved = np.eye(4)
    moved[0, 3] = 0.5
    save(folder / "labels/case_1.nii.gz", 1, (13, 13, 13), moved, 3)
    save(folder / "labels/case_2.nii.gz", 1, (13, 13, 13), None, 3)
    save(folder / "images/case_3.nii.gz", 3, (9, 9, 9))
    half = nibabel.Nifti1Image(np.full((9, 9, 9), 0.5, np.float32), np.eye(4))
    nibabel.save(half, folder / "labels/case_3.nii.gz")
    found = batches(
        root=str(folder / "images"),
        label_root=str(folder / "labels"),
        atlas=str(folder / "images/case_0.nii.gz"),
    )
    sentences = [batch["error"] for batch in found]
    assert "case_1.nii.gz does not lie where" in sentences[0]
    assert "case_2.nii.gz has the shape (13, 13, 13)" in sentences[1]
    assert "case_3.nii.gz holds the value 0.5, which is no whole number" in sentences[2]
