"""Cardiac CT angiographies for pre-training, prepared as in the paper."""

from typing import Any

from gvsl_lightning.datamodules.pretrain import PretrainDataModule
from gvsl_lightning.transforms.intensity import Modality


class CardiacCT(PretrainDataModule):
    """Pairs of cardiac CT angiographies (CTA) from any folder, with the paper's preparation.

    GVSL was pre-trained on 302 CTA of a hospital, which are not published; `root` is any folder,
    pattern or list of others. Voxels of 1 mm, HU + 1024 clipped to [0, 2048] and divided by 2048,
    crops of 160 voxels. The scans of MM-WHS or ASOCA serve too, by a pattern that leaves label maps
    out, such as `FOLDER/ct_train/*_image.nii.gz`; leave out the test scans of later
    tasks.

    Args:
        modality: Intensity preset.
        window: Lower and upper limit of the preset in HU; (0, 2048) for volumes stored as
            HU + 1024.
        spacing: Voxel size in mm to which the volumes are resampled.
        patch_size: Size (D, H, W) in voxels of the network's input.
        **options: see `PretrainDataModule`.
    """

    def __init__(
        self,
        root: str | list[str] | None = None,
        modality: Modality = "ct",
        window: tuple[float, float] = (-1024.0, 1024.0),
        spacing: tuple[float, float, float] | None = (1.0, 1.0, 1.0),
        patch_size: tuple[int, int, int] = (160, 160, 160),
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            modality=modality,
            window=window,
            spacing=spacing,
            patch_size=patch_size,
            **options,
        )
