from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import layouts
from gvsl_lightning.datamodules import CardiacCT
from gvsl_lightning.errors import InputError


def test_any_folder_is_prepared_as_in_the_paper(tmp_path: Path) -> None:
    for number in range(4):
        image, _ = layouts.heart(number)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / f"{number}.nii.gz")
    data = CardiacCT(str(tmp_path), val_count=2)
    pair = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert pair["fixed"].shape == (2, 1, 160, 160, 160)
    image, _ = layouts.heart(int(pair["fixed_name"][0]))
    expected = np.clip(image + 1024.0, 0, 2048) / 2048
    start = [(160 - size) // 2 for size in image.shape]
    parts = [slice(low, low + size) for low, size in zip(start, image.shape, strict=True)]
    got = pair["fixed"][0, 0][tuple(parts)]
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)
    assert image.min() < -1024
    assert image.max() > 1024


def test_voxels_become_1_mm(tmp_path: Path) -> None:
    layouts.mmwhs(tmp_path, train=3, test=0)
    data = CardiacCT(str(tmp_path / "ct_train" / "*_image.nii.gz"), patch_size=(40, 40, 40))
    data.setup()
    assert data.train_pairs is not None
    volumes: Any = data.train_pairs.volumes
    assert len(volumes) == 3
    for size, voxels in zip(volumes[0]["image"].shape[1:], layouts.SHAPE, strict=True):
        assert abs(size - 1.5 * voxels) <= 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        CardiacCT(str(tmp_path / "away")).setup()
