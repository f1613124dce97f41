import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gvsl_lightning.errors import InputError
from gvsl_lightning.tasks import BYOL


def tiny(**options: Any) -> BYOL:
    torch.manual_seed(0)
    defaults = {"backbone_options": {"channels": [8, 16]}, "projection_channels": 16}
    return BYOL(**{**defaults, **options})


class Follow(pl.Callback):
    """Recomputes the teacher by the formula, from the students that it sees."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: BYOL) -> None:
        self.expected = [p.clone() for p in pl_module.teacher_backbone.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, total = trainer.global_step, trainer.max_steps
        momentum = 1 - (1 - 0.9) * (math.cos(math.pi * step / total) + 1) / 2
        self.expected = [
            momentum * old + (1 - momentum) * new.detach()
            for old, new in zip(self.expected, pl_module.backbone.parameters(), strict=True)
        ]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_teacher_follows_by_the_schedule(accumulated: int) -> None:
    task, follow = tiny(momentum=0.9, learning_rate=1e-2), Follow()
    assert equal(task.teacher_backbone, task.backbone)
    start = nn.utils.parameters_to_vector(task.teacher_backbone.parameters()).clone()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=4,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[follow],
        accumulate_grad_batches=accumulated,
    )  # fmt: skip
    trainer.fit(task, DataLoader([{"image": torch.rand(1, 8, 8, 8)}] * 16, batch_size=2))
    for got, expected in zip(task.teacher_backbone.parameters(), follow.expected, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    moved = nn.utils.parameters_to_vector(task.teacher_backbone.parameters()) - start
    assert float(moved.norm()) > 1e-4
    # at the last step the momentum is 1
    assert task.momentum_at(4) == 1
    assert task.momentum_at(0) == pytest.approx(0.9)


def test_teacher_is_neither_trained_nor_in_the_optimiser() -> None:
    task = tiny()
    (group,) = task.configure_parameters()
    trained = {id(parameter) for parameter in group["params"]}
    teacher = [*task.teacher_backbone.parameters(), *task.teacher_projection.parameters()]
    assert not trained & {id(parameter) for parameter in teacher}
    views = task.views_of({"image": torch.rand(2, 1, 8, 8, 8)})
    task.compute_losses(views)["total"].backward()
    assert all(parameter.grad is None for parameter in teacher)


def test_buffers_follow_too() -> None:
    task = tiny(backbone="basic_unet", backbone_options={"norm": "batch", "features": [8] * 6})
    student = dict(task.backbone.named_buffers())
    assert student, "a network with buffers"
    for buffer in student.values():
        buffer.add_(1)
    task.update_teacher(1.0)
    for name, buffer in task.teacher_backbone.named_buffers():
        assert torch.equal(buffer, student[name])


def test_loss_is_the_mean_of_both_directions() -> None:
    task = tiny()
    for parameter in task.teacher_projection.parameters():
        nn.init.normal_(parameter)
    for standardisation in (task.standardisation, task.teacher_standardisation):
        standardisation.mean.fill_(0.1)
        standardisation.variance.fill_(0.25**2)
    task.eval()
    views = task.views_of({"image": torch.rand(3, 1, 8, 8, 8)})

    def project(volumes: Tensor, backbone: nn.Module, head: nn.Module) -> Tensor:
        pooled = backbone.encode(volumes).mean(dim=(2, 3, 4))
        return head((pooled - 0.1) / 0.25)

    total = 0.0
    for one, other in (("first", "second"), ("second", "first")):
        predicted = task.prediction_head(project(views[one], task.backbone, task.projection_head))
        target = project(views[other], task.teacher_backbone, task.teacher_projection)
        for p, t in zip(predicted, target, strict=True):
            total += float(1 - (p @ t) / p.norm() / t.norm()) / 6
    assert float(task.compute_losses(views)["total"]) == pytest.approx(total, rel=1e-3)


def test_momentum_must_be_a_share() -> None:
    with pytest.raises(InputError, match=r"^momentum "):
        tiny(momentum=1.5)


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
