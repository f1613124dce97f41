"""Brain structures in T1-weighted MR: CANDI."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvsl_lightning.data.regions import Centred, FindRegion
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import Amount
from gvsl_lightning.datamodules.published.layout import PublishedSegmentation, sibling
from gvsl_lightning.datamodules.volume_data import check_size

STRUCTURES = {
    2: "left cerebral white matter",
    3: "left cerebral cortex",
    4: "left lateral ventricle",
    7: "left cerebellar white matter",
    8: "left cerebellar cortex",
    10: "left thalamus",
    11: "left caudate",
    12: "left putamen",
    13: "left pallidum",
    14: "third ventricle",
    15: "fourth ventricle",
    16: "brain stem",
    17: "left hippocampus",
    18: "left amygdala",
    24: "cerebrospinal fluid",
    28: "left ventral diencephalon",
    41: "right cerebral white matter",
    42: "right cerebral cortex",
    43: "right lateral ventricle",
    46: "right cerebellar white matter",
    47: "right cerebellar cortex",
    49: "right thalamus",
    50: "right caudate",
    51: "right putamen",
    52: "right pallidum",
    53: "right hippocampus",
    54: "right amygdala",
    60: "right ventral diencephalon",
}
"""The 28 structures by their value in the label maps, which is that of FreeSurfer."""

_SUFFIX = "_procimg.nii.gz"


class CANDI(PublishedSegmentation):
    """Child and Adolescent NeuroDevelopment Initiative, the paper's task SBM.

    **Layout.** `SchizBull_2008/HC/HC_001/HC_001_procimg.nii.gz` with `HC_001_seg.nii.gz` (or
    `HC_001.seg.nii.gz`) in the same folder, and likewise the groups BPDwoPsy, BPDwPsy and SS: 103
    subjects. The folders between `root` and a subject's may have any names. Registered copies,
    `*_linear_*`, are not read.

    **Source.** https://www.nitrc.org/projects/candi_share, four archives
    `SchizBull_2008_GROUP_segimgreg_V1.2.tar.gz`, free after registration at NITRC and acceptance of
    its terms of use. Frazier et al., Diagnostic and sex effects on limbic volumes in early-onset
    bipolar disorder and schizophrenia, Schizophrenia Bulletin 2008.

    **Preparation** (He et al., CVPR 2023). Crop of 160x160x128 stored voxels about the brain, then
    minimum to 0 and maximum to 1. The scans are stored in coronal slices, 256x256x128, and stay at
    their voxel size; turned to RAS, the crop is 160x128x160. It is centred on the labelled voxels,
    in test too. In prediction it is centred on the volume, in whose middle the brain is in this
    set; beyond the crop, predictions are background.

    **Classes.** The paper says 28 tissues and does not name them. Taken are those 28 that one-shot
    segmentation of CANDI is compared on, with the same crop, since LT-Net (Wang et al., CVPR 2020,
    https://arxiv.org/abs/2003.07072): twelve left and right, and four in the middle. Every other
    value, such as those of accumbens, inferior lateral ventricles, vessels and undetermined voxels,
    is background.

    **Split.** 40 train, 20 validate, 43 test, as in the paper, which does not say which: here they
    are random with `split_seed`, each of the four groups in equal shares.

    Args:
        root: Folder with `SchizBull_2008` in it, or a folder below; in prediction any folder,
            pattern or list of volumes.
        class_names: Name of every class, the background first; None: those of the 28 structures.
        label_values: None: that of the 28 structures.
        crop: Size of the crop in stored voxels; None: no crop.
        patch_size: Size (D, H, W) of the training patches, in RAS; the default is the whole crop.
        val: Validation cases, a number or a share.
        test: Test cases, likewise.
        **options: see `SegmentationDataModule`.
    """

    source = (
        "download CANDI from https://www.nitrc.org/projects/candi_share and give the folder with "
        "SchizBull_2008/HC/HC_001/HC_001_procimg.nii.gz and HC_001_seg.nii.gz, and the other "
        "groups likewise, in it."
    )

    def __init__(
        self,
        root: str | list[str] | None = None,
        class_names: list[str] | None = None,
        label_values: dict[int, int] | None = None,
        crop: tuple[int, int, int] | None = (160, 160, 128),
        patch_size: tuple[int, int, int] = (160, 128, 160),
        val: Amount = 20,
        test: Amount = 43,
        **options: Any,
    ) -> None:
        if crop is not None:
            check_size("crop", crop, 2)
        super().__init__(
            root,
            class_names or ["background", *STRUCTURES.values()],
            label_values=label_values or _label_values(),
            patch_size=patch_size,
            val=val,
            test=test,
            **options,
        )
        self.crop = crop

    def configure_region(self) -> FindRegion | None:
        """Crop about the brain."""
        return Centred(self.crop) if self.crop else None

    def configure_strata(self) -> Sequence[Any]:
        """The four groups."""
        return [file.name.partition("_")[0] for file in self.files]

    def find_layout(self, root: Path) -> list[VolumeFile]:
        """Find the scans at any depth."""
        files = []
        for image in root.rglob(f"*{_SUFFIX}"):
            name = image.name.removesuffix(_SUFFIX)
            label = sibling(image, f"{name}_seg.nii.gz", f"{name}.seg.nii.gz")
            files.append(VolumeFile(str(image), name, label))
        return sorted(files, key=lambda file: file.name)


def _label_values() -> dict[int, int]:
    classes = {value: index for index, value in enumerate(STRUCTURES, 1)}
    return {value: classes.get(value, 0) for value in range(256)}
