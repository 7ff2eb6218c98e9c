"""Calibration: the probability a model gave its answers against their accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava.files.terminal_text import show

BIN_COUNT = 10
_ROUNDING = 1e-3
"""Largest log-probability accepted; sums in 16 bit may exceed 0 a little."""


class RunnerUp(NamedTuple):
    """The second-best first token, or answer of a closed list, with its probability, 0..1."""

    text: str
    probability: float


@dataclass(frozen=True)
class Bin:
    """Answers whose probability lies between `low` (included) and `high`; the last bin includes 1.

    `confidence` and `accuracy` are their means, 0..1; both are None in an empty bin.
    """

    low: float
    high: float
    questions: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy.

    Attributes:
        questions: answers that carry a probability.
        confidence: their mean probability, 0..1.
        accuracy: their mean accuracy, 0..1.
        expected_error: expected calibration error: the distance of confidence and accuracy in a bin, averaged over
            the answers, 0..1.
        bins: ten of equal width.
    """

    questions: int
    confidence: float
    accuracy: float
    expected_error: float
    bins: tuple[Bin, ...]


def answer_confidence(metadata: Mapping[str, Any]) -> float | None:
    """Return the probability of an answer, 0..1; None where its metadata have none.

    The product over the answer's tokens; with a closed list (`choices`), normalised over the list.
    """
    if "logprob" not in metadata:
        return None
    logprob = float(metadata["logprob"])
    return _share(logprob, list(metadata.get("choices", {}).values()))


def answer_runner_up(metadata: Mapping[str, Any], text: str | None) -> RunnerUp | None:
    """Return the runner-up of the answer `text`; None where its metadata have none."""
    if choices := metadata.get("choices"):
        others = [(logprob, choice) for choice, logprob in choices.items() if choice != text]
        if not others:
            return None
        logprob, choice = max(others, key=lambda pair: pair[0])
        return RunnerUp(choice, _share(logprob, list(choices.values())))
    if "runner_up" not in metadata:
        return None
    return RunnerUp(metadata["runner_up"], _share(metadata["runner_up_logprob"], []))


def find_confidence_problem(metadata: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the log-probabilities in an answer's metadata, or None."""
    choices = metadata.get("choices", {})
    if not isinstance(choices, dict):
        return f"'choices' is {show(choices)}, not a mapping of answers to log-probabilities"
    numbers = {key: metadata[key] for key in ("logprob", "runner_up_logprob") if key in metadata} | choices
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value <= _ROUNDING:
            return f"the log-probability {show(key)} is {show(value)}, not a number up to 0"
    if choices and "logprob" not in metadata:
        return "'choices' without the answer's 'logprob'"
    if ("runner_up" in metadata) != ("runner_up_logprob" in metadata):
        return "'runner_up' and 'runner_up_logprob' go together"
    if not isinstance(metadata.get("runner_up", ""), str):
        return f"'runner_up' is {show(metadata['runner_up'])}, not a text"
    return None


def calibrate(confidences: Sequence[float], accuracies: Sequence[float]) -> Calibration:
    """Compare the probabilities of answers with their accuracies, both 0..1 and in the same order.

    Raises:
        ValueError: if there are no answers or the lengths differ.

    Source: M. P. Naeini, G. F. Cooper and M. Hauskrecht, Obtaining well calibrated probabilities using Bayesian
        binning, AAAI 2015, for the expected calibration error.
    """
    if not confidences or len(confidences) != len(accuracies):
        raise ValueError(f"{len(confidences)} confidences and {len(accuracies)} accuracies; give as many of each")
    members: list[list[tuple[float, float]]] = [[] for _ in range(BIN_COUNT)]
    for confidence, accuracy in zip(confidences, accuracies, strict=True):
        members[min(BIN_COUNT - 1, int(confidence * BIN_COUNT))].append((confidence, accuracy))
    bins = tuple(_fill_bin(index, pairs) for index, pairs in enumerate(members))
    error = math.fsum(
        abs(math.fsum(accuracy - confidence for confidence, accuracy in pairs)) for pairs in members
    ) / len(confidences)
    return Calibration(len(confidences), _mean(confidences), _mean(accuracies), error, bins)


def _fill_bin(index: int, pairs: Sequence[tuple[float, float]]) -> Bin:
    low, high = index / BIN_COUNT, (index + 1) / BIN_COUNT
    if not pairs:
        return Bin(low, high, 0, None, None)
    return Bin(low, high, len(pairs), _mean([pair[0] for pair in pairs]), _mean([pair[1] for pair in pairs]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _share(logprob: float, rivals: Sequence[float]) -> float:
    """The probability, normalised over a closed list if there is one."""
    largest = max(rivals, default=0.0)
    if logprob == -math.inf:
        return 0.0
    total = math.fsum(math.exp(rival - largest) for rival in rivals) if rivals else 1.0
    return min(1.0, math.exp(logprob - largest) / total)
