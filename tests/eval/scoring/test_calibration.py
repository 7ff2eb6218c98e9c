"""Confidence from what inference notes, and calibration by hand."""

import math

import pytest

from llava.eval.scoring.calibration import (
    RunnerUp,
    answer_confidence,
    answer_runner_up,
    calibrate,
    find_confidence_problem,
)

SCORES = {"logprob": math.log(0.5), "first_token_logprob": math.log(0.6), "runner_up": "no",
          "runner_up_logprob": math.log(0.3)}  # fmt: skip
CHOICES = {"choices": {"yes": math.log(0.3), "no": math.log(0.1), "maybe": -math.inf}, "logprob": math.log(0.3)}


def test_confidence_is_the_probability_of_the_whole_answer():
    assert answer_confidence(SCORES) == pytest.approx(0.5)
    assert answer_runner_up(SCORES, "yes") == RunnerUp("no", pytest.approx(0.3))


def test_among_choices_it_is_the_share_of_the_list():
    assert answer_confidence(CHOICES) == pytest.approx(0.75)
    assert answer_runner_up(CHOICES, "yes") == RunnerUp("no", pytest.approx(0.25))
    assert answer_runner_up({"choices": {"yes": -1.0}, "logprob": -1.0}, "yes") is None


def test_impossible_and_very_long_answers():
    assert answer_confidence({"logprob": -math.inf, "choices": {"a": -math.inf}}) == 0.0
    assert answer_confidence({"logprob": -2000.0}) == 0.0
    assert answer_confidence({"logprob": -2000.0, "choices": {"a": -2000.0, "b": -2001.0}}) == pytest.approx(0.7310586)
    assert answer_confidence({"logprob": 0.0004}) == 1.0  # rounding in 16 bit


def test_answers_without_scores_have_no_confidence():
    assert answer_confidence({}) is None
    assert answer_runner_up({}, "yes") is None


@pytest.mark.parametrize("metadata", [{}, {"error": "x"}, SCORES, CHOICES])
def test_what_inference_writes_is_accepted(metadata):
    assert find_confidence_problem(metadata) is None


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"logprob": 0.5}, "the log-probability 'logprob' is 0.5, not a number up to 0"),
        ({"logprob": math.nan}, "the log-probability 'logprob' is nan, not a number up to 0"),
        ({"logprob": True}, "the log-probability 'logprob' is True, not a number up to 0"),
        ({"choices": ["yes"], "logprob": 0}, "'choices' is ['yes'], not a mapping of answers to log-probabilities"),
        ({"choices": {"yes": "x"}, "logprob": 0}, "the log-probability 'yes' is 'x', not a number up to 0"),
        ({"choices": {"yes": -1}}, "'choices' without the answer's 'logprob'"),
        ({"logprob": -1, "runner_up": "x"}, "'runner_up' and 'runner_up_logprob' go together"),
        ({"logprob": -1, "runner_up": 3, "runner_up_logprob": -2}, "'runner_up' is 3, not a text"),
    ],
)
def test_what_is_no_log_probability_is_named(metadata, problem):
    assert find_confidence_problem(metadata) == problem


def test_calibration_by_hand():
    result = calibrate([0.95, 0.85, 0.92, 0.15, 1.0, 0.9], [1, 1, 0, 0, 1, 0.6])
    assert [part.questions for part in result.bins] == [0, 1, 0, 0, 0, 0, 0, 0, 1, 4]
    top = result.bins[9]
    assert (top.low, top.high) == (0.9, 1.0)
    assert (top.confidence, top.accuracy) == pytest.approx((3.77 / 4, 2.6 / 4))
    assert (result.bins[0].confidence, result.bins[0].accuracy) == (None, None)
    # |0 - 0.15| + |1 - 0.85| + |2.6 - 3.77|, of six answers
    assert result.expected_error == pytest.approx((0.15 + 0.15 + 1.17) / 6)
    assert (result.questions, result.confidence, result.accuracy) == (6, pytest.approx(4.77 / 6), pytest.approx(0.6))


def test_a_model_that_is_right_as_often_as_it_thinks_has_no_error():
    assert calibrate([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 1, 0, 0, 0]).expected_error == pytest.approx(0)


@pytest.mark.parametrize(("confidences", "accuracies"), [([], []), ([0.5], [])])
def test_calibration_needs_as_many_of_each(confidences, accuracies):
    with pytest.raises(ValueError, match=r"^\d confidences and \d accuracies; give as many of each$"):
        calibrate(confidences, accuracies)
