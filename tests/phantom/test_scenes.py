"""Generated anatomy: reproducible, of one topology, and labelled correctly."""

import hashlib
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch

from gvsl_lightning.errors import InputError
from gvsl_lightning.nn.geometry import jacobian_determinant
from gvsl_lightning.phantom import SCENES, body_coordinates, generate_phantom

ALL = list(SCENES)


SUBJECTS = 6


LARGE = {
    "cardiac_ct": ["left atrium", "left ventricle", "right atrium", "right ventricle"],
    "brain_mr": ["left cerebral white matter", "right cerebral white matter", "brain stem"],
    "chest_ct": ["left lung", "right lung", "heart"],
}


@pytest.fixture(scope="module")
def population():
    return {scene: [generate_phantom(scene, i) for i in range(SUBJECTS)] for scene in ALL}


def mask(phantom, scene, name):
    return phantom["label"] == SCENES[scene].labels.index(name)


def dilate(volume):
    """Grow a mask by one voxel along each axis."""
    grown = volume.copy()
    for axis in range(volume.ndim):
        lower, upper = ([slice(None)] * volume.ndim for _ in range(2))
        lower[axis], upper[axis] = slice(None, -1), slice(1, None)
        grown[tuple(lower)] |= volume[tuple(upper)]
        grown[tuple(upper)] |= volume[tuple(lower)]
    return grown


def components(volume):
    """Sizes of the 26-connected parts of a mask, largest first."""
    left = set(map(tuple, np.argwhere(volume).tolist()))
    sizes = []
    steps = [s for s in np.ndindex(3, 3, 3) if s != (1, 1, 1)]
    while left:
        queue, size = deque([left.pop()]), 0
        while queue:
            place = queue.popleft()
            size += 1
            for step in steps:
                other = tuple(p + s - 1 for p, s in zip(place, step, strict=True))
                if other in left:
                    left.remove(other)
                    queue.append(other)
        sizes.append(size)
    return sorted(sizes, reverse=True)


@pytest.mark.parametrize("scene", ALL)
def test_format(population, scene):
    for phantom in population[scene]:
        image, label = phantom["image"], phantom["label"]
        assert image.shape == label.shape == (64, 64, 64)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert np.ptp(image) > 0.6
        assert label.dtype == np.uint8
        assert isinstance(phantom["class"], int)


def test_brain_has_28_labels_in_left_right_pairs():
    names = SCENES["brain_mr"].labels[1:]
    assert len(names) == len(set(names)) == 28
    left = [name[5:] for name in names if name.startswith("left ")]
    assert len(left) == 12
    assert all(f"right {name}" in names for name in left)


@pytest.mark.parametrize("scene", ALL)
def test_a_subject_depends_on_nothing_but_its_arguments(population, scene):
    for index in reversed(range(2)):
        again = generate_phantom(scene, index)
        np.testing.assert_array_equal(again["image"], population[scene][index]["image"])
        np.testing.assert_array_equal(again["label"], population[scene][index]["label"])
        assert again["class"] == population[scene][index]["class"]


def test_another_process_generates_the_same_bytes(population):
    code = f"""
import hashlib
from gvsl_lightning.phantom import generate_phantom
for scene in {ALL[::-1]}:
    phantom = generate_phantom(scene, 2)
    print(hashlib.sha256(phantom["image"].tobytes() + phantom["label"].tobytes()).hexdigest())
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    expected = [
        hashlib.sha256(p["image"].tobytes() + p["label"].tobytes()).hexdigest()
        for p in (population[scene][2] for scene in ALL[::-1])
    ]
    assert answer.stdout.split() == expected


@pytest.mark.parametrize("scene", ALL)
def test_seed_and_index_make_different_subjects(population, scene):
    other_seed = generate_phantom(scene, 0, seed=1)["label"]
    base = population[scene][0]["label"]
    for other in (other_seed, population[scene][1]["label"]):
        assert (base != other).mean() > 0.003


@pytest.mark.parametrize("scene", ALL)
def test_every_label_is_there(population, scene):
    for phantom in population[scene]:
        counts = np.bincount(phantom["label"].ravel(), minlength=len(SCENES[scene].labels))
        assert len(counts) == len(SCENES[scene].labels)
        for name, count in zip(SCENES[scene].labels, counts, strict=True):
            if name == "lesion":
                assert (count > 0) == (phantom["class"] == 1)
            else:
                assert count >= 15, name


def test_unregistered_subjects_overlap_in_part(population):
    for scene, names in LARGE.items():
        for name in names:
            masks = [mask(phantom, scene, name) for phantom in population[scene]]
            dice = [
                2 * (a & b).sum() / (a.sum() + b.sum())
                for i, a in enumerate(masks)
                for b in masks[:i]
            ]
            assert 0.35 < np.mean(dice) < 0.8, (scene, name, np.mean(dice))


def test_myocardium_encloses_the_left_ventricle(population):
    for phantom in population["cardiac_ct"]:
        cavity = mask(phantom, "cardiac_ct", "left ventricle")
        shell = dilate(cavity) & ~cavity
        wall = shell & mask(phantom, "cardiac_ct", "myocardium")
        assert wall.sum() > 0.7 * shell.sum()
        for name in ("right ventricle", "right atrium", "pulmonary artery"):
            assert not (shell & mask(phantom, "cardiac_ct", name)).any(), name


def test_neighbours_touch(population):
    for phantom in population["cardiac_ct"]:
        for first, second in (
            ("myocardium", "right ventricle"),
            ("left ventricle", "ascending aorta"),
            ("right ventricle", "pulmonary artery"),
            ("right ventricle", "right atrium"),
        ):
            reach = dilate(dilate(mask(phantom, "cardiac_ct", first)))
            assert (reach & mask(phantom, "cardiac_ct", second)).any(), (first, second)


def test_sides_are_consistent(population):
    """Axis 0 points to the patient's right."""

    def place(phantom, scene, name):
        return np.argwhere(mask(phantom, scene, name)).mean(axis=0)

    for scene, spec in SCENES.items():
        pairs = [name[5:] for name in spec.labels if name.startswith("left ")]
        for name in pairs:
            if f"right {name}" not in spec.labels:
                continue
            for phantom in population[scene]:
                left, right = (
                    place(phantom, scene, f"{side} {name}") for side in ("left", "right")
                )
                assert right[0] > left[0] + 2, (scene, name)
    for phantom in population["cardiac_ct"]:
        apex, atrium = (place(phantom, "cardiac_ct", n) for n in ("left ventricle", "left atrium"))
        assert apex[1] > atrium[1] + 4
        assert apex[2] < atrium[2] - 4
        assert place(phantom, "cardiac_ct", "right atrium")[0] > apex[0] + 8
    for phantom in population["brain_mr"]:
        assert place(phantom, "brain_mr", "brain stem")[2] < 28


@pytest.mark.parametrize("size", [(64, 64, 64), (40, 48, 56)])
def test_coronary_arteries_are_two_connected_thin_trees(size):
    for index in range(SUBJECTS):
        phantom = generate_phantom("coronary_ct", index, size)
        arteries = mask(phantom, "coronary_ct", "coronary artery")
        sizes = components(arteries)
        assert len(sizes) <= 2
        assert min(np.ptp(np.argwhere(arteries), axis=0) / np.array(size)) > 0.25


def test_coronary_arteries_are_thin(population):
    for phantom in population["coronary_ct"]:
        arteries = mask(phantom, "coronary_ct", "coronary artery")
        core = ~dilate(~arteries)
        assert core.sum() < 0.05 * arteries.sum()
        assert arteries.mean() < 0.006


def test_lungs_hold_the_lesions():
    for index in range(8):
        phantom = generate_phantom("chest_ct", index, seed=5)
        lesion = mask(phantom, "chest_ct", "lesion")
        if not phantom["class"]:
            continue
        near = dilate(dilate(lesion)) & ~lesion
        lungs = mask(phantom, "chest_ct", "left lung") | mask(phantom, "chest_ct", "right lung")
        assert (near & lungs).sum() > 0.4 * near.sum()
        assert phantom["image"][lesion].mean() > phantom["image"][lungs].mean() + 0.08


def test_classes_are_balanced_and_not_the_index():
    classes = [generate_phantom("chest_ct", i, (16, 16, 16))["class"] for i in range(40)]
    assert sum(classes) == 20
    assert sum(classes[::2]) not in (0, 20)
    assert {generate_phantom("brain_mr", i, (16, 16, 16))["class"] for i in range(4)} == {0}


def test_intensities_follow_the_labels(population):
    def mean(phantom, scene, name):
        return phantom["image"][mask(phantom, scene, name)].mean()

    for phantom in population["cardiac_ct"]:
        muscle = mean(phantom, "cardiac_ct", "myocardium")
        assert mean(phantom, "cardiac_ct", "left ventricle") > muscle + 0.05
        assert mean(phantom, "cardiac_ct", "ascending aorta") > muscle + 0.05
        assert 0.48 < muscle < 0.62
        assert np.percentile(phantom["image"], 5) < 0.2
    for phantom in population["chest_ct"]:
        assert mean(phantom, "chest_ct", "airway") < 0.2
        assert 0.05 < mean(phantom, "chest_ct", "left lung") < 0.25
        assert mean(phantom, "chest_ct", "heart") > 0.48
        assert phantom["image"][0, 0, 32] < 0.15
    for phantom in population["brain_mr"]:
        white = mean(phantom, "brain_mr", "left cerebral white matter")
        grey = mean(phantom, "brain_mr", "left cerebral cortex")
        assert white > grey + 0.05
        assert grey > mean(phantom, "brain_mr", "CSF") + 0.05
        assert mean(phantom, "brain_mr", "left putamen") < white
        assert mean(phantom, "brain_mr", "left lateral ventricle") < 0.4
    for phantom in population["coronary_ct"]:
        arteries = mask(phantom, "coronary_ct", "coronary artery")
        around = dilate(dilate(arteries)) & ~dilate(arteries)
        assert phantom["image"][arteries].mean() > np.median(phantom["image"][around]) + 0.01


def test_subjects_differ_in_contrast_not_only_in_shape(population):
    means = [
        p["image"][mask(p, "cardiac_ct", "left ventricle")].mean() for p in population["cardiac_ct"]
    ]
    assert np.std(means) > 0.008


@pytest.mark.parametrize("scene", ALL)
def test_the_body_map_is_invertible(scene):
    """Also a check of the axes: the map keeps the orientation of the body."""
    for index in range(12):
        points = torch.from_numpy(body_coordinates(scene, index, (40, 32, 48)))
        extent = torch.tensor(SCENES[scene].extent).reshape(3, 1, 1, 1)
        voxels = points / extent * torch.tensor([20.0, 16.0, 24.0]).reshape(3, 1, 1, 1)
        grid = torch.stack(torch.meshgrid(*map(torch.arange, (40.0, 32.0, 48.0)), indexing="ij"))
        determinant = jacobian_determinant((voxels - grid)[None])
        assert determinant.min() > 0.05
        assert 0.4 < determinant.mean() < 2


def test_one_body_behind_all_subjects():
    """Voxels of two subjects with the same body coordinates carry the same label."""
    first, second = (body_coordinates("chest_ct", i).reshape(3, -1).T for i in (0, 2))
    labels = [generate_phantom("chest_ct", i)["label"].ravel() for i in (0, 2)]
    chosen = np.flatnonzero(np.isin(labels[0], [1, 2, 3]))[::400]
    gaps = ((first[chosen, None] - second[None]) ** 2).sum(axis=2)
    near = gaps.argmin(axis=1)
    inside = gaps.min(axis=1) < 0.06**2
    assert inside.sum() > 20
    assert (labels[0][chosen] == labels[1][near])[inside].mean() > 0.85
    assert (labels[0] == labels[1])[chosen].mean() < 0.85


def test_anatomy_does_not_depend_on_the_resolution():
    coarse = generate_phantom("cardiac_ct", 3, (32, 32, 32))["label"]
    fine = generate_phantom("cardiac_ct", 3, (64, 64, 64))["label"]
    for value in range(1, 8):
        a = np.argwhere(coarse == value).mean(axis=0) + 0.5
        b = (np.argwhere(fine == value).mean(axis=0) + 0.5) / 2
        np.testing.assert_allclose(a, b, atol=0.8)


@pytest.mark.parametrize("scene", ALL)
@pytest.mark.parametrize("size", [(48, 64, 40), (33, 30, 41)])
def test_any_size(scene, size):
    phantom = generate_phantom(scene, 1, size)
    assert phantom["image"].shape == phantom["label"].shape == size
    present = np.unique(phantom["label"])
    assert len(present) >= len(SCENES[scene].labels) - 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liver_us", 0), "liver_us"),
        (("brain_mr", -1), "index is -1"),
        (("brain_mr", 0, (64, 64)), "size"),
        (("brain_mr", 0, (64, 64, 4)), "size"),
        (("brain_mr", 0, (64, 64, 64), -3), "seed is -3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        generate_phantom(*arguments)
