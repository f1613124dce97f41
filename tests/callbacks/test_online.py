"""Callbacks that watch the features of a run, and the figures they draw."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from gvsl_lightning.callbacks import (
    FeatureFigure,
    OnlineProbe,
    draw_embedding,
    draw_features,
)
from gvsl_lightning.callbacks import online as module
from gvsl_lightning.errors import InputError
from gvsl_lightning.evaluation.probes import (
    class_prototypes,
    fit_linear_probe,
    local_features,
    nearest_neighbours,
    nearest_prototype,
    sample_features,
    sampling_weights,
    silhouette,
    standardise,
)
from gvsl_lightning.evaluation.scores import dice_scores
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.tasks import GVSL

SHAPE = (8, 12, 18)


def pairs(names: str = "cadb", labelled: bool = True, batch_size: int = 3) -> DataLoader[Any]:
    """Pairs whose fixed volumes are bright where their labels 3 and 7 are."""
    items = []
    for index, name in enumerate(names):
        generator = torch.Generator().manual_seed(ord(name))
        image, moving = 0.3 * torch.rand(2, 1, *SHAPE, generator=generator)
        label = torch.zeros(1, *SHAPE, dtype=torch.int32)
        label[:, 1:4, 2:9, 2 : 5 + ord(name) % 3] = 3
        label[:, 5:7, 2:9, 2:8] = 7
        item = {"fixed": image + label / 10, "moving": moving}
        item |= {"fixed_name": name, "moving_name": str(index)}
        if labelled:
            item |= {"fixed_label": label, "moving_label": label}
        items.append(item)
    return DataLoader(items, batch_size=batch_size)


def tiny_task() -> GVSL:
    return GVSL(
        backbone="basic_unet",
        backbone_options={"features": [8, 8, 8, 8, 8, 8], "dropout": 0.1},
        affine_channels=8,
        learning_rate=1e-2,
    )


class PlainTask(pl.LightningModule):
    """Any task with a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_backbone("unet", channels=[4, 8])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.backbone(batch["fixed"]).local_features.square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def run(*callbacks: pl.Callback, task: Any = None, data: Any = None, **options: Any) -> Any:
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **{"max_epochs": 1, "logger": False, "log_every_n_steps": 1, **options},
        )
        trainer.fit(task or tiny_task(), pairs(), pairs() if data is None else data)
        return trainer

    return run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every drawing of features."""
    calls: list[dict[str, Any]] = []

    def record(volumes: Any, colours: Any, **arguments: Any) -> Any:
        calls.append({"volumes": volumes, "colours": colours, **arguments})
        return draw_features(volumes[:1], {key: value[:1] for key, value in colours.items()})

    monkeypatch.setattr(module, "draw_features", record)
    monkeypatch.setattr(module, "embed", lambda vectors: vectors[:, :2].numpy())
    return calls


class TestOnlineProbe:
    def test_a_run_does_not_notice_the_callbacks(self, fit, figures):
        weights = []
        for callbacks in ((), (OnlineProbe(steps=2), FeatureFigure(num_volumes=2, points=20))):
            pl.seed_everything(1, verbose=False)
            task = tiny_task()
            fit(*callbacks, task=task, max_epochs=2)
            weights.append({**task.state_dict(), "random": torch.rand(1)})
            weights[-1]["numpy"] = torch.tensor(np.random.random())  # noqa: NPY002
        assert len(figures) == 2
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_trains_on_the_first_half_by_name_and_tests_on_the_other(self, fit):
        task = tiny_task()
        names = ["left", "right"]
        trainer = fit(
            OnlineProbe(steps=40, class_names=names),
            task=task,
            data=pairs("cadbca"),
        )
        volumes = {item["fixed_name"]: item for item in pairs().dataset}
        features, labels = [], []
        for name in "abcd":
            features.append(standardise(local_features(task.backbone, volumes[name]["fixed"])))
            label = volumes[name]["fixed_label"]
            labels.append((label == 3).long() + 2 * (label == 7).long())
        probe = fit_linear_probe(features[:2], labels[:2], 3, steps=40)
        dice = torch.stack(
            [
                dice_scores(probe(feature[None]).argmax(1), label, (1, 2))[0]
                for feature, label in zip(features[2:], labels[2:], strict=True)
            ]
        ).mean(dim=0)
        logged = {name: float(trainer.callback_metrics[f"val/probe_dice_{name}"]) for name in names}
        assert list(logged.values()) == pytest.approx(dice.tolist(), abs=1e-5)
        assert trainer.callback_metrics["val/probe_dice"] == pytest.approx(
            float(dice.mean()), abs=1e-5
        )
        assert dice.mean() > 0.3

    def test_every_second_validation_also_after_resuming(self, fit, monkeypatch):
        probed = []
        monkeypatch.setattr(
            OnlineProbe, "_evaluate", lambda self, trainer, backbone: probed.append(1) or {}
        )
        callback = OnlineProbe(every_n_validations=2)
        fit(callback, task=PlainTask(), max_epochs=3)
        assert len(probed) == 2
        resumed = OnlineProbe(every_n_validations=2)
        resumed.load_state_dict(callback.state_dict())
        fit(resumed, task=PlainTask(), max_epochs=1)
        assert len(probed) == 2
        fit(resumed, task=PlainTask(), max_epochs=1)
        assert len(probed) == 3

    def test_validation_alone(self, tmp_path):
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            callbacks=[OnlineProbe(steps=1)],
            enable_progress_bar=False,
        )
        (metrics,) = trainer.validate(PlainTask(), pairs(), verbose=False)
        assert {"val/probe_dice", "val/probe_dice_3", "val/probe_dice_7"} <= metrics.keys()

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            (pairs(labelled=False), {}, "two validation volumes, all with labels"),
            (pairs("aa"), {}, "two validation volumes"),
            (pairs(), {"class_names": ["a"]}, r"1 class_names for 2 structures"),
        ],
    )
    def test_unusable_data(self, fit, data, options, message):
        with pytest.raises(InputError, match=message):
            fit(OnlineProbe(**options), task=PlainTask(), data=data)

    @pytest.mark.parametrize("options", [{"steps": 0}, {"num_volumes": 1}, {"learning_rate": 0}])
    def test_arguments_out_of_range(self, options):
        with pytest.raises(InputError, match=r"steps|num_volumes|learning_rate"):
            OnlineProbe(**options)


class TestFeatureFigure:
    def test_files_of_both_kinds(self, fit, tmp_path):
        callback = FeatureFigure(num_volumes=2, points=30)
        trainer = fit(callback, task=PlainTask(), logger=CSVLogger(tmp_path))
        folder = Path(trainer.log_dir) / "figures"
        assert callback.last_paths == (
            folder / "features_step=000002.png",
            folder / "tsne_step=000002.png",
        )
        for path in callback.last_paths:
            pixels = imread(path)
            assert min(pixels.shape[:2]) > 300
            assert pixels[..., :3].std() > 0.05

    def test_different_volumes_with_their_labels(self, fit, figures):
        fit(FeatureFigure(num_volumes=3), task=PlainTask(), data=pairs("bbacd"))
        (call,) = figures
        assert call["names"] == ["b", "a", "c"]
        assert call["class_names"] == {1: "3", 2: "7"}
        assert [label.unique().tolist() for label in call["labels"]] == [[0, 1, 2]] * 3
        expected = [item["fixed"] for item in pairs("bac").dataset]
        assert all(torch.equal(*both) for both in zip(call["volumes"], expected, strict=True))
        ((heading, colours),) = call["colours"].items()
        assert heading.startswith("local features")
        assert [colour.shape for colour in colours] == [(3, *SHAPE)] * 3

    def test_logs_what_the_first_volume_by_name_tells_of_the_others(self, fit, figures):
        task = PlainTask()
        trainer = fit(
            FeatureFigure(points=40, class_names=["left", "right"]), task=task, data=pairs("dbdca")
        )
        volumes = {item["fixed_name"]: item for item in pairs("dbc").dataset}
        features, labels = {}, {}
        for name, volume in volumes.items():
            features[name] = standardise(local_features(task.backbone, volume["fixed"]))
            label = volume["fixed_label"]
            labels[name] = (label == 3).long() + 2 * (label == 7).long()
        references, classes = sample_features(features["b"], labels["b"], 40)
        weights = sampling_weights(classes, labels["b"])
        prototypes = class_prototypes(features["b"], labels["b"])
        dice = {"prototype": [], "neighbours": []}
        for name in "cd":
            found = nearest_prototype(features[name], *prototypes)
            dice["prototype"].append(dice_scores(found[None], labels[name], (1, 2))[0])
            found = nearest_neighbours(features[name], references, classes, weights=weights)
            dice["neighbours"].append(dice_scores(found[None], labels[name], (1, 2))[0])
        for way, scores in dice.items():
            expected = torch.stack(scores).mean(dim=0)
            logged = [
                float(trainer.callback_metrics[f"val/{way}_dice{suffix}"])
                for suffix in ("_left", "_right", "")
            ]
            assert logged == pytest.approx([*expected.tolist(), float(expected.mean())], abs=1e-5)
            assert expected.max() > 0.05
        samples = [
            sample_features(features[name], labels[name], 14, seed)
            for seed, name in enumerate("dbc")
        ]
        vectors, drawn = (torch.cat(parts) for parts in zip(*samples, strict=True))
        expected = silhouette(vectors[drawn > 0], drawn[drawn > 0])
        assert float(trainer.callback_metrics["val/silhouette"]) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("data", "sentence", "logged", "files"),
        [
            (pairs(labelled=False), "no Dice and silhouette", set(), ["features"]),
            (pairs("aa"), "no Dice, since", {"val/silhouette"}, ["features", "tsne"]),
        ],
    )
    def test_warns_once_of_scores_that_are_missing(
        self, fit, figures, data, sentence, logged, files
    ):
        callback = FeatureFigure(points=20)
        with pytest.warns(UserWarning, match=sentence) as warnings:
            trainer = fit(callback, task=PlainTask(), data=data, max_epochs=2)
        assert sum("FeatureFigure" in str(warning.message) for warning in warnings) == 1
        assert len(figures) == 2
        assert len(figures[0]["labels"]) == ("tsne" in files)
        assert [path.name.partition("_")[0] for path in callback.last_paths] == files
        assert trainer.callback_metrics.keys() == logged

    def test_every_second_validation_but_not_the_sanity_check(self, fit, figures, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger = TensorBoardLogger(tmp_path, name="board")
        callback = FeatureFigure(every_n_validations=2, points=20)
        fit(callback, task=PlainTask(), max_epochs=3, logger=logger)
        assert [call["title"] for call in figures] == ["step 2", "step 6"]
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        for name in ("features", "tsne"):
            assert [image.step for image in events.Images(name)] == [2, 6]

    def test_shared_parameters(self):
        trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy())
        with pytest.raises(InputError, match="ModelParallelStrategy"):
            FeatureFigure().setup(trainer, PlainTask(), "fit")

    def test_another_task(self, tmp_path):
        trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, callbacks=[FeatureFigure()])
        with pytest.raises(InputError, match="BoringModel has none: remove it"):
            trainer.fit(BoringModel())

    def test_other_data(self):
        trainer: Any = type("T", (), {"is_global_zero": True, "sanity_checking": False})
        with pytest.raises(InputError, match=r"needs validation pairs .* got image, label"):
            FeatureFigure().on_validation_batch_end(
                trainer, tiny_task(), None, {"image": 0, "label": 0}, 0
            )

    @pytest.mark.parametrize("options", [{"every_n_validations": 0}, {"points": 3}])
    def test_arguments_out_of_range(self, options):
        with pytest.raises(InputError, match=r"every_n_validations|points"):
            FeatureFigure(**options)


def label_map(shape: tuple[int, ...]) -> Tensor:
    label = torch.zeros(1, *shape, dtype=torch.int64)
    label[0, 1:3, 2:4, 5:7] = 2
    return label


class TestDrawFeatures:
    def test_slices_pass_through_the_structures(self):
        shapes = [(8, 12, 10), (9, 7, 11)]
        volumes = [torch.rand(1, *shape) for shape in shapes]
        colours = [torch.rand(3, *shape) for shape in shapes]
        figure = draw_features(
            volumes,
            {"here": colours, "there": colours},
            labels=[label_map(shape) for shape in shapes],
            class_names={2: "heart"},
            names=["first", "second"],
        )
        panels = [axes for axes in figure.axes if axes.images]
        assert [axes.get_title() for axes in panels if axes.get_title()] == [
            "image\n",
            "here",
            "there",
        ] * 2
        middle = (2, 2, 6)  # of places 1 and 2, 2 and 3, 5 and 6, rounded half to even
        for block, (volume, colour) in enumerate(zip(volumes, colours, strict=True)):
            for column, shown in enumerate(
                (volume[0], colour.movedim(0, -1), colour.movedim(0, -1))
            ):
                for row, cut in enumerate((2, 1, 0)):
                    axes = panels[block * 9 + column * 3 + row]
                    expected = shown.select(cut, middle[cut]).transpose(0, 1)
                    assert np.allclose(axes.images[0].get_array(), expected)
                    assert len(axes.collections) == 1
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["heart"]

    def test_without_labels_through_the_centre(self):
        colour = torch.rand(3, *SHAPE)
        figure = draw_features([torch.ones(1, *SHAPE)], {"here": [colour]})
        panel = [axes for axes in figure.axes if axes.images][3]
        expected = colour[:, :, :, 8].permute(2, 1, 0)  # the mean place 8.5, rounded half to even
        assert np.allclose(panel.images[0].get_array(), expected)
        assert not figure.legends


class TestDrawEmbedding:
    def test_every_point_in_the_colour_of_its_structure(self):
        labels = torch.tensor([0, 1, 2, 12, 13, 1])
        points = np.arange(12.0).reshape(6, 2)
        names = {0: "background", 1: "a", 2: "b", 12: "c", 13: "d"}
        figure = draw_embedding({"left": points, "right": points + 1}, labels, names)
        legend = {
            name.get_text(): tuple(handle.get_color())
            for name, handle in zip(
                figure.legends[0].get_texts(), figure.legends[0].get_lines(), strict=True
            )
        }
        assert len(set(legend.values())) == 5
        for axes, shift in zip(figure.axes, (0, 1), strict=True):
            (scatter,) = axes.collections
            for place, colour in zip(scatter.get_offsets(), scatter.get_facecolors(), strict=True):
                index = int((place[0] - shift) / 2)
                assert tuple(place) == (points[index, 0] + shift, points[index, 1] + shift)
                assert tuple(colour) == pytest.approx(legend[names[int(labels[index])]])

    @pytest.mark.parametrize("panels", [1, 3])
    def test_long_legends_stay_inside(self, panels):
        names = {value: f"structure number {value}" for value in range(28)}
        points = {str(panel): np.zeros((28, 2)) for panel in range(panels)}
        figure = draw_embedding(points, torch.arange(28), names, "title")
        FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent().transformed(figure.transFigure.inverted())
        assert box.x0 > 0
        assert box.x1 < 1
        assert box.y0 > figure.axes[0].get_position().y1
        assert box.y1 < 1
