"""Base of the published data sets for segmentation: cases are found by the folder's layout."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gvsl_lightning.data.regions import AroundLabel, FindRegion
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.splits import Amount
from gvsl_lightning.datamodules.segmentation_cases import SegmentationDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms.intensity import Modality


class PublishedSegmentation(SegmentationDataModule):
    """Base of data sets that come in a folder of a known layout.

    In prediction a `root` of the layout stands for its images, with or without label maps, and
    every other one for all volumes in it. Label maps are not looked at.
    """

    source: str
    """Where to download the set and how its folder looks, the end of an error's sentence."""

    @abstractmethod
    def find_layout(self, root: Path) -> list[VolumeFile]:
        """Find the images of the layout, sorted by name, each with its label map if that exists.

        The list is empty where the folder does not exist or is not of the layout.
        """

    def find_files(self) -> list[VolumeFile]:
        """Find the cases.

        Raises:
            InputError: The folder is not of the layout.
        """
        files = self._find()
        if not files:
            raise InputError(f"{self.root} holds no volume of {type(self).__name__}; {self.source}")
        named: dict[str, VolumeFile] = {}
        for file in files:
            if (other := named.setdefault(file.name, file)) is not file:
                raise InputError(
                    f"{file.image} and {other.image} are both the case {file.name}; leave out one "
                    "of the two."
                )
        return files

    def find_predicted(self) -> Sequence[VolumeFile]:
        """Find the images of the layout, or else all volumes."""
        return self._find() or super().find_predicted()

    def _find(self) -> list[VolumeFile]:
        is_path = isinstance(self.root, str)
        return self.find_layout(Path(os.path.expanduser(str(self.root)))) if is_path else []


class HeartSegmentation(PublishedSegmentation):
    """Base of the sets of hearts in CT, with the preparation of the paper (He et al., CVPR 2023).

    Crop to the heart, voxels of 1 mm, HU + 1024 clipped to [0, 2048] and divided by 2048. The paper
    does not say how the heart is found. Here it is the box of all labelled voxels and `margin`, in
    test too. Prediction reads no label map and segments the whole volume, window by window.

    Args:
        root: Folder of the set; in prediction any folder, pattern or list of volumes.
        class_names: Name of every class, the background first; None: those of the set.
        margin: Of the crop, in mm on every side.
        modality: Intensity preset.
        spacing: Voxel size in mm to which the volumes are resampled.
        patch_size: Size (D, H, W) of the training patches.
        val: Validation cases, a number or a share.
        **options: see `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        class_names: list[str] | None = None,
        margin: float = 20.0,
        modality: Modality = "ct",
        spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0),
        patch_size: tuple[int, int, int] = (128, 128, 128),
        val: Amount = 5,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            class_names,
            modality=modality,
            spacing=spacing,
            patch_size=patch_size,
            val=val,
            **options,
        )
        self.margin = margin

    def configure_region(self) -> FindRegion:
        """Crop to the heart."""
        return AroundLabel(self.margin)


def sibling(image: Path, *names: str) -> str | None:
    """The first of some names that exists in the folder of a volume."""
    paths = (image.with_name(name) for name in names)
    return next((str(path) for path in paths if path.is_file()), None)
