"""Small folders in the layouts of the published data sets, for the tests."""

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from gvsl_lightning.datamodules.published.candi import STRUCTURES
from gvsl_lightning.phantom import generate_phantom

HEART = np.array([0, 205, 420, 500, 550, 600, 820, 850], dtype=np.int16)
SHAPE = (20, 24, 18)


def mmwhs(root: Path, train: int = 6, test: int = 2, labelled_tests: int = 2) -> Path:
    """CT in HU and label maps of the challenge's values, voxels of 1.5 mm, left to right turned."""
    affine = np.diag([-1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = (40, -30, 12)
    for group, first, count in (("train", 1001, train), ("test", 2001, test)):
        folder = root / f"ct_{group}"
        folder.mkdir(parents=True)
        for number in range(first, first + count):
            image, label = heart(number)
            stem = f"ct_{group}_{number}"
            nibabel.save(nibabel.Nifti1Image(image, affine), folder / f"{stem}_image.nii.gz")
            if group == "train" or number < first + labelled_tests:
                nibabel.save(
                    nibabel.Nifti1Image(HEART[label], affine), folder / f"{stem}_label.nii.gz"
                )
            if group == "test":
                (folder / f"{stem}_label_encrypt_1mm.nii.gz").write_bytes(b"encrypted")
    return root


def asoca(root: Path, count: int = 4) -> Path:
    """CT in HU and arteries, NRRD."""
    for group in ("Normal", "Diseased"):
        for kind in ("CTCA", "Annotations", "SurfaceMeshes"):
            (root / group / kind).mkdir(parents=True)
        for number in range(1, count + 1):
            image, label = heart(number)
            arteries = (label == 6).astype(np.uint8)
            for kind, array in (("CTCA", image), ("Annotations", arteries)):
                made = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
                made.SetSpacing((0.8, 0.8, 1.25))
                made.SetOrigin((-20.0, 5.0, 100.0))
                SimpleITK.WriteImage(made, str(root / group / kind / f"{group}_{number}.nrrd"))
    return root


def candi(root: Path, count: int = 3) -> Path:
    """MR of any unit in coronal slices, and label maps with values that are no class."""
    affine = np.array([[-1, 0, 0, 9], [0, 0, 1.5, -14], [0, -1, 0, 11], [0, 0, 0, 1]], dtype=float)
    groups = {"HC": "HC", "BPDwithoutPsy": "BPDwoPsy", "BPDwithPsy": "BPDwPsy", "SS": "SS"}
    number = 0
    for folder, group in groups.items():
        for _ in range(count):
            number += 1
            name = f"{group}_{number:03d}"
            subject = root / "SchizBull_2008" / folder / name
            subject.mkdir(parents=True)
            random = np.random.default_rng(number)
            label = np.zeros(SHAPE, np.uint8)
            values = np.array([*STRUCTURES, 5, 26, 77], dtype=np.uint8)
            brain = (slice(4, 14), slice(3, 17), slice(6, 14))
            label[brain] = random.permutation(np.resize(values, 10 * 14 * 8)).reshape(10, 14, 8)
            image = (label + 3.0 + random.normal(size=SHAPE)).astype(np.float32)
            ending = ".seg.nii.gz" if group == "SS" else "_seg.nii.gz"
            for array, suffix in ((image, "_procimg.nii.gz"), (label, ending)):
                nibabel.save(nibabel.Nifti1Image(array, affine), subject / f"{name}{suffix}")
            copy = subject / "MNI152_2mm_Linear" / f"{name}_linear_MRI.nii.gz"
            copy.parent.mkdir()
            copy.write_bytes(b"not read")
    return root


def stoic(root: Path, count: int = 12) -> Path:
    """Chests in HU as MetaImage, voxels of 2 mm, and the table."""
    (root / "data" / "mha").mkdir(parents=True)
    (root / "metadata").mkdir()
    lines = ["PatientID,probCOVID,probSevere"]
    for patient in range(1, count + 1):
        made = SimpleITK.GetImageFromArray(chest().transpose(2, 1, 0))
        made.SetSpacing((2.0, 2.0, 2.0))
        SimpleITK.WriteImage(made, str(root / "data" / "mha" / f"{patient}.mha"))
        lines.append(f"{patient},{patient % 2},0")
    (root / "metadata" / "reference.csv").write_text("\n".join(lines) + "\n")
    return root


def heart(subject: int) -> tuple[np.ndarray, np.ndarray]:
    """A heart in HU and the number of its structure at each voxel, int16."""
    phantom = generate_phantom("cardiac_ct", subject, SHAPE)
    image = np.asarray(phantom["image"]) * 3400 - 1100
    return image.astype(np.int16), np.asarray(phantom["label"]).astype(np.int16)


LUNGS = (slice(6, 26), slice(9, 20), slice(5, 21))


def chest() -> np.ndarray:
    """A body in air: two lungs, bowel gas, a table; padding that is darker than air."""
    array = np.full((32, 30, 26), -1000, np.int16)
    array[:, :2] = -3024
    array[3:29, 5:25] = 40
    array[6:13, 9:20, 5:21] = -850
    array[18:26, 11:20, 7:21] = -820
    array[14:16, 6:8, 1:3] = -900
    array[:, 27] = 300
    return array
