"""Curves of a run from its tables."""

from gvsl_lightning.evaluation.run_curves import draw_run


def test_losses_and_scores_are_drawn_over_the_steps_that_are_done() -> None:
    rows = [
        {"step": 0.0, "train/loss": 3.0, "train/learning_rate": 1.0},
        {"step": 4.0, "train/loss": 2.0},
        {"step": 4.0, "val/loss": 2.5, "val/dice_before": 0.1, "val/dice_after": 0.6},
    ]
    figure = draw_run(rows)
    assert figure is not None
    losses, scores = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.get_lines()}
    assert drawn == {"train/loss": [[1, 3], [5, 2]], "val/loss": [[5, 2.5]]}
    assert [line.get_label() for line in scores.get_lines()] == [
        "val/dice_after",
        "val/dice_before",
    ]


def test_a_run_without_losses_has_no_curves() -> None:
    assert draw_run([{"step": 0.0, "test/dice": 0.5}]) is None
