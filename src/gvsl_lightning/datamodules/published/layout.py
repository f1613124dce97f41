"""Base of the published data sets for segmentation: cases are found by the folder's layout."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.datamodules.segmentation_cases import SegmentationDataModule
from gvsl_lightning.errors import InputError


class PublishedSegmentation(SegmentationDataModule):
    """Base of data sets that come in a folder of a known layout.

    In prediction a `root` of the layout stands for its images, with or without label maps, and
    every other one for all volumes in it. Label maps are not looked at.
    """

    source: str
    """Where to download the set and how its folder looks, the end of an error's sentence."""

    @abstractmethod
    def find_layout(self, root: Path) -> list[VolumeFile]:
        """Find the images of the layout, each with its label map if that exists, sorted by name.

        Args:
            root: The folder, which may not exist.

        Returns:
            Nothing where the folder is not of the layout.
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


def sibling(image: Path, *names: str) -> str | None:
    """The first of some names that exists in the folder of a volume."""
    paths = (image.with_name(name) for name in names)
    return next((str(path) for path in paths if path.is_file()), None)
