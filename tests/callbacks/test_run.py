import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import wandb
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader

from gvsl_lightning.callbacks import (
    BackboneExporter,
    GradientNorms,
    MatchingFigure,
    ResumableCheckpoint,
    RunSummary,
    draw_matching,
    run_folder,
)
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.case_figures import CaseDrawing, draw_cases
from gvsl_lightning.nn import geometry
from gvsl_lightning.tasks.gvsl import GVSL
from gvsl_lightning.weights import load_backbone

SHAPE = (8, 12, 10)


def volumes(count: int = 2) -> Tensor:
    return torch.rand(count, 1, *SHAPE)


def labels(count: int = 2) -> Tensor:
    label = torch.zeros(count, 1, *SHAPE, dtype=torch.int64)
    label[:, :, 2:6, 3:9, 2:5] = 1
    label[:, :, 2:6, 3:9, 5:8] = 2
    return label


def panels(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def headings(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def outlines(figure: Figure, title: str) -> int:
    (axes,) = [axes for axes in figure.axes if axes.get_title().split("\n")[0] == title]
    return sum(
        len(collection.get_paths()) > 0
        for collection in axes.collections
        if not isinstance(collection, LineCollection)
    )


class TestDrawMatching:
    def test_everything_given(self):
        fixed, moving = volumes(), volumes()
        coordinates = geometry.compose(None, torch.zeros(2, 3, *SHAPE))
        scores = {"ncc_before": 0.2, "ncc_after": 0.5, "dice_before": 0.6, "dice_after": 0.7}
        figure = draw_matching(
            fixed,
            moving,
            coordinates,
            fixed_label=labels(),
            moving_label=labels(),
            corrupted=fixed + 0.25,
            restored=fixed,
            names=["a onto b", "c onto d"],
            scores=[{**scores, "folded": 0.0123}] * 2,
            title="epoch 3",
        )
        assert len(panels(figure)) == 2 * 3 * 8
        assert headings(figure)[:8] == [
            "fixed\n",
            "moving\nNCC 0.200, Dice 0.600",
            "moving, warped\nNCC 0.500, Dice 0.700",
            "difference before\n(moving - fixed)",
            "difference after\n(warped - fixed)",
            "displacement\n1.23 % folded",
            "corrupted\nmean error 0.250",
            "restored\nmean error 0.000",
        ]
        texts = [text.get_text() for text in figure.texts]
        assert texts == ["epoch 3", "a onto b", "c onto d"]

    @pytest.mark.parametrize(
        ("given", "columns"),
        [
            ((), ["fixed", "moving", "difference before"]),
            (("restored", "corrupted"), ["fixed", "moving", "difference before", "corrupted"]),
            (("coordinates",), ["fixed", "moving", "moving, warped", "difference before"]),
        ],
    )
    def test_what_is_not_given_is_left_out(self, given, columns):
        extra = {
            "coordinates": geometry.identity_grid(SHAPE),
            "corrupted": volumes(1),
            "restored": volumes(1),
        }
        figure = draw_matching(volumes(1), volumes(1), **{name: extra[name] for name in given})
        names = [heading.split("\n")[0] for heading in headings(figure)]
        assert names[: len(columns)] == columns
        assert len(names) == 3 + ("restored" in given) * 2 + ("coordinates" in given) * 3
        assert len(panels(figure)) == 3 * len(names)

    def test_orientation_is_the_radiologists(self):
        """Right, anterior and superior corners appear left and up on the page."""
        fixed = torch.zeros(1, 1, *SHAPE)
        right, anterior, superior = (size - 1 for size in SHAPE)
        d, h, w = (size // 2 for size in SHAPE)
        fixed[0, 0, right, anterior, w] = 1
        fixed[0, 0, right, h, superior] = 2
        fixed[0, 0, d, anterior, superior] = 3
        figure = draw_matching(fixed, fixed)
        for axes, name, value in zip(
            panels(figure)[:3], ("axial", "coronal", "sagittal"), (1, 2, 3), strict=True
        ):
            assert axes.get_ylabel() == name
            row, column = np.argwhere(axes.images[0].get_array() == value)[0]
            across, up = axes.transAxes.inverted().transform(
                axes.transData.transform((column, row))
            )
            assert across < 0.2
            assert up > 0.8

    def test_grid_shows_where_each_voxel_is_read(self):
        displacement = torch.zeros(1, 3, *SHAPE)
        displacement[:, 0], displacement[:, 2] = 1.5, -2.0
        figure = draw_matching(
            volumes(1), volumes(1), geometry.compose(None, displacement), title="shift"
        )
        displacements = panels(figure)[15:18]
        assert displacements[0].get_title().startswith("displacement")
        for axes, (across, up) in zip(displacements, ((0, 1), (0, 2), (1, 2)), strict=True):
            assert np.allclose(axes.images[0].get_array(), 2.5)
            (grid,) = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
            points = np.concatenate(grid.get_segments())
            shift = (1.5, 0.0, -2.0)
            for column, axis in enumerate((across, up)):
                assert points[:, column].min() == pytest.approx(shift[axis])
                assert points[:, column].max() == pytest.approx(SHAPE[axis] - 1 + shift[axis])

    def test_warped_column_is_the_sampled_volume(self):
        fixed, moving = volumes(1), volumes(1)
        coordinates = geometry.compose(None, torch.full((1, 3, *SHAPE), 0.4))
        figure = draw_matching(fixed, moving, coordinates)
        warped = geometry.sample(moving, coordinates)[0, 0]
        shown = panels(figure)
        middle = SHAPE[2] // 2
        assert np.allclose(shown[6].images[0].get_array(), warped[:, :, middle].T)
        difference = (warped - fixed[0, 0])[:, :, middle].T
        assert np.allclose(shown[12].images[0].get_array(), difference)

    def test_outlines(self):
        figure = draw_matching(
            volumes(1),
            volumes(1),
            geometry.identity_grid(SHAPE),
            fixed_label=labels(1) * (labels(1) == 2),
            moving_label=labels(1),
        )
        # the axial slice shows label 2 alone
        assert outlines(figure, "fixed") == 1
        assert outlines(figure, "moving") == 1
        assert outlines(figure, "moving, warped") == 2
        assert outlines(figure, "difference before") == 0

    @pytest.mark.parametrize(("fixed", "warped", "entries"), [(0, 1, 0), (1, 0, 1), (1, 1, 2)])
    def test_the_legend_explains_the_outlines_that_are_drawn(self, fixed, warped, entries):
        figure = draw_matching(
            volumes(1),
            volumes(1),
            geometry.identity_grid(SHAPE) if warped else None,
            fixed_label=labels(1) if fixed else None,
        )
        legends = [len(legend.get_texts()) for legend in figure.legends]
        assert legends == [entries] * bool(entries)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("value", [0.0, 0.5, math.nan])
    def test_flat_and_diverged_volumes_are_drawn(self, value):
        flat = torch.full((1, 1, *SHAPE), value)
        figure = draw_matching(
            volumes(1),
            volumes(1) * 0 + 0.5,
            geometry.identity_grid(SHAPE) + value,
            fixed_label=torch.ones(1, 1, *SHAPE, dtype=torch.uint8),
            corrupted=flat,
            restored=flat,
        )
        FigureCanvasAgg(figure).draw()

    def test_tensors_of_training_and_half_precision(self):
        fixed = volumes(1).bfloat16().requires_grad_()
        FigureCanvasAgg(draw_matching(fixed, fixed, restored=fixed)).draw()


def pair_batches(count: int, with_labels: bool = True, batch_size: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for index in range(count):
        fixed, moving = torch.rand(2, 1, *SHAPE, generator=generator)
        pair = {
            "fixed": fixed,
            "moving": moving,
            "fixed_name": f"f{index}",
            "moving_name": f"m{index}",
        }
        if with_labels:
            pair |= {"fixed_label": labels(1)[0], "moving_label": labels(1)[0].roll(1, 2)}
        pairs.append(pair)
    return DataLoader(pairs, batch_size=batch_size)


def tiny_task(**options: Any) -> GVSL:
    return GVSL(
        backbone_options={"channels": [8, 16]}, affine_channels=8, learning_rate=1e-2, **options
    )


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def run(
        *callbacks: pl.Callback, task: GVSL | None = None, labelled: bool = True, **options: Any
    ) -> pl.Trainer:
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            **{
                "log_every_n_steps": 1,
                "max_epochs": 2,
                "logger": CSVLogger(tmp_path),
                "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
                **options,
            },
        )
        trainer.fit(task or tiny_task(), pair_batches(2), pair_batches(3, labelled))
        return trainer

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every figure; instead of drawing them, which takes seconds, a blank one."""
    calls: list[dict[str, Any]] = []

    def record(**arguments: Any) -> Figure:
        calls.append(arguments)
        return Figure(figsize=(1, 1))

    monkeypatch.setattr("gvsl_lightning.callbacks.matching_figure.draw_matching", record)
    return calls


def figure_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("**/*.png"))


KINDS = ("displacement", "matching")


def drawn_at(*steps: int, kinds: tuple[str, ...] = KINDS) -> list[str]:
    return [f"{kind}_step={step:06d}.png" for kind in kinds for step in steps]


class TestMatchingFigure:
    def test_files_in_the_runs_folder(self, fit):
        callback = MatchingFigure(num_pairs=1)
        trainer = fit(callback)
        folder = Path(trainer.log_dir) / "figures"
        assert figure_names(folder) == drawn_at(2, 4)
        assert callback.last_path == folder / "matching_step=000004.png"
        pixels = imread(callback.last_path)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.1

    def test_end_of_training_is_drawn_in_any_case(self, fit, drawn, tmp_path):
        fit(MatchingFigure(every_n_epochs=2), max_epochs=3)
        assert figure_names(tmp_path) == drawn_at(2, 6)

    def test_end_is_drawn_from_the_final_weights(self, fit, drawn):
        fit(MatchingFigure(), max_epochs=3, check_val_every_n_epoch=2)
        assert [call["title"] for call in drawn] == ["epoch 1, step 4", "epoch 2, step 6"]

    def test_validation_alone_is_drawn(self, tmp_path, drawn):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            logger=False,
            accelerator="cpu",
            callbacks=[MatchingFigure(every_n_epochs=5)],
            enable_progress_bar=False,
        )
        trainer.validate(tiny_task(), pair_batches(1), verbose=False)
        assert (tmp_path / "figures" / "matching_step=000000.png").is_file()

    def test_nothing_is_drawn_in_the_sanity_check(self, fit, drawn):
        fit(MatchingFigure(), max_steps=0)
        assert drawn == []

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("num_pairs", [1, 2, 5])
    def test_number_of_pairs(self, tmp_path, drawn, num_pairs, batch_size):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            logger=False,
            accelerator="cpu",
            callbacks=[MatchingFigure(num_pairs=num_pairs)],
            enable_progress_bar=False,
        )
        loader = pair_batches(3, batch_size=batch_size)
        trainer.validate(tiny_task(), loader, verbose=False)
        count = min(num_pairs, 3)
        expected = torch.stack([loader.dataset[index]["fixed"] for index in range(count)])
        assert torch.equal(drawn[0]["fixed"], expected)
        assert drawn[0]["names"] == ["m0 onto f0", "m1 onto f1", "m2 onto f2"][:count]
        assert len(drawn[0]["scores"]) == count

    def test_scores_are_the_tasks_own(self, fit, drawn):
        trainer = fit(MatchingFigure(num_pairs=3), max_epochs=1)
        for name in ("ncc_before", "ncc_after", "dice_before", "dice_after", "folded"):
            mean = sum(scores[name] for scores in drawn[-1]["scores"]) / 3
            assert mean == pytest.approx(float(trainer.callback_metrics[f"val/{name}"]), abs=1e-5)

    def test_restores_what_the_task_corrupts(self, tmp_path, drawn):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            logger=False,
            accelerator="cpu",
            callbacks=[MatchingFigure()],
            enable_progress_bar=False,
        )
        task = tiny_task()
        trainer.validate(task, pair_batches(2), verbose=False)
        first = {name: drawn[0][name][:1] for name in ("fixed", "moving")}
        corrupted = task.eval().views_of(first)["corrupted"]
        assert not torch.equal(corrupted, first["fixed"])
        torch.testing.assert_close(drawn[0]["corrupted"][:1], corrupted)
        with torch.no_grad():
            torch.testing.assert_close(drawn[0]["restored"][:1], task.restore(corrupted))

    def test_training_goes_on_as_without(self, fit, drawn):
        weights = []
        for callbacks in ((), (MatchingFigure(),)):
            pl.seed_everything(1, verbose=False)
            task = tiny_task()
            fit(*callbacks, task=task)
            weights.append(task.state_dict())
            weights[-1]["random"] = torch.rand(1)
        assert len(drawn) == 2
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @pytest.mark.parametrize(
        ("options", "left_out", "drawn_names"),
        [
            ({"z_matching": False}, {"coordinates"}, {"corrupted", "restored"}),
            ({"restoration": False}, {"corrupted", "restored"}, {"coordinates"}),
            ({"affine": False}, set(), {"coordinates", "corrupted", "restored"}),
            ({"composition": "affine_first"}, set(), {"coordinates", "corrupted", "restored"}),
        ],
    )
    def test_ablations(self, fit, drawn, tmp_path, options, left_out, drawn_names):
        fit(MatchingFigure(), task=tiny_task(**options), max_epochs=1)
        assert drawn_names <= drawn[0].keys()
        assert not left_out & drawn[0].keys()
        kinds = KINDS if "coordinates" in drawn_names else ("matching",)
        assert figure_names(tmp_path) == drawn_at(2, kinds=kinds)

    def test_without_labels(self, fit, drawn):
        fit(MatchingFigure(), labelled=False, max_epochs=1)
        assert "fixed_label" not in drawn[0]
        assert "dice_after" not in drawn[0]["scores"][0]

    def test_in_mixed_precision(self, fit, drawn):
        fit(MatchingFigure(num_pairs=1), precision="bf16-mixed", max_epochs=1)
        assert torch.isfinite(drawn[0]["coordinates"]).all()
        assert drawn[0]["restored"].dtype == torch.float32

    def test_tensorboard_gets_the_figure(self, fit, drawn, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger = TensorBoardLogger(tmp_path, name="board")
        fit(MatchingFigure(), logger=logger, max_epochs=1)
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert [image.step for image in events.Images("matching")] == [2]
        assert [image.step for image in events.Images("displacement")] == [2]
        assert figure_names(Path(logger.log_dir)) == drawn_at(2)

    def test_wandb_gets_the_figure(self, fit, drawn, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # Lightning sets a variable that W&B looks at once in a process
        logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
        try:
            fit(MatchingFigure(), logger=logger, max_epochs=1)
        finally:
            logger.experiment.finish()
        media = list(tmp_path.glob("wandb/offline-run-*/files/media/images/matching_*.png"))
        assert len(media) == 1
        assert figure_names(tmp_path / "test" / logger.version / "figures") == drawn_at(2)

    @pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"num_pairs": 0}])
    def test_arguments_below_one(self, options):
        with pytest.raises(InputError, match=r"every_n_epochs|num_pairs"):
            MatchingFigure(**options)

    def test_another_task(self, tmp_path):
        trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, callbacks=[MatchingFigure()])
        with pytest.raises(InputError, match="BoringModel is none: remove it"):
            trainer.fit(BoringModel())


class TestResumableCheckpoint:
    @pytest.mark.parametrize("every", ["validation", "epoch"])
    def test_last_is_the_last_although_it_got_worse(self, tmp_path, every):
        class Worsening(GVSL):
            def on_validation_epoch_end(self) -> None:
                self.log("val/score", -float(self.global_step))

            def on_train_epoch_end(self) -> None:
                self.log("val/score", -float(self.global_step))

        checkpoint = ResumableCheckpoint(
            monitor="val/score",
            mode="max",
            filename="best",
            save_last=True,
            save_on_train_epoch_end=every == "epoch",
        )
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=3,
            logger=False,
            accelerator="cpu",
            callbacks=[checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        options = {"channels": [8, 16]}
        trainer.fit(
            Worsening(backbone_options=options, affine_channels=8), pair_batches(4), pair_batches(2)
        )
        saved = {
            name: torch.load(getattr(checkpoint, f"{name}_model_path"), weights_only=True)
            for name in ("best", "last")
        }
        assert (
            saved["best"]["global_step"] * 3 == saved["last"]["global_step"] == trainer.global_step
        )

    def test_best_of_the_run_before_is_remembered_in_a_new_folder(self, tmp_path):
        class Worsening(GVSL):
            def on_validation_epoch_end(self) -> None:
                self.log("val/score", -float(self.current_epoch))

        def run(folder: str, epochs: int, resumed: str | None) -> ResumableCheckpoint:
            checkpoint = ResumableCheckpoint(
                monitor="val/score", mode="max", filename="best", save_last=True
            )
            exporter = BackboneExporter()
            trainer = pl.Trainer(
                default_root_dir=tmp_path / folder,
                max_epochs=epochs,
                logger=False,
                accelerator="cpu",
                callbacks=[checkpoint, exporter],
                enable_progress_bar=False,
            )
            task = Worsening(backbone_options={"channels": [8, 16]}, affine_channels=8)
            trainer.fit(task, pair_batches(2), pair_batches(2), ckpt_path=resumed)
            card = json.loads(exporter.last_path.with_suffix(".json").read_text())
            assert (card["steps"], card["score"]) == (2, 0.0)
            return checkpoint

        first = run("first", 2, None)
        second = run("second", 3, first.last_model_path)
        assert second.best_model_path == first.best_model_path
        assert Path(second.last_model_path).parent != Path(first.last_model_path).parent
        assert Path(first.last_model_path).is_file()

    def test_a_best_file_that_is_gone_does_not_count(self, tmp_path):
        state = {"dirpath": "elsewhere", "best_model_path": str(tmp_path / "gone.ckpt")}
        checkpoint = ResumableCheckpoint(tmp_path, monitor="val/score")
        with pytest.warns(UserWarning, match="dirpath has changed"):
            checkpoint.load_state_dict({**state, "best_model_score": torch.tensor(1.0)})
        assert checkpoint.best_model_score is None


class TestBackboneExporter:
    def test_last_weights(self, fit, capsys):
        callback, task = BackboneExporter(), tiny_task()
        trainer = fit(callback, task=task)
        path = Path(trainer.log_dir) / "backbone.safetensors"
        assert callback.last_path == path
        assert_same_weights(load_backbone(path), task.backbone)
        card = json.loads(path.with_suffix(".json").read_text())
        assert (card["steps"], card["epochs"], card["weights"]) == (4, 2, "end of training")
        assert card["task"]["class"] == "GVSL"
        assert card["task"]["learning_rate"] == 0.01
        assert card["data"]["training_items"] == 2
        assert f"Backbone (end of training, step 4): {path}" in capsys.readouterr().out

    def test_best_checkpoint_is_preferred(self, fit, tmp_path):
        class Worsening(GVSL):
            def on_validation_epoch_end(self) -> None:
                self.log("val/score", -float(self.current_epoch))

        pl.seed_everything(7, verbose=False)
        task = Worsening(backbone_options={"channels": [8, 16]}, affine_channels=8)
        checkpoint = ModelCheckpoint(monitor="val/score", mode="max", save_last=True)
        exporter = BackboneExporter()
        # the exporter comes before the checkpoint in the list
        fit(exporter, checkpoint, task=task, max_epochs=3)
        best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
        exported = load_backbone(exporter.last_path).state_dict()
        for name, value in exported.items():
            assert torch.equal(value, best[f"backbone.{name}"])
        last = task.backbone.state_dict()
        assert any(not torch.equal(value, last[name]) for name, value in exported.items())
        card = json.loads(exporter.last_path.with_suffix(".json").read_text())
        assert card["weights"] == "best checkpoint by val/score"
        assert (card["steps"], card["epochs"], card["score"], card["seed"]) == (2, 1, 0.0, 7)

    def test_data_module_is_described(self, tmp_path):
        class Data(pl.LightningDataModule):
            def __init__(self, root: Path, patch_size: tuple[int, int, int]) -> None:
                super().__init__()
                self.save_hyperparameters()

            def train_dataloader(self) -> DataLoader[Any]:
                return pair_batches(2)

        exporter = BackboneExporter()
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_steps=1,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            callbacks=[exporter],
            enable_progress_bar=False,
        )
        trainer.fit(tiny_task(), Data(Path("volumes"), (8, 8, 8)))
        assert exporter.last_path == tmp_path / "backbone.safetensors"
        assert json.loads((tmp_path / "backbone.json").read_text())["data"] == {
            "class": "Data",
            "root": "volumes",
            "patch_size": [8, 8, 8],
            "training_items": 2,
        }

    def test_fast_dev_run_writes_nothing(self, fit, tmp_path):
        fit(BackboneExporter(), fast_dev_run=True)
        assert list(tmp_path.glob("**/backbone.*")) == []


class TestRunSummary:
    def test_one_line(self, fit, drawn, capsys):
        figure, exporter = MatchingFigure(), BackboneExporter()
        # listed first, yet it knows what the others wrote
        trainer = fit(RunSummary(), figure, exporter)
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("4 steps: ")]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert line == (
            f"4 steps: NCC {metrics['val/ncc_before']:.3f} -> {metrics['val/ncc_after']:.3f}, "
            f"Dice {metrics['val/dice_before']:.3f} -> {metrics['val/dice_after']:.3f}, "
            f"{100 * metrics['val/folded']:.2f} % of voxels folded, "
            f"figure {figure.last_path}, backbone {exporter.last_path}"
        )

    def test_without_labels_and_results(self, fit, capsys):
        fit(RunSummary(), labelled=False)
        out = capsys.readouterr().out
        assert "NCC" in out
        assert "Dice" not in out
        assert "figure" not in out

    def test_without_validation(self, fit, capsys):
        fit(RunSummary(), limit_val_batches=0)
        assert "4 steps: no validation\n" in capsys.readouterr().out


class Recorder(pl.Callback):
    """Gradient norms of each parameter group as the optimiser finds them."""

    def __init__(self) -> None:
        self.norms: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        groups = {
            "backbone": pl_module.backbone,
            "affine_head": pl_module.matching_head.affine_head,
            "deformable_head": pl_module.matching_head.deformable_head,
            "restoration_head": pl_module.restoration_head,
        }
        self.norms.append(
            {
                name: math.sqrt(sum(float((p.grad**2).sum()) for p in group.parameters()))
                for name, group in groups.items()
            }
        )


class TestGradientNorms:
    def test_each_head_has_its_norm(self, fit):
        recorder = Recorder()
        # clipping comes later: what is logged is what the loss gave
        trainer = fit(GradientNorms(), recorder, max_epochs=1, gradient_clip_val=1e-6)
        logged = trainer.logged_metrics
        expected = recorder.norms[-1]
        assert min(expected.values()) > 0
        for name, value in expected.items():
            assert float(logged[f"train/grad_norm_{name}"]) == pytest.approx(value, rel=1e-4)
        names = {name for name in logged if name.startswith("train/grad_norm_")}
        assert names == {f"train/grad_norm_{n}" for n in expected}

    def test_only_on_log_steps(self, fit, monkeypatch):
        steps = []
        original = GVSL.log

        def log(self: GVSL, name: str, *args: Any, **kwargs: Any) -> None:
            if name == "train/grad_norm_backbone":
                steps.append(self.global_step)
            original(self, name, *args, **kwargs)

        monkeypatch.setattr(GVSL, "log", log)
        fit(GradientNorms(), max_epochs=3, log_every_n_steps=3)
        assert steps == [2, 5]

    def test_switched_off_heads_are_left_out(self, fit):
        task = tiny_task(restoration=False, affine=False)
        logged = fit(GradientNorms(), task=task, max_epochs=1).logged_metrics
        names = {name for name in logged if name.startswith("train/grad_norm_")}
        parts = {"backbone", "deformable_head"}
        assert names == {f"train/grad_norm_{n}" for n in parts}


class TestRunFolder:
    def test_is_where_the_checkpoints_lie(self, fit, tmp_path):
        for logger in (CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board"), False):
            checkpoint = ModelCheckpoint()
            trainer = fit(checkpoint, logger=logger, max_epochs=1)
            assert run_folder(trainer) == Path(checkpoint.best_model_path).parents[1]


def assert_same_weights(backbone: Any, other: Any) -> None:
    entries = backbone.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(entries[name], value), name


class TestCases:
    def test_slices_are_turned_to_the_patient_and_keep_their_proportions(self):
        label = torch.zeros(6, 8, 10)
        label[4, 1:3, 7:9] = 1  # towards right, posterior and superior in a RAS volume
        image = label + 0.5
        views = []
        for codes, edges in (("RAS", (1.0, 2.0, 3.0)), ("PSL", (2.0, 3.0, 1.0))):
            turn = nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
            )
            volumes = [
                torch.from_numpy(nibabel.apply_orientation(volume.numpy(), turn).copy())
                for volume in (image, label, label)
            ]
            axes = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
            affine = np.diag([0.0, 0.0, 0.0, 1.0])
            for column, (code, edge) in enumerate(zip(codes, edges, strict=True)):
                axis, sign = axes[code]
                affine[axis, column] = sign * edge
            views.append(CaseDrawing.of(*volumes, affine))
        for one, other in zip(views[0][:3], views[1][:3], strict=True):
            for first, second in zip(one, other, strict=True):
                assert np.array_equal(first, second)
        assert views[0].aspects == views[1].aspects == (2.0, 3.0, 1.5)
        # coronal: superior is up (rows count from below) and the right is on the left
        rows, columns = np.nonzero(views[0].labels[1])
        assert (rows.min(), rows.max()) == (7, 8)
        assert set(columns) == {1}

    def test_sheet_has_a_row_for_each_case(self):
        volume = torch.rand(6, 8, 10)
        case = CaseDrawing.of(volume, volume > 0.5, volume > 0.4, np.eye(4))
        figure = draw_cases([case, case], ["worst: a", "best: b"], ["background", "ball"])
        assert len(figure.axes) == 6
        texts = [text.get_text() for text in figure.texts]
        assert texts == ["worst: a", "best: b"]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert legend == ["ball", "label map", "prediction"]

    def test_no_class_has_the_colour_of_the_line_styles(self):
        volume = torch.rand(6, 8, 10)
        case = CaseDrawing.of(volume, volume > 0.5, volume > 0.4, torch.eye(4))
        figure = draw_cases([case], ["best: b"], [str(index) for index in range(11)])
        *classes, label_map, prediction = [
            to_rgb(line.get_color()) for line in figure.legends[0].get_lines()
        ]
        assert label_map == prediction
        assert prediction not in classes
