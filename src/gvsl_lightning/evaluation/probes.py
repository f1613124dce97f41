"""Local features of single volumes: segmentation by similarity, linear probe, clusters, colours."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.networks.utils import eval_mode
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.prediction import sliding_window
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn.backbones import Backbone
from gvsl_lightning.nn.losses import voxel_cross_entropy


def local_features(
    backbone: Backbone, volume: Tensor, window: Sequence[int] | None = None
) -> Tensor:
    """Compute the local features of one volume, without gradient and in eval mode.

    Args:
        backbone: on any device; its mode is restored.
        volume: (in_channels, D, H, W) in [0, 1], on any device.
        window: size in voxels of the windows of
            :func:`~gvsl_lightning.evaluation.prediction.sliding_window`, for volumes that do not
            fit into memory. None: the whole volume at once.

    Returns:
        (local_channels, D, H, W), float32, on the backbone's device or, with ``window``, the CPU.
    """
    parameter = next(backbone.parameters())
    batch = volume[None].to(parameter.device, parameter.dtype)

    def compute(part: Tensor) -> Tensor:
        features: Tensor = backbone(part).local_features
        return features.float()

    with eval_mode(backbone):
        if window is None:
            return compute(batch)[0]
        return sliding_window(batch, compute, window)[0]


def label_values(labels: Iterable[Tensor]) -> Tensor:
    """Find the values of label maps: ascending, with 0, the background; int64 on the CPU.

    Raises:
        InputError: if a value is negative, or all are 0.
    """
    found = [torch.unique(label).long().cpu() for label in labels]
    values: Tensor = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), *found]))
    if values[0] < 0:
        raise InputError(f"A label map has the value {values[0]}; give 0 and greater ones.")
    if len(values) < 2:
        raise InputError("The label maps are empty; give volumes with labelled structures.")
    return values


def class_indices(label: Tensor, values: Tensor) -> Tensor:
    """Replace label values by their indices in ``values``; see :func:`label_values`."""
    return torch.searchsorted(values.to(label.device), label.long().contiguous())


def name_classes(values: Tensor, class_names: Sequence[str] | None = None) -> dict[int, str]:
    """Name the indices of label values.

    Args:
        values: see :func:`label_values`.
        class_names: names of the structures, without the background; None: their values.

    Returns:
        Index -> name; 0 is the background.

    Raises:
        InputError: if there are more or fewer names than structures.
    """
    structures = [str(value) for value in values[1:].tolist()]
    names = list(class_names or structures)
    if len(names) != len(structures):
        raise InputError(
            f"There are {len(names)} class_names for {len(structures)} structures (label values "
            f"{', '.join(structures)}); give one name for each."
        )
    return dict(enumerate(["background", *names]))


def standardise(features: Tensor) -> Tensor:
    """Bring every channel of (C, D, H, W) to mean 0 and standard deviation 1 over the volume.

    Otherwise the mean feature of all voxels dominates every cosine similarity. A constant channel
    becomes 0 up to rounding.
    """
    deviation, mean = torch.std_mean(features, dim=(1, 2, 3), keepdim=True, correction=0)
    return (features - mean) / deviation.clamp_min(1e-5)


def sample_features(
    features: Tensor, label: Tensor, per_class: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw equally many voxels of every structure and of the background.

    Args:
        features: (C, D, H, W).
        label: D * H * W integers of any shape, such as (1, D, H, W).
        per_class: voxels of each label value, drawn without replacement; all if there are fewer.
        seed: of the draw.

    Returns:
        Vectors (n, C) and their label values (n,), ascending, on the features' device.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = label.flatten().cpu()
    chosen = []
    for value in torch.unique(flat):
        places = torch.nonzero(flat == value).squeeze(1)
        chosen.append(places[torch.randperm(len(places), generator=generator)[:per_class]])
    index = torch.cat(chosen)
    vectors = features.flatten(1)[:, index.to(features.device)].T
    return vectors.contiguous(), flat[index].to(features.device)


def class_prototypes(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the normalised feature vectors of every structure and of the background.

    Takes features and a label map as :func:`sample_features`. Returns prototypes (K, C) and their
    label values (K,), ascending.
    """
    vectors = F.normalize(features.flatten(1), dim=0)
    values, classes = torch.unique(label.flatten().to(features.device), return_inverse=True)
    sums = vectors.new_zeros(len(values), len(vectors)).index_add_(0, classes, vectors.T)
    return sums / torch.bincount(classes).unsqueeze(1), values


def nearest_prototype(features: Tensor, prototypes: Tensor, values: Tensor) -> Tensor:
    """Give every voxel the label of the prototype with the largest cosine similarity.

    Takes features (C, D, H, W) and the result of :func:`class_prototypes`. Returns labels
    (D, H, W).
    """
    # features need no normalisation: the length of a feature scales all its similarities alike
    nearest = (F.normalize(prototypes, dim=1) @ features.flatten(1)).argmax(dim=0)
    return values[nearest].reshape(features.shape[1:])


def nearest_neighbours(
    features: Tensor,
    references: Tensor,
    labels: Tensor,
    neighbours: int = 15,
    weights: Tensor | None = None,
    chunk: int = 2**13,
) -> Tensor:
    """Give every voxel the most frequent label of its nearest references by cosine similarity.

    Args:
        features: (C, D, H, W).
        references: (n, C), see :func:`sample_features`.
        labels: (n,) their label values.
        neighbours: number of references that vote; all if there are fewer.
        weights: (n,) of the votes, see :func:`sampling_weights`. None: equal weights.
        chunk: voxels compared at once with all references; limits the memory.

    Returns:
        Labels (D, H, W); of equal votes, the smallest label wins.
    """
    references = F.normalize(references, dim=1)
    values: Tensor
    values, classes = torch.unique(labels, return_inverse=True)
    votes = F.one_hot(classes, len(values)).to(features.dtype)
    if weights is not None:
        votes = votes * weights.unsqueeze(1)
    prevailing: list[Tensor] = []
    for part in torch.split(features.flatten(1), chunk, dim=1):
        similarities = part.T @ references.T
        nearest = similarities.topk(min(neighbours, len(references)), dim=1, sorted=False).indices
        prevailing.append(votes[nearest].sum(dim=1).argmax(dim=1))
    return values[torch.cat(prevailing)].reshape(features.shape[1:])


def sampling_weights(labels: Tensor, label: Tensor) -> Tensor:
    """Number of voxels of its structure that each drawn voxel represents, (n,) float32.

    Takes the label values (n,) from :func:`sample_features` and the label map that it drew from.
    """
    values, classes, drawn = torch.unique(labels, return_inverse=True, return_counts=True)
    flat = label.flatten().to(labels.device)
    present = torch.stack([(flat == value).sum() for value in values])
    weights: Tensor = (present / drawn)[classes]
    return weights


class OneShotSegmenter:
    """Segments volumes by the similarity of their features to those of one labelled volume.

    Args:
        features: (C, D, H, W) of the labelled volume.
        label: as in :func:`sample_features`.
        samples: voxels of each structure that are drawn as references.
        neighbours: number of nearest references that vote.
        seed: of the draw.
    """

    def __init__(
        self,
        features: Tensor,
        label: Tensor,
        samples: int = 500,
        neighbours: int = 15,
        seed: int = 0,
    ) -> None:
        self.neighbours = neighbours
        self._prototypes = class_prototypes(features, label)
        self._references, self._labels = sample_features(features, label, samples, seed)
        self._weights = sampling_weights(self._labels, label)

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """Segment a volume by its features (C, D, H, W).

        Returns:
            Labels (D, H, W) by :func:`nearest_prototype` (key ``prototype``) and by
            :func:`nearest_neighbours` with :func:`sampling_weights` (``neighbours``).
        """
        return {
            "prototype": nearest_prototype(features, *self._prototypes),
            "neighbours": nearest_neighbours(
                features, self._references, self._labels, self.neighbours, self._weights
            ),
        }

    def dice(self, features: Tensor, label: Tensor, classes: int) -> dict[str, Tensor]:
        """Segment a volume and score the result.

        Takes its features and label map, (1, D, H, W) integers from 0 to ``classes - 1``. Returns
        the Dice of each structure, (classes - 1,), by each way.
        """
        return {
            way: dice_scores(prediction[None], label, range(1, classes))[0]
            for way, prediction in self(features).items()
        }


def silhouette(vectors: Tensor, labels: Tensor) -> float:
    """Mean silhouette of labelled vectors (n, C) by cosine distance; all pairs are compared.

    Returns:
        In [-1, 1]: 1 if every structure is a narrow cluster, 0 if the structures overlap; NaN for
        one structure.
    """
    if not 2 <= len(torch.unique(labels)) < len(labels):
        return math.nan
    return float(silhouette_score(vectors.cpu().numpy(), labels.cpu().numpy(), metric="cosine"))


def embed(vectors: Tensor, seed: int = 0) -> npt.NDArray[np.float32]:
    """Map feature vectors to a plane by t-SNE of cosine distances, as GVSL's figure 7 (CVPR 2023).

    Takes at least four vectors (n, C), returns (n, 2).
    """
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    points: npt.NDArray[np.float32] = tsne.fit_transform(vectors.cpu().numpy())
    return points


class FeatureColours:
    """Colours features: red, green and blue are the first three principal components.

    Takes at least three vectors (n, C), of one or several volumes. The 1st and 99th percentile of
    each component become 0 and 1.
    """

    def __init__(self, vectors: Tensor) -> None:
        values = vectors.cpu().numpy()
        self._pca = PCA(min(3, *values.shape), svd_solver="full").fit(values)
        self._low, self._high = np.percentile(self._pca.transform(values), (1, 99), axis=0)

    def __call__(self, features: Tensor) -> Tensor:
        """Colour features (C, D, H, W).

        Returns:
            (3, D, H, W) in [0, 1], float32, on the CPU; missing components are 0.5.
        """
        components = self._pca.transform(features.flatten(1).T.cpu().numpy())
        extent = np.maximum(self._high - self._low, 1e-12)
        scaled = ((components - self._low) / extent).clip(0, 1)
        colours = torch.full((3, scaled.shape[0]), 0.5)
        colours[: scaled.shape[1]] = torch.from_numpy(scaled.T).float()
        return colours.reshape(3, *features.shape[1:])


def fit_linear_probe(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    steps: int = 200,
    learning_rate: float = 5e-2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.Conv3d:
    """Train one 3x3x3 convolution on frozen features, the paper's linear evaluation.

    The loss is Dice plus cross-entropy, the optimiser is Adam. Each step takes one volume; all
    volumes come once, in random order, before one comes again. Works in inference mode too, and
    draws nothing from global generators.

    Args:
        features: (C, D, H, W) of each volume, on any device; copied to ``device`` one by one.
        labels: (1, D, H, W) integers from 0 to ``classes - 1``.
        classes: number of classes with the background.
        steps: number of steps.
        learning_rate: of Adam.
        seed: of the initial weights and the order.
        device: of the training.

    Returns:
        The convolution, from (N, C, D, H, W) to logits (N, classes, D, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    channels = features[0].shape[0]
    bound = 1 / math.sqrt(27 * channels)  # as PyTorch's own initial weights
    with torch.inference_mode(False), torch.enable_grad():
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own
            probe = nn.Conv3d(channels, classes, 3, padding=1)
        for parameter in probe.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        probe = probe.to(device)
        dice_loss = DiceLoss(to_onehot_y=True, softmax=True)
        optimizer = torch.optim.Adam(probe.parameters(), lr=learning_rate)
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(features), generator=generator).tolist()
            index = order.pop()
            # a copy: tensors made in inference mode cannot take part in a gradient
            volume = features[index][None].to(device, copy=True)
            logits, label = probe(volume), labels[index][None].to(device, copy=True)
            loss = dice_loss(logits, label) + voxel_cross_entropy(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe.requires_grad_(False)
