"""Sliding windows, and the way back to the grid of the scan."""

import itertools

import numpy as np
import pytest
import SimpleITK
import torch
from torch import Tensor, nn

from gvsl_lightning.evaluation import prediction
from gvsl_lightning.evaluation.prediction import (
    choose_window,
    labels_on_original_grid,
    sliding_window,
    to_original_grid,
)

OBLIQUE = np.array([[0.0, -1.8, 0.6, 5], [1.2, 0.0, 0.0, -7], [0.0, 0.9, 1.2, 11], [0, 0, 0, 1]])


def two_classes(volume: Tensor) -> Tensor:
    return torch.cat([1 - volume, volume], dim=1)


class TestSlidingWindow:
    @pytest.mark.parametrize(
        ("shape", "overlap"), [((5, 6, 7), 0.5), ((17, 21, 20), 0.0), ((5, 30, 19), 0.5)]
    )
    def test_windows_cover_every_voxel(self, shape, overlap):
        sizes = set()

        def network(window: Tensor) -> Tensor:
            sizes.add(tuple(window.shape[2:]))
            return two_classes(window)

        volume = torch.rand(1, 1, *shape)
        logits = sliding_window(volume, network, (16, 12, 8), overlap)
        torch.testing.assert_close(logits, two_classes(volume))
        assert sizes == {(16, 12, 8)}

    def test_centres_weigh_more_than_borders(self):
        ramp = torch.linspace(0, 1, 16).view(1, 1, 16, 1, 1).expand(1, 1, 16, 16, 16)

        def position(volume: Tensor) -> Tensor:
            return ramp.repeat(len(volume), 1, 1, 1, 1)

        logits = sliding_window(torch.zeros(1, 1, 24, 16, 16), position, (16, 16, 16), 0.5)
        # voxel 8 is the middle of the first window (0.53) and the border of the second (0)
        assert logits[0, 0, 8, 8, 8] > 0.45

    def test_mirrored_prediction_of_a_network_with_a_direction(self):
        torch.manual_seed(0)
        network = nn.Conv3d(1, 3, 3, padding=1).requires_grad_(False)
        volume = torch.rand(1, 1, 8, 8, 8)
        got = sliding_window(volume, network, (8, 8, 8), mirror=True).softmax(dim=1)
        total = torch.zeros_like(got)
        for axes in itertools.product((False, True), repeat=3):
            flipped = [axis + 2 for axis in range(3) if axes[axis]]
            total += network(volume.flip(flipped)).softmax(dim=1).flip(flipped) / 8
        torch.testing.assert_close(got, total)


class TestChosenWindow:
    @pytest.mark.parametrize(
        ("size", "most", "expected"),
        [
            ((20, 30, 40), 24_000, (20, 30, 40)),  # the whole volume fits
            ((512, 512, 20), 2**22, (304, 512, 20)),  # two windows that share a quarter
            ((64, 64, 64), 1, (16, 16, 16)),
        ],
    )
    def test_largest_windows_that_fit(self, size, most, expected):
        assert choose_window(size, 0.25, most) == expected

    def test_small_windows_come_in_batches_within_the_limit(self, monkeypatch):
        monkeypatch.setattr(prediction, "LARGEST_MAP", 4 * 8**3 * 3)
        batches = []

        def network(window: Tensor) -> Tensor:
            batches.append(len(window))
            return two_classes(window)

        volume = torch.rand(1, 1, 8, 16, 40)
        logits = sliding_window(volume, network, (8, 8, 8), overlap=0.0, channels=4)
        torch.testing.assert_close(logits, two_classes(volume))
        assert batches == [3, 3, 3, 1]


class TestOriginalGrid:
    @pytest.mark.parametrize(
        ("axes", "signs"),
        [((0, 1, 2), (1, -1, -1)), ((2, 0, 1), (1, 1, 1)), ((1, 2, 0), (-1, -1, 1))],
    )
    def test_turned_grids_are_exact(self, axes, signs):
        original = torch.rand(2, 5, 6, 7)
        turned = original.permute(0, *(axis + 1 for axis in axes))
        turned = turned.flip([place + 1 for place in range(3) if signs[place] < 0])
        # voxel p of the turned volume lies where its voxel of the original one does
        matrix = np.zeros((4, 4))
        matrix[3, 3] = 1
        for place, axis in enumerate(axes):
            matrix[axis, place] = signs[place]
            matrix[axis, 3] = 0 if signs[place] > 0 else original.shape[axis + 1] - 1
        got = to_original_grid(turned, OBLIQUE @ matrix, OBLIQUE, original.shape[1:])
        torch.testing.assert_close(got, original, atol=1e-5, rtol=0)

    def test_resampling_agrees_with_simpleitk(self):
        volume = torch.rand(1, 12, 11, 10)
        finer = OBLIQUE @ np.diag([0.5, 0.8, 0.7, 1.0])
        finer[:3, 3] += [1.5, 2.0, 1.0]

        def image(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
            made = SimpleITK.GetImageFromArray(array.transpose(2, 1, 0))
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            made.SetSpacing(spacing.tolist())
            made.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
            made.SetOrigin(affine[:3, 3].tolist())
            return made

        shape = (9, 8, 7)
        reference = SimpleITK.Resample(
            image(volume[0].numpy(), OBLIQUE),
            image(np.zeros(shape, np.float32), finer),
            SimpleITK.Transform(),
            SimpleITK.sitkLinear,
            -1.0,
        )
        expected = SimpleITK.GetArrayFromImage(reference).transpose(2, 1, 0)
        got = to_original_grid(volume, OBLIQUE, finer, shape)[0].numpy()
        inside = expected >= 0
        assert inside.mean() > 0.3
        np.testing.assert_allclose(got[inside], expected[inside], atol=1e-4)

    def test_labels_are_the_most_probable_class_of_the_resampled_probabilities(self):
        probabilities = torch.rand(4, 6, 6, 6).softmax(dim=0)
        finer = np.diag([0.6, 0.6, 0.6, 1.0])
        affine = np.eye(4)
        labels = labels_on_original_grid(probabilities, affine, finer, (9, 9, 9))
        resampled = to_original_grid(probabilities, affine, finer, (9, 9, 9))
        assert torch.equal(labels.long(), resampled.argmax(dim=0))
        assert labels.dtype == torch.uint8

    def test_beyond_a_crop_there_is_background(self):
        start, size = np.array([3, 2, 4]), (3, 4, 2)
        shift = np.eye(4)
        shift[:3, 3] = start
        probabilities = torch.zeros(3, *size)
        probabilities[2] = 1
        labels = labels_on_original_grid(probabilities, OBLIQUE @ shift, OBLIQUE, (9, 9, 9))
        raw = to_original_grid(probabilities, OBLIQUE @ shift, OBLIQUE, (9, 9, 9))
        for voxel in np.ndindex(9, 9, 9):
            away = np.maximum(np.maximum(start - voxel, voxel - (start + size) + 1), 0).max()
            assert labels[voxel] == (2 if away <= 1 else 0)
            assert raw[(2, *voxel)] == pytest.approx(1.0 if away <= 1 else 0.0)

    def test_many_classes_need_a_larger_type(self):
        probabilities = torch.zeros(300, 2, 2, 2)
        probabilities[299] = 1
        labels = labels_on_original_grid(probabilities, np.eye(4), np.eye(4), (2, 2, 2))
        assert labels.dtype == torch.int16
        assert (labels == 299).all()
