"""Draw `loss.png`: training and validation loss, accuracy and learning rate over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import PLOT_FILE

_TRAIN, _VALIDATION, _RATE, _GRID = "#4477aa", "#cc3311", "#888888", "#dddddd"
_REACH = 0.01  # share of the logged steps, on either side, that the smoothed training loss averages


class Series(NamedTuple):
    """Points of one curve."""

    steps: list[int]
    values: list[float]


def read_series(history: Sequence[Mapping[str, Any]], key: str) -> Series:
    """Return the points logged as `key`; the later value if a step was logged twice."""
    points = {row["step"]: row[key] for row in history if key in row}
    steps = sorted(points)
    return Series(steps, [points[step] for step in steps])


def smooth(series: Series) -> Series:
    """Return the moving average over 1 % of the points on either side."""
    reach, values = round(_REACH * len(series.values)), series.values
    around = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return Series(series.steps, [sum(part) / len(part) for part in around])


def draw_curves(history: Sequence[Mapping[str, Any]], path: str | Path, *, best_step: int | None = None) -> None:
    """Draw the curves of a run's log.

    Args:
        history: rows `{"step": ..., "loss": ..., "learning_rate": ..., "eval_loss": ..., "eval_accuracy": ...}`, each
            with some of the keys; the accuracy is 0..1.
        path: of the PNG file.
        best_step: step of the best checkpoint, marked; None = not marked.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{PLOT_FILE} needs matplotlib; install it with pip install "llava[train]"') from error
    accuracy = read_series(history, "eval_accuracy")
    heights = [3, 2, 1] if accuracy.steps else [3, 1]
    figure = Figure(figsize=(9, 1.5 + 1.1 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _draw_losses(panels[0], history, best_step)
    if accuracy.steps:
        _draw_accuracy(panels[1], accuracy, best_step)
    rate = read_series(history, "learning_rate")
    panels[-1].plot(rate.steps, rate.values, color=_RATE)
    panels[-1].set_ylabel("learning rate")
    panels[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    panels[-1].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    panels[-1].locator_params(axis="x", integer=True)
    for panel in panels:
        panel.grid(color=_GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _draw_losses(panel: Any, history: Sequence[Mapping[str, Any]], best_step: int | None) -> None:
    train, validation = read_series(history, "loss"), read_series(history, "eval_loss")
    if train.steps:
        panel.plot(*train, color=_TRAIN, alpha=0.35, linewidth=0.8)
        panel.plot(*smooth(train), color=_TRAIN, linewidth=1.8, label="training")
    if validation.steps:
        panel.plot(*validation, color=_VALIDATION, marker="o", markersize=4, label="validation")
    _mark_best(panel, best_step)
    panel.set_ylabel("loss")
    panel.set_ylim(bottom=0)
    if train.steps or validation.steps:
        panel.legend(frameon=False, loc="upper right")


def _draw_accuracy(panel: Any, accuracy: Series, best_step: int | None) -> None:
    percent = [100 * value for value in accuracy.values]
    panel.plot(accuracy.steps, percent, color=_VALIDATION, marker="o", markersize=4)
    place = len(percent) - 1 if best_step not in accuracy.steps else accuracy.steps.index(best_step)
    panel.annotate(
        f"{percent[place]:.1f} %",
        (accuracy.steps[place], percent[place]),
        textcoords="offset points",
        xytext=(0, 8),
        ha="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    _mark_best(panel, best_step)
    panel.set_ylabel("validation\naccuracy, %")
    panel.margins(y=0.25)


def _mark_best(panel: Any, best_step: int | None) -> None:
    if best_step is not None:
        panel.axvline(best_step, color="black", linestyle=":", linewidth=1.2, label=f"best, step {best_step}")
