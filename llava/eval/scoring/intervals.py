"""Confidence intervals of accuracies, and significance of the difference between two models.

Everything is a closed formula: the same numbers give the same intervals, without random draws. Questions about one
image share its difficulty, so they count as one group: the more alike they are, the fewer independent questions there
are. If all questions are about one image, they stand for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

CONFIDENCE_LEVEL = 0.95
_Z = 1.959963984540054
"""97.5 % of a normal distribution lie below."""


class Interval(NamedTuple):
    """Bounds of a 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Change of accuracy from one set of answers to another, on the same questions.

    Attributes:
        questions: how many both answered.
        mean: mean accuracy of the second minus that of the first, -1..1.
        low: lower bound of the 95 % interval of `mean`.
        high: upper bound.
        better: questions with a higher accuracy than before.
        worse: questions with a lower one.
        p_value: of McNemar's exact test: the chance of a split at least as uneven as better against worse, if both
            were equally likely.
    """

    questions: int
    mean: float
    low: float
    high: float
    better: int
    worse: int
    p_value: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0 and the test agrees (p below 0.05)."""
        return not self.low <= 0 <= self.high and self.p_value < 1 - CONFIDENCE_LEVEL


def wilson_interval(mean: float, count: float) -> Interval:
    """Return Wilson's score interval of a proportion.

    For values between 0 and 1 that are not binary (ten-answer accuracy) the interval is too wide, never too narrow:
    their variance is at most `mean * (1 - mean)`.

    Args:
        mean: proportion or mean, 0..1.
        count: independent observations, more than 0; fractions are allowed.

    Returns:
        The bounds, 0..1.

    Raises:
        ValueError: if `mean` or `count` is outside its range.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= mean <= 1 or not count > 0:
        raise ValueError(f"mean {mean} of {count} observations; a mean is 0 to 1, the observations more than 0")
    square = _Z**2 / count
    centre = (mean + square / 2) / (1 + square)
    half = _Z * math.sqrt(mean * (1 - mean) / count + square / count / 4) / (1 + square)
    return Interval(0.0 if mean == 0 else max(0.0, centre - half), 1.0 if mean == 1 else min(1.0, centre + half))


def mean_interval(values: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """Return Wilson's interval of a mean, at the number of independent values that has the same variance.

    Args:
        values: accuracies, 0..1.
        groups: of each value; values of one group may depend on each other.

    Returns:
        The bounds, 0..1. With one value in every group this is Wilson's interval.

    Raises:
        ValueError: if there are no values.
    """
    if not values:
        raise ValueError("no values to give an interval of")
    mean = math.fsum(values) / len(values)
    return wilson_interval(mean, effective_count(values, groups))


def effective_count(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return how many independent yes/no values would leave the mean as uncertain as these, at most `len(values)`."""
    mean = math.fsum(values) / len(values)
    variance = _grouped_variance(values, _separate(groups))
    if variance == 0:
        return float(len(values))
    return min(float(len(values)), mean * (1 - mean) / variance)


class Ratio(NamedTuple):
    """A ratio of two sums over questions, as precision is: right yes answers by yes answers.

    Attributes:
        numerators: one a question, 0 to its denominator.
        denominators: one a question, 0 where the question does not count; their sum is more than 0.
        groups: of each question, as in `mean_interval`.
    """

    numerators: Sequence[float]
    denominators: Sequence[float]
    groups: Sequence[Hashable]

    @property
    def value(self) -> float:
        """The ratio, 0..1."""
        return math.fsum(self.numerators) / math.fsum(self.denominators)


def ratio_interval(ratios: Sequence[Ratio]) -> Interval:
    """Return Wilson's interval of the mean of ratios, at the number of independent values that has the same variance.

    The variance is that of the linearised ratio: a question moves it by (numerator - ratio * denominator) / sum of the
    denominators. Equal groups of different ratios are one group. With one ratio whose denominators are 1 this is
    `mean_interval`.

    Args:
        ratios: one, or several that are averaged.

    Returns:
        The bounds, 0..1.

    Raises:
        ValueError: if there are no ratios.

    Source: W. G. Cochran, Sampling Techniques, 3rd edition (1977), section 6.3: variance of a ratio estimate.
    """
    if not ratios:
        raise ValueError("no ratios to give an interval of")
    moves: list[float] = []
    groups: list[Hashable] = []
    for ratio in ratios:
        value, total = ratio.value, math.fsum(ratio.denominators) * len(ratios)
        for numerator, denominator, group in zip(*ratio, strict=True):
            if denominator:
                moves.append((numerator - value * denominator) / total)
                groups.append(group)
    mean = math.fsum(ratio.value for ratio in ratios) / len(ratios)
    variance = _grouped_variance(moves, _separate(groups)) * len(moves) ** 2  # of the sum: the moves have no mean
    count = len(moves) if variance == 0 else min(len(moves), mean * (1 - mean) / variance)
    return wilson_interval(mean, count)


def compare_paired(before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable]) -> Difference:
    """Compare two accuracies of each question.

    The interval is Bonett and Price's: Wald's, after one better and one worse question have been added, which keeps it
    honest for few questions. Between groups the differences vary as they were seen to; with one question in every group
    and binary accuracies it is exactly theirs.

    Args:
        before: accuracies of the first, 0..1.
        after: of the second, of the same questions in the same order.
        groups: of each question, as in `mean_interval`.

    Returns:
        The difference, its interval and the test.

    Raises:
        ValueError: if there are no questions or the lengths differ.

    Source: D. G. Bonett and R. M. Price, Adjusted Wald confidence interval for a difference of binomial proportions
        based on paired data, J. Educational and Behavioral Statistics 37 (2012); McNemar's test with exact binomial
        probabilities.
    """
    if not before or not len(before) == len(after) == len(groups):
        raise ValueError(f"{len(before)} and {len(after)} accuracies in {len(groups)} groups; give as many of each")
    changes = [second - first for first, second in zip(before, after, strict=True)]
    adjusted = [*changes, 1.0, -1.0]
    own_groups: list[Hashable] = [("group", group) for group in _separate(groups)]
    centre = math.fsum(adjusted) / len(adjusted)
    half = _Z * math.sqrt(_grouped_variance(adjusted, [*own_groups, "better", "worse"]))
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    mean = math.fsum(changes) / len(changes)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Difference(len(changes), mean, low, high, better, worse, mcnemar_p_value(better, worse))


def mcnemar_p_value(better: int, worse: int) -> float:
    """Return the two-sided exact p-value of a split into `better` and `worse` changes, each as likely as the other."""
    count, fewer = better + worse, min(better, worse)
    if better == worse:
        return 1.0
    logarithm = math.lgamma(count + 1) - math.lgamma(fewer + 1) - math.lgamma(count - fewer + 1)
    term = total = math.exp(logarithm - count * math.log(2))
    for index in range(fewer, 0, -1):
        term *= index / (count - index + 1)
        total += term
    return min(1.0, 2 * total)


def _separate(groups: Sequence[Hashable]) -> Sequence[Hashable]:
    return groups if len(set(groups)) > 1 else range(len(groups))


def _grouped_variance(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Variance of the mean of values that are independent between groups, not inside them.

    With one value in every group it is the plain one, divided by the number of values; fewer groups make it larger.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    deviations: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        deviations[group] = deviations.get(group, 0.0) + value - mean
    few = len(deviations) / (len(deviations) - 1) * (count - 1) / count if len(deviations) > 1 else 1.0
    return few * math.fsum(deviation**2 for deviation in deviations.values()) / count**2
