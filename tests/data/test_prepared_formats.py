"""Why prepared volumes are .npy files: size and time of a crop against blosc2 and NIfTI.

pytest -m slow tests/data/test_prepared_formats.py -s
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy.ndimage import zoom

from gvsl_lightning.data.crop import crop
from gvsl_lightning.data.prepared import PreparedFolder
from gvsl_lightning.datamodules import PretrainDataModule
from gvsl_lightning.tools.prepare import prepare

READS = 40


def hippocampi(data_root: Path, folder: Path) -> None:
    found = sorted((data_root / "Task04_Hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))
    for path in found[:20]:
        (folder / path.name).symlink_to(path)


def torso(data_root: Path, folder: Path) -> None:
    image: Any = nibabel.load(data_root / "ct_torso_3mm.nii.gz")
    scale = 256 / np.array(image.shape)
    array = zoom(image.get_fdata(dtype=np.float32), scale, order=1)
    affine = image.affine @ np.diag([*(1 / scale), 1])
    nibabel.save(
        nibabel.Nifti1Image(array.round().astype(np.int16), affine), folder / "torso.nii.gz"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "modality", "patch"),
    [(hippocampi, "mri", (32, 48, 32)), (torso, "ct", (96, 96, 96))],
    ids=["hippocampus", "torso"],
)
def test_size_and_time_of_a_crop(
    data_root: Path,
    tmp_path: Path,
    source: Callable[[Path, Path], None],
    modality: Any,
    patch: tuple[int, int, int],
) -> None:
    blosc2 = pytest.importorskip("blosc2")
    blosc2.set_nthreads(1)
    originals = tmp_path / "originals"
    originals.mkdir()
    source(data_root, originals)
    prepare(PretrainDataModule(str(originals), modality=modality), str(tmp_path / "prepared"))
    volumes = PreparedFolder(tmp_path / "prepared").volumes({})
    arrays = [np.load(volume.image, mmap_mode="r") for volume in volumes]

    def compressed(codec: Any) -> tuple[list[Path], Callable[[Path], Any]]:
        paths = [tmp_path / f"{codec.name}_{index}.b2nd" for index in range(len(arrays))]
        for array, path in zip(arrays, paths, strict=True):
            size = np.minimum(array.shape, (1, 64, 64, 64)).tolist()
            options = {"codec": codec, "clevel": 5, "nthreads": 1}
            plain = np.array(array)
            blosc2.asarray(plain, urlpath=str(path), chunks=size, cparams=options)
        return paths, lambda path: blosc2.open(str(path), mmap_mode="r")

    def nifti(path: Path) -> Any:
        return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)[None]

    formats = {
        ".npy": (
            [Path(volume.image) for volume in volumes],
            lambda path: np.load(path, mmap_mode="r"),
        ),
        "blosc2 lz4": compressed(blosc2.Codec.LZ4),
        "blosc2 zstd": compressed(blosc2.Codec.ZSTD),
        ".nii.gz": (sorted(originals.iterdir()), nifti),
    }
    voxels = sum(array.size for array in arrays)
    times: dict[str, list[float]] = {name: [] for name in formats}
    for turn in range(READS + 1):  # formats take turns, so that the load of the machine is shared
        position = np.random.default_rng(turn).random(3)
        expected = crop(arrays[turn % len(arrays)], patch, position)
        for name, (paths, opened) in formats.items():
            began = time.perf_counter()
            found = crop(opened(paths[turn % len(paths)]), patch, position)
            if turn:
                times[name].append(1000 * (time.perf_counter() - began))
            assert found.shape == expected.shape
            if name != ".nii.gz":
                assert (found == expected).all()
    medians = {name: float(np.median(values)) for name, values in times.items()}
    print(f"\n{len(arrays)} volumes, {arrays[0].shape}, crops of {patch}")
    for name, (paths, _) in formats.items():
        size = sum(path.stat().st_size for path in paths)
        print(
            f"{name:12} {size / voxels:5.2f} bytes per voxel {medians[name]:9.2f} ms per crop "
            f"{medians[name] / medians['.npy']:7.1f} times .npy"
        )
