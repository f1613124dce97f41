import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from gvsl_lightning.data.hashing import data_hash
from gvsl_lightning.datamodules import Phantom, PretrainDataModule
from gvsl_lightning.phantom import generate_phantom


class TestDataHash:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        (tmp_path / "a").mkdir()
        for index in range(5):
            image = generate_phantom("cardiac_ct", index, (16, 16, 16))["image"]
            nib.save(nib.Nifti1Image(np.asarray(image), np.eye(4)), tmp_path / f"a/{index}.nii.gz")
        return tmp_path / "a"

    @staticmethod
    def of(root: Path, **options: Any) -> str:
        data = PretrainDataModule(str(root), val_count=2, patch_size=(8, 8, 8), **options)
        data.setup()
        found = data_hash(data)
        assert found is not None
        return found

    def test_wherever_the_files_lie(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "b")
        assert self.of(tmp_path / "b") == self.of(folder)
        assert self.of(folder, num_workers=1, batch_size=1) == self.of(folder)

    def test_changes_with_one_voxel_or_file(self, folder):
        before = self.of(folder)
        image = nib.load(folder / "3.nii.gz")
        voxels = image.get_fdata()
        voxels[8, 8, 8] += 0.1
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), folder / "3.nii.gz")
        changed = self.of(folder)
        (folder / "4.nii.gz").rename(folder / "5.nii.gz")
        renamed = self.of(folder)
        assert len({before, changed, renamed}) == 3

    def test_of_generated_volumes(self):
        hashes = set()
        for options in ({}, {}, {"scene": "coronary_ct"}, {"num_train": 5}):
            data = Phantom(**{"size": (16, 16, 16), "num_train": 4, "num_val": 2, **options})
            assert data_hash(data) is None
            data.setup()
            hashes.add(data_hash(data))
        assert len(hashes) == 3

    def test_of_nothing(self):
        assert data_hash(None) is None
