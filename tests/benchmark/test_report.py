"""Figures of a comparison and the page that holds them."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from gvsl_lightning.benchmark import report
from gvsl_lightning.benchmark.comparison import Comparison
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.nn.backbones import build_backbone
from gvsl_lightning.weights import save_backbone
from plans import TASK, finish, write

CONFIGS = Path(__file__).parents[2] / "configs"
FIGURES = {"convergence": ["GVSL", "<b>"], "ncc": ["GVSL", "<b>"], "tsne": ["<b>", "GVSL"]}


def comparison(folder: Path, validations: bool = True, **changes: Any) -> Comparison:
    """Finished runs of two methods, tasks and seeds."""
    methods = {"<b>": {}, "GVSL": {"config": "pretrain.yaml"}}
    content = {
        "methods": methods,
        "tasks": {"hearts": TASK, "lungs & more": TASK},
        "modes": {"linear": {"model.init_args.mode": "linear"}},
        "baseline": "<b>",
        "figures": FIGURES,
    }
    plan = Plan.read(write(folder, **content | changes))
    runs = plan.runs(folder / "out", [])
    for run in runs:
        score = 0.7 if run.method == "GVSL" else 0.5
        curve = (score / 2 - 0.15, score - 0.2) if run.task else (0.3, 0.5, 0.6)
        finish(run, [score] * 8, curve if validations else ())
    return Comparison(plan, runs)


def lines(figure: Figure, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(round(x), round(y, 6)) for x, y in line.get_xydata().tolist()]
        for line in figure.axes[panel].lines
    }


def test_convergence_has_a_panel_for_each_task_in_percent(tmp_path: Path) -> None:
    figure = report.draw_convergence(comparison(tmp_path), FIGURES["convergence"])
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["hearts, linear", "lungs & more, linear"]
    for panel in (0, 1):
        drawn = lines(figure, panel)
        assert drawn["GVSL"] == [(10, 20), (20, 50)]
        assert drawn["<b>"] == [(10, 10), (20, 30)]


def test_ncc_is_that_of_the_pretrainings(tmp_path: Path) -> None:
    figure = report.draw_ncc(comparison(tmp_path), FIGURES["ncc"])
    assert figure is not None
    assert lines(figure) == {"GVSL": [(10, 0.3), (20, 0.5), (30, 0.6)]}


def test_the_band_reaches_from_the_lowest_to_the_highest_seed() -> None:
    figure = Figure()
    axes = figure.subplots()
    report.draw_curves(axes, {"a": [{1: 0.0, 2: 1.0, 3: 5.0}, {1: 2.0, 2: 2.0}]}, {"a": "red"})
    assert lines(figure) == {"a": [(1, 1), (2, 1.5)]}
    (band,) = axes.collections
    edges = band.get_paths()[0].vertices
    for step, low, high in ((1, 0, 2), (2, 1, 2)):
        assert {y for x, y in edges if x == step} == {low, high}


def test_nothing_named_or_measured_is_not_drawn(tmp_path: Path) -> None:
    given = comparison(tmp_path, validations=False, figures={})
    assert report.draw_convergence(given, ["GVSL"]) is None
    assert report.draw_ncc(given, ["GVSL"]) is None
    assert report.draw_convergence(comparison(tmp_path), []) is None
    assert report.draw_tsne(given, []) is None
    out = tmp_path / "report"
    out.mkdir()
    page = report.write_report(given, list(given.results), out)
    assert [path.name for path in out.iterdir()] == [page.name]
    assert "<img" not in page.read_text(encoding="utf-8")


def test_page_holds_everything_and_escapes_names(tmp_path: Path) -> None:
    given = comparison(tmp_path, figures={"ncc": ["GVSL"], "convergence": ["<b>"]})
    pretraining = next(run for run in given.results if not run.task)
    pictures = pretraining.backbone.parent / "figures"
    pictures.mkdir(parents=True)
    for step, text in (("000001", b"first"), ("000020", b"last")):
        (pictures / f"matching_step={step}.png").write_bytes(text)
    page = report.write_report(given, list(given.results), tmp_path).read_text(encoding="utf-8")
    assert "<td>&lt;b&gt;</td>" in page
    assert "lungs &amp; more" in page
    assert "<b>70.0 ± 0.0</b>* (+20.0)" in page
    drawn = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)\"", page)]
    assert drawn == [
        (tmp_path / "convergence.png").read_bytes(),
        (tmp_path / "ncc.png").read_bytes(),
        b"last",
    ]
    assert not re.search(r"https?:|<script|<link|url\(|src=\"(?!data:)", page)
    assert "color-scheme: light dark" in page


def test_a_classification_has_no_tsne(tmp_path: Path) -> None:
    given = comparison(tmp_path)
    for result in given.results.values():
        result["cases"] = [{"name": "0", "label": "a"}]
    assert report.draw_tsne(given, FIGURES["tsne"]) is None


def test_tsne_of_test_volumes_of_a_segmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = comparison(tmp_path)
    config = yaml.safe_load(
        (CONFIGS / "finetune" / "phantom_segmentation.yaml").read_text(encoding="utf-8")
    )
    config["model"]["init_args"]["backbone_options"] = {"channels": [8, 16]}
    config["data"]["init_args"] |= {"size": [16, 16, 16], "count": 16, "val": 2, "test": 3}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(5)  # other weights than the untrained backbone has by its seed
    backbone = build_backbone("unet", channels=[8, 16])
    pretraining = next(run for run in given.results if not run.task)
    save_backbone(backbone, pretraining.backbone, {})
    monkeypatch.setattr(report, "_SAMPLES", 30)
    embedded: list[np.ndarray] = []

    def embed(vectors: Any) -> np.ndarray:
        embedded.append(vectors.numpy())
        return vectors.numpy()[:, :2]

    monkeypatch.setattr(report, "embed", embed)
    figure = report.draw_tsne(given, FIGURES["tsne"])
    assert figure is not None
    titles = [axes.get_title().splitlines()[0] for axes in figure.axes]
    assert titles == ["<b>", "GVSL"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == config["model"]["init_args"]["class_names"]
    untrained, trained = embedded
    assert untrained.shape == trained.shape
    assert not np.allclose(untrained, trained)
    assert len(untrained) > 100
    # no more of a structure than was asked for, from three volumes
    assert len(untrained) <= 30 * len(names)
