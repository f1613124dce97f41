"""The ten tasks of the Medical Segmentation Decathlon."""

from pathlib import Path
from typing import Any

from monai.apps.datasets import DecathlonDataset
from monai.apps.utils import download_and_extract
from torch.utils.data import Dataset

from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.datamodules.volumes import VolumeFile, load_json
from gvsl_lightning.errors import InputError
from gvsl_lightning.transforms.intensity import Modality


class Decathlon(PretrainDataModule):
    """Pairs of volumes of one task of the Medical Segmentation Decathlon.

    The intensity preset and the number of channels follow from the task's `dataset.json`. Training
    images only, since the test images have no labels to measure registration with; the last ones
    by name validate. Source: Antonelli et al., The Medical Segmentation Decathlon, Nature
    Communications 2022, http://medicaldecathlon.com.

    Args:
        root: Folder that holds the folder of the task, or into which it is downloaded.
        task: Name of the task and of its folder, such as `Task04_Hippocampus`.
        download: Download the task, checked and unpacked by MONAI, where its folder is missing.
        modality: Intensity preset; None: `ct` for CT, `mri` for everything else.
        val_count: How many of the last cases validate; None: `val_fraction` of them. `split_seed`
            has no effect.
        test_count: How many cases, the last ones by name, are left out altogether: those before
            them validate.
        **pretrain_options: Options of `PretrainDataModule` and `PairDataModule`.

    Raises:
        InputError: The task is not there, or an option is wrong.
    """

    def __init__(
        self,
        root: str | None = None,
        task: str = "Task04_Hippocampus",
        download: bool = False,
        modality: Modality | None = None,
        val_count: int | None = None,
        test_count: int = 0,
        **pretrain_options: Any,
    ) -> None:
        if root is None:
            raise InputError(
                f"root is missing; add --data.init_args.root=FOLDER, where FOLDER holds {task}."
            )
        folder = Path(root).expanduser() / task
        super().__init__(str(folder), val_count=val_count, **pretrain_options)
        self.folder = folder
        self.task = task
        self.download = download
        self.preset = modality
        self.test_count = test_count

    def prepare_data(self) -> None:
        """Download the task if it is wanted and missing."""
        if not self.download or self.folder.exists():
            return
        if self.task not in DecathlonDataset.resource:
            raise InputError(
                f"There is no task {self.task} to download; choose one of "
                f"{', '.join(DecathlonDataset.resource)}."
            )
        download_and_extract(
            DecathlonDataset.resource[self.task],
            self.folder.with_suffix(".tar"),
            self.folder.parent,
            hash_val=DecathlonDataset.md5[self.task],
            hash_type="md5",
        )

    def configure_datasets(self) -> tuple[Dataset[dict[str, Any]], Dataset[dict[str, Any]]]:
        """Take preset and channels from `dataset.json`, then do as the base class."""
        description = self.folder / "dataset.json"
        if not description.is_file():
            raise InputError(
                f"{description} does not exist; correct root and task or set download to true."
            )
        named = load_json(str(description)).get("modality")
        if not isinstance(named, dict):
            raise InputError(f'{description} has no "modality" such as {{"0": "MRI"}}; add it.')
        modalities = named.values()
        self.channels = len(modalities)
        self.modality = self.preset or ("ct" if "CT" in modalities else "mri")
        return super().configure_datasets()

    def find_files(self) -> list[VolumeFile]:
        """Find the training images, without the cases kept for a test."""
        files = super().find_files()
        if not 0 <= self.test_count <= len(files) - 2:
            raise InputError(
                f"test_count is {self.test_count} and {self.folder} has {len(files)} cases; leave "
                "at least two for training."
            )
        return files[: len(files) - self.test_count]

    def configure_split(self, count: int, validation: int) -> set[int]:
        """Validate on the last cases by name."""
        return set(range(count - validation, count))
