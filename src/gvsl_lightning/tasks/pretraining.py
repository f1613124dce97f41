"""Bases of the pre-training methods: views of clean volumes, and losses of the views."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_options
from gvsl_lightning.nn.heads import RestorationHead, RunningStandardisation
from gvsl_lightning.tasks.base import BaseTask, Batch
from gvsl_lightning.tasks.spread import Spread, effective_rank, feature_std
from gvsl_lightning.transforms.spatial import RandomSpatialTransform
from gvsl_lightning.transforms.views import RandomView

Views = dict[str, Tensor]


class PretrainTask(BaseTask):
    """Base of all pre-training.

    A training step is ``training_loss(compute_losses(views_of(batch)))``. A subclass implements
    :meth:`configure_heads`, :meth:`make_views` and :meth:`compute_losses`.

    A batch holds clean volumes (N, in_channels, D, H, W) in [0, 1]: ``fixed`` and ``moving``, or
    ``image``. A method of single volumes takes both volumes of a pair, so that each step has as
    many volumes as one of GVSL.

    Validation logs ``val/feature_std`` and ``val/effective_rank`` of :meth:`monitored`, which fall
    if the features collapse; see :mod:`gvsl_lightning.tasks.spread`.

    Attributes:
        trains_decoder: whether the loss reaches the decoder. If not, an exported backbone holds a
            decoder of random weights: fine-tune with ``pretrained: encoder``.
    """

    trains_decoder: ClassVar[bool] = True

    def configure_models(self) -> None:
        self.backbone = self.configure_backbone()
        if not self.trains_decoder:
            self.backbone.freeze_decoder()
        self.configure_heads()

    def configure_metrics(self) -> None:
        self.feature_std = Spread(feature_std)
        self.effective_rank = Spread(effective_rank)

    @abstractmethod
    def configure_heads(self) -> None:
        """Create the networks behind ``self.backbone``."""

    @abstractmethod
    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """Make inputs and targets from clean volumes (N, in_channels, D, H, W) on the device.

        ``generator``, on the same device, is the only source of random numbers.
        """

    @abstractmethod
    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Losses of the views: ``total``, and each term where there are several."""

    def views_of(self, batch: Batch, batch_idx: int = 0) -> Views:
        """The views of a batch, drawn from its ``seed`` if it has one.

        Without a seed, training draws from the global generator, and evaluation from ``batch_idx``:
        every validation has the same views.
        """
        volumes = volumes_of(batch)
        generator = torch.Generator(volumes.device).manual_seed(self._seed(batch, batch_idx))
        with torch.no_grad():
            return self.make_views(volumes, generator)

    def _seed(self, batch: Batch, batch_idx: int) -> int:
        if "seed" in batch:  # a number, or one for each item of a batch as PyTorch collates it
            return int(torch.as_tensor(batch["seed"]).flatten()[0])
        return int(torch.randint(2**62, ())) if self.training else batch_idx

    def embed(self, volumes: Tensor) -> Tensor:
        """One vector for each volume (N, in_channels, D, H, W): the pooled global features."""
        return pool(self.backbone.encode(volumes))

    def monitored(self, volumes: Tensor) -> Tensor:
        """Vectors (N, C) of volumes, which are equal if the features have collapsed."""
        return self.embed(volumes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.training_loss(self.compute_losses(self.views_of(batch, batch_idx)), batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("test", batch, batch_idx)

    def evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Log the losses and the spread of a batch; ``stage`` is ``val`` or ``test``."""
        losses = self.compute_losses(self.views_of(batch, batch_idx))
        named = self.name_evaluated(stage, losses, batch)
        self.log_dict(named, batch_size=len(volumes_of(batch)), sync_dist=True)
        self.log_spread(stage, batch)

    def log_spread(self, stage: str, batch: Batch) -> None:
        """Log the spread of the vectors of all volumes that are ``image`` or ``fixed``."""
        vectors = self.monitored(batch["image"] if "image" in batch else batch["fixed"])
        for name in ("feature_std", "effective_rank"):
            spread: Spread = getattr(self, name)
            spread.update(vectors)
            self.log(f"{stage}/{name}", spread, batch_size=1)


class RestorationTask(PretrainTask):
    """Base of the methods that restore a volume from a corrupted copy (:meth:`corrupt`).

    Args:
        spatial: options of :class:`gvsl_lightning.transforms.spatial.RandomSpatialTransform`, which
            moves training volumes before their corruption; true: its defaults, false: none.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if an option is unknown or out of range.
    """

    def __init__(self, spatial: bool | dict[str, Any] = True, **base: Any) -> None:
        super().__init__(**base)

    def configure_heads(self) -> None:
        self.restoration_head = RestorationHead(
            self.backbone.local_channels, self.hparams["in_channels"]
        )

    def configure_losses(self) -> None:
        self.spatial = build_transform("spatial", RandomSpatialTransform, self.hparams["spatial"])

    @abstractmethod
    def corrupt(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """Corrupt volumes (N, in_channels, D, H, W).

        Returns:
            ``corrupted``, ``volume`` (the target) and, if only a part is to be restored, ``mask``
            (N, 1, D, H, W) boolean.
        """

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        if self.training and self.spatial is not None:
            (volumes,) = self.spatial(volumes, generator=generator)
        return self.corrupt(volumes, generator)

    def restore(self, corrupted: Tensor) -> Tensor:
        """Undo the corruption of volumes (N, in_channels, D, H, W), same shape back."""
        restored: Tensor = self.restoration_head(self(corrupted).local_features)
        return restored

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Mean squared error of each volume, over its masked voxels where there is a mask."""
        errors = (self.restore(views["corrupted"]) - views["volume"].float()).square().flatten(1)
        if "mask" not in views:
            return {"total": errors.mean()}
        mask = views["mask"].expand_as(views["volume"]).flatten(1)
        means = errors.where(mask, 0).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        return {"total": means.mean()}


class GlobalTask(PretrainTask):
    """Base of the methods that read one vector for each volume, and train the encoder alone.

    The vectors are the pooled global features, standardised by
    :class:`gvsl_lightning.nn.heads.RunningStandardisation`.
    """

    trains_decoder = False

    def configure_models(self) -> None:
        super().configure_models()
        self.standardisation = RunningStandardisation(self.backbone.global_channels)

    def embed_standardised(self, volumes: Tensor) -> Tensor:
        """Standardised embeddings (N, global_channels); in training, the statistics follow."""
        return self.standardise(self.embed(volumes), self.standardisation)

    def standardise(self, vectors: Tensor, standardisation: RunningStandardisation) -> Tensor:
        """Standardise vectors (N, channels); in training, the statistics follow them first."""
        if self.training:
            standardisation.update(self.gather(vectors.detach()))
        standardised: Tensor = standardisation(vectors)
        return standardised


class TwoViewTask(GlobalTask):
    """Base of the methods that compare two random views of each volume.

    A subclass creates ``projection_head`` in :meth:`configure_heads`, or overrides
    :meth:`monitored`.

    Args:
        view: options of :class:`gvsl_lightning.transforms.views.RandomView`; None: its defaults.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if an option is unknown or out of range.
    """

    projection_head: nn.Module

    def __init__(self, view: dict[str, Any] | None = None, **base: Any) -> None:
        super().__init__(**base)

    def configure_losses(self) -> None:
        self.view = build_transform("view", RandomView, self.hparams["view"] or True)

    def monitored(self, volumes: Tensor) -> Tensor:
        """The projections, as in section 4.1 of SimSiam's paper."""
        projected: Tensor = self.projection_head(self.embed_standardised(volumes))
        return projected

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``first`` and ``second``."""
        return {"first": self.view(volumes, generator), "second": self.view(volumes, generator)}


def volumes_of(batch: Batch) -> Tensor:
    """The volumes of a batch, (N, C, D, H, W): ``image``, or ``fixed`` and then ``moving``."""
    if "image" in batch:
        volumes: Tensor = batch["image"]
        return volumes
    return torch.cat([batch["fixed"], batch["moving"]])


def pool(global_features: Tensor) -> Tensor:
    """Mean (N, C) of global features (N, C, d, h, w) over space, float32."""
    return global_features.float().mean(dim=(2, 3, 4))


def build_transform(key: str, transform: type[nn.Module], options: bool | dict[str, Any]) -> Any:
    """Build a transform from the option ``key`` of a task; true: its defaults, false: None.

    Raises:
        InputError: if an option is unknown, of a wrong type or out of range.
    """
    if options is False:
        return None
    given = {} if options is True else options
    check_options(key, transform.__name__, given, transform)
    try:
        return transform(**given)
    except TypeError as error:
        raise InputError.about(key, f"is {options}, which does not fit: {error}.") from error
