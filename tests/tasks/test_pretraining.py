"""Every method that learns from single volumes: a new one is tested without editing this file."""

import os
import socket
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import gvsl_lightning.tasks
from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.datamodules.phantom import PhantomDataset
from gvsl_lightning.nn.backbones import BACKBONES, build_backbone
from gvsl_lightning.tasks import GVSL, DeepCluster, PretrainTask, RestorationTask, SimCLR, SimSiam
from gvsl_lightning.tasks.pretraining import TwoViewTask, Views, volumes_of
from gvsl_lightning.tasks.spread import effective_rank, feature_std
from gvsl_lightning.weights import load_backbone_weights

EDGE = 16
STAGES = {"channels": [8, 16, 32]}
OPTIONS: dict[str, dict[str, Any]] = {
    "BYOL": {"projection_channels": 32, "momentum": 0.9},
    "DeepCluster": {"clusters": 3, "reassign_steps": 1000},
    "MaskedAutoencoder": {"block": 4},
    "SimCLR": {"projection_channels": 32},
    "SimSiam": {"projection_channels": 32, "prediction_channels": 16},
    "VoCo": {"grid": (2, 2, 1), "projection_channels": 32},
}
METHODS = [
    task
    for name in gvsl_lightning.tasks.__all__
    if issubclass(task := getattr(gvsl_lightning.tasks, name), PretrainTask)
    and not issubclass(task, GVSL)
    and not task.__abstractmethods__
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def tiny(method: type[PretrainTask], **options: Any) -> PretrainTask:
    torch.manual_seed(0)
    defaults = {"backbone_options": {"channels": [8, 16]}, **OPTIONS.get(method.__name__, {})}
    task = method(**{**defaults, **options})
    if isinstance(task, DeepCluster):
        task.assignments = {f"volume {index}": index % 3 for index in range(8)}
    return task


def volume(seed: int) -> Tensor:
    """A smooth volume (1, EDGE, EDGE, EDGE) in [0, 1]."""
    coarse = torch.rand(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(EDGE, EDGE, EDGE), mode="trilinear", align_corners=True)[0]


def batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    return {
        "image": torch.stack([volume(index) for index in range(size)]),
        "name": [f"volume {index}" for index in range(size)],
        "seed": seed,
    }


class Volumes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": volume(index), "name": f"volume {index}"}


class Pairs(PairDataModule):
    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return Volumes(), Volumes()


def fit(task: pl.LightningModule, data: pl.LightningDataModule, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(**{**defaults, **options})
    trainer.fit(task, data)
    return trainer


def test_all_methods_of_the_paper_are_here() -> None:
    names = {method.__name__ for method in METHODS}
    assert names >= {
        "Denoising", "ContextEncoder", "ModelsGenesis", "Rotation", "DeepCluster", "SimSiam",
        "BYOL", "SimCLR", "MaskedAutoencoder", "VoCo",
    }  # fmt: skip


@every_method
def test_gradient_reaches_all_that_trains(method: type[PretrainTask]) -> None:
    task = tiny(method)
    task.compute_losses(task.views_of(batch()))["total"].backward()
    decoder = tuple(f"backbone.{part}." for part in task.backbone.decoder_parts)
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # a convolution's bias in front of a norm over its single channel's group, or the last
            # bias behind a cosine, may have none: everything else must
            assert bool(parameter.grad.any()) or name.endswith("bias"), name
        frozen = name.startswith("teacher_")
        frozen |= not method.trains_decoder and name.startswith(decoder)
        assert parameter.requires_grad != frozen, name
    (group,) = task.configure_parameters()
    assert {id(p) for p in group["params"]} == {
        id(p) for p in task.parameters() if p.grad is not None
    }


@every_method
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ("unet", "swin_unetr")])
def test_works_on_other_backbones(method: type[PretrainTask], name: str) -> None:
    options = {
        "basic_unet": {"features": [8, 8, 16, 16, 32, 8]},
        "dynunet": {"filters": [8, 16, 32]},
        "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    }[name]
    task = tiny(method, backbone=name, backbone_options=options)
    loss = task.compute_losses(task.views_of(batch(2)))["total"]
    assert loss.isfinite()
    loss.backward()


@every_method
def test_views_follow_from_the_seed_alone(method: type[PretrainTask]) -> None:
    task = tiny(method)
    first, again, other = (task.views_of(batch(seed=seed)) for seed in (1, 1, 2))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_method
def test_one_volume_is_enough(method: type[PretrainTask]) -> None:
    task = tiny(method)
    loss = task.compute_losses(task.views_of(batch(1)))["total"]
    assert loss.isfinite()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in task.parameters() if p.grad is not None)


@every_method
def test_half_precision_stays_close(method: type[PretrainTask]) -> None:
    task = tiny(method).eval()
    views = task.views_of(batch())
    expected = task.compute_losses(views)["total"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = task.compute_losses(views)["total"]
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(expected), rel=0.1, abs=0.02)


class _Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


class _Phantoms(PairDataModule):
    """Eight generated hearts of 16 voxels, the first two of which validate too."""

    items: ClassVar[list[dict[str, Any]]] = []

    def configure_datasets(self) -> tuple[Any, Any]:
        if not self.items:
            phantoms = PhantomDataset("cardiac_ct", 8, (16, 16, 16))
            self.items.extend(
                {"image": phantom["image"].float(), "name": f"heart {index}"}
                for index, phantom in enumerate(phantoms)
            )
        return self.items, self.items[:2]


@every_method
def test_loss_falls_on_phantoms(method: type[PretrainTask]) -> None:
    # methods that read the pooled features need a third stage, and some need more steps
    steps, more = (40, {}) if method.trains_decoder else (60, {"backbone_options": STAGES})
    if method.__name__ in ("DeepCluster", "Rotation"):
        steps = 150
    if issubclass(method, TwoViewTask):
        more = {**more, "view": {"scale": (0.9, 1.0), "rotation": 0.1, "translation": 0.03}}
    losses = _Losses()
    trainer = fit(
        tiny(method, learning_rate=3e-3 if method.trains_decoder else 1e-3, **more),
        _Phantoms((16, 16, 16), batch_size=3, val_pairs=2),
        max_steps=steps, callbacks=[losses], check_val_every_n_epoch=None,
        val_check_interval=steps, gradient_clip_val=1.0,
    )  # fmt: skip
    tenth = steps // 10
    before, after = sum(losses.values[:tenth]) / tenth, sum(losses.values[-tenth:]) / tenth
    assert after < 0.9 * before, (before, after)
    spread = trainer.callback_metrics["val/feature_std"]
    assert 0 < float(spread) < 3
    assert float(trainer.callback_metrics["val/effective_rank"]) >= 1
    assert ("val/loss" in trainer.callback_metrics) == (method is not DeepCluster)


@every_method
def test_checkpoint_fills_a_backbone(method: type[PretrainTask], tmp_path: Path) -> None:
    task = tiny(method)
    trainer = fit(
        task,
        Pairs(patch_size=(EDGE,) * 3, batch_size=1, val_pairs=2),
        max_steps=1,
        limit_val_batches=1,
        default_root_dir=tmp_path,
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    backbone = build_backbone("unet", channels=[8, 16])
    report = load_backbone_weights(backbone, tmp_path / "last.ckpt")
    assert report.matched_fraction == 1
    assert not report.unexpected
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, task.backbone.state_dict()[name])
    again = method.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    expected, got = (one.eval().compute_losses(one.views_of(batch())) for one in (task, again))
    assert float(got["total"]) == float(expected["total"])


class _SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@every_method
def test_resumed_run_equals_an_unbroken_one(method: type[PretrainTask], tmp_path: Path) -> None:
    def run(start: Path | None = None, **options: Any) -> PretrainTask:
        more = {"reassign_steps": 3} if method is DeepCluster else {}
        task = tiny(method, learning_rate=1e-2, **more)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            max_steps=6, **options,
        )  # fmt: skip
        data = Pairs(patch_size=(EDGE,) * 3, batch_size=1, val_pairs=2)
        trainer.fit(task, data, ckpt_path=start, weights_only=True)
        return task

    unbroken = run(callbacks=[_SaveAt(2, tmp_path / "2.ckpt")])
    resumed = run(tmp_path / "2.ckpt")
    for name, value in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_both_volumes_of_a_pair_are_taken() -> None:
    fixed, moving = torch.rand(2, 3, 1, 4, 4, 4)
    assert torch.equal(volumes_of({"fixed": fixed, "moving": moving}), torch.cat([fixed, moving]))


def test_projections_that_are_all_alike_show_as_collapse() -> None:
    task, volumes = tiny(SimSiam), torch.rand(6, 1, EDGE, EDGE, EDGE)
    task.monitored(volumes)  # in training, the standardisation follows
    task.eval()
    assert float(feature_std(task.monitored(volumes))) > 0.05
    with torch.no_grad():
        last = list(task.projection_head.parameters())[-2:]
        last[0].zero_()
        last[1].fill_(1.0)
    assert float(feature_std(task.monitored(volumes))) < 1e-4


def test_simclr_of_a_volume_that_is_drawn_twice() -> None:
    task, given = tiny(SimCLR).eval(), batch(4)
    given["name"] = ["one", "another", "one", "third"]
    views = task.views_of(given)
    numbers = views["volume"][:, 0].tolist()
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 3
    got = float(task.compute_losses(views)["total"])
    del views["volume"]
    assert got < float(task.compute_losses(views)["total"])


def test_gvsl_monitors_its_features_too() -> None:
    torch.manual_seed(0)
    task = GVSL(backbone_options={"channels": [8, 16]}, affine_channels=16)
    trainer = fit(task, Pairs(patch_size=(EDGE,) * 3, batch_size=2, val_pairs=4), max_epochs=1)
    embedded = task.embed(torch.stack([volume(index) for index in range(4)]))
    measured = trainer.callback_metrics
    assert float(measured["val/feature_std"]) == pytest.approx(
        float(feature_std(embedded)), rel=1e-4
    )
    assert float(measured["val/effective_rank"]) == pytest.approx(
        float(effective_rank(embedded)), rel=1e-4
    )


@pytest.mark.parametrize(
    "method", [m for m in METHODS if issubclass(m, RestorationTask)], ids=lambda m: m.__name__
)
def test_restoration_loss_is_the_mean_over_what_was_corrupted(
    method: type[RestorationTask],
) -> None:
    task = tiny(method).eval()
    views = task.views_of(batch(3))
    with torch.no_grad():
        restored = task.restore(views["corrupted"])
        loss = float(task.compute_losses(views)["total"])
    means = []
    for index in range(3):
        errors = (restored[index] - views["volume"][index]) ** 2
        means.append(
            float(errors[views["mask"][index]].mean() if "mask" in views else errors.mean())
        )
    assert loss == pytest.approx(sum(means) / 3, rel=1e-5)
    if "mask" in views:
        kept = ~views["mask"]
        assert torch.equal(views["corrupted"][kept], batch(3)["image"][kept])


# Two processes -------------------------------------------------------------------------------


def same_views(method: type[PretrainTask]) -> type[PretrainTask]:
    """The method, whose views of a volume do not depend on the batch it is in."""

    class SameViews(method):  # type: ignore[misc, valid-type]
        def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
            views = [
                super(SameViews, self).make_views(
                    one[None], torch.Generator().manual_seed(int(1e5 * one.mean()))
                )
                for one in volumes
            ]
            return {name: torch.cat([view[name] for view in views]) for name in views[0]}

    SameViews.__name__ = method.__name__
    return SameViews


class _KeepGradients(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients = {
            name: value.grad.clone()
            for name, value in pl_module.named_parameters()
            if value.grad is not None
        }


def gradients_of(method: type[PretrainTask], batch_size: int, devices: int) -> dict[str, Tensor]:
    task = tiny(same_views(method))
    data = Pairs(patch_size=(EDGE,) * 3, batch_size=batch_size, val_pairs=4)
    keep = _KeepGradients()
    fit(
        task, data, max_steps=1, callbacks=[keep], devices=devices,
        strategy="ddp" if devices > 1 else "auto", limit_val_batches=1,
    )  # fmt: skip
    return keep.gradients


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    for method in METHODS:
        gradients = gradients_of(method, batch_size=1, devices=2)
        torch.save(gradients, Path(folder) / f"{method.__name__}-{rank}.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, args=(port, str(folder)), nprocs=2, start_method="forkserver"
    )
    return folder


@every_method
def test_gradients_in_two_processes_are_those_of_one(
    method: type[PretrainTask], together: Path
) -> None:
    expected = gradients_of(method, batch_size=2, devices=1)
    for rank in range(2):
        got = torch.load(together / f"{method.__name__}-{rank}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        assert any(bool(value.any()) for value in expected.values())
        for name, value in got.items():
            # alone and together, sums are rounded in another order
            off = float((value - expected[name]).norm())
            assert off <= 1e-4 * float(expected[name].norm()) + 1e-6, name


def test_a_method_from_elsewhere_needs_two_hooks() -> None:
    class Brightness(PretrainTask):
        def configure_heads(self) -> None:
            self.head = nn.Linear(self.backbone.local_channels, 1)

        def make_views(self, volumes: Tensor, generator: torch.Generator) -> Views:
            factor = torch.rand(len(volumes), generator=generator)
            return {"volume": volumes * factor.view(-1, 1, 1, 1, 1), "factor": factor}

        def compute_losses(self, views: Views) -> dict[str, Tensor]:
            pooled = self(views["volume"]).local_features.mean(dim=(2, 3, 4))
            return {"total": F.mse_loss(self.head(pooled)[:, 0], views["factor"])}

    trainer = fit(
        tiny(Brightness), Pairs(patch_size=(EDGE,) * 3, batch_size=2, val_pairs=2), max_epochs=2
    )
    assert {"train/loss", "val/loss", "val/feature_std"} <= set(trainer.callback_metrics)
