"""Ids that are numbers or texts of digits, and the lines on which one repeats."""

import re

import pytest

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.question_ids import canonical_id, find_repeats, note_repeats


def test_a_text_of_digits_is_a_number():
    assert [canonical_id(value) for value in ("012", "q1", 3, "³", "", "0", "-1")] == [12, "q1", 3, "³", "", 0, "-1"]
    assert canonical_id("1" * 640) == int("1" * 640)
    assert canonical_id("1" * 5000) == "1" * 5000  # Python refuses to convert it


def test_each_repeat_is_found_with_the_first_of_its_id():
    assert list(find_repeats([7, "a", "007", 8, "7", "a"])) == [(2, 0), (4, 0), (5, 1)]


def test_repeats_are_named_with_both_lines():
    bad = BadRows("f.jsonl")
    note_repeats(bad, [1, 3, 4, 9], ["7", "a", "a", "007"])
    message = (
        "f.jsonl: 2 bad rows\n"
        "  line 4: question_id 'a' is already on line 3\n"
        "  line 9: question_id '007' is already on line 1, as '7'\nway out"
    )
    with pytest.raises(TableError, match=f"^{re.escape(message)}$"):
        bad.raise_if_any("way out")
