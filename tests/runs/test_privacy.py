"""Facts of patients stay where they are: names, DICOM tags, free text of headers, keys."""

import gzip
import json
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
import wandb
import yaml
from PIL import Image

from bad_volumes import series
from checkpoints import registration_checkpoint, segmentation_checkpoint
from gvsl_lightning.cli.main import main
from gvsl_lightning.datamodules import (
    ClassificationDataModule,
    PretrainDataModule,
    SegmentationDataModule,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.runs import privacy
from gvsl_lightning.runs.privacy import FOLDER, pseudonym, pseudonyms
from wandb_files import _records

CONFIGS = Path(__file__).parents[2] / "configs"
SENTINEL = "SMITHJOHN"


def places(folder: Path, sentinel: str) -> list[str]:
    """Where below a folder a text stands: in names, and in contents however they are packed."""
    wandb.teardown()  # its service may write still
    found = []
    for path in sorted(folder.rglob("*")):
        if sentinel in path.name:
            found.append(f"name of {path}")
        if path.is_file() and any(sentinel.encode() in part for part in _unpacked(path)):
            found.append(str(path))
    return found


def _unpacked(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    yield content
    if content[:2] == b"\x1f\x8b":
        yield gzip.decompress(content)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())
    elif path.suffix == ".png":
        with Image.open(path) as image:
            yield str(image.info).encode()
    elif path.suffix == ".wandb":
        for record in _records(content):
            yield record.SerializeToString()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with a private folder beside it."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "private"))
    monkeypatch.setattr(privacy, "_known", {})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def scans(folder: Path, count: int = 6, labelled: bool = True) -> Path:
    """Volumes, and label maps beside them, whose names and free text are a patient's."""
    for number in range(count):
        random = np.random.default_rng(number)
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:12, 5:11, 4:12] = 1
        image = (label + random.random(label.shape)).astype(np.float32)
        for kind, array in (("images", image), ("labels", label))[: 1 + labelled]:
            made = nibabel.Nifti1Image(array, np.diag([1.0, 1.2, 1.5, 1.0]))
            for key in ("descrip", "db_name", "aux_file", "intent_name"):
                made.header[key] = SENTINEL.encode()
            made.header.extensions.append(
                nibabel.nifti1.Nifti1Extension("comment", SENTINEL.encode())
            )
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(made, folder / kind / f"{SENTINEL}_{number}.nii.gz")
    return folder


TINY = (
    "--model.backbone_options={channels: [8, 16]}",
    *("--data.patch_size=[16,16,16]", "--data.num_workers=0"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"),
)


def words(folder: Path, *more: str) -> list[str]:
    return [
        *(f"--config={CONFIGS / 'finetune' / 'segmentation.yaml'}", *TINY),
        *(f"--data.root={folder / 'images'}", "--data.modality=none"),
        *(f"--data.label_root={folder / 'labels'}", "--data.spacing=null"),
        *("--data.val=2", "--data.test=2", "--data.split_by=name"),
        *("--model.mode=scratch", "--model.class_names=[background, heart]"),
        *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.max_epochs=null"),
        *("--trainer.check_val_every_n_epoch=null", "--data.anonymise=true", *more),
    ]


class TestPseudonyms:
    def test_key_and_table_are_private_and_names_are_stable(self, work: Path) -> None:
        folder = work.parent / "private"
        first, second, again = pseudonyms(["a", "b", "a"])
        assert first == again != second
        assert pseudonym(first) == first
        for path in (folder, folder / "key", folder / "names.csv"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        table = (folder / "names.csv").read_text()
        assert table.splitlines() == ["pseudonym,name", f"{first},a", f"{second},b"]
        privacy._known.clear()  # another process
        assert pseudonyms(["b", "a"]) == [second, first]
        assert (folder / "names.csv").read_text() == table
        shutil.rmtree(folder)
        privacy._known.clear()
        assert pseudonym("a") != first  # which nobody can compute without the key

    @pytest.mark.parametrize("wrong", ["readable", "short", "file"])
    def test_a_folder_that_protects_nothing_is_refused(self, wrong: str, work: Path) -> None:
        folder = work.parent / "private"
        if wrong == "file":
            folder.write_text("")
        else:
            pseudonym("a")
            privacy._known.clear()
            if wrong == "short":
                (folder / "key").write_text("\n")
            else:
                (folder / "key").chmod(0o644)
        with pytest.raises(InputError, match="private"):
            pseudonym("b")


class TestAnonymise:
    def test_fit_test_and_predict_name_nobody(
        self, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = scans(work.parent / SENTINEL)
        fit = ["fit", *words(folder, "--test_after_fit=true")]
        monkeypatch.setattr(sys, "argv", ["gvsl_lightning", *fit])  # which W&B records
        main(fit)
        run = work / "runs" / "segmentation" / "version_0"
        checkpoint = run / "checkpoints" / "last.ckpt"
        shutil.rmtree(folder / "labels")
        main(["predict", *words(folder, f"--ckpt_path={checkpoint}")])
        printed = capsys.readouterr()
        assert SENTINEL not in printed.out + printed.err
        assert list(run.glob("wandb/offline-run-*/*.wandb"))
        assert (run / "test_cases.csv").is_file()
        (written_to,) = work.rglob("predictions")
        predicted = sorted(path.name for path in written_to.rglob("*.nii.gz"))
        names = [f"{SENTINEL}_{number}" for number in range(6)]
        assert predicted == sorted(f"{name}.nii.gz" for name in pseudonyms(names))
        assert places(work, SENTINEL) == []
        original = nibabel.load(folder / "images" / f"{names[0]}.nii.gz")
        written = nibabel.load(written_to / f"{pseudonym(names[0])}.nii.gz")
        assert original.header["descrip"].item() == SENTINEL.encode()
        for key in ("sform_code", "qform_code", "srow_x", "srow_z", "pixdim"):
            assert np.array_equal(original.header[key], written.header[key]), key
        assert written.header.extensions == []
        # what is searched would be found
        table = (work.parent / "private" / "names.csv").read_text()
        assert all(name in table for name in names)
        tested = {line.partition(",")[0] for line in (run / "test_cases.csv").open()} - {"name"}
        assert tested == set(pseudonyms(names[-2:]))  # the last ones by name, as without
        saved = torch.load(checkpoint, weights_only=True)
        root = saved["datamodule_hyper_parameters"]["root"]
        assert root == pseudonym(str(folder / "images"))
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["data"]["init_args"]["root"] == root

    def test_the_search_finds_names_where_nothing_is_hidden(self, work: Path) -> None:
        folder = scans(work.parent / SENTINEL)
        main(["fit", *words(folder, "--data.anonymise=false", "--trainer.max_steps=1")])
        found = " ".join(places(work, SENTINEL))
        for part in ("config.yaml", ".wandb", ".ckpt"):
            assert part in found

    def test_split_is_that_of_the_names(self, work: Path) -> None:
        folder = scans(work.parent / SENTINEL)
        for kind, options in (
            (SegmentationDataModule, {"class_names": ["a", "b"]}),
            (PretrainDataModule, {}),
        ):
            modules: list[Any] = [
                kind(
                    str(folder / "images"),
                    label_root=str(folder / "labels"),
                    patch_size=(8, 8, 8),
                    anonymise=hidden,
                    **options,
                )
                for hidden in (False, True)
            ]
            names = []
            for module in modules:
                module.setup()
                names.append(
                    [
                        [dataset[index]["name"] for index in range(len(dataset))]
                        for dataset in module.volume_datasets()
                    ]
                )
            plain, hidden = names
            assert hidden == [pseudonyms(part) for part in plain]

    def test_classification(self, work: Path) -> None:
        folder = work.parent / SENTINEL
        for name in ("ill", "well"):
            scans(folder / name, 4, labelled=False)
        data = ClassificationDataModule(
            str(folder), ["ill", "well"], (8, 8, 8), val=2, anonymise=True
        )
        data.setup()
        for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
            for batch in loader:
                assert all(map(privacy.is_pseudonym, batch["name"]))

    def test_prepared_volumes_keep_the_order_of_the_names(
        self, work: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = scans(work.parent / SENTINEL)
        (folder / "images" / f"{SENTINEL}_7.nii.gz").write_bytes(b"damaged")
        command = [
            *("prepare", f"--data.root={folder / 'images'}", "--workers=1"),
            *("--data.anonymise=true", "--out=prepared"),
        ]
        for state in ("6 prepared", "6 up to date"):
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code == 3  # one was rejected
            assert state in capsys.readouterr().out
        assert places(work, SENTINEL) == []
        rejected = (work / "prepared" / "rejected.csv").read_text()
        assert pseudonym(str(folder / "images" / f"{SENTINEL}_7.nii.gz")) in rejected
        with pytest.raises(SystemExit):
            main([word for word in command if "anonymise" not in word])
        index = json.loads((work / "prepared" / "index.json").read_text())
        assert index["names"] == pseudonyms(f"{SENTINEL}_{number}" for number in range(6))
        # labelled data find their volumes in it, without telling
        options: dict[str, Any] = {"class_names": ["a", "b"], "patch_size": (8, 8, 8), "val": 2}
        main([*command[:1], *_labelled(folder)])
        data = SegmentationDataModule(
            str(folder / "images2"),
            label_root=str(folder / "labels"),
            prepared="labelled",
            anonymise=True,
            **options,
        )
        data.setup()
        names = [item["name"] for dataset in data.volume_datasets() for item in dataset]
        assert sorted(names) == sorted(index["names"])
        assert places(work, SENTINEL) == []
        module = PretrainDataModule(
            "labelled", val_root=str(folder / "images2"), patch_size=(8, 8, 8)
        )
        with pytest.raises(InputError, match="anonymise"):
            module.setup()

    def test_registration(self, work: Path) -> None:
        folder = scans(work.parent / SENTINEL, 4, labelled=False)
        (folder / "atlas").mkdir()
        atlas = folder / "atlas" / "atlas.nii.gz"
        shutil.move(folder / "images" / f"{SENTINEL}_3.nii.gz", atlas)
        pretrain = CONFIGS / "pretrain" / "gvsl.yaml"
        main(
            [
                *("predict", f"--config={pretrain}", TINY[0], *TINY[3:]),
                f"--ckpt_path={registration_checkpoint(work / 'task.ckpt', affine_channels=8)}",
                *("--model.affine_channels=8", "--data=RegistrationDataModule"),
                *(f"--data.root={folder / 'images'}", f"--data.atlas={atlas}"),
                *("--data.modality=none", "--data.spacing=null"),
                *("--data.anonymise=true", "--trainer.callbacks+=RegistrationWriter"),
            ]
        )
        (table,) = work.rglob("registration/registration.csv")
        assert len(list(table.parent.glob("*/warped.nii.gz"))) == 3
        assert "anon_" in table.read_text()
        assert places(work, SENTINEL) == []


def _labelled(folder: Path) -> list[str]:
    """Words that prepare the same volumes, without the damaged one, with their labels."""
    (folder / "images2").mkdir()
    for path in (folder / "images").glob("*.nii.gz"):
        if path.stat().st_size > 100:
            os.link(path, folder / "images2" / path.name)
    return [
        *(f"--data.root={folder / 'images2'}", f"--data.label_root={folder / 'labels'}"),
        *("--workers=1", "--data.anonymise=true", "--out=labelled"),
    ]


TAGS = (
    *("PatientName", "PatientID", "PatientBirthDate", "InstitutionName", "PatientAddress"),
    *("ReferringPhysicianName", "AccessionNumber", "StudyDescription", "SeriesDescription"),
    *("ProtocolName", "StationName", "OperatorsName", "PatientComments", "StudyID"),
)


def patient_series(folder: Path) -> None:
    """A DICOM series whose tags, except the geometry, hold a patient's name."""
    for path in series(folder).iterdir():
        data = pydicom.dcmread(path)
        for tag in TAGS:
            value = "19591231" if tag == "PatientBirthDate" else f"{SENTINEL}{tag}"[:16]
            setattr(data, tag, value)
        block = data.private_block(0x0019, SENTINEL, create=True)
        block.add_new(0x01, "LO", f"{SENTINEL} private")
        data.save_as(path)


def test_tags_of_dicom_series_stay_in_them(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patient = "DOEJANE"  # whose name is that of the folders
    folder = work.parent / patient
    for number in range(4):
        patient_series(folder / f"{patient}_{number}")
    assert len(places(folder, SENTINEL)) == 40
    pretrain = [
        *("fit", f"--config={CONFIGS / 'pretrain' / 'gvsl.yaml'}", *TINY),
        *(f"--data.root={folder}", "--data.modality=none"),
        *("--data.spacing=null", "--data.batch_size=1"),
        *("--model.affine_channels=8", "--trainer.max_steps=1"),
        *("--trainer.val_check_interval=1", "--data.anonymise=true"),
        *("--data.val_count=2", "--data.val_pairs=1"),
    ]
    main(pretrain)
    run = work / "runs" / "gvsl" / "version_0"
    assert list((run / "figures").glob("*.png"))
    card = json.loads((run / "backbone.json").read_text())
    assert card["data"]["root"] == pseudonym(str(folder))
    prepare = ["prepare", f"--data.root={folder}", "--out=prepared", "--workers=1"]
    main([*prepare, "--data.anonymise=true"])
    segment = [
        *("predict", f"--config={CONFIGS / 'finetune' / 'segmentation.yaml'}", *TINY),
        *(f"--data.root={folder}", "--data.modality=none"),
        *("--data.spacing=null", "--data.anonymise=true"),
        "--model.class_names=[background, heart]",
        f"--ckpt_path={segmentation_checkpoint(work / 'task.ckpt', ['background', 'heart'])}",
    ]
    main(segment)
    assert len(list(work.rglob("predictions/*.nii.gz"))) == 4
    printed = capsys.readouterr()
    for name in (SENTINEL, "19591231", patient):
        assert name not in printed.out + printed.err
        assert places(work, name) == []


def test_keys_are_in_no_file_of_a_run(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("OTHER_TOKEN", "tokentokentoken")
    arguments = [
        *("fit", f"--config={CONFIGS / 'quickstart.yaml'}", TINY[0]),
        *("--data.size=[16,16,16]", "--data.num_train=2"),
        *("--data.num_val=2", "--data.val_pairs=1"),
        *("--trainer.max_steps=1", "--trainer.val_check_interval=1"),
        "--model.affine_channels=8",
    ]
    for name, word in (
        ("WANDB_API_KEY", "--trainer.logger.notes=key ${oc.env:WANDB_API_KEY}"),
        ("OTHER_TOKEN", "--trainer.logger.tags=[tokentokentoken]"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*arguments, word])
        printed = capsys.readouterr().err
        assert name in printed
        assert key not in printed
    main(arguments)
    run = work / "runs" / "quickstart" / "version_0"
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert list(run.glob("checkpoints/*.ckpt"))
    assert places(work, key) == places(work, "tokentokentoken") == []
