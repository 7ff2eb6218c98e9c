"""Intervals and tests against published values, definitions, and resampling done here independently."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.scoring.intervals import (
    Difference,
    Ratio,
    compare_paired,
    effective_count,
    mcnemar_p_value,
    mean_interval,
    ratio_interval,
    wilson_interval,
)

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombes_published_table(right, count, low, high):
    """R. G. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998)."""
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_bounds_are_where_the_score_test_turns(case):
    right, count = case
    share = right / count
    for bound in wilson_interval(share, count):
        distance = (share - bound) ** 2 - Z**2 * bound * (1 - bound) / count
        assert abs(distance) < 1e-9 or bound in (0.0, 1.0)


def test_wilson_includes_the_mean_at_both_ends():
    assert wilson_interval(0.0, 3).low == 0.0
    assert wilson_interval(1.0, 3).high == 1.0


@pytest.mark.parametrize(("mean", "count"), [(1.1, 3), (-0.1, 3), (0.5, 0), (math.nan, 3)])
def test_wilson_refuses_what_is_no_proportion(mean, count):
    with pytest.raises(
        ValueError, match=r"^mean .* of \d observations; a mean is 0 to 1, the observations more than 0"
    ):
        wilson_interval(mean, count)


def test_questions_of_one_group_that_always_agree_count_once():
    values = [value for value in (1.0, 0.0, 1.0, 1.0, 0.0, 1.0) for _ in range(5)]
    groups = [group for group in range(6) for _ in range(5)]
    count = effective_count(values, groups)
    assert count == pytest.approx(6 * (30 / 29) * (5 / 6), abs=1e-12)  # six groups, estimated as six values would be
    assert effective_count(values, range(30)) == pytest.approx(30, abs=1e-12)
    assert mean_interval(values, groups) == pytest.approx(wilson_interval(2 / 3, count), abs=1e-12)


def test_questions_about_one_single_image_stand_for_themselves():
    assert mean_interval([1.0, 0.0, 1.0], ["a", "a", "a"]) == pytest.approx(wilson_interval(2 / 3, 3), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), st.integers(0, 5)), min_size=1, max_size=40))
def test_an_interval_never_claims_more_than_independent_yes_or_no_questions(pairs):
    values, groups = [value for value, _ in pairs], [group for _, group in pairs]
    mean = math.fsum(values) / len(values)
    low, high = mean_interval(values, groups)
    plain = wilson_interval(mean, len(values))
    assert 0 <= low <= plain.low + 1e-12 and plain.high - 1e-12 <= high <= 1
    assert low - 1e-12 <= mean <= high + 1e-12


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match=r"^no values to give an interval of$"):
        mean_interval([], [])


def bootstrap(values, groups, draws=1000):
    """2.5 % and 97.5 % of the means of resampled groups."""
    members = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    sums = [(sum(group), len(group)) for group in members.values()]
    source = random.Random(0)
    means = []
    for _ in range(draws):
        chosen = source.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in chosen) / sum(size for _, size in chosen))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def clustered_answers(groups, size, source):
    """Yes/no accuracies whose chance to be 1 is the group's own."""
    chances = [source.betavariate(2, 1) for _ in range(groups)]
    return [float(source.random() < chance) for chance in chances for _ in range(size)]


def test_intervals_agree_with_the_bootstrap_over_groups():
    source = random.Random(1)
    groups = [group for group in range(300) for _ in range(4)]
    values = clustered_answers(300, 4, source)
    assert mean_interval(values, groups) == pytest.approx(bootstrap(values, groups), abs=0.006)
    after = [max(value, float(source.random() < 0.2)) for value in values]
    difference = compare_paired(values, after, groups)
    changes = [second - first for first, second in zip(values, after, strict=True)]
    assert (difference.low, difference.high) == pytest.approx(bootstrap(changes, groups), abs=0.006)


def test_intervals_cover_the_true_value_in_95_of_100_experiments():
    source = random.Random(2)
    groups = [group for group in range(60) for _ in range(4)]
    covered = plain = 0
    for _ in range(400):
        values = clustered_answers(60, 4, source)
        low, high = mean_interval(values, groups)
        covered += low <= 2 / 3 <= high
        low, high = mean_interval(values, range(len(values)))
        plain += low <= 2 / 3 <= high
    assert covered / 400 >= 0.93
    assert plain < covered  # as if questions about one image were independent: too narrow


def exact_p_value(better, worse):
    """The definition, in whole numbers."""
    count, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(count, index) for index in range(fewer + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**count)))


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (9, 1), (5, 5), (6, 5), (0, 40), (119, 15), (600, 500)])
def test_mcnemar_equals_the_binomial_definition(better, worse):
    assert mcnemar_p_value(better, worse) == pytest.approx(exact_p_value(better, worse), rel=1e-9)
    assert mcnemar_p_value(worse, better) == mcnemar_p_value(better, worse)


def test_mcnemar_by_hand():
    assert mcnemar_p_value(9, 1) == pytest.approx(22 / 1024, rel=1e-12)
    assert mcnemar_p_value(5000, 0) == 0.0  # below the smallest float


def test_paired_interval_equals_bonett_and_prices_formula():
    before = [1.0] * 40 + [0.0] * 30 + [1.0] * 5 + [0.0] * 25
    after = [1.0] * 40 + [1.0] * 30 + [0.0] * 5 + [0.0] * 25
    gain, loss, count = (30 + 1) / 102, (5 + 1) / 102, 102
    half = Z * math.sqrt((gain + loss - (gain - loss) ** 2) / count)
    result = compare_paired(before, after, range(100))
    assert (result.low, result.high) == pytest.approx((gain - loss - half, gain - loss + half), abs=1e-12)
    assert (result.questions, result.mean, result.better, result.worse) == (100, 0.25, 30, 5)
    assert result.p_value == pytest.approx(exact_p_value(30, 5), rel=1e-9)
    assert result.is_real


def test_swapping_the_files_turns_the_sign():
    source = random.Random(3)
    before, after = ([source.choice([0.0, 0.3, 0.6, 0.9, 1.0]) for _ in range(50)] for _ in range(2))
    groups = [index // 3 for index in range(50)]
    one, other = compare_paired(before, after, groups), compare_paired(after, before, groups)
    assert (other.mean, other.low, other.high) == pytest.approx((-one.mean, -one.high, -one.low), abs=1e-12)
    assert (other.better, other.worse, other.p_value) == (one.worse, one.better, one.p_value)


def test_equal_files_are_not_told_apart():
    result = compare_paired([1.0, 0.0], [1.0, 0.0], ["a", "b"])
    assert (result.mean, result.p_value, result.is_real) == (0.0, 1.0, False)
    assert result.low == -result.high < 0


def test_one_changed_question_proves_nothing():
    result = compare_paired([0.0], [1.0], ["a"])
    assert isinstance(result, Difference)
    assert not result.is_real


@pytest.mark.parametrize(("before", "after", "groups"), [([], [], []), ([1.0], [1.0, 0.0], "a"), ([1.0], [1.0], "ab")])
def test_comparing_needs_as_many_of_each(before, after, groups):
    message = r"^\d and \d accuracies in \d groups; give as many of each$"
    with pytest.raises(ValueError, match=message):
        compare_paired(before, after, groups)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from((0.0, 0.3, 0.6, 0.9, 1.0)), st.integers(0, 4)), min_size=1, max_size=30))
def test_a_ratio_with_denominators_of_one_is_a_mean(pairs):
    values, groups = [value for value, _ in pairs], [group for _, group in pairs]
    ratio = Ratio(values, [1.0] * len(values), groups)
    assert ratio_interval([ratio]) == pytest.approx(mean_interval(values, groups), abs=1e-7)


def test_the_interval_of_a_ratio_covers_what_resampled_groups_give():
    """F1 of 300 images with three questions each, whose difficulty they share; two such ratios are averaged."""
    draws = random.Random(0)

    def draw():
        numerators, denominators, groups = [], [], []
        for image in range(300):
            chance = draws.choice((0.4, 0.95))
            for _ in range(3):
                label, right = draws.random() < 0.5, draws.random() < chance
                said = label if right else not label
                numerators.append(2.0 * (label and said))
                denominators.append(float(label) + float(said))
                groups.append(image)
        return Ratio(numerators, denominators, groups)

    def spread(ratios):
        means = []
        for _ in range(400):
            images = [draws.randrange(300) for _ in range(300)]
            rows = [3 * image + offset for image in images for offset in range(3)]
            parts = [sum(r.numerators[i] for i in rows) / sum(r.denominators[i] for i in rows) for r in ratios]
            means.append(sum(parts) / len(parts))
        centre = sum(means) / len(means)
        return math.sqrt(sum((mean - centre) ** 2 for mean in means) / len(means))

    for ratios in ([draw()], [draw(), draw()]):
        low, high = ratio_interval(ratios)
        assert (high - low) / 2 / Z == pytest.approx(spread(ratios), rel=0.12)


def test_a_ratio_that_is_right_throughout_is_as_certain_as_its_questions():
    assert ratio_interval([Ratio([2.0, 2.0, 0.0], [2.0, 2.0, 0.0], ["a", "b", "c"])]) == wilson_interval(1.0, 2)
    with pytest.raises(ValueError, match=r"^no ratios to give an interval of$"):
        ratio_interval([])
