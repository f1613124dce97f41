"""Curves of a run from its tables."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gvsl_lightning.evaluation.run_curves import draw_run


def all_lines(figure: Figure) -> list[Line2D]:
    return [line for axes in figure.axes for line in axes.get_lines()]


def test_losses_and_scores_are_drawn_over_the_steps_that_are_done() -> None:
    rows = [
        {"step": 0.0, "train/loss": 3.0, "train/learning_rate": 1.0},
        {"step": 4.0, "train/loss": 2.0},
        {"step": 4.0, "val/loss": 2.5, "val/dice_before": 0.1, "val/dice_after": 0.6},
    ]
    figure = draw_run(rows)
    assert figure is not None
    losses, _ = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.get_lines()}
    assert drawn == {"train/loss": [[1, 3], [5, 2]], "val/loss": [[5, 2.5]]}
    style = {
        line.get_label(): (line.get_color(), line.get_linestyle()) for line in all_lines(figure)
    }
    assert list(style) == ["train/loss", "val/loss", "val/dice_after", "val/dice_before"]
    assert style["train/loss"][0] == style["val/loss"][0]
    assert style["val/dice_after"][0] == style["val/dice_before"][0]
    assert [style[name][1] for name in style] == ["-", "--", "-", "--"]


def test_terms_of_a_loss_have_colours_of_their_own() -> None:
    terms = ("train/loss", "train/loss_ncc", "val/loss_ncc")
    figure = draw_run([dict.fromkeys(("step", *terms), 1.0)])
    assert figure is not None
    total, ncc, ncc_val = (line.get_color() for line in all_lines(figure))
    assert total != ncc == ncc_val


def test_a_run_without_losses_has_no_curves() -> None:
    assert draw_run([{"step": 0.0, "test/dice": 0.5}]) is None
