"""Figures about data are counted right, and their histograms lose nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.data.doctor.statistics import UsableRow, compute_statistics, even_bins


def record(*texts):
    return {"conversations": [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]}


def test_figures_of_a_few_rows():
    a, b = Path("a.jpg"), Path("b.jpg")
    records = [
        record("<image>\nIs it?", "Yes."),
        "no record",
        record("<image> <image>", "no", "And?", " no "),
        record("Hi", "yes"),
    ]
    rows = [UsableRow(0, [a], 20, 2), UsableRow(2, [a, b], 41, 6), UsableRow(3, [], 9, 2)]
    figures = compute_statistics(records, rows)
    assert {key: figures[key] for key in ("rows", "usable_rows", "rows_without_image", "images", "questions")} == {
        "rows": 4,
        "usable_rows": 3,
        "rows_without_image": 1,
        "images": 2,
        "questions": 4,
    }
    per_image = figures["questions_per_image"]
    assert [per_image[key] for key in ("mean", "min", "max", "total")] == [2.5, 2, 3, 5]
    assert [entry["count"] for entry in per_image["histogram"]] == [0, 1, 1]
    assert figures["answers"] == {
        "total": 4,
        "distinct": 3,
        "yes_share": 0.5,
        "no_share": 0.5,
        "top": [
            {"answer": "no", "count": 2, "share": 0.5},
            {"answer": "Yes.", "count": 1, "share": 0.25},
            {"answer": "yes", "count": 1, "share": 0.25},
        ],
    }
    assert [figures["tokens"][key] for key in ("mean", "min", "max", "total")] == [23.33, 9, 41, 70]
    assert figures["tokens"]["histogram"][0] == {"from": 5, "to": 9, "count": 1}
    assert figures["supervised_tokens"]["total"] == 10


def test_nothing_to_count():
    figures = compute_statistics(["no record"], [])
    assert figures["rows"] == 1
    assert [figures[key] for key in ("questions_per_image", "answers", "tokens", "supervised_tokens")] == [None] * 4


def test_twenty_answers_and_a_bin_for_the_rest():
    image = Path("a.jpg")
    records = [record("<image>", f"answer {number:03}") for number in range(120)]
    figures = compute_statistics(records, [UsableRow(number, [image]) for number in range(120)])
    assert [entry["answer"] for entry in figures["answers"]["top"]] == [f"answer {number:03}" for number in range(20)]
    assert figures["questions_per_image"]["histogram"][-1] == {"from": 100, "to": 120, "count": 1}


@given(st.lists(st.integers(0, 10**7), min_size=1))
def test_bins_hold_every_value_once(values):
    bins = even_bins(values)
    assert 1 <= len(bins) <= 12
    assert all(sum(low <= value <= high for low, high in bins) == 1 for value in values)
    assert len({high - low for low, high in bins}) == 1


@pytest.mark.parametrize(
    ("values", "bins"), [([], []), ([7], [(7, 7)]), ([622, 654], [(start, start + 4) for start in range(620, 655, 5)])]
)
def test_bins_are_round(values, bins):
    assert even_bins(values) == bins
