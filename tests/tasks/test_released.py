"""The affine head of GVSL trains; that of the released code does not."""

import torch

from gvsl_lightning.tasks import GVSL, DetachedGVSL


def _movement(task: GVSL) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    names = ("fixed", "corrupted", "moving")
    views = {name: torch.rand(1, 1, 16, 16, 16, generator=generator) for name in names}
    before = {name: value.detach().clone() for name, value in task.named_parameters()}
    optimizer = torch.optim.Adam(task.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        task.compute_losses(views)["total"].backward()
        optimizer.step()
    return {
        name: float((p.detach() - before[name]).abs().max()) for name, p in task.named_parameters()
    }


def test_only_the_detached_affine_head_stays_where_it_started() -> None:
    options = {"backbone_options": {"channels": [8, 16]}, "affine_channels": 8}
    for task, affine_trains in ((GVSL(**options), True), (DetachedGVSL(**options), False)):
        for name, moved in _movement(task).items():
            assert (moved > 0) == (affine_trains or "affine_head" not in name), name
