from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gvsl_lightning.datamodules.pairs import PairDataModule
from gvsl_lightning.errors import InputError
from gvsl_lightning.nn import geometry
from gvsl_lightning.nn.backbones import BACKBONES, Features
from gvsl_lightning.nn.heads import Matching
from gvsl_lightning.nn.losses import SIMILARITIES, LocalNCCLoss, build_similarity
from gvsl_lightning.tasks import GVSL

EDGE = 12
SMALL_BACKBONES: dict[str, dict[str, Any]] = {
    "unet": {"channels": [8, 16]},
    "basic_unet": {"features": [8, 8, 16, 16, 32, 8]},
    "dynunet": {"filters": [8, 16, 32]},
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1]},
    "swin_unetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
}


def tiny(task: type[GVSL] = GVSL, **options: Any) -> GVSL:
    torch.manual_seed(0)
    defaults = {"backbone_options": {"channels": [8, 16]}, "affine_channels": 16}
    return task(**{**defaults, **options})


def blobs(seed: int, channels: int = 1, edge: int = EDGE) -> Tensor:
    """A smooth volume (C, D, H, W) in [0, 1]."""
    coarse = torch.rand(1, channels, 5, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(edge, edge, edge), mode="trilinear", align_corners=True)[0]


def pairs(batch: int = 2, channels: int = 1) -> dict[str, Any]:
    fixed, moving, noise = (
        torch.stack([blobs(10 * k + n, channels) for n in range(batch)]) for k in range(3)
    )
    return {"fixed": fixed, "moving": moving, "corrupted": 0.8 * fixed + 0.2 * noise}


class Volumes(Dataset[dict[str, Any]]):
    def __init__(self, seeds: range, channels: int = 1) -> None:
        self.seeds = seeds
        self.channels = channels

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = blobs(self.seeds[index], self.channels, EDGE + 2)
        label = (image[:1] * 4).long() - 1
        return {"image": image, "label": label.clamp_min(0), "name": f"volume {index}"}


class RandomPairs(PairDataModule):
    """Five volumes to train on (three batches of two pairs) and three to validate on."""

    def __init__(self, channels: int = 1, **options: Any) -> None:
        defaults = {"patch_size": (EDGE, EDGE, EDGE), "batch_size": 2, "val_pairs": 3}
        super().__init__(**{**defaults, **options})
        self.channels = channels

    def configure_datasets(self) -> tuple[Volumes, Volumes]:
        return Volumes(range(100, 105), self.channels), Volumes(range(200, 203), self.channels)


class Recorder(pl.loggers.Logger):
    """Keeps what is logged: `steps[name]` is {step: value}."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.steps.setdefault(name, {})[step] = float(value)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def trainer(root: Path, steps: int = 2, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "max_epochs": -1,
            "logger": Recorder(),
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "default_root_dir": root,
            **options,
        }
    )


def logged(
    root: Path,
    task: GVSL,
    steps: int = 2,
    ckpt_path: Path | None = None,
    data: pl.LightningDataModule | DataLoader[Any] | None = None,
    **options: Any,
) -> list[float]:
    """Train and return the logged loss of every step."""
    run = trainer(root, steps, **options)
    run.fit(task, data or RandomPairs(), ckpt_path=ckpt_path)
    return list(run.logger.steps["train/loss"].values())


def without_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.any())
    ]


def wake(task: GVSL) -> GVSL:
    """Heads as after some training: no longer the identity."""
    with torch.no_grad():
        for parameter in task.matching_head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return task


class TestLearning:
    def test_overfits_one_pair(self):
        task, batch = tiny(), pairs(1)
        optimizer = torch.optim.Adam(task.parameters(), 5e-3)
        totals, measured = [], []
        for step in range(40):
            losses, matching = task.compute_losses(batch), task.last_matching
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            totals.append(losses["total"].item())
            if step in (0, 39):
                measured.append(task.measure(batch, matching))
        first, last = measured
        assert totals[-1] < 0.75 * totals[0]
        assert first["ncc_before"] == last["ncc_before"]
        assert first["ncc_after"].item() == pytest.approx(first["ncc_before"].item(), abs=1e-3)
        assert last["ncc_after"] > first["ncc_after"] + 0.25

    @pytest.mark.parametrize("name", list(BACKBONES))
    def test_every_parameter_of_every_head_gets_a_gradient(self, name):
        # in the released code 27 % of the parameters never get one
        # the usual width: of 16 channels on a bottleneck of one voxel, all may have the same sign
        # for a pair and its swap, and then the last norm's bias has no gradient
        options = {"backbone_options": SMALL_BACKBONES.get(name, {}), "affine_channels": 256}
        task = tiny(backbone=name, **options)
        task.compute_losses(pairs(1))["total"].backward()
        assert without_gradient(task.matching_head) == []
        assert without_gradient(task.restoration_head) == []
        assert [key for key, value in task.named_parameters() if value.grad is None] == []

    @pytest.mark.parametrize(
        "options",
        [
            {"z_matching": False},
            {"restoration": False},
            {"affine": False},
            {"deformable": False},
            {"composition": "affine_first"},
            {"weight_contrast": 1.0},
        ],
    )
    def test_ablations_leave_no_parameter_unused(self, options):
        task = tiny(**options)
        task.compute_losses(pairs())["total"].backward()
        assert without_gradient(task) == []


class TestLosses:
    def test_total_is_the_weighted_sum(self):
        task = wake(tiny(weight_similarity=2.0, weight_smoothness=0.5, weight_restoration=3.0))
        losses = task.compute_losses(pairs())
        assert losses.keys() == {"total", "ncc", "smoothness", "restoration"}
        assert min(value.item() for value in losses.values()) > 1e-4
        expected = 2 * losses["ncc"] + 0.5 * losses["smoothness"] + 3 * losses["restoration"]
        torch.testing.assert_close(losses["total"], expected)
        losses = wake(tiny(weight_contrast=0.5)).compute_losses(pairs())
        expected = torch.stack(
            [losses[name] for name in ("ncc", "smoothness", "restoration")]
        ).sum()
        torch.testing.assert_close(losses["total"], expected + 0.5 * losses["contrast"])

    def test_terms_are_what_they_are_called(self):
        task, batch = wake(tiny()), pairs()
        losses, matching = task.compute_losses(batch), task.last_matching
        again = task.match(batch["corrupted"], batch["moving"])
        torch.testing.assert_close(matching.affine, again.affine)
        torch.testing.assert_close(matching.displacement, again.displacement)
        coordinates = geometry.compose(matching.affine, matching.displacement)
        warped = geometry.sample(batch["moving"], coordinates)
        torch.testing.assert_close(losses["ncc"], LocalNCCLoss()(warped, batch["fixed"]))
        torch.testing.assert_close(losses["smoothness"], task.smoothness(matching.displacement))
        error = (task.restore(batch["corrupted"]) - batch["fixed"]).square().mean()
        torch.testing.assert_close(losses["restoration"], error)

    @pytest.mark.parametrize("similarity", ["ncc", "mind", "mi", "ssim"])
    def test_similarities(self, similarity):
        task, batch = wake(tiny(similarity=similarity)), pairs()
        losses, matching = task.compute_losses(batch), task.last_matching
        expected = build_similarity(similarity)(
            task.warp(batch["moving"], matching), batch["fixed"]
        )
        torch.testing.assert_close(losses[similarity], expected)
        others = losses["smoothness"] + losses["restoration"]
        torch.testing.assert_close(losses["total"], expected + others)
        losses["total"].backward()
        assert without_gradient(task.matching_head) == []

    def test_a_similarity_from_elsewhere(self, monkeypatch):
        monkeypatch.setitem(SIMILARITIES, "mse", nn.MSELoss)
        assert isinstance(tiny(similarity="mse").similarity, nn.MSELoss)
        assert "mse" in tiny(similarity="mse").compute_losses(pairs())

    @pytest.mark.parametrize(("batch_size", "channels"), [(2, 1), (3, 2)])
    def test_a_batch_is_the_mean_of_its_pairs(self, batch_size, channels):
        task, batch = wake(tiny(in_channels=channels)), pairs(batch_size, channels)
        losses, matching = task.compute_losses(batch), task.last_matching
        assert matching.displacement.shape == (batch_size, 3, EDGE, EDGE, EDGE)
        assert task.restore(batch["fixed"]).shape == (batch_size, channels, EDGE, EDGE, EDGE)
        alone = [
            task.compute_losses({key: value[n : n + 1] for key, value in batch.items()})
            for n in range(batch_size)
        ]
        for name, value in losses.items():
            mean = torch.stack([one[name] for one in alone]).mean()
            torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5)

    def test_composition_is_the_one_asked_for(self):
        batch = pairs()
        warped = []
        for composition in ("displacement_first", "affine_first"):
            task = wake(tiny(composition=composition))
            matching = task.match(batch["fixed"], batch["moving"])
            coordinates = geometry.compose(*matching, order=composition)
            expected = geometry.sample(batch["moving"], coordinates)
            warped.append(task.warp(batch["moving"], matching))
            assert torch.equal(warped[-1], expected)
        assert not torch.equal(*warped)


class TestViews:
    BATCH = {"fixed": blobs(1)[None].repeat(2, 1, 1, 1, 1), "seed": 4}  # noqa: RUF012
    BATCH["moving"] = BATCH["fixed"].clone()

    def test_one_spatial_transform_moves_the_three_volumes_alike(self):
        kept = self.BATCH["fixed"].clone()
        views = tiny(corruption=False).views_of(self.BATCH)
        assert torch.equal(views["fixed"], views["moving"])
        assert torch.equal(views["fixed"], views["corrupted"])
        assert not torch.allclose(views["fixed"], kept, atol=0.05)
        assert not torch.equal(*views["fixed"])
        assert torch.equal(self.BATCH["fixed"], kept)

    def test_the_moving_volume_moves_apart_if_wanted(self):
        together = tiny(corruption=False).views_of(self.BATCH)
        apart = tiny(corruption=False, shared_spatial=False).views_of(self.BATCH)
        assert torch.equal(apart["fixed"], together["fixed"])
        assert torch.equal(apart["corrupted"], apart["fixed"])
        for other in (apart["fixed"], self.BATCH["moving"]):
            assert not torch.allclose(apart["moving"], other, atol=0.05)

    def test_only_the_copy_of_the_fixed_volume_is_corrupted(self):
        views = tiny(spatial=False).views_of(self.BATCH)
        assert torch.equal(views["fixed"], self.BATCH["fixed"])
        assert torch.equal(views["moving"], self.BATCH["moving"])
        assert not torch.equal(views["corrupted"], self.BATCH["fixed"])

    def test_draws_follow_the_seed_alone(self):
        task = tiny()
        first = task.views_of(self.BATCH)
        torch.rand(7)
        again, other = (task.views_of({**self.BATCH, "seed": seed}) for seed in (4, 5))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(other["moving"], first["moving"])
        # as PyTorch collates the seeds of a batch
        collated = task.views_of({**self.BATCH, "seed": torch.tensor([4, 5])})
        assert torch.equal(collated["moving"], first["moving"])

    def test_options_arrive(self):
        quiet = {"shuffling_rate": 0.0, "nonlinear_rate": 0.0, "inpainting_rate": 0.0}
        views = tiny(corruption=quiet, spatial={"rate": 0.0}).views_of(self.BATCH)
        assert all(torch.equal(view, self.BATCH["fixed"]) for view in views.values())

    def test_validation_is_corrupted_alike_each_time_and_not_moved(self):
        task, batch = tiny().eval(), pairs()
        first, again = (task.views_of(batch, 3) for _ in range(2))
        assert torch.equal(first["fixed"], batch["fixed"])
        assert torch.equal(first["moving"], batch["moving"])
        assert torch.equal(first["corrupted"], again["corrupted"])
        assert not torch.equal(first["corrupted"], batch["fixed"])

    def test_any_loader_of_pairs_trains(self, tmp_path):
        items = [{"fixed": blobs(n), "moving": blobs(n + 5)} for n in range(4)]
        loader = DataLoader(items, batch_size=2)
        run = trainer(tmp_path, limit_val_batches=1.0)
        run.fit(tiny(), loader, loader)
        assert {"train/loss", "val/loss", "val/ncc_after"} <= set(run.callback_metrics)

    def test_single_volumes_are_no_pairs(self):
        with pytest.raises(InputError, match="GVSL"):
            tiny().views_of({"image": blobs(0)[None]})


class TestAblations:
    def test_without_z_matching(self, tmp_path):
        task = tiny(z_matching=False)
        losses = task.compute_losses(pairs())
        assert task.last_matching is None
        assert losses.keys() == {"total", "restoration"}
        with pytest.raises(ValueError, match="z_matching: false"):
            task.match(*pairs()["fixed"][:, None])
        run = trainer(tmp_path, 3, limit_val_batches=1.0)
        run.fit(task, RandomPairs())
        measured = {name for name in run.callback_metrics if name.startswith("val/")}
        spread = {"val/feature_std", "val/effective_rank"}
        assert measured == {"val/loss", "val/loss_restoration", *spread}

    def test_without_restoration(self):
        task = tiny(restoration=False)
        assert task.compute_losses(pairs()).keys() == {"total", "ncc", "smoothness"}
        with pytest.raises(ValueError, match="restoration: false"):
            task.restore(pairs()["fixed"])


class TestContrast:
    """Of features that tell every voxel's intensity from all others."""

    @staticmethod
    def contrast(shift: int, **changes: Tensor) -> float:
        """The loss of volumes one voxel apart where the matching says ``shift``."""
        fixed = torch.rand(2, 1, EDGE, EDGE, EDGE, generator=torch.Generator().manual_seed(0)) + 0.1
        batch = {"fixed": fixed, "corrupted": fixed, "moving": fixed.roll(1, dims=2)}
        task = tiny(
            weight_contrast=1.0, contrast_temperature=1e-4, contrast_points=400, restoration=False
        )
        task.backbone, task.projection_head = Waves(), nn.Identity()
        displacement = torch.zeros(2, 3, EDGE, EDGE, EDGE)
        displacement[:, 0] = shift
        matching = Matching(geometry.identity_affine(2), displacement)
        task._match = lambda fixed, moving: matching
        return task.compute_losses(batch | changes)["contrast"].item()

    def test_reads_the_moving_features_where_the_matching_says(self):
        assert self.contrast(1) < 1 < 100 < self.contrast(0)
        assert self.contrast(-1) > 100

    def test_background_takes_no_part(self):
        assert self.contrast(1, fixed=torch.zeros(2, 1, EDGE, EDGE, EDGE)) == 0
        assert self.contrast(0, fixed=torch.zeros(2, 1, EDGE, EDGE, EDGE)) == 0

    def test_points_matched_outside_take_no_part(self):
        assert self.contrast(EDGE) == 0

    def test_points_follow_the_step_not_the_global_generator(self, tmp_path):
        task = wake(tiny(weight_contrast=1.0, contrast_points=8))
        first = task.compute_losses(pairs())["contrast"]
        torch.rand(3)
        assert torch.equal(task.compute_losses(pairs())["contrast"], first)
        before = {name: value.clone() for name, value in task.state_dict().items()}
        trainer(tmp_path, 2).fit(task, RandomPairs())
        task.load_state_dict(before)
        assert not torch.equal(task.compute_losses(pairs())["contrast"], first)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"weight_contrast": 1.0, "z_matching": False}, "z_matching"),
            ({"z_matching": False, "restoration": False}, "both off"),
            ({"affine": False, "deformable": False}, "affine or its deformable"),
            ({"contrast_points": 1}, "contrast_points"),
            ({"similarity_options": {"no_such": 1}}, "no_such"),
            ({"similarity": "nc"}, "ncc"),
            ({"corruption": {"shufling_rate": 1}}, r"corruption\.shufling_rate"),
            ({"spatial": {"rotate": 1}}, r"spatial\.rotat"),
            ({"spatial": {"scale": 1}}, "spatial"),
        ],
    )
    def test_bad_options(self, options, named):
        with pytest.raises(ValueError, match=named):
            tiny(**options)


class Waves(nn.Module):
    """Local features of a voxel: sine and cosine of multiples of its intensity."""

    def forward(self, volume: Tensor) -> Features:
        phases = torch.arange(1, 9).view(1, 8, 1, 1, 1) * 3 * volume
        return Features(volume, torch.cat([phases.sin(), phases.cos()], dim=1))


class TestMeasures:
    def test_of_a_known_shift(self):
        moving = torch.stack([blobs(1, edge=20), blobs(2, edge=20)])
        moving_label = (moving * 4).long()
        displacement = torch.zeros(2, 3, 20, 20, 20)
        displacement[:, 0] = 2
        batch = {
            "moving": moving,
            "fixed": geometry.warp(moving, displacement),
            "moving_label": moving_label,
            "fixed_label": geometry.warp(moving_label, displacement, "nearest"),
        }
        matching = Matching(geometry.identity_affine(2), displacement)
        measured = {name: value.item() for name, value in tiny().measure(batch, matching).items()}
        assert measured["ncc_after"] > 0.99 > 0.9 > measured["ncc_before"] > 0
        assert measured["dice_after"] == 1
        assert 0 < measured["dice_before"] < 0.95
        assert measured["displacement"] == pytest.approx(2 / 3)
        assert measured["folded"] == 0

    def test_dice_is_the_mean_over_structures_of_the_fixed_volume(self):
        fixed_label = torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64)
        moving_label = fixed_label.clone()
        fixed_label[..., :2], fixed_label[..., 2] = 1, 3
        moving_label[..., :1], moving_label[..., 2] = 1, 3
        volumes = pairs(1)["fixed"][..., :4, :4, :4]
        batch = {
            "fixed": volumes,
            "moving": volumes,
            "fixed_label": fixed_label,
            "moving_label": moving_label,
        }
        identity = Matching(geometry.identity_affine(1), torch.zeros(1, 3, 4, 4, 4))
        measured = tiny().measure(batch, identity)
        # structure 1: 2 * 16 / (32 + 16); structure 2: absent; structure 3: equal
        assert measured["dice_before"].item() == pytest.approx((2 / 3 + 1) / 2)
        assert measured["dice_after"].item() == pytest.approx((2 / 3 + 1) / 2)

    def test_validation_logs_every_measure(self, tmp_path):
        task, data = wake(tiny()), RandomPairs(batch_size=1)
        run = trainer(tmp_path, limit_val_batches=1.0)
        run.validate(task, data, verbose=False)
        metrics = {name: value.item() for name, value in run.callback_metrics.items()}
        assert metrics.keys() == {
            *(f"val/loss{term}" for term in ("", "_ncc", "_smoothness", "_restoration")),
            *(f"val/{name}_{when}" for name in ("ncc", "dice") for when in ("before", "after")),
            *("val/folded", "val/displacement"),
            *("val/affine_spread", "val/affine_spread_translation"),
            *("val/feature_std", "val/effective_rank"),
        }
        measured, affines = [], []
        with torch.no_grad():
            for batch in data.val_dataloader():
                matching = task.match(batch["fixed"], batch["moving"])
                affines.append(matching.affine)
                measured.append(task.measure(batch, matching))
        assert len(measured) == 3
        for name in measured[0]:
            mean = sum(one[name].item() for one in measured) / 3
            assert metrics[f"val/{name}"] == pytest.approx(mean, rel=1e-4, abs=1e-6), name
        spread = torch.cat(affines).std(dim=0, correction=0)
        assert metrics["val/affine_spread"] == pytest.approx(spread[:, :3].mean().item(), rel=1e-3)
        assert metrics["val/affine_spread"] > 1e-4

    def test_training_logs_losses_and_measures_of_each_step(self, tmp_path):
        run = trainer(tmp_path, 4)
        run.fit(tiny(), RandomPairs())
        steps = run.logger.steps
        named = ("loss", "loss_ncc", "loss_smoothness", "loss_restoration", "ncc_after")
        for name in (*named, "affine_spread", "affine_spread_translation"):
            assert list(steps[f"train/{name}"]) == [0, 1, 2, 3]
        for step in range(4):
            terms = (steps[f"train/loss{t}"][step] for t in ("_ncc", "_smoothness"))
            total = sum(terms) + steps["train/loss_restoration"][step]
            assert steps["train/loss"][step] == pytest.approx(total, rel=1e-5)

    def test_measures_cost_nothing_between_logged_steps(self, tmp_path, monkeypatch):
        task, calls = tiny(), []
        measure = task.measure

        def counted(batch: dict[str, Any], matching: Matching) -> dict[str, Tensor]:
            calls.append(task.global_step)
            return measure(batch, matching)

        monkeypatch.setattr(task, "measure", counted)
        trainer(tmp_path, 4, log_every_n_steps=2).fit(task, RandomPairs())
        assert calls == [1, 3]

    def test_test_and_prediction(self, tmp_path):
        task, data = wake(tiny()), RandomPairs()
        run = trainer(tmp_path, limit_val_batches=1.0)
        loader = data.val_dataloader()
        (metrics,) = run.test(task, loader, verbose=False)
        (validated,) = run.validate(task, loader, verbose=False)
        assert metrics == {k.replace("val/", "test/"): v for k, v in validated.items()}
        prediction = run.predict(task, loader)[0]
        batch = next(iter(loader))
        with torch.no_grad():
            matching = task.match(batch["fixed"], batch["moving"])
        torch.testing.assert_close(prediction["displacement"], matching.displacement)
        torch.testing.assert_close(prediction["affine"], matching.affine)
        torch.testing.assert_close(prediction["warped"], task.warp(batch["moving"], matching))
        assert prediction["fixed_name"] == batch["fixed_name"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[GVSL, list[float]]:
    task = tiny(learning_rate=1e-3, warmup_steps=3)
    return task, logged(tmp_path_factory.mktemp("unbroken"), task, 5)


class TestCheckpoint:
    def test_rebuilds_the_task_from_the_file_alone(self, tmp_path):
        options = {
            "in_channels": 2,
            "composition": "affine_first",
            "similarity": "mind",
            "similarity_options": {"radius": 1},
            "weight_smoothness": 0.25,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "warmup_steps": 3,
        }
        task = wake(tiny(**options))
        run = trainer(tmp_path)
        run.fit(task, RandomPairs(channels=2))
        run.save_checkpoint(tmp_path / "task.ckpt")
        loaded = GVSL.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)
        assert dict(loaded.hparams) == dict(task.hparams)
        assert {**loaded.hparams, **options} == dict(loaded.hparams)
        assert loaded.hparams["backbone_options"] == {"channels": [8, 16]}
        assert loaded.similarity.radius == 1
        batch = pairs(channels=2)
        with torch.no_grad():
            for one, other in zip(
                loaded.match(batch["fixed"], batch["moving"]),
                task.match(batch["fixed"], batch["moving"]),
                strict=True,
            ):
                assert torch.equal(one, other)
            assert torch.equal(loaded.restore(batch["fixed"]), task.restore(batch["fixed"]))

    @pytest.mark.parametrize("stop", [2, 3, 4])
    def test_resumed_run_equals_the_unbroken_one(self, tmp_path, unbroken, stop):
        # three steps make an epoch: resumed inside the first, between, and inside the second
        whole, losses = unbroken
        first = trainer(tmp_path, stop)
        first.fit(tiny(learning_rate=1e-3, warmup_steps=3), RandomPairs())
        first.save_checkpoint(tmp_path / "half.ckpt")
        torch.manual_seed(99)
        other = GVSL(**whole.hparams)
        rest = logged(tmp_path, other, 5, ckpt_path=tmp_path / "half.ckpt")
        begun = list(first.logger.steps["train/loss"].values())
        assert begun == losses[:stop]
        assert rest == losses[stop:]
        for name, value in whole.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name

    @pytest.mark.parametrize("step", [2, 3])
    def test_run_continues_from_what_model_checkpoint_wrote(self, tmp_path, step):
        options = {"learning_rate": 1e-3, "schedule": "cosine", "optimizer": "adamw"}
        checkpoint = pl.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1
        )
        whole = tiny(**options)
        losses = logged(tmp_path, whole, 5, enable_checkpointing=True, callbacks=[checkpoint])
        other = tiny(**options)
        rest = logged(tmp_path, other, 5, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest == losses[step:]
        for name, value in whole.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


class TestPrecision:
    def test_half_precision_run_follows_the_full_precision_run(self, tmp_path):
        full = logged(tmp_path, tiny(), 3, gradient_clip_val=1.0)
        half = logged(tmp_path, tiny(), 3, gradient_clip_val=1.0, precision="bf16-mixed")
        assert half == pytest.approx(full, rel=0.02)
        assert half != full

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_heads_warp_and_losses_stay_in_float32(self, dtype):
        task, batch = wake(tiny()), pairs(1)
        expected, expected_matching = task.compute_losses(batch), task.last_matching
        with torch.autocast("cpu", dtype):
            assert task(batch["fixed"]).local_features.dtype == dtype
            losses, matching = task.compute_losses(batch), task.last_matching
            assert task.restore(batch["fixed"]).dtype == torch.float32
            assert task.warp(batch["moving"], matching).dtype == torch.float32
            measured = task.measure(batch, matching)
        assert {value.dtype for value in (*matching, *measured.values())} == {torch.float32}
        for name, value in losses.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[name], rtol=0.05, atol=1e-3)
        difference = (matching.displacement - expected_matching.displacement).abs().mean()
        assert difference < 0.05 * expected_matching.displacement.abs().mean()
        losses["total"].backward()
        assert without_gradient(task.matching_head) == []

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
    def test_on_a_device(self, tmp_path, precision):
        # a device draws other views from the same seed
        options = {"corruption": False, "spatial": False}
        data = DataLoader([pairs(2), pairs(1), pairs(3), pairs(2)], batch_size=None)
        expected = logged(tmp_path, tiny(**options), 4, data=data)
        device = {"accelerator": "gpu", "devices": 1, "precision": precision}
        got = logged(tmp_path, tiny(**options), 4, data=data, **device)
        assert got == pytest.approx(expected, rel=0.02)


class HuberMatching(GVSL):
    """A subclass in another project: one hook, one hyper-parameter of its own."""

    def __init__(self, delta: float = 1.0, **gvsl: Any) -> None:
        super().__init__(**gvsl)

    def configure_losses(self) -> None:
        super().configure_losses()
        self.similarity = nn.HuberLoss(delta=self.hparams["delta"])


class TestSubclass:
    def test_overrides_one_hook(self, tmp_path):
        task = wake(tiny(HuberMatching, delta=0.01, weight_smoothness=0.0))
        batch = pairs()
        losses, matching = task.compute_losses(batch), task.last_matching
        expected = F.huber_loss(task.warp(batch["moving"], matching), batch["fixed"], delta=0.01)
        torch.testing.assert_close(losses["total"], expected + losses["restoration"])
        run = trainer(tmp_path)
        run.fit(task, RandomPairs())
        run.save_checkpoint(tmp_path / "own.ckpt")
        loaded = HuberMatching.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
        assert loaded.hparams["delta"] == 0.01
        assert loaded.hparams["weight_smoothness"] == 0
        torch.testing.assert_close(
            loaded.compute_losses(batch)["total"], task.compute_losses(batch)["total"]
        )
