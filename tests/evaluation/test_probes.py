"""Measures of local features against references, and the linear probe."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.probes import (
    FeatureColours,
    OneShotSegmenter,
    class_indices,
    class_prototypes,
    embed,
    fit_linear_probe,
    label_values,
    local_features,
    name_classes,
    nearest_neighbours,
    nearest_prototype,
    sample_features,
    sampling_weights,
    silhouette,
    standardise,
)
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn.backbones import build_backbone

SHAPE = (6, 7, 5)


def random_features(channels: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(channels, *SHAPE, generator=torch.Generator().manual_seed(seed))


def random_label(classes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (1, *SHAPE), generator=generator)


def anatomy(seed: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features that are a direction of each structure, of random lengths, with noise."""
    label = torch.zeros(1, *SHAPE, dtype=torch.int64)
    label[:, 1:3, 2:5, 1:4] = 4
    label[:, 3 + seed % 2 :, 4:, 2:] = 9
    directions = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.1], [0.3, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(seed)
    features = directions[torch.searchsorted(torch.tensor([0, 4, 9]), label[0])].movedim(-1, 0)
    features = features * (0.1 + 10 * torch.rand(SHAPE, generator=generator))
    return features + noise * torch.randn(features.shape, generator=generator), label


class TestLocalFeatures:
    def test_are_the_backbones_own_in_eval_mode_and_the_mode_is_kept(self):
        backbone = build_backbone("basic_unet", features=(8, 8, 8, 8, 8, 8), dropout=0.5).train()
        volume = torch.rand(1, 17, 16, 20)
        found = local_features(backbone, volume)
        assert backbone.training
        assert not found.requires_grad
        expected = backbone.eval()(volume[None]).local_features[0]
        torch.testing.assert_close(found, expected)

    def test_half_precision_weights(self):
        backbone = build_backbone("unet", channels=(8, 8)).bfloat16()
        assert local_features(backbone, torch.rand(1, *SHAPE)).dtype == torch.float32

    def test_windows_cover_the_volume(self):
        """A network that sees one voxel only has the same features in any window."""
        backbone = build_backbone("unet", channels=(8, 8))
        windows = []
        backbone.encode_padded = lambda volume: (windows.append(volume), [])
        backbone.decode = lambda deepest, skips: [windows[-1].repeat(1, 8, 1, 1, 1)]
        volume = torch.rand(1, 16, 20, 12)
        found = local_features(backbone, volume, (8, 8, 8))
        assert {tuple(window.shape[2:]) for window in windows} == {(8, 8, 8)}
        torch.testing.assert_close(found, volume.expand(8, -1, -1, -1))


def test_standardise():
    features = random_features() * 7 + torch.arange(4).view(4, 1, 1, 1)
    features[2] = 0.3
    found = standardise(features)
    varying = found[[0, 1, 3]]
    torch.testing.assert_close(varying.mean((1, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(varying.std((1, 2, 3), correction=0), torch.ones(3))
    assert float(found[2].abs().max()) < 0.01


def test_samples_are_balanced_without_replacement_and_true_to_the_label():
    label = random_label()
    label[label == 2] = 1
    label[0, 0, 0, :3] = 2
    features = torch.arange(label.numel()).reshape(1, *SHAPE).float()
    state = torch.get_rng_state()
    vectors, labels = sample_features(features, label, per_class=20)
    assert torch.bincount(labels).tolist() == [20, 20, 3]
    places = vectors[:, 0].long()
    assert len(places.unique()) == 43
    assert torch.equal(label.flatten()[places], labels)
    assert torch.equal(vectors, sample_features(features, label, 20)[0])
    assert not torch.equal(vectors, sample_features(features, label, 20, seed=1)[0])
    assert torch.equal(torch.get_rng_state(), state)


class TestPrototypes:
    def test_equal_a_slow_reference(self):
        features, label = random_features(), random_label() * 3
        prototypes, values = class_prototypes(features, label)
        assert values.tolist() == [0, 3, 6]
        other = random_features(seed=1)
        for row, value in enumerate((0, 3, 6)):
            members = [
                features[:, d, h, w] / features[:, d, h, w].norm()
                for d, h, w in torch.nonzero(label[0] == value).tolist()
            ]
            torch.testing.assert_close(prototypes[row], torch.stack(members).mean(dim=0))
        expected = torch.tensor(
            [
                values[F.cosine_similarity(vector[None], prototypes, dim=1).argmax()]
                for vector in other.flatten(1).T
            ]
        )
        found = nearest_prototype(other, prototypes, values)
        assert torch.equal(found, expected.reshape(SHAPE))

    def test_both_ways_segment_another_volume(self):
        segment = OneShotSegmenter(*anatomy(0), samples=30, neighbours=5)
        other, truth = anatomy(1)
        found = segment(other)
        assert found.keys() == {"prototype", "neighbours"}
        assert all(torch.equal(labels, truth[0]) for labels in found.values())


class TestNearestNeighbours:
    def test_equals_scikit_learn(self):
        references, labels = sample_features(random_features(), random_label() * 2, 40)
        other = random_features(seed=1)
        oracle = KNeighborsClassifier(7, algorithm="brute", metric="cosine")
        oracle.fit(references.numpy(), labels.numpy())
        expected = oracle.predict(other.flatten(1).T.numpy()).reshape(SHAPE)
        for chunk in (9, 2**13):
            found = nearest_neighbours(other, references, labels, 7, chunk=chunk)
            assert np.array_equal(found.numpy(), expected)

    def test_weights_of_votes(self):
        references = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.98, 0.2], [-1.0, 0.0]])
        labels = torch.tensor([5, 5, 1, 0])
        voxel = torch.tensor([1.0, 0.05]).reshape(2, 1, 1, 1)
        weights = torch.tensor([1.0, 1.0, 2.5, 100.0])
        assert nearest_neighbours(voxel, references, labels, 3).item() == 5
        assert nearest_neighbours(voxel, references, labels, 3, weights).item() == 1
        assert nearest_neighbours(voxel, references, labels, 99, weights).item() == 0

    def test_sampling_weights_restore_the_sizes_of_structures(self):
        features, label = anatomy(0)
        _, labels = sample_features(features, label, 11)
        weights = sampling_weights(labels, label)
        for value in (0, 4, 9):
            total = float(weights[labels == value].sum())
            assert total == pytest.approx(int((label == value).sum()))


def test_silhouette_is_the_mean_over_voxels_by_cosine_distance():
    vectors, labels = sample_features(anatomy(0, noise=0.5)[0], anatomy(0)[1], 15)
    expected = silhouette_samples(F.normalize(vectors).numpy(), labels.numpy(), metric="cosine")
    assert silhouette(vectors, labels) == pytest.approx(float(expected.mean()), abs=1e-5)
    assert silhouette(vectors * 1000, labels) == pytest.approx(silhouette(vectors, labels))
    assert math.isnan(silhouette(vectors, torch.ones(len(vectors))))
    assert math.isnan(silhouette(vectors[:3], torch.arange(3)))


def test_embedding_keeps_clusters_together():
    vectors, labels = sample_features(anatomy(0, noise=0.02)[0], anatomy(0)[1], 12)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    points = embed(vectors)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert points.shape == (36, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert np.array_equal(labels.numpy()[distances.argmin(axis=1)], labels.numpy())
    assert np.array_equal(points, embed(vectors))
    assert embed(vectors[:4]).shape == (4, 2)


class TestFeatureColours:
    def test_are_principal_components(self):
        features = random_features(5) * torch.tensor([9.0, 5, 3, 0.1, 0.1]).view(5, 1, 1, 1)
        vectors = features.flatten(1).T
        colours = FeatureColours(vectors)(features)
        assert colours.shape == (3, *SHAPE)
        centred = vectors - vectors.mean(dim=0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
        inside = (colours > 0) & (colours < 1)
        for colour, component, kept in zip(
            colours.flatten(1), directions @ centred.T, inside.flatten(1), strict=True
        ):
            correlation = np.corrcoef(colour[kept].numpy(), component[kept].numpy())[0, 1]
            assert abs(correlation) == pytest.approx(1, abs=1e-4)
            assert 0.97 < kept.float().mean() < 1

    def test_two_channels(self):
        features = random_features(2)
        colours = FeatureColours(features.flatten(1).T)(features)
        assert torch.equal(colours[2], torch.full(SHAPE, 0.5))


class TestClasses:
    def test_values_and_their_places(self):
        labels = [torch.tensor([[205, 0]]), torch.tensor([[820, 205]], dtype=torch.int32)]
        values = label_values(labels)
        assert values.tolist() == [0, 205, 820]
        assert class_indices(labels[1], values).tolist() == [[2, 1]]
        assert name_classes(values) == {0: "background", 1: "205", 2: "820"}
        assert name_classes(values, ["left", "right"])[2] == "right"
        with pytest.raises(InputError, match=r"3 class_names for 2 structures .*205, 820"):
            name_classes(values, ["a", "b", "c"])

    @pytest.mark.parametrize(("value", "message"), [(0, "empty"), (-1, "has the value -1")])
    def test_unusable_labels(self, value, message):
        with pytest.raises(InputError, match=message):
            label_values([torch.full((3,), value)])


class TestLinearProbe:
    def test_learns_what_is_linear_in_the_features(self):
        volumes = [anatomy(seed) for seed in range(4)]
        values = torch.tensor([0, 4, 9])
        features = [standardise(feature) for feature, _ in volumes]
        labels = [class_indices(label, values) for _, label in volumes]
        probe = fit_linear_probe(features[:2], labels[:2], 3, steps=150)
        assert (probe.kernel_size, probe.out_channels) == ((3, 3, 3), 3)
        scores = [
            dice_scores(probe(feature[None]).argmax(1), label, (1, 2))[0]
            for feature, label in zip(features[2:], labels[2:], strict=True)
        ]
        assert float(torch.stack(scores).min()) > 0.8
        start = fit_linear_probe(features[:2], labels[:2], 3, steps=0)
        untrained = dice_scores(start(features[2][None]).argmax(1), labels[2], (1, 2))
        assert float(untrained.mean()) < 0.6

    @torch.inference_mode()
    def test_works_in_inference_mode_and_repeats_itself(self):
        features, label = anatomy(0)
        classes = class_indices(label, torch.tensor([0, 4, 9]))
        state = torch.get_rng_state()
        first = fit_linear_probe([features], [classes], 3, steps=3)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        again = fit_linear_probe([features], [classes], 3, steps=3)
        assert torch.equal(first.weight, again.weight)
        for options in ({"steps": 0}, {"steps": 3, "seed": 1}):
            other = fit_linear_probe([features], [classes], 3, **options)
            assert not torch.equal(first.weight, other.weight)
