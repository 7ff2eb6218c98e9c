"""The loss plot shows what was logged."""

from __future__ import annotations

import logging
import sys

import pytest
from PIL import Image

from llava.train.callbacks import CurvePlot, EarlyStopping, LastValidation
from llava.train.loss_plot import Series, draw_curves, read_series, smooth

BLUE, RED, GRAY = (0x44, 0x77, 0xAA), (0xCC, 0x33, 0x11), (0x88, 0x88, 0x88)
TRAINING = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step} for step in range(1, 40)]
VALIDATION = [{"step": step, "eval_loss": 2 / step, "eval_accuracy": step / 40} for step in range(5, 40, 5)]


@pytest.fixture(scope="module", autouse=True)
def quick_plot():
    """Plots are what is tested here."""


def colors(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        image = image.convert("RGB")
        return image.size, {color: count for count, color in image.getcolors(1 << 24)}


def test_all_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves([*TRAINING, *VALIDATION], tmp_path / "loss.png", best_step=20)
    size, found = colors(tmp_path / "loss.png")
    assert size == (1080, 972)  # three panels
    assert min(found[color] for color in (BLUE, RED, GRAY)) > 200
    assert found[(255, 255, 255)] > 0.8 * size[0] * size[1]


def test_without_validation_no_curve_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(TRAINING, tmp_path / "loss.png")
    size, found = colors(tmp_path / "loss.png")
    assert size == (1080, 708)  # two panels
    assert found[BLUE] > 200
    assert RED not in found


def test_nothing_was_logged(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves([{"step": 1, "train_loss": 3.0}], tmp_path / "loss.png")
    assert BLUE not in colors(tmp_path / "loss.png")[1]


def test_the_later_value_of_a_step_logged_twice():
    rows = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 3, "eval_loss": 1}]
    assert read_series(rows, "loss") == Series([1, 2], [4.0, 3.0])


def test_smoothing_is_a_mean_of_neighbours():
    series = Series(list(range(100)), [float(value) for value in range(100)])
    assert smooth(series).values[50] == 50.0  # of 49, 50 and 51
    assert smooth(series).values[0] == 0.5  # of 0 and 1
    assert smooth(Series([1, 2], [3.0, 9.0])).values == [3.0, 9.0]


class State:
    """What callbacks read of the trainer's."""

    is_world_process_zero, best_global_step, global_step, max_steps = True, None, 7, 7

    def __init__(self, history=()):
        self.log_history = list(history)


class Flags:
    metric_for_best_model, greater_is_better, eval_strategy = "accuracy", True, "steps"

    def __init__(self, output_dir="."):
        self.output_dir = output_dir


class Control:
    should_training_stop = should_evaluate = False


def test_without_matplotlib_the_log_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = 'loss.png needs matplotlib; install it with pip install "llava[train]"'
    with pytest.raises(ImportError) as caught:
        draw_curves(TRAINING, tmp_path / "loss.png")
    assert str(caught.value) == message
    with caplog.at_level(logging.WARNING):
        CurvePlot().on_train_end(Flags(tmp_path), State(TRAINING), Control())
    assert caplog.messages == [message]
    assert list(tmp_path.iterdir()) == []


def test_other_processes_draw_nothing(tmp_path):
    state = State(TRAINING)
    state.is_world_process_zero = False
    CurvePlot().on_train_end(Flags(tmp_path), state, Control())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),  # the same is no better
        ([0.5, 0.6], 1, False),
        ([0.5, 0.6, 0.4], 2, False),
        ([0.5, 0.6, 0.4, 0.5], 2, True),
        ([0.5, 0.6, 0.4, 0.7], 2, False),
    ],
)
@pytest.mark.parametrize("sign", [1, -1], ids=["greater is better", "smaller is better"])
def test_patience(values, patience, stops, sign):
    flags, control = Flags(), Control()
    flags.greater_is_better = sign == 1
    rows = [{"step": step, "eval_accuracy": sign * value} for step, value in enumerate(values)]
    EarlyStopping(patience).on_evaluate(flags, State([*rows, {"step": 9, "loss": 1.0}]), control)
    assert control.should_training_stop is stops


@pytest.mark.parametrize(("strategy", "step", "asks"), [("steps", 7, True), ("steps", 6, False), ("no", 7, False)])
def test_the_last_step_is_validated(strategy, step, asks):
    flags, state = Flags(), State()
    flags.eval_strategy, state.global_step = strategy, step
    assert LastValidation().on_step_end(flags, state, Control()).should_evaluate is asks
