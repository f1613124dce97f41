"""DeepCluster, Caron et al., ECCV 2018, https://arxiv.org/abs/1807.05520."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError, check_range
from gvsl_lightning.runs.batches import names_of
from gvsl_lightning.tasks.base import Batch
from gvsl_lightning.tasks.pretraining import TwoViewTask, Views


class DeepCluster(TwoViewTask):
    """Classify volumes by clusters of their own features, and cluster again from time to time.

    Every ``reassign_steps`` steps, :func:`assign_clusters` clusters the pooled global features of
    all training volumes (their centres, without augmentation); the clusters are the new classes,
    and the classifier starts anew. The loss weighs each volume by the inverse size of its cluster,
    which the paper (section 3.2) calls equivalent to sampling clusters uniformly. In 3D here: views
    by :class:`gvsl_lightning.transforms.views.RandomView`, and no Sobel filter, as there is no
    colour. The encoder alone is trained.

    Args:
        clusters: their number, 2 or more, at most as many as there are training volumes.
        components: of the whitening, at most; see :func:`assign_clusters`.
        reassign_steps: from one clustering to the next.
        **base: see :class:`gvsl_lightning.tasks.pretraining.TwoViewTask`.

    Raises:
        InputError: if an option is out of range, or the data are no
            :class:`gvsl_lightning.datamodules.pairs.PairDataModule`.
    """

    monitor = None  # its loss tells nothing about the features

    cluster_weights: Tensor

    def __init__(
        self,
        clusters: int = 16,
        components: int = 64,
        reassign_steps: int = 100,
        **base: Any,
    ) -> None:
        check_range("clusters", clusters, 2)
        check_range("components", components, 1)
        check_range("reassign_steps", reassign_steps, 1)
        super().__init__(**base)
        self.assignments: dict[str, int] = {}
        self._next_assignment = 0

    def configure_heads(self) -> None:
        self.classifier = nn.Linear(self.backbone.global_channels, self.hparams["clusters"])
        self.register_buffer("cluster_weights", torch.ones(self.hparams["clusters"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clusters"] = {"assignments": self.assignments, "next": self._next_assignment}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.assignments = checkpoint["clusters"]["assignments"]
        self._next_assignment = checkpoint["clusters"]["next"]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step < self._next_assignment:
            return
        self._next_assignment = self.global_step + self.hparams["reassign_steps"]
        names, features = self._features()
        clusters: list[int] = []
        if self.trainer.is_global_zero:
            clusters = assign_clusters(
                features,
                self.hparams["clusters"],
                self.hparams["components"],
                seed=self.global_step,
            )
        clusters = self.trainer.strategy.broadcast(clusters)
        self.assignments = dict(zip(names, clusters, strict=True))
        sizes = torch.bincount(torch.tensor(clusters), minlength=self.hparams["clusters"])
        used = int(sizes.count_nonzero())
        # the mean over the volumes is 1; an empty cluster has no volume to weigh
        self.cluster_weights.copy_(len(clusters) / used / sizes.clamp_min(1))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.global_step)
            fresh = nn.Linear(self.classifier.in_features, self.classifier.out_features)
        self.classifier.load_state_dict(fresh.state_dict())
        for parameter in self.classifier.parameters():
            # the moments belong to the old clusters
            self.trainer.optimizers[0].state.pop(parameter, None)
        self.log("train/clusters", float(used), batch_size=1, sync_dist=False)

    def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
        """``view``; :meth:`views_of` adds the ``cluster``."""
        return {"view": self.view(volumes, generator)}

    def views_of(self, batch: Batch, batch_idx: int = 0) -> Views:
        """``view``, and the ``cluster`` of each volume."""
        views = super().views_of(batch, batch_idx)
        clusters = [self.assignments[name] for name in names_of(batch)]
        cluster = torch.tensor(clusters).to(views["view"].device, non_blocking=True)
        return {**views, "cluster": cluster}

    def monitored(self, volumes: Tensor) -> Tensor:
        """The embeddings, which are clustered: there is no projection."""
        return self.embed(volumes)

    def compute_losses(self, views: Views) -> dict[str, Tensor]:
        """Cross-entropy weighted by the inverse size of the clusters."""
        logits = self.classifier(self.embed_standardised(views["view"])).float()
        losses = F.cross_entropy(logits, views["cluster"], reduction="none")
        return {"total": (losses * self.cluster_weights[views["cluster"]]).mean()}

    def evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        """Log no loss: validation volumes are in no cluster."""
        self.log_spread(stage, batch)

    @torch.no_grad()
    def _features(self) -> tuple[list[str], np.ndarray]:
        """Names and embeddings of all training volumes, each process computing its share."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, PairDataModule):
            raise InputError(
                f"DeepCluster needs all training volumes and {type(datamodule).__name__} does not "
                "give them; use a data module of pre-training."
            )
        volumes = datamodule.training_volumes()
        count, world = len(volumes), self.trainer.world_size  # type: ignore[arg-type]
        if count < self.hparams["clusters"]:
            raise InputError.about(
                "clusters",
                f"is {self.hparams['clusters']} and there are {count} training volumes; choose "
                "fewer clusters.",
            )
        # all processes compute equally many volumes; repeated ones are dropped below
        share = [
            index % count for index in range(self.global_rank, -(-count // world) * world, world)
        ]
        loader = DataLoader(
            Subset(volumes, share),
            batch_size=datamodule.batch_size,
            num_workers=datamodule.num_workers,
        )
        training = self.training
        self.eval()
        computed = [(batch["name"], self.embed(batch["image"].to(self.device))) for batch in loader]
        self.train(training)
        gathered: Tensor = self.all_gather(torch.cat([vectors for _, vectors in computed]))  # type: ignore[assignment]
        in_order = gathered.reshape(world, len(share), -1).transpose(0, 1).flatten(0, 1)[:count]
        names = [name for batch, _ in computed for name in batch]
        everyone = [list(names) for _ in range(world)]
        if world > 1:
            torch.distributed.all_gather_object(everyone, names)
        ordered = [name for row in zip(*everyone, strict=True) for name in row][:count]
        return ordered, in_order.cpu().numpy()


def assign_clusters(features: np.ndarray, clusters: int, components: int, seed: int) -> list[int]:
    """Cluster vectors as the paper does: whitened by principal components, normalised, k-means.

    Args:
        features: (N, C).
        clusters: their number.
        components: of the whitening, at most C, and N / 4: whitening along as many directions as
            there are vectors would place all vectors equally far apart.
        seed: of the initial centres.
    """
    components = min(components, features.shape[1], max(1, len(features) // 4))
    whitened = PCA(components, whiten=True, random_state=seed).fit_transform(features)
    norms = np.linalg.norm(whitened, axis=1, keepdims=True)
    # threads add up in the order in which they finish, and rounding can move a vector
    with threadpool_limits(1, user_api="openmp"):
        means = KMeans(clusters, n_init=4, random_state=seed)
        means.fit(whitened / np.maximum(norms, 1e-12))
    return [int(label) for label in means.labels_]
