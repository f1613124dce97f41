"""The whole heart in CT: seven structures of MM-WHS 2017."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import Amount, Split
from gvsl_lightning.datamodules.published.layout import HeartSegmentation, sibling

CLASS_NAMES = [
    "background",
    "left ventricle myocardium",
    "left atrium",
    "left ventricle",
    "right atrium",
    "right ventricle",
    "ascending aorta",
    "pulmonary artery",
]
LABEL_VALUES = {205: 1, 420: 2, 421: 2, 500: 3, 550: 4, 600: 5, 820: 6, 850: 7}
"""421 is in one released label map, in the left atrium, which is 420."""


class MMWHS(HeartSegmentation):
    """CT of the Multi-Modality Whole Heart Segmentation challenge 2017, the paper's task SHC.

    **Layout.** `ct_train/ct_train_1001_image.nii.gz` with `ct_train_1001_label.nii.gz` to 1020, and
    `ct_test/ct_test_2001_image.nii.gz` to 2040; `.nii` works too. The label maps of the 40 test
    scans are released only in encrypted form, `ct_test_2001_label_encrypt_1mm.nii.gz`, for the
    organisers' evaluation program, and are not read. Who has them as `ct_test_2001_label.nii.gz`,
    as the paper has, puts them into the folder of the images.

    **Source.** https://zmiclab.github.io/zxh/0/mmwhs, after registration; research only, not to be
    passed on. Zhuang et al., Evaluation of algorithms for Multi-Modality Whole Heart Segmentation,
    Medical Image Analysis 2019.

    **Split.** 15 scans of `ct_train` train, 5 validate, those of `ct_test` that have a label map
    test, 40 in the paper. Without any, `test=5` and `val=2`, for example, test on the last five of
    `ct_train`.

    Args:
        root: Folder with `ct_train`; in prediction any folder, pattern or list of volumes.
        class_names: Name of every class, the background first; None: those of the challenge.
        label_values: Class index of each value in the label maps; None: 205, 420, 500, 550, 600,
            820, 850 become 1 to 7, and 421 counts as 420.
        test: Test cases, a number or a share of the labelled ones; None: those of `ct_test`.
        split_by: `name`: by number the last cases test, those before them validate; or `random`.
        **options: see `HeartSegmentation`, whose preparation the set gets.
    """

    source = (
        "register for MM-WHS 2017 at https://zmiclab.github.io/zxh/0/mmwhs, download its CT and "
        "give the folder with ct_train/ct_train_1001_image.nii.gz and "
        "ct_train/ct_train_1001_label.nii.gz in it."
    )

    def __init__(
        self,
        root: str | list[str] | None = None,
        class_names: list[str] | None = None,
        label_values: dict[int, int] | None = None,
        test: Amount | None = None,
        split_by: Literal["random", "name"] = "name",
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            class_names or CLASS_NAMES,
            label_values=label_values or LABEL_VALUES,
            test=0 if test is None else test,
            split_by=split_by,
            **options,
        )
        self.tests_on_released = test is None

    def find_layout(self, root: Path) -> list[VolumeFile]:
        """Find the scans by number: those of `ct_train` come first."""
        files = []
        for image in root.glob("ct_*/ct_*_image.nii*"):
            named = re.fullmatch(r"(ct_(?:train|test)_\d+)_image\.nii(?:\.gz)?", image.name)
            if named:
                stem = f"{named[1]}_label.nii"
                files.append(VolumeFile(str(image), named[1], sibling(image, f"{stem}.gz", stem)))
        return sorted(files, key=lambda file: (_released(file), file.name))

    def find_files(self) -> list[VolumeFile]:
        """Find the cases: the scans of `ct_train` and the labelled ones of `ct_test`."""
        return [file for file in super().find_files() if file.label or not _released(file)]

    def configure_split(self, names: Sequence[str]) -> Split:
        """Test on the scans of `ct_test`, unless a number of test cases is given."""
        if self.split_file is not None or not self.tests_on_released:
            return super().configure_split(names)
        count = sum(not _released(file) for file in self.files)
        split = super().configure_split(names[:count])
        return Split(split.train, split.val, tuple(range(count, len(names))))


def _released(file: VolumeFile) -> bool:
    """Whether a scan is one of those released for the test."""
    return file.name.startswith("ct_test")
