"""Prepared volumes in pre-training: equal to those that are prepared at each access."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from monai.transforms.compose import Compose

from gvsl_lightning.cli.main import main
from gvsl_lightning.data.crop import crop
from gvsl_lightning.data.prepared import PreparedFolder, map_array
from gvsl_lightning.data.regions import AroundLabel
from gvsl_lightning.datamodules import (
    ClassificationDataModule,
    Decathlon,
    PretrainDataModule,
    SegmentationDataModule,
)
from gvsl_lightning.datamodules.phantom import PhantomDataset
from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import GVSL
from gvsl_lightning.tools.prepare import prepare
from gvsl_lightning.transforms.intensity import intensity_transforms

OPTIONS: dict[str, Any] = {
    "modality": "mri",
    "spacing": (1.0, 1.5, 2.0),
    "crop_foreground": 0.05,
}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gvsl_lightning.tools.prepare.draw_contact_sheet", lambda *_: Figure())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six anisotropic volumes in different orientations, three of them oblique, with labels."""
    generator = np.random.default_rng(0)
    for index, codes in enumerate(("RAS", "LPI", "PIR", "SAL", "ASR", "LAS")):
        array = np.zeros((20, 18, 22), np.float32)
        array[3:18, 2:16, 1:19] = generator.uniform(200, 1000, (15, 14, 18))
        affine = np.diag([0.8, 1.3, 2.5, 1.0])
        if index % 2:
            turn = np.deg2rad(8 * index)
            cosine, sine = np.cos(turn), np.sin(turn)
            affine[:2, :2] = [[cosine, -sine], [sine, cosine]] @ affine[:2, :2]
        affine[:3, 3] = generator.uniform(-50, 50, 3)
        orientation = nibabel.orientations.axcodes2ornt(codes)
        for kind, content in (("images", array), ("labels", (array > 600) * np.uint8(2))):
            folder = tmp_path / kind / ("deep" if index == 4 else ".")
            folder.mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(content, affine).as_reoriented(orientation)
            nibabel.save(image, folder / f"case_{index}.nii.gz")
    return tmp_path


def module(root: str | list[str] | Path, **options: Any) -> PretrainDataModule:
    root = str(root) if isinstance(root, Path) else root
    made = PretrainDataModule(root, **{**OPTIONS, "patch_size": (8, 10, 6), **options})
    made.setup()
    return made


def prepared(data: Path, **options: Any) -> PreparedFolder:
    source = PretrainDataModule(
        str(data / "images"), label_root=str(data / "labels"), **{**OPTIONS, **options}
    )
    prepare(source, str(data / "out"))
    return PreparedFolder(data / "out")


def test_volumes_labels_names_and_split_are_those_of_the_original_folder(data: Path) -> None:
    folder = prepared(data)
    split = {"val_count": 2, "split_seed": 3}
    original = module(data / "images", label_root=str(data / "labels"), **split)
    mapped = module(folder.path, **split)
    for ours, theirs in (
        (mapped.train_pairs.volumes, original.train_pairs.volumes),
        (mapped.validation_pairs.volumes, original.validation_pairs.volumes),
    ):
        assert len(ours) == len(theirs) > 0
        for index in range(len(ours)):
            item, expected = ours[index], theirs[index]
            assert item.keys() <= expected.keys()
            assert item["name"] == expected["name"]
            # half precision of numbers in [0, 1]
            assert np.abs(item["image"] - expected["image"].numpy()).max() < 2**-11
            if "label" in item:
                assert item["label"].dtype == np.uint8
                assert np.array_equal(item["label"], expected["label"].numpy())
    assert "label" in mapped.validation_pairs.volumes[0]
    assert "deep/case_4" in [volume.name for volume in folder.volumes({})]
    for ours, theirs in zip(mapped.val_dataloader(), original.val_dataloader(), strict=True):
        assert ours["fixed_name"] == theirs["fixed_name"]
        for key in ("fixed", "moving", "fixed_label", "moving_label"):
            assert ours[key].dtype == theirs[key].dtype
            assert torch.allclose(ours[key], theirs[key], atol=2**-11)


def test_float32_is_stored_without_any_loss(data: Path) -> None:
    source = PretrainDataModule(str(data / "images"), **OPTIONS)
    prepare(source, str(data / "out"), dtype="float32")
    ours, theirs = module(data / "out").train_pairs, module(data / "images").train_pairs
    for index in range(len(ours)):
        assert np.array_equal(ours.volumes[index]["image"], theirs.volumes[index]["image"])
        pair, expected = (pairs[(index, 0, 7)] for pairs in (ours, theirs))
        assert torch.equal(pair["fixed"], expected["fixed"])


def test_the_geometry_of_a_stored_volume_is_that_of_the_patient(data: Path) -> None:
    folder = prepared(data, crop_foreground=None)
    for volume in folder.volumes({}):
        known = folder.sidecar(volume.name)
        source = nibabel.load(data / "images" / f"{volume.name}.nii.gz")
        stored = known["stored"]
        assert known["original"]["shape"] == [1, *source.shape]
        assert np.allclose(known["original"]["affine"], source.affine)
        assert np.allclose(known["original"]["spacing"], source.header.get_zooms(), atol=1e-5)
        assert np.allclose(stored["spacing"], OPTIONS["spacing"], atol=1e-5)
        assert nibabel.aff2axcodes(np.array(stored["affine"])) == ("R", "A", "S")
        array = np.load(volume.image)
        assert list(array.shape) == stored["shape"] == list(volume.shape)
        # the centre of gravity does not move by preparation, but for the resampling
        scaled = intensity_transforms("mri")[0]({"image": source.get_fdata()[None]})["image"]
        centres = []
        for voxels, affine in ((scaled[0], source.affine), (array[0], np.array(stored["affine"]))):
            weights = np.asarray(voxels, dtype=np.float64)
            indices = np.indices(weights.shape).reshape(3, -1)
            centres.append(affine[:3, :3] @ (indices @ weights.ravel() / weights.sum()))
            centres[-1] = centres[-1] + affine[:3, 3]
        assert np.linalg.norm(centres[0] - centres[1]) < 0.5


def test_what_is_known_of_a_volume(data: Path) -> None:
    folder = prepared(data)
    known = folder.sidecar("case_1")
    values = np.load(folder.volumes({})[1].image).astype(np.float64)
    intensity = known["intensity"]
    for name in ("min", "max", "mean", "std"):
        assert intensity[name] == pytest.approx(getattr(values, name)(), abs=1e-6)
    assert intensity["percentiles"]["25"] == pytest.approx(np.percentile(values, 25), abs=1e-6)
    assert known["source"]["path"] == str(data / "images" / "case_1.nii.gz")
    assert known["label"]["path"] == str(data / "labels" / "case_1.nii.gz")
    assert len(known["source"]["sha256"]) == 64


def test_patches_are_cut_from_the_map(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(data)
    mapped, loaded = module(data / "out"), module(data / "out", cache=True)
    image = mapped.train_pairs.volumes[0]["image"]
    assert isinstance(image, np.memmap)
    assert isinstance(loaded.train_pairs.volumes[0]["image"], torch.Tensor)
    assert loaded.train_pairs.volumes[0]["image"].dtype == torch.float32
    for seed in range(5):
        ours, theirs = (which.train_pairs[(0, 2, seed)] for which in (mapped, loaded))
        for role in ("fixed", "moving"):
            assert ours[role].dtype == torch.float32
            assert torch.equal(ours[role], theirs[role])
    for patch in ((2, 2, 2), (40, 4, 40), (30, 30, 30)):
        assert torch.equal(crop(image, patch), crop(torch.tensor(np.array(image)).float(), patch))


@pytest.mark.parametrize("cache", [False, True])
def test_a_validation_root_may_be_prepared_too(data: Path, cache: bool) -> None:
    prepared(data)
    inside = PretrainDataModule(
        str(data / "images" / "deep"), label_root=str(data / "labels" / "deep"), **OPTIONS
    )
    (data / "images" / "deep" / "link.nii.gz").symlink_to(data / "images" / "case_0.nii.gz")
    (data / "labels" / "deep" / "link.nii.gz").symlink_to(data / "labels" / "case_0.nii.gz")
    prepare(inside, str(data / "val"))
    for root, val_root in (("out", "val"), ("out", "images/deep"), ("images", "val")):
        made = PretrainDataModule(
            str(data / root), val_root=str(data / val_root), cache=cache, **OPTIONS
        )
        training, validation = made.configure_files()
        assert [file.name for file in validation] == ["case_4", "link"]
        assert [file.name for file in training] == ["case_1", "case_2", "case_3", "case_5"]
        made.setup()
        assert "label" not in made.train_pairs.volumes[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"modality": "ct"}, "modality mri .*modality ct"),
        ({"spacing": None}, r"spacing \[1.0, 1.5, 2.0\] .*spacing null"),
        ({"crop_foreground": 0.1}, "crop_foreground 0.05 .*crop_foreground 0.1"),
        ({"channels": 2}, "channels 1 .*channels 2"),
        ({"label_root": "/nowhere"}, "label_root .*/labels .*label_root /nowhere"),
        (
            {"transforms": [{"class_path": "monai.transforms.ScaleIntensityd"}]},
            "transforms null .*transforms .*ScaleIntensityd",
        ),
    ],
)
def test_other_settings_are_refused(data: Path, options: dict[str, Any], sentence: str) -> None:
    prepared(data)
    with pytest.raises(InputError, match=sentence) as raised:
        module(data / "out", **options)
    assert len(str(raised.value).splitlines()) == 1


def test_settings_without_effect_need_not_agree(data: Path) -> None:
    prepared(data)
    module(data / "out", window=(0.0, 1.0), spacing=[1, 1.5, 2], val_count=2)
    module(data / "out", label_root=str(data / "labels") + os.sep)


def test_a_preparation_that_a_subclass_changes_is_another_one(data: Path) -> None:
    class Other(PretrainDataModule):
        def configure_intensity(self) -> list[Any]:
            return intensity_transforms("none")

    prepared(data)
    with pytest.raises(InputError, match=r"configure_intensity null .*Other"):
        Other(str(data / "out"), **OPTIONS).setup()


def test_unfinished_and_damaged_folders_are_named(data: Path) -> None:
    folder = prepared(data)
    made = module(folder.path)
    Path(folder.volumes({})[0].image).write_bytes(b"")
    with pytest.raises(InputError, match=r"case_0.npy .*prepare"):
        made.train_pairs.volumes[0]
    prepared(data)  # what is damaged is prepared anew
    assert made.train_pairs.volumes[0]["image"].max() == 1
    folder.index_path.unlink()
    with pytest.raises(InputError, match=r"out .*prepare"):
        module(folder.path)
    settings = json.loads((folder.path / "settings.json").read_text())
    (folder.path / "settings.json").write_text(json.dumps({**settings, "prepared": 0}))
    with pytest.raises(InputError, match=r"out .*version"):
        module(folder.path)


def test_prepared_volumes_are_no_volumes_for_other_data_modules(data: Path) -> None:
    prepared(data)
    for root in (str(data / "out"), [str(data / "images"), str(data / "out")]):
        with pytest.raises(InputError, match=r"/out "):
            SegmentationDataModule(root, ["a", "b"]).setup("fit")
    with pytest.raises(InputError, match=r"/out "):
        module([str(data / "images"), str(data / "out")])


def segmentation(data: Path, **options: Any) -> SegmentationDataModule:
    given: dict[str, Any] = {
        "root": str(data / "images"),
        "label_root": str(data / "labels"),
        "class_names": ["background", "bright"],
        "label_values": {2: 1},
        "modality": "mri",
        "spacing": OPTIONS["spacing"],
        "patch_size": (6, 30, 5),
        "val": 2,
        "test": 1,
    }
    return SegmentationDataModule(**(given | options))


@pytest.mark.parametrize("cache", [False, True])
def test_segmentation_reads_prepared_volumes(
    data: Path, cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(data, crop_foreground=None)
    theirs = segmentation(data)
    expected = [list(theirs.train_dataloader()), theirs.val_dataloader(), theirs.test_dataloader()]
    ours = segmentation(data, prepared=str(folder.path), cache=cache)
    ours.setup("fit")
    with monkeypatch.context() as patch:
        patch.setattr("gvsl_lightning.data.datasets.read_case", None)
        loaded = [list(ours.train_dataloader()), list(ours.val_dataloader())]
    for batches, others in zip([*loaded, ours.test_dataloader()], expected, strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert batch.keys() == other.keys()
            for key, value in other.items():
                if isinstance(value, torch.Tensor | np.ndarray):
                    assert batch[key].dtype == value.dtype
                    assert np.allclose(batch[key], value, atol=2**-9)  # half, then augmentation
                else:
                    assert batch[key] == value
    assert expected[0][0]["label"].unique().tolist() == [0, 1]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells pages on Linux only")
def test_a_training_patch_does_not_read_the_whole_volume(tmp_path: Path) -> None:
    path, shape = tmp_path / "volume.npy", (1, 320, 320, 320)
    np.save(path, np.zeros(shape, np.float16))
    label = torch.zeros(shape, dtype=torch.uint8)
    label[0, 100, 100, 100] = 1
    image = torch.from_numpy(map_array(str(path)))
    transform = Compose(segmentation(tmp_path, patch_size=(4, 4, 4)).configure_crop())
    (patch,) = transform({"image": image, "label": label})
    assert patch["image"].shape == (1, 4, 4, 4)
    assert patch["image"].dtype == torch.float32

    def pages() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        start = next(number for number, line in enumerate(lines) if str(path) in line)
        resident = next(line for line in lines[start:] if line.startswith("Rss:"))
        return int(resident.split()[1])

    assert crop(map_array(str(path)), (4, 4, 4)).shape == (1, 4, 4, 4)
    assert pages() < 5_000  # kB of 64,000; the kernel may map 2 MiB about each page
    image.sum()
    assert pages() > 60_000


def test_classification_reads_prepared_volumes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared(data)
    table = data / "table.csv"
    rows = [f"images/{'deep/' * (i == 4)}case_{i}.nii.gz,{'ab'[i % 2]}" for i in range(6)]
    table.write_text("\n".join(["path,label", *rows]))
    for resize in (False, True):
        options = {**OPTIONS, "size": (9, 30, 7), "resize": resize, "val": 2, "test": 1}
        theirs = ClassificationDataModule(str(table), ["a", "b"], **options)
        expected = [list(theirs.train_dataloader()), list(theirs.val_dataloader())]
        ours = ClassificationDataModule(
            str(table), ["a", "b"], prepared=str(folder.path), **options
        )
        with monkeypatch.context() as patch:
            patch.setattr("gvsl_lightning.data.datasets.read_case", None)
            loaded = [list(ours.train_dataloader()), list(ours.val_dataloader())]
        for batches, others in zip(loaded, expected, strict=True):
            for batch, other in zip(batches, others, strict=True):
                assert batch["name"] == other["name"]
                assert torch.equal(batch["target"], other["target"])
                assert batch["image"].dtype == torch.float32
                assert torch.allclose(batch["image"], other["image"], atol=2**-9)


def test_labelled_data_take_only_what_was_prepared_of_the_same_files(data: Path) -> None:
    folder = prepared(data, crop_foreground=None)

    def load(**options: Any) -> None:
        segmentation(data, prepared=str(folder.path), **options).train_dataloader()

    load()
    with pytest.raises(InputError, match="spacing null"):
        load(spacing=None)
    with pytest.raises(InputError, match="images"):
        segmentation(data, prepared=str(data / "images"))

    class Around(SegmentationDataModule):
        def configure_region(self) -> AroundLabel:
            return AroundLabel(3)

    options = {"root": str(data / "images"), "label_root": str(data / "labels")}
    with pytest.raises(InputError, match="AroundLabel"):
        Around(
            **options,
            class_names=["background", "bright"],
            label_values={2: 1},
            prepared=str(folder.path),
            val=0,
        ).train_dataloader()

    label = data / "labels" / "case_0.nii.gz"
    image = nibabel.load(label)
    changed = np.asarray(image.dataobj)[:, :, ::-1]
    nibabel.save(nibabel.Nifti1Image(changed, image.affine), label)
    with pytest.raises(InputError, match=r"labels/case_0.nii.gz"):
        load(val=0, test=0)
    source = PretrainDataModule(str(data / "images"), **{**OPTIONS, "crop_foreground": None})
    prepare(source, str(data / "unlabelled"))
    with pytest.raises(InputError, match="label_root"):
        segmentation(data, prepared=str(data / "unlabelled")).train_dataloader()
    for kind in ("images", "labels"):
        nibabel.save(nibabel.Nifti1Image(changed, image.affine), data / kind / "new.nii.gz")
    split = {"split_by": "name", "val": 1, "test": 0, "labelled": 1}
    with pytest.raises(InputError, match=r"new.nii.gz"):
        segmentation(data, prepared=str(folder.path), **split).val_dataloader()


def test_a_label_map_away_from_its_image_is_rejected(data: Path) -> None:
    label = data / "labels" / "case_2.nii.gz"
    image = nibabel.load(label)
    affine = image.affine.copy()
    affine[0, 3] += 5
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), label)
    folder = prepared(data)
    assert len(folder.volumes({})) == 5
    rejected = (folder.path / "rejected.csv").read_text()
    assert "5.00 mm" in rejected


def test_names_that_end_like_label_maps_do_not_collide(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    entries = []
    for name in ("a", "a.label", "a.label_"):
        for kind in ("image", "map"):
            values = np.random.default_rng(len(name)).integers(0, 3, (4, 5, 6)).astype(np.uint8)
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / kind / f"{name}.nii")
        entries.append({"image": f"image/{name}.nii", "label": f"map/{name}.nii"})
    (folder / "list.json").write_text(json.dumps(entries))
    prepare(PretrainDataModule(str(folder / "list.json")), str(tmp_path / "out"))
    made = PretrainDataModule(str(tmp_path / "out"), val_fraction=0)
    made.setup()
    volumes = PreparedFolder(tmp_path / "out").volumes({})
    assert [volume.name for volume in volumes] == ["a", "a.label", "a.label_"]
    for volume in volumes:
        values = np.random.default_rng(len(volume.name)).integers(0, 3, (4, 5, 6))
        assert np.array_equal(np.load(volume.label)[0], values)
        assert np.allclose(np.load(volume.image)[0], values / 2, atol=1e-3)


def test_a_decathlon_task_is_read_by_its_own_class(tmp_path: Path) -> None:
    task = tmp_path / "Task04_Hippocampus"
    pairs = []
    for index in range(0, 10, 2):  # one case of each subject
        for kind in ("imagesTr", "labelsTr"):
            (task / kind).mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(index).integers(0, 3, (4, 5, 6)).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), task / kind / f"{index}.nii.gz")
        pairs.append({"image": f"imagesTr/{index}.nii.gz", "label": f"labelsTr/{index}.nii.gz"})
    content = {"training": pairs, "modality": {"0": "MRI"}}
    (task / "dataset.json").write_text(json.dumps(content))
    options: dict[str, Any] = {"val_count": 2, "test_count": 1}
    prepare(Decathlon(str(tmp_path), **options), str(tmp_path / "out"))
    assert len(PreparedFolder(tmp_path / "out").volumes({"modality": "mri"})) == 5
    made = Decathlon(str(tmp_path / "out"), **options)
    training, validation = made.configure_files()
    assert [file.name for file in training] == ["0", "2"]
    assert [file.name for file in validation] == ["4", "6"]
    made.setup()
    assert made.validation_pairs.volumes[0]["label"].max() == 2
    with pytest.raises(InputError, match=r"modality mri .*modality ct"):
        Decathlon(str(tmp_path / "out"), modality="ct").setup()


def test_many_volumes_are_opened_without_looking_at_each(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(data)
    count = 2_000
    names = sorted(f"site_{index % 7}/case_{index}" for index in range(count))
    index = {
        "names": names,
        "shapes": [[1, 96, 96, 96]] * count,
        "labelled": [False] * count,
        "origins": [f"/data/{name}.nii.gz" for name in names],
    }
    folder.index_path.write_text(json.dumps(index))
    made = module(folder.path, val_count=100)  # none of the files exists
    assert len(made.train_pairs) == count - 100


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def losses(data: PretrainDataModule) -> np.ndarray:
    pl.seed_everything(0)
    task = GVSL(
        backbone_options={"channels": [8, 16]},
        affine_channels=8,
        deformable_channels=8,
        learning_rate=1e-3,
    )
    seen = Losses()
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[seen],
    )
    trainer.fit(task, data)
    assert len(seen.values) == 6
    return np.array(seen.values)


def test_training_on_prepared_phantoms_equals_training_on_files(tmp_path: Path) -> None:
    subjects = PhantomDataset("cardiac_ct", 6, (20, 20, 20))
    (tmp_path / "data").mkdir()
    for index in range(6):
        image = (subjects[index]["image"][0].numpy() * 2048 - 1024).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "data" / f"{index}.nii.gz")
    words = ["--data.root", str(tmp_path / "data"), "--data.modality=ct"]
    main(["prepare", *words, "--out", str(tmp_path / "out"), "--workers=1"])
    options: dict[str, Any] = {"modality": "ct", "patch_size": (16, 16, 16), "val_count": 2}
    found, expected = (
        losses(PretrainDataModule(str(tmp_path / folder), **options)) for folder in ("out", "data")
    )
    assert np.allclose(found, expected, rtol=1e-3)
    assert len(set(expected)) == 6
