"""Curves of one run: its losses, and its validation scores."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gvsl_lightning.evaluation.panels import without_formulas

_SCORES = ("val/ncc_", "val/dice", "val/auroc", "val/prototype_dice", "val/probe_dice")

Rows = Sequence[Mapping[str, float]]


def draw_run(rows: Rows) -> Figure | None:
    """Draw the losses of training and validation, and the validation scores if there are any.

    Args:
        rows: of the run's tables, see :func:`gvsl_lightning.runs.files.read_metrics`: ``step`` and
            the values logged in it.

    Returns:
        A panel of losses and perhaps one of scores, over the number of steps. A loss has one
        colour, and is dashed for the validation; a score has one colour, and is dashed before the
        matching. None if no loss was logged.
    """
    names = sorted({name for row in rows for name in row})
    losses = [name for name in names if name.startswith(("train/loss", "val/loss"))]
    scores = [name for name in names if name.startswith(_SCORES)]
    if not losses:
        return None
    panels = [("losses", losses), *([("validation scores", scores)] if scores else [])]
    figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, drawn) in zip(grid, panels, strict=True):
        _draw(axes, rows, drawn)
        axes.set_title(title, fontsize=9)
    return without_formulas(figure)


def _draw(axes: Axes, rows: Rows, names: Iterable[str]) -> None:
    colours: dict[str, str] = {}
    for name in names:
        subject = name.partition("/")[2].removesuffix("_before").removesuffix("_after")
        colour = colours.setdefault(subject, f"C{len(colours) % 10}")
        # a value is logged in the step that it comes after
        points = [(row["step"] + 1, row[name]) for row in rows if name in row and "step" in row]
        style = "--" if name.startswith("val/loss") or name.endswith("_before") else "-"
        marker = "." if len(points) < 30 else ""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=colour, label=name, marker=marker, lw=1.2)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
