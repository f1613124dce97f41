import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from gvsl_lightning.datamodules import Decathlon, DecathlonSegmentation, decathlon
from gvsl_lightning.datamodules.pairs import validation_pairs
from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import Segmentation

LABELS = {"2": "Posterior", "0": "background", "1": "Anterior"}


def make_task(
    folder: Path,
    modality: dict[str, str],
    count: int = 5,
    labels: Any = LABELS,
) -> None:
    shape = (6, 6, 6) if len(modality) == 1 else (6, 6, 6, len(modality))
    entries = []
    for index in reversed(range(count)):
        entry = {"image": f"./imagesTr/c_{index}.nii.gz", "label": f"./labelsTr/c_{index}.nii.gz"}
        for path, size in ((entry["image"], shape), (entry["label"], (6, 6, 6))):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            array = np.random.default_rng(index).uniform(0, 900, size).astype(np.float32)
            array = array if path == entry["image"] else array // 300
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / path)
        entries.append(entry)
    content = {"modality": modality, "labels": labels, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("modality", "preset", "channels"),
    [
        ({"0": "CT"}, "ct", 1),
        ({"0": "MRI"}, "mri", 1),
        ({"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, "mri", 4),
    ],
)
def test_preset_and_channels_follow_the_description(
    tmp_path: Path, modality: dict[str, str], preset: str, channels: int
) -> None:
    make_task(tmp_path / "Task99_Test", modality)
    module = Decathlon(str(tmp_path), "Task99_Test", patch_size=(4, 4, 4), val_count=2)
    module.setup()
    image = module.train_pairs.volumes[0]["image"]
    assert image.shape == (channels, 6, 6, 6)
    assert module.configure_preparation().modality == preset
    low, high = (image.min(), image.max())
    assert (low > 0.49 and high < 0.95) if preset == "ct" else (low == 0 and high == 1)


def test_an_explicit_preset_wins(tmp_path: Path) -> None:
    make_task(tmp_path / "Task99_Test", {"0": "CT"})
    module = Decathlon(str(tmp_path), "Task99_Test", modality="none")
    module.setup()
    assert module.train_pairs.volumes[0]["image"].min() == 0


@pytest.mark.parametrize("kind", [Decathlon, DecathlonSegmentation])
def test_hounsfield_units_of_mr_are_refused(tmp_path: Path, kind: Any) -> None:
    make_task(tmp_path / "Task99_Test", {"0": "T1w", "1": "T2w"})
    with pytest.raises(InputError, match=r"modality is ct and .*dataset\.json says T1w, T2w"):
        kind(str(tmp_path), "Task99_Test", modality="ct").setup("fit")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"modality": ["MRI"]}'])
def test_a_damaged_description_is_named(tmp_path: Path, content: str) -> None:
    make_task(tmp_path / "Task04_Hippocampus", {"0": "MRI"})
    (tmp_path / "Task04_Hippocampus" / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=r"dataset\.json"):
        Decathlon(str(tmp_path)).setup("fit")


def test_a_missing_task_is_named_and_not_downloaded_unasked(tmp_path: Path) -> None:
    module = Decathlon(str(tmp_path), "Task09_Spleen")
    module.prepare_data()
    with pytest.raises(InputError, match=r"Task09_Spleen.dataset.json does not exist"):
        module.setup()


@pytest.mark.parametrize("kind", [Decathlon, DecathlonSegmentation])
def test_download_fetches_a_missing_task_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch(url: str, archive: Path, target: Path, hash_val: str, hash_type: str) -> None:
        calls.append((url, archive.name, hash_type))
        make_task(target / "Task04_Hippocampus", {"0": "MRI"})

    monkeypatch.setattr(decathlon, "download_and_extract", fetch)
    for _ in range(2):
        module = kind(str(tmp_path), download=True)
        module.prepare_data()
        module.setup()
    assert [call[1:] for call in calls] == [("Task04_Hippocampus.tar", "md5")]
    assert calls[0][0].endswith("Task04_Hippocampus.tar")
    with pytest.raises(InputError, match="no task Task11_Heart to download"):
        kind(str(tmp_path), "Task11_Heart", download=True).prepare_data()
    if kind is DecathlonSegmentation:
        assert module.class_names == ["background", "Anterior", "Posterior"]


def test_hyperparameters_rebuild_the_module(tmp_path: Path) -> None:
    module = Decathlon(str(tmp_path), "Task09_Spleen", val_count=4, patch_size=(8, 8, 8))
    rebuilt = Decathlon(**module.hparams)
    assert rebuilt.hparams == module.hparams
    assert rebuilt.folder == module.folder == tmp_path / "Task09_Spleen"


def test_hippocampus(data_root: Path) -> None:
    module = Decathlon(str(data_root), patch_size=(40, 56, 40))
    module.setup()
    training, validation = module.train_pairs.volumes, module.validation_pairs.volumes
    names = [file.name for file in (*training.files, *validation.files)]
    assert (len(training), len(validation)) == (180, 20)
    assert names == sorted(names)
    folder = data_root / "Task04_Hippocampus"
    raw_medians, medians = [], []
    for item in (*(training[index] for index in range(0, 180, 20)), validation[7]):
        raw = nibabel.load(folder / f"imagesTr/{item['name']}.nii.gz").get_fdata()
        image = item["image"][0].numpy().astype(np.float64)
        assert image.min() == 0
        assert image.max() == 1
        inner = (image > 0) & (image < 1)
        assert np.corrcoef(image[inner], raw[inner])[0, 1] > 0.9999
        raw_medians.append(np.median(raw))
        medians.append(np.median(image))
    assert max(raw_medians) > 1000 * min(raw_medians)
    assert max(medians) < 3 * min(medians)
    for item in (validation[0], validation[19]):
        label = nibabel.load(folder / f"labelsTr/{item['name']}.nii.gz").get_fdata()
        assert np.array_equal(item["label"][0].numpy(), label)
        assert set(item["label"].unique().tolist()) == {0, 1, 2}
    batch = next(iter(module.val_dataloader()))
    assert batch["fixed"].shape == batch["moving_label"].shape == (2, 1, 40, 56, 40)
    assert batch["fixed_label"].amax() == 2


def test_cases_kept_for_a_test_neither_train_nor_validate(tmp_path: Path) -> None:
    make_task(tmp_path / "Task99_Test", {"0": "MRI"}, count=9)
    options = {"task": "Task99_Test", "val_count": 2, "patch_size": (4, 4, 4)}
    module = Decathlon(str(tmp_path), test_count=3, **options)
    training, validation = module.configure_files()
    assert [file.name for file in training] == [f"c_{index}" for index in range(4)]
    assert [file.name for file in validation] == ["c_4", "c_5"]
    with pytest.raises(InputError, match=r"test_count is 8 and .* has 9 cases"):
        Decathlon(str(tmp_path), test_count=8, **options).setup("fit")


class TestDecathlonSegmentation:
    @pytest.mark.parametrize(
        ("modality", "preset"), [({"0": "CT"}, "ct"), ({"0": "FLAIR", "1": "T1w"}, "mri")]
    )
    def test_classes_preset_and_channels_follow_the_description(
        self, tmp_path: Path, modality: dict[str, str], preset: str
    ) -> None:
        make_task(tmp_path / "Task99_Test", modality)
        module = DecathlonSegmentation(str(tmp_path), "Task99_Test", patch_size=(4, 4, 4))
        assert module.class_names == ["background", "Anterior", "Posterior"]
        batch = next(iter(module.val_dataloader()))
        assert batch["image"].shape == (1, len(modality), 6, 6, 6)
        assert module.configure_preparation().modality == preset
        stored = np.asarray(
            nibabel.load(tmp_path / f"Task99_Test/labelsTr/{batch['name'][0]}.nii.gz").dataobj
        )
        assert np.array_equal(batch["label"][0, 0], stored)
        assert set(np.unique(stored)) == {0, 1, 2}

    def test_what_is_given_wins(self, tmp_path: Path) -> None:
        make_task(tmp_path / "Task99_Test", {"0": "CT"}, labels={})
        module = DecathlonSegmentation(
            str(tmp_path),
            "Task99_Test",
            class_names=["nothing", "hippocampus"],
            label_values={1: 1, 2: 1},
            modality="none",
        )
        batch = next(iter(module.val_dataloader()))
        assert module.class_names == ["nothing", "hippocampus"]
        assert module.configure_preparation().modality == "none"
        assert batch["label"].unique().tolist() == [0, 1]

    def test_values_with_gaps_become_the_classes(self, tmp_path: Path) -> None:
        labels = {"0": "background", "2": "organ", "1": "tumour", "7": "vessel"}
        make_task(tmp_path / "Task99_Test", {"0": "CT"}, labels=labels)
        module = DecathlonSegmentation(str(tmp_path), "Task99_Test", ignore_index=255)
        assert module.class_names == ["background", "tumour", "organ", "vessel"]
        assert module.label_values == {0: 0, 1: 1, 2: 2, 7: 3, 255: 255}

    def test_the_cases_that_test_are_those_that_pre_training_leaves_out(
        self, tmp_path: Path
    ) -> None:
        make_task(tmp_path / "Task99_Test", {"0": "MRI"}, count=9)
        module = DecathlonSegmentation(str(tmp_path), "Task99_Test", val=2, test=3)
        module.setup()
        assert module.split is not None
        training, validation, test = (
            [module.files[index].name for index in part]
            for part in (module.split.train, module.split.val, module.split.test)
        )
        pretraining = Decathlon(str(tmp_path), "Task99_Test", val_count=2, test_count=3)
        assert [[file.name for file in part] for part in pretraining.configure_files()] == [
            training,
            validation,
        ]
        assert test == ["c_6", "c_7", "c_8"]

    @pytest.mark.parametrize(
        ("labels", "options", "sentence"),
        [
            ({}, {}, r'dataset\.json has no "labels" such as .*; add it'),
            ({"background": 0, "organ": 1}, {}, r'dataset\.json has no "labels"'),
            ({"0": "organ", "1": "organ"}, {}, "class_names is .*'organ', 'organ'.*different"),
            (LABELS, {"ignore_index": 2}, "ignore_index is 2, which is the class 'Posterior'"),
            (LABELS, {"label_values": {1: 1}}, "label_values are given without class_names"),
            (LABELS, {"root": None}, "root is missing"),
            (LABELS, {"task": "Task09_Spleen"}, r"Task09_Spleen.dataset.json does not exist"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, tmp_path: Path, labels: Any, options: dict[str, Any], sentence: str
    ) -> None:
        make_task(tmp_path / "Task99_Test", {"0": "MRI"}, labels=labels)
        given = {"root": str(tmp_path), "task": "Task99_Test", **options}
        with pytest.raises(InputError, match=sentence):
            DecathlonSegmentation(**given).setup("fit")

    def test_hyperparameters_rebuild_the_module(self, tmp_path: Path) -> None:
        labels = {"0": "background", "1": "organ", "2": "tumour", "7": "vessel"}
        make_task(tmp_path / "Task99_Test", {"0": "CT"}, labels=labels)
        module = DecathlonSegmentation(
            str(tmp_path), "Task99_Test", val=1, patch_size=(8, 8, 8), ignore_index=255
        )
        rebuilt = DecathlonSegmentation(**module.hparams)
        assert rebuilt.hparams == module.hparams
        assert rebuilt.class_names == module.class_names
        assert rebuilt.label_values == module.label_values

    def test_a_model_of_other_classes_is_refused(self, tmp_path: Path) -> None:
        make_task(tmp_path / "Task99_Test", {"0": "MRI"})
        module = DecathlonSegmentation(
            str(tmp_path), "Task99_Test", patch_size=(8, 8, 8), batch_size=1
        )
        options: dict[str, Any] = {
            "mode": "scratch",
            "backbone_options": {"channels": [8, 16]},
            "window_size": (8, 8, 8),
        }
        for names in (["background", "left", "right"], module.class_names):
            trainer = pl.Trainer(
                max_steps=1,
                accelerator="cpu",
                logger=CSVLogger(tmp_path),
                enable_progress_bar=False,
                enable_checkpointing=False,
            )
            task = Segmentation(class_names=names, **options)
            if names == module.class_names:
                trainer.fit(task, module)
            else:
                sentence = "classes background, left, right and the data background, Anterior, Post"
                with pytest.raises(InputError, match=sentence):
                    trainer.fit(task, module)

    def test_hippocampus(self, data_root: Path) -> None:
        module = DecathlonSegmentation(str(data_root), val=20, test=40, labelled=5)
        batch = next(iter(module.val_dataloader()))
        assert module.class_names == ["background", "Anterior", "Posterior"]
        assert (batch["image"].min(), batch["image"].max()) == (0, 1)
        assert batch["label"].unique().tolist() == [0, 1, 2]
        assert module.split is not None
        parts = (module.split.train, module.split.val, module.split.test)
        assert [len(part) for part in parts] == [5, 21, 40]


def test_both_hippocampi_of_a_subject_are_in_one_part(data_root: Path) -> None:
    def subjects(files: Any) -> set[int]:
        return {(int(file.name[-3:]) + 1) // 2 for file in files}

    data = DecathlonSegmentation(str(data_root), val=20, test=40)
    data.setup("test")
    assert data.split is not None
    parts = [[data.files[case] for case in part] for part in vars(data.split).values()]
    train, val, test = map(subjects, parts)
    assert not train & val
    assert not (train | val) & test
    assert [len(part) for part in parts] == [139, 21, 40]
    pairs = Decathlon(str(data_root), val_count=20, test_count=40, across_subjects=True)
    training, validation = pairs.configure_files()
    assert not subjects(training) & subjects(validation)
    assert not (subjects(training) | subjects(validation)) & test
    pairs._validating = validation
    of = pairs.validation_subjects()
    assert of is not None
    chosen = validation_pairs(len(validation), 400, of)
    assert chosen
    assert all(of[fixed] != of[moving] for fixed, moving, _ in chosen)
