"""Options that all data modules share, and those of all that read volumes from files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from monai.transforms.transform import MapTransform
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Dataset

from gvsl_lightning.data.preparation import Preparation
from gvsl_lightning.data.prepared import PreparedVolume
from gvsl_lightning.data.source import VolumeFile
from gvsl_lightning.data.survey import describe_sizes
from gvsl_lightning.datamodules.loading import ResumableDataLoader, SeededSampler
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.runs.privacy import hide_paths
from gvsl_lightning.transforms.intensity import Modality


class VolumeDataModule(pl.LightningDataModule):
    """Base of all data modules.

    Args:
        num_workers: Loader processes.
        anonymise: Write and log pseudonyms in the place of names of volumes and paths of data, see
            :mod:`gvsl_lightning.runs.privacy`.

    Raises:
        InputError: An option is out of range.
    """

    def __init__(self, num_workers: int = 0, anonymise: bool = False) -> None:
        super().__init__()
        check_range("num_workers", num_workers, 0)
        self.save_hyperparameters()
        if anonymise:
            # checkpoints, loggers and cards get the options without paths
            self.save_hyperparameters(hide_paths(self.hparams))
        self.num_workers = num_workers
        self.anonymise = anonymise
        self._loader: ResumableDataLoader | None = None
        self._stored: dict[str, Any] = {}

    def resumable_loader(
        self, dataset: Dataset[Any], sampler: SeededSampler, drop_last: bool = False, **options: Any
    ) -> ResumableDataLoader:
        """Make the training loader; with a trainer it starts where that starts or resumes.

        Args:
            dataset: Items.
            sampler: Their order.
            drop_last: Leave out the last batch of an epoch if it is smaller than the others.
            **options: `batch_size` and other options of PyTorch's loader.
        """
        self._loader = ResumableDataLoader(
            dataset,
            trainer=self.trainer,
            stored=self._stored,
            sampler=sampler,
            drop_last=drop_last and len(sampler) >= options["batch_size"],
            **options,
        )
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Sizes of the training loader, for a checkpoint."""
        return self._loader.sizes() if self._loader and self.trainer else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the sizes before; the training loader starts by them."""
        self._stored = state_dict


def check_size(name: str, size: Sequence[int], low: int = 1) -> None:
    """Check a size (D, H, W) in voxels.

    Raises:
        InputError: It is not three numbers of at least `low`.
    """
    if len(size) != 3 or min(size) < low:
        raise InputError.about(name, f"is {tuple(size)}; give three numbers of at least {low}.")


class FileDataModule(VolumeDataModule):
    """Base of the data modules that read volumes from files: how the volumes are prepared.

    Args:
        modality: Intensity preset: `ct`, `mri` or `none`; see
            `gvsl_lightning.transforms.intensity.intensity_transforms`.
        window: Lower and upper limit of the preset `ct` in HU.
        transforms: MONAI dictionary transforms on the key `image`, in place of the preset, each as
            `{"class_path": "monai.transforms.Name", "init_args": {...}}`. They must be
            deterministic and map intensities to [0, 1]; they must not move or resize volumes.
        spacing: Voxel size in mm along right, front and top to which volumes are resampled.
        crop_foreground: Crop to the box of all voxels above this value in [0, 1], after intensity
            scaling. Beyond the box, predictions are background.
        channels: Channels of every volume.
        **options: Options of `VolumeDataModule`.

    Attributes:
        preparation: These options as one object.

    Raises:
        InputError: An option is out of range.
    """

    def __init__(
        self,
        modality: Modality = "none",
        window: tuple[float, float] = (-1024.0, 1024.0),
        transforms: list[dict[str, Any]] | None = None,
        spacing: tuple[float, float, float] | None = None,
        crop_foreground: float | None = None,
        channels: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.preparation = Preparation(
            modality, window, transforms, spacing, crop_foreground, channels
        )

    def configure_preparation(self) -> Preparation:
        """Choose how volumes are prepared, once the data are there; a hook to override."""
        return self.preparation

    def configure_intensity(self) -> list[MapTransform]:
        """Make the transforms that bring `image` to [0, 1]; a hook to override."""
        return self.configure_preparation().intensity_transforms()

    def make_preparation(self) -> Preparation:
        """The preparation with the transforms of `configure_intensity`."""
        return replace(self.configure_preparation(), intensity=tuple(self.configure_intensity()))

    def announce(
        self, files: Sequence[VolumeFile], patch_size: Sequence[int], subjects: int
    ) -> None:
        """Print one line on the volumes that a run trains on, see :func:`describe_sizes`."""
        trains = self.trainer is not None and self.trainer.training
        if not trains or not files or isinstance(files[0], PreparedVolume):
            return
        line = describe_sizes(files, self.configure_preparation().spacing, patch_size, subjects)
        rank_zero_only(print)(line)

    def preparation_settings(self) -> dict[str, Any]:
        """Everything that decides how volumes are prepared, by which prepared ones are known.

        A hook: extend it where `configure_intensity` depends on options of your own.

        Returns:
            JSON values. A setting that has no effect beside others is None.
        """
        hook: Any = type(self).configure_intensity
        own = hook is not FileDataModule.configure_intensity
        name = f"{hook.__module__}.{hook.__qualname__}" if own else None
        return {**self.configure_preparation().settings(), "configure_intensity": name}
