"""Figures of a comparison, and one page that holds them with the tables."""

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gvsl_lightning import __version__
from gvsl_lightning.benchmark.comparison import (
    BUDGET,
    Cells,
    Comparison,
    budget,
    caption,
    headings,
    is_share,
    rows,
    score_cells,
    sizes,
    step_cells,
    steps_title,
)
from gvsl_lightning.benchmark.plan import Plan
from gvsl_lightning.benchmark.training import Run
from gvsl_lightning.evaluation.feature_figures import draw_embedding
from gvsl_lightning.evaluation.panels import without_formulas
from gvsl_lightning.evaluation.probes import (
    embed,
    local_features,
    sample_features,
    silhouette,
    standardise,
)
from gvsl_lightning.runs.files import save_figure, write_text
from gvsl_lightning.weights import load_backbone_weights

NCC = "val/ncc_after"
"""Metric of a pre-training: NCC of the validation pairs after matching."""

Curve = Mapping[int, float]
"""Step -> value."""


def write_report(comparison: Comparison, runs: Sequence[Run], out: Path) -> Path:
    """Draw the figures of the plan and write ``report.html``, which needs no other file.

    Writes ``convergence.png``, ``ncc.png`` and ``tsne.png``, as far as there are results for them.

    Args:
        comparison: the finished runs.
        runs: all runs of the plan.
        out: folder of the figures and the page.

    Returns:
        The page.
    """
    drawn: dict[str, Path] = {}
    for name, (_, draw) in _FIGURES.items():
        figure = draw(comparison, comparison.plan.figures.get(name, ()))
        if figure is not None:
            drawn[name] = out / f"{name}.png"
            save_figure(figure, drawn[name], dpi=110)
    page = out / "report.html"
    write_text(page, report_page(comparison, len(runs), drawn))
    return page


def draw_convergence(comparison: Comparison, methods: Sequence[str]) -> Figure | None:
    """Validation score against step: a panel for each task and mode, mean and range over seeds.

    Returns:
        None if there is nothing to draw, as from the two functions below.
    """
    plan = comparison.plan
    panels = [
        (f"{name}, {mode}", task.monitor, _curves(comparison, methods, task.monitor, name, mode))
        for mode in plan.modes
        for name, task in plan.tasks.items()
    ]
    return _draw_panels(plan, panels, across=len(plan.tasks))


def draw_ncc(comparison: Comparison, methods: Sequence[str]) -> Figure | None:
    """NCC of the validation pairs after matching against the step of pre-training."""
    panel = ("Pre-training", NCC, _curves(comparison, methods, NCC))
    return _draw_panels(comparison.plan, [panel], across=1)


def draw_tsne(comparison: Comparison, methods: Sequence[str]) -> Figure | None:
    """t-SNE of local features of test volumes before any transfer: a panel for each method.

    The volumes are those of the plan's first segmentation, as its network sees them; the backbones
    those of its first seed. Colours name the structures.
    """
    points, classes, volumes = {}, {}, 0
    for method in methods:
        run = _segmentation(comparison, method)
        if run is None:
            continue
        model, data = _build(run)
        if model.hparams["weights"] is not None:
            load_backbone_weights(model.backbone, model.hparams["weights"])
        vectors, labels, volumes = _test_features(model, data)
        inside = labels > 0
        measured = silhouette(vectors[inside], labels[inside])
        points[f"{method}\nsilhouette {measured:.3f}"] = embed(vectors)
        classes = dict(enumerate(data.class_names))
    if not points:
        return None
    title = f"t-SNE of local features, standardised, of {volumes} test volumes"
    return draw_embedding(points, labels, classes, title)


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Curve]],
    colours: Mapping[str, Any],
    factor: float = 1,
) -> None:
    """Draw the mean over seeds of each method, in a band from the lowest to the highest seed.

    Args:
        axes: to draw in.
        curves: method -> the curve of each seed.
        colours: method -> colour.
        factor: of the values.
    """
    for method, seeds in curves.items():
        steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
        values = factor * np.array([[curve[step] for step in steps] for curve in seeds])
        colour = colours[method]
        marker = "o" if len(steps) < 2 else ""
        axes.plot(steps, values.mean(axis=0), color=colour, label=method, marker=marker)
        if len(seeds) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def report_page(comparison: Comparison, planned: int, figures: Mapping[str, Path]) -> str:
    """HTML of the tables and figures, and of pairs that the pre-trainings matched.

    Args:
        comparison: the finished runs.
        planned: number of all runs of the plan.
        figures: name -> picture.
    """
    plan = comparison.plan
    parts = [
        f"<p>{len(comparison.results)} of {planned} runs; gvsl_lightning {__version__}. "
        f"{escape(sizes(comparison))}</p>",
        "<h2>Scores</h2>",
        _table(comparison, score_cells),
        f"<p>{escape(caption(plan))}</p>",
        f"<h2>{escape(steps_title(plan))}</h2>",
        _table(comparison, step_cells),
        "<h2>Cost of all seeds together</h2>",
        _html_table(["method", *BUDGET], budget(comparison)),
    ]
    for name, path in figures.items():
        title, _ = _FIGURES[name]
        parts.append(f"<h2>{escape(title)}</h2>{_image(path, title)}")
    matched = _matched_pairs(comparison)
    if matched:
        parts.append("<h2>Pairs that the pre-trainings matched</h2>")
    for run, path in matched:
        parts.append(f"<h3>{escape(str(run))}</h3>{_image(path, f'pairs matched by {run.method}')}")
    return _PAGE.format(body="\n".join(parts))


_FIGURES: dict[str, tuple[str, Callable[[Comparison, Sequence[str]], Figure | None]]] = {
    "convergence": (
        "Validation while training on labels, mean and range over seeds",
        draw_convergence,
    ),
    "ncc": ("Matching while pre-training, mean and range over seeds", draw_ncc),
    "tsne": ("Local features of test volumes", draw_tsne),
}
"""Figure -> title and function."""

_VOLUMES = 8
_SAMPLES = 100
"""Voxels of each structure, from all volumes together: t-SNE takes long for many points."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Comparison of pre-trained backbones</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid GrayText; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; background: white; border-radius: 4px; }}
</style>
</head>
<body>
<h1>Comparison of pre-trained backbones</h1>
{body}
</body>
</html>
"""


def _curves(
    comparison: Comparison, methods: Sequence[str], monitor: str, task: str = "", mode: str = ""
) -> dict[str, list[Curve]]:
    curves: dict[str, list[Curve]] = {}
    for method in methods:
        for result in comparison.of(method, task, mode).values():
            curve = {
                int(row["step"]) + 1: row[monitor]
                for row in result["validations"]
                if monitor in row
            }
            if curve:
                curves.setdefault(method, []).append(curve)
    return curves


def _draw_panels(
    plan: Plan, panels: Sequence[tuple[str, str, dict[str, list[Curve]]]], across: int
) -> Figure | None:
    """Draw title, metric and curves of each panel; None if there are no curves."""
    if not any(curves for *_, curves in panels):
        return None
    down = len(panels) // across
    width = 3.4 * across + 0.4
    figure = Figure(figsize=(width, 2.7 * down + 0.5), layout="constrained")
    palette = mpl.colormaps["tab20" if len(plan.methods) > 10 else "tab10"]
    colours = {method: palette(number) for number, method in enumerate(plan.methods)}
    handles: dict[str, Any] = {}
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (title, metric, curves) in zip(grid.flat, panels, strict=True):
        draw_curves(axes, curves, colours, 100 if is_share(metric) else 1)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(f"{metric}{' %' if is_share(metric) else ''}", fontsize=8)
        drawn, labels = axes.get_legend_handles_labels()
        handles |= zip(labels, drawn, strict=True)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=min(len(handles), 4, int(width // 1.8)),  # as many as fit
        fontsize=8,
        frameon=False,
    )
    return without_formulas(figure)


def _segmentation(comparison: Comparison, method: str) -> Run | None:
    """The method's first run of the first segmentation."""
    for task in comparison.plan.tasks:
        for run, result in comparison.results.items():
            if (run.task, run.method) == (task, method):
                names = (name for case in result["cases"] for name in case)
                if any(name.startswith("dice ") for name in names):
                    return run
    return None


def _test_features(model: Any, data: Any) -> tuple[Tensor, Tensor, int]:
    """Vectors of sampled voxels of the test volumes, their labels, and the number of volumes."""
    data.setup("test")
    cases = data.split.test[:_VOLUMES]
    volumes = data.configure_dataset(cases, "val")  # labels on the grid of the images
    share = -(-_SAMPLES // max(len(cases), 1))
    sampled = []
    for place in range(len(cases)):
        item = volumes[place]
        features = local_features(model.backbone, item["image"], model.hparams["window_size"])
        sampled.append(sample_features(standardise(features), item["label"], share, place))
    vectors, labels = (torch.cat(parts) for parts in zip(*sampled, strict=True))
    return vectors, labels, len(cases)


def _build(run: Run) -> tuple[Any, Any]:
    """Build the task and the data module of a run as its process does."""
    from gvsl_lightning.cli.main import CommandLine  # which imports the whole package

    logging.disable(logging.WARNING)  # a trainer logs its devices
    try:
        line = CommandLine([*run.words, *_ON_ANY_MACHINE], run=False)
    finally:
        logging.disable(logging.NOTSET)
    return line.model, line.datamodule


_ON_ANY_MACHINE = (
    "--trainer.logger=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
)


def _table(comparison: Comparison, cells: Cells) -> str:
    plan = comparison.plan
    groups = "".join(f'<th colspan="{len(plan.tasks)}">{escape(mode)}</th>' for mode in plan.modes)
    names = "".join(f"<th>{escape(name)}</th>" for _ in plan.modes for name in headings(plan))
    body = []
    for method, row in rows(comparison, cells).items():
        texts = [
            f"<td>{f'<b>{escape(cell.text)}</b>' if cell.bold else escape(cell.text)}"
            f"{escape(cell.rest)}</td>"
            for cell in row
        ]
        body.append(f"<tr><td>{escape(method)}</td>{''.join(texts)}</tr>")
    return (
        f'<div class="wide"><table><tr><th></th>{groups}</tr><tr><th>method</th>{names}</tr>'
        f"{''.join(body)}</table></div>"
    )


def _html_table(heading: Sequence[str], cells: Mapping[str, Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(name)}</th>" for name in heading)
    body = "".join(
        f"<tr><td>{escape(method)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for method, row in cells.items()
    )
    return f'<div class="wide"><table><tr>{first}</tr>{body}</table></div>'


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'


def _matched_pairs(comparison: Comparison) -> list[tuple[Run, Path]]:
    """The last picture of each method's first pre-training that left one."""
    found: dict[str, tuple[Run, Path]] = {}
    for run, result in comparison.results.items():
        pictures = sorted((run.log_folder / "figures").glob("matching_step=*.png"))
        if not run.task and pictures and any(NCC in row for row in result["validations"]):
            found.setdefault(run.method, (run, pictures[-1]))
    return list(found.values())
