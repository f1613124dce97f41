"""COVID-19 in CT of the chest: STOIC 2021."""

import csv
import os
from pathlib import Path
from typing import Any, Literal

from gvsl_lightning.data.regions import AroundLungMask, AroundLungs, FindRegion
from gvsl_lightning.data.splits import Amount
from gvsl_lightning.datamodules.classification_cases import ClassificationDataModule
from gvsl_lightning.errors import InputError, check_choice
from gvsl_lightning.transforms.intensity import Modality

_SOURCE = (
    "download the public training set of STOIC2021 from "
    "https://registry.opendata.aws/stoic2021-training and give the folder with data/mha/1.mha and "
    "metadata/reference.csv in it"
)


class STOIC(ClassificationDataModule):
    """Study of Thoracic CT in COVID-19, the paper's task CCC: COVID-19, yes or no.

    **Layout.** `data/mha/1.mha` and so on, and `metadata/reference.csv` with the columns PatientID,
    the name of the file, probCOVID, 1 after a positive RT-PCR and 0 otherwise, and probSevere,
    which is not used. 2,000 scans are public.

    **Source.** https://registry.opendata.aws/stoic2021-training, without an account:
    `aws s3 cp s3://stoic2021-training/ FOLDER --recursive --no-sign-request`, 280 GB; CC BY-NC 4.0.
    Revel et al., Study of Thoracic CT in COVID-19: The STOIC Project, Radiology 2021.

    **Preparation** (He et al., CVPR 2023). Crop to the lungs, voxels of 1 mm, HU + 1024 clipped to
    [0, 2048] and divided by 2048. The paper gives neither the way lungs are found nor the network's
    input size. Here lungs are air that the body encloses, see
    `gvsl_lightning.data.regions.AroundLungs`, or the mask of `lungmask`; a scan without lungs is
    left whole. In prediction the same is done.

    **Split.** 1,000 train, 400 validate, 600 test, as in the paper, which does not say which: here
    they are random with `split_seed`, both classes in equal shares.

    Args:
        root: Folder with `data` and `metadata`; in prediction any folder, pattern or list.
        class_names: Name of the class without and of that with COVID-19; None: negative, positive.
        size: Size (D, H, W) in voxels of the network's input: the centre of the crop, padded with
            zeros. The default holds the lungs of most adults at 1 mm; smaller devices need another
            `spacing` or `resize`.
        lungs: `threshold`, or `lungmask`: the network of that package, which is installed apart.
        margin: Of the crop, in mm on every side.
        modality: Intensity preset.
        spacing: Voxel size in mm to which the volumes are resampled.
        val: Validation cases, a number or a share.
        test: Test cases, likewise.
        **options: see `ClassificationDataModule`.
    """

    def __init__(
        self,
        root: str | None = None,
        class_names: list[str] | None = None,
        size: tuple[int, int, int] = (320, 256, 320),
        lungs: Literal["threshold", "lungmask"] = "threshold",
        margin: float = 10.0,
        modality: Modality = "ct",
        spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0),
        val: Amount = 400,
        test: Amount = 600,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            class_names or ["negative", "positive"],
            size,
            modality=modality,
            spacing=spacing,
            val=val,
            test=test,
            **options,
        )
        check_choice("lungs", lungs, ("threshold", "lungmask"))
        self.lungs = lungs
        self.margin = margin

    def configure_cases(self) -> list[str]:
        """Read `metadata/reference.csv`."""
        folder = Path(os.path.expanduser(self.root))
        self.cases = []
        for patient, positive in sorted(_reference(folder).items()):
            path = folder / "data" / "mha" / f"{patient}.mha"
            if not path.is_file():
                raise InputError(
                    f"{path} does not exist and metadata/reference.csv lists it; download it, or "
                    "take its line out."
                )
            self.cases.append((patient, str(path), (positive,)))
        return [patient for patient, _, _ in self.cases]

    def configure_region(self) -> FindRegion:
        """Crop to the lungs."""
        return (
            AroundLungs(self.margin) if self.lungs == "threshold" else AroundLungMask(self.margin)
        )


def _reference(folder: Path) -> dict[str, int]:
    """Whether each patient has COVID-19, 1 or 0."""
    path = folder / "metadata" / "reference.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {_SOURCE}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, int] = {}
    for row in rows:
        patient, covid = (str(row.get(key) or "").strip() for key in ("PatientID", "probCOVID"))
        if not patient or covid not in ("0", "1", "0.0", "1.0") or patient in found:
            raise InputError(
                f"{path} has the line {dict(row)}; every patient has one, with a PatientID and a "
                "probCOVID of 0 or 1; download the file anew."
            )
        found[patient] = int(float(covid))
    if not found:
        raise InputError(f"{path} lists no patient; {_SOURCE}.")
    return found
