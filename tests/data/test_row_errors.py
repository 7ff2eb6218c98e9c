"""Lists of row errors: counted by row, the first twenty listed, the file named where there are several."""

from __future__ import annotations

from llava.data.row_errors import (
    UNUSABLE,
    WARNINGS,
    Place,
    RowError,
    describe_unusable,
    list_errors,
    locate_errors,
    with_fix,
)


def error(row, file="data.json"):
    return RowError("empty_turn", f"reason {row}", file, row)


def test_twenty_errors_are_listed():
    errors = [error(row) for row in range(23)]
    lines = describe_unusable(["data.json"], errors, 100).splitlines()
    assert lines[0] == "data.json: 23 of 100 rows can't be used"
    assert lines[1] == "  row 0: reason 0"
    assert lines[20:] == ["  row 19: reason 19", "  ... and 3 more"]
    assert describe_unusable(["d"], [error(4)], 5) == "d: 1 of 5 rows can't be used\n  row 4: reason 4"


def test_rows_are_counted_once_and_their_files_named():
    errors = [error(0, "a.json"), error(0, "a.json"), error(0, "b.jsonl")]
    assert describe_unusable(["a.json", "b.jsonl"], errors, 9).splitlines() == [
        "a.json, b.jsonl: 2 of 9 rows can't be used",
        "  a.json, row 0: reason 0",
        "  a.json, row 0: reason 0",
        "  b.jsonl, row 0: reason 0",
    ]
    assert list_errors(errors, shown=1) == ["  a.json, row 0: reason 0", "  ... and 2 more"]


def test_the_code_decides_whether_a_row_is_lost():
    assert all(RowError(code, "").is_unusable for code in UNUSABLE)
    assert not any(RowError(code, "").is_unusable for code in WARNINGS)


def test_the_fix_follows_the_message_unless_it_is_there():
    assert with_fix("empty_turn", "it is empty") == "it is empty; write its text, or remove the row"
    assert with_fix("image_missing", "gone; pass --image_folder") == "gone; pass --image_folder"


def test_errors_of_joined_files_get_their_file_and_row():
    places = [Place("a.json", 0), Place("a.json", 1), Place("b.csv", 0, 2)]
    error = RowError("empty_turn", "it is empty").at(2)
    assert error == RowError("empty_turn", "it is empty; write its text, or remove the row", row=2)
    assert locate_errors([error], places) == [error._replace(file="b.csv", row=0, line=2)]
    assert list_errors(locate_errors([error], places)) == [
        "  b.csv, row 0 (line 2): it is empty; write its text, or remove the row"
    ]
