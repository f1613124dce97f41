"""Coronary arteries in CT: ASOCA 2020."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvsl_lightning.data.regions import AroundLabel, FindRegion
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import Amount
from gvsl_lightning.datamodules.published.layout import PublishedSegmentation
from gvsl_lightning.transforms.intensity import Modality

GROUPS = ("Normal", "Diseased")


class ASOCA(PublishedSegmentation):
    """Automated Segmentation of Coronary Arteries, the paper's task SAC.

    **Layout.** `Normal/CTCA/Normal_1.nrrd` with `Normal/Annotations/Normal_1.nrrd` to 20, and
    `Diseased` likewise: 40 annotated CT coronary angiographies. The centre lines, surface meshes
    and test sets without annotations are not read.

    **Source.** https://asoca.grand-challenge.org, and https://reshare.ukdataservice.ac.uk/855916,
    after registration and with the owners' permission, for which they ask for an ethics approval or
    waiver. Gharleghi et al., Annotated computed tomography coronary angiogram images and associated
    data of normal and diseased arteries, Scientific Data 2023.

    **Preparation** (He et al., CVPR 2023), that of MM-WHS. Crop to the heart, voxels of 1 mm,
    HU + 1024 clipped to [0, 2048] and divided by 2048. The coronary arteries lie on the heart,
    which is taken as the box of all labelled voxels and `margin`, in test too. Nothing is cropped
    in prediction: the whole volume is segmented, window by window.

    **Split.** 15 train, 5 validate, 20 test, as in the paper, which does not say which: here they
    are random with `split_seed`, normal and diseased in equal shares.

    Args:
        root: Folder with `Normal` and `Diseased`; in prediction any folder, pattern or list.
        class_names: Name of the background and of the arteries.
        label_values: Class index of each value in the label maps; None: 1 is the arteries.
        margin: Of the crop, in mm on every side.
        modality: Intensity preset.
        spacing: Voxel size in mm to which the volumes are resampled.
        patch_size: Size (D, H, W) of the training patches.
        val: Validation cases, a number or a share.
        test: Test cases, likewise.
        **options: Options of `SegmentationDataModule`.

    Raises:
        InputError: A path, a file or an option is wrong; the sentence names it.
    """

    source = (
        "register for ASOCA at https://asoca.grand-challenge.org, download it and give the folder "
        "with Normal/CTCA/Normal_1.nrrd, Normal/Annotations/Normal_1.nrrd and Diseased likewise in "
        "it."
    )

    def __init__(
        self,
        root: str | list[str] | None = None,
        class_names: list[str] | None = None,
        label_values: dict[int, int] | None = None,
        margin: float = 20.0,
        modality: Modality = "ct",
        spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0),
        patch_size: tuple[int, int, int] = (128, 128, 128),
        val: Amount = 5,
        test: Amount = 20,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            class_names or ["background", "coronary arteries"],
            label_values=label_values,
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            val=val,
            test=test,
            **options,
        )
        self.margin = margin

    def configure_region(self) -> FindRegion:
        """Crop to the heart."""
        return AroundLabel(self.margin)

    def configure_strata(self) -> Sequence[Any]:
        """Normal or diseased."""
        return [file.name.partition("_")[0] for file in self.files]

    def find_layout(self, root: Path) -> list[VolumeFile]:
        """Find the scans."""
        files = []
        for group in GROUPS:
            for image in (root / group / "CTCA").glob("*.nrrd"):
                if re.fullmatch(rf"{group}_\d+", image.stem):
                    label = root / group / "Annotations" / image.name
                    existing = str(label) if label.is_file() else None
                    files.append(VolumeFile(str(image), image.stem, existing))
        return sorted(files, key=lambda file: file.name)
