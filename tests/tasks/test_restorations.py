"""Corruptions and targets of the restoring methods."""

import pytest
import torch

from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import ContextEncoder, Denoising, MaskedAutoencoder, ModelsGenesis
from gvsl_lightning.tasks.masked_autoencoder import standardise_blocks

SMALL = {"backbone_options": {"channels": [8, 16]}}


def volumes(count: int = 3, shape: tuple[int, int, int] = (16, 20, 12)) -> torch.Tensor:
    return torch.rand(count, 1, *shape, generator=torch.Generator().manual_seed(0))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_denoising_adds_noise_of_the_given_strength() -> None:
    views = Denoising(noise=0.2, **SMALL).corrupt(volumes(), generator())
    noise = views["corrupted"] - views["volume"]
    assert torch.equal(views["volume"], volumes())
    assert float(noise.std()) == pytest.approx(0.2, rel=0.05)
    assert abs(float(noise.mean())) < 0.01
    with pytest.raises(InputError, match=r"^noise "):
        Denoising(noise=0.0, **SMALL)


def test_training_volumes_are_moved_first() -> None:
    task, batch = Denoising(**SMALL), {"image": volumes(), "seed": 1}
    moved, again = (task.views_of(batch)["volume"] for _ in range(2))
    assert torch.equal(moved, again)
    assert not torch.allclose(moved, volumes(), atol=0.05)
    assert torch.equal(task.eval().views_of(batch)["volume"], volumes())
    still = Denoising(spatial=False, **SMALL)
    assert torch.equal(still.views_of(batch)["volume"], volumes())
    with pytest.raises(InputError, match=r"spatial\.rotaton"):
        Denoising(spatial={"rotaton": 1}, **SMALL)


def test_context_encoder_cuts_boxes_and_fills_them_with_the_mean() -> None:
    views = ContextEncoder(**SMALL).corrupt(volumes(20), generator())
    mask = views["mask"]
    assert mask.shape == (20, 1, 16, 20, 12)
    share = mask.float().mean(dim=(1, 2, 3, 4))
    assert float(share.min()) > 0
    assert 0.05 < float(share.mean()) < 0.4
    for index in range(20):
        mean = volumes(20)[index].mean()
        filled = views["corrupted"][index][mask[index]]
        torch.testing.assert_close(filled, mean.expand_as(filled))


def test_genesis_shows_what_its_corruption_makes() -> None:
    task = ModelsGenesis(**SMALL)
    views = task.corrupt(volumes(), generator())
    assert torch.equal(views["corrupted"], task.corruption(volumes(), generator()))
    assert torch.equal(views["volume"], volumes())
    assert "mask" not in views


def test_masked_autoencoder_masks_whole_blocks_to_zero() -> None:
    task = MaskedAutoencoder(block=4, ratio=0.6, standardised=False, **SMALL)
    views = task.corrupt(volumes(), generator())
    blocks = views["mask"].unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    assert bool((blocks.all(dim=-1) == blocks.any(dim=-1)).all())
    assert blocks.all(dim=-1).flatten(1).sum(dim=1).tolist() == [round(0.6 * 4 * 5 * 3)] * 3
    assert not views["corrupted"][views["mask"]].any()
    assert torch.equal(views["volume"], volumes())
    assert not torch.equal(views["mask"][0], views["mask"][1])


@pytest.mark.parametrize("shape", [(16, 20, 12), (10, 9, 5)])
def test_target_is_standardised_block_by_block(shape: tuple[int, int, int]) -> None:
    given = volumes(2, shape)
    got = standardise_blocks(given, 4)
    for sample in range(2):
        for i in range(0, shape[0], 4):
            for j in range(0, shape[1], 4):
                for k in range(0, shape[2], 4):
                    place = (sample, 0, slice(i, i + 4), slice(j, j + 4), slice(k, k + 4))
                    block = given[place]
                    variance = block.var(correction=0)
                    expected = (block - block.mean()) / (variance + 1e-6).sqrt()
                    torch.testing.assert_close(got[place], expected, rtol=1e-3, atol=1e-4)
    assert not standardise_blocks(torch.ones(1, 1, 8, 8, 8), 4).any()


@pytest.mark.parametrize("options", [{"block": 0}, {"block": 64}, {"ratio": 1.0}])
def test_mask_that_masks_nothing(options: dict) -> None:
    task = MaskedAutoencoder(**SMALL, **options)
    with pytest.raises(InputError, match="block"):
        task.views_of({"image": volumes()})
