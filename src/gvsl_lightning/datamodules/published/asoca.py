"""Coronary arteries in CT: ASOCA 2020."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import Amount
from gvsl_lightning.datamodules.published.layout import HeartSegmentation

GROUPS = ("Normal", "Diseased")


class ASOCA(HeartSegmentation):
    """Automated Segmentation of Coronary Arteries, the paper's task SAC.

    **Layout.** `Normal/CTCA/Normal_1.nrrd` with `Normal/Annotations/Normal_1.nrrd` to 20, and
    `Diseased` likewise: 40 annotated CT coronary angiographies. The centre lines, surface meshes
    and test sets without annotations are not read.

    **Source.** https://asoca.grand-challenge.org, and https://reshare.ukdataservice.ac.uk/855916,
    after registration and with the owners' permission, for which they ask for an ethics approval or
    waiver. Gharleghi et al., Annotated computed tomography coronary angiogram images and associated
    data of normal and diseased arteries, Scientific Data 2023.

    **Split.** 15 train, 5 validate, 20 test, as in the paper, which does not say which: here they
    are random with `split_seed`, normal and diseased in equal shares.

    Args:
        root: Folder with `Normal` and `Diseased`; in prediction any folder, pattern or list.
        class_names: Name of the background and of the arteries.
        test: Test cases, a number or a share.
        **options: see `HeartSegmentation`, whose preparation the set gets.
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
        test: Amount = 20,
        **options: Any,
    ) -> None:
        names = class_names or ["background", "coronary arteries"]
        super().__init__(root, names, test=test, **options)

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
