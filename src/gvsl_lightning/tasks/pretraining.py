"""What the methods of pre-training share: collapse monitors, and learning from single volumes."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvsl_lightning.errors import InputError, check_options
from gvsl_lightning.nn.heads import RestorationHead, RunningStandardisation
from gvsl_lightning.tasks.base import BaseTask, Batch
from gvsl_lightning.transforms.views import RandomView

Views = dict[str, Tensor]


class PretrainTask(BaseTask):
    """Base of all pre-training: watches in validation whether the features collapse.

    Logs, over the vectors (:meth:`watched`) of all validation volumes, ``val/feature_std`` and
    ``val/effective_rank``; see :func:`feature_std` and :func:`effective_rank`.
    """

    def embed(self, volumes: Tensor) -> Tensor:
        """One vector for each volume (N, in_channels, D, H, W): the pooled global features."""
        return pool(self.backbone.encode(volumes))

    def watched(self, volumes: Tensor) -> Tensor:
        """Vectors (N, C) that are equal where the features have collapsed: the embeddings."""
        return self.embed(volumes)

    def watch(self, volumes: Tensor) -> None:
        """Remember the vectors of validation volumes."""
        self._embeddings.append(self.watched(volumes))

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self._embeddings: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        """Log how much the embeddings differ."""
        self._log_spread("val")

    def on_test_epoch_start(self) -> None:
        """See :meth:`on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """See :meth:`on_validation_epoch_end`."""
        self._log_spread("test")

    def _log_spread(self, stage: str) -> None:
        if not self._embeddings:
            return
        embeddings = self.gather(torch.cat(self._embeddings))
        self.log_dict(
            {
                f"{stage}/feature_std": feature_std(embeddings),
                f"{stage}/effective_rank": effective_rank(embeddings),
            },
            sync_dist=True,
        )


class VolumeTask(PretrainTask):
    """Base of the methods that learn from single volumes.

    A batch is that of a :class:`gvsl_lightning.datamodules.pairs.PairDataModule`, both of whose
    volumes are taken, so that a method sees as many volumes in a step as GVSL does; or it holds
    them as ``image`` (N, in_channels, D, H, W) in [0, 1]. A subclass says what it shows of them
    (:meth:`make_views`) and what is lost (:meth:`compute_losses`). All that is random in a step
    follows from the batch's ``seed``, a whole number, where it has one.

    Attributes:
        trains_decoder: whether the loss reaches the decoder. Otherwise it has no gradient and
            stays at its random initial weights, which an exported backbone then holds: fine-tune
            with ``pretrained: encoder``.
    """

    trains_decoder: ClassVar[bool] = True

    def configure_models(self) -> None:
        """Create the backbone, and the heads by :meth:`configure_heads`."""
        self.backbone = self.configure_backbone()
        if not self.trains_decoder:
            self.backbone.freeze_decoder()
        self.configure_heads()

    @abstractmethod
    def configure_heads(self) -> None:
        """Create what is on top of the backbone."""

    @abstractmethod
    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """Make what the networks see of volumes (N, in_channels, D, H, W), and the targets.

        Args:
            volumes: of a batch, on the device.
            generator: the only source of random numbers, on the device.
        """

    @abstractmethod
    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Losses of the views: ``total``, and each term where there are several."""

    def views_of(self, batch: Batch, batch_idx: int = 0) -> Views:
        """The views of a batch; a validation batch has the same ones each time."""
        volumes = volumes_of(batch)
        if "seed" in batch:
            seed = batch["seed"]
        else:  # training draws from the global generator, validation is always alike
            seed = int(torch.randint(2**62, ())) if self.training else batch_idx
        generator = torch.Generator(volumes.device).manual_seed(seed ^ _VIEWS)
        with torch.no_grad():
            return self.make_views(volumes, generator)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; see the class for the loss."""
        losses = self.compute_losses(self.views_of(batch, batch_idx))
        return self.training_loss(losses, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the training objective on the validation volumes, and watch their embeddings."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """See :meth:`validation_step`."""
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        volumes = volumes_of(batch)
        losses = self.compute_losses(self.views_of(batch, batch_idx))
        named = self.name_evaluated(stage, losses, batch)
        self.log_dict(named, batch_size=len(volumes), sync_dist=True)
        self.watch(volumes)


class GlobalTask(VolumeTask):
    """Base of the methods that learn from one vector for each volume, and train the encoder alone.

    They read the pooled global features, standardised, see
    :class:`gvsl_lightning.nn.heads.RunningStandardisation`.
    """

    trains_decoder = False

    def configure_models(self) -> None:
        """Create the backbone, the standardisation and the heads."""
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


class RestorationTask(VolumeTask):
    """Base of the methods that restore a volume from a corrupted copy of it.

    The local features are read by the restoration head of GVSL. A subclass makes the views
    ``corrupted``, ``volume`` and, where only a part is to be restored, ``mask``
    (N, 1, D, H, W) boolean.
    """

    def configure_heads(self) -> None:
        """Create the restoration head."""
        self.restoration_head = RestorationHead(
            self.backbone.local_channels, self.hparams["in_channels"]
        )

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


class TwoViewTask(GlobalTask):
    """Base of the methods that compare two random views of each volume.

    A subclass creates ``projection_head`` in :meth:`configure_heads`, or says what else is watched.

    Args:
        view: options of :class:`gvsl_lightning.transforms.views.RandomView`; None: its defaults.
        **base: see :class:`gvsl_lightning.tasks.base.BaseTask`.

    Raises:
        InputError: if they are unknown or out of range.
    """

    projection_head: nn.Module

    def __init__(self, view: dict[str, Any] | None = None, **base: Any) -> None:
        super().__init__(**base)

    def configure_losses(self) -> None:
        """Create the views."""
        options = self.hparams["view"] or {}
        check_options("view", RandomView.__name__, options, RandomView)
        try:
            self.view = RandomView(**options)
        except TypeError as error:
            raise InputError(f"The options {options} of view do not fit: {error}.") from error

    def watched(self, volumes: Tensor) -> Tensor:
        """Projections: what is compared, as in section 4.1 of SimSiam's paper."""
        projected: Tensor = self.projection_head(self.embed_standardised(volumes))
        return projected

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``first`` and ``second``."""
        return {"first": self.view(volumes, generator), "second": self.view(volumes, generator)}


_ROUNDING = 1e-5
"""Of float32 vectors, with a margin."""

_VIEWS = 0x5EED
"""Parts the random numbers of the views from those that the data module drew from the seed."""


def volumes_of(batch: Batch) -> Tensor:
    """The volumes of a batch, (N, C, D, H, W): ``image``, or ``fixed`` and then ``moving``."""
    if "image" in batch:
        volumes: Tensor = batch["image"]
        return volumes
    return torch.cat([batch["fixed"], batch["moving"]])


def pool(global_features: Tensor) -> Tensor:
    """Mean (N, C) of global features (N, C, d, h, w) over space, float32."""
    return global_features.float().mean(dim=(2, 3, 4))


def feature_std(embeddings: Tensor) -> Tensor:
    """How far vectors (N, C) are spread over the sphere, a scalar.

    The standard deviation of the entries of the normalised vectors, mean over the C entries, times
    the root of C: 0 where all are equal (collapse), about 1 where they point anywhere. Chen and He,
    SimSiam, CVPR 2021, section 4.1, https://arxiv.org/abs/2011.10566.
    """
    directions = F.normalize(embeddings.float(), dim=1)
    spread: Tensor = directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5
    return spread


def effective_rank(embeddings: Tensor) -> Tensor:
    """In how many directions vectors (N, C) differ, a scalar from 1 to min(N - 1, C).

    The exponential of the entropy of the singular values of the centred vectors, divided by their
    sum (Roy and Vetterli, EUSIPCO 2007). What is less than rounding leaves of the vectors does not
    count, so that it is 1 too where all are equal; NaN if a vector is not finite.
    """
    # in double precision, which not every device has
    vectors = embeddings.detach().cpu().double()
    if not vectors.isfinite().all():
        return embeddings.new_tensor(torch.nan)
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    values = values.where(values > _ROUNDING * torch.linalg.matrix_norm(vectors), 0)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum().exp().to(embeddings)
    return rank
