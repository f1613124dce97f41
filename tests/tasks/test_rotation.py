import itertools

import numpy as np
import pytest
import torch

from gvsl_lightning.tasks.rotation import ROTATIONS, Rotation, central_cube, rotate


def test_there_are_24_different_rotations_and_the_first_is_none() -> None:
    cube = torch.rand(1, 4, 4, 4)
    turned = [rotate(cube, index) for index in range(len(ROTATIONS))]
    assert len(turned) == 24
    assert torch.equal(turned[0], cube)
    for first, second in itertools.combinations(turned, 2):
        assert not torch.equal(first, second)


@pytest.mark.parametrize("index", range(24))
def test_rotation_is_a_proper_one_about_the_centre(index: int) -> None:
    cube = torch.rand(1, 5, 5, 5)
    turned = rotate(cube, index)[0].numpy()
    # the matrix that leads from centred voxels of the result to those of the cube, from three marks
    columns = []
    for axis in range(3):
        place = np.full(3, 2)
        place[axis] = 4
        columns.append(np.argwhere(cube[0].numpy() == turned[tuple(place)])[0] - 2)
    matrix = np.stack(columns, axis=1) / 2
    assert np.linalg.det(matrix) == pytest.approx(1)
    for place in itertools.product(range(5), repeat=3):
        source = (matrix @ (np.array(place) - 2) + 2).astype(int)
        assert turned[place] == cube[0].numpy()[tuple(source)]


def test_central_cube() -> None:
    volume = torch.rand(2, 1, 6, 9, 4)
    assert torch.equal(central_cube(volume), volume[:, :, 1:5, 2:6])


def test_label_is_the_rotation_that_was_done() -> None:
    torch.manual_seed(0)
    task = Rotation(backbone_options={"channels": [8, 16]})
    volumes = torch.rand(40, 1, 4, 6, 4)
    views = task.make_views(volumes, torch.Generator().manual_seed(3))
    assert len(set(views["rotation"].tolist())) > 12
    for turned, rotation, volume in zip(
        views["turned"], views["rotation"], central_cube(volumes), strict=True
    ):
        assert torch.equal(turned, rotate(volume, int(rotation)))
