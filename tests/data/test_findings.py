"""Findings in words: counted by row, the first twenty listed, the file named where there are several."""

from __future__ import annotations

from llava.data.findings import UNUSABLE, WARNINGS, Finding, describe_unusable, list_findings, with_way_out


def finding(row, file="data.json"):
    return Finding("empty_turn", file, row, f"reason {row}")


def test_findings_are_listed_to_twenty():
    findings = [finding(row) for row in range(23)]
    lines = describe_unusable(["data.json"], findings, 100).splitlines()
    assert lines[0] == "data.json: 23 of 100 rows can't be used"
    assert lines[1] == "  row 0: reason 0"
    assert lines[20:] == ["  row 19: reason 19", "  ... and 3 more"]
    assert describe_unusable(["d"], [finding(4)], 5) == "d: 1 of 5 rows can't be used\n  row 4: reason 4"


def test_rows_are_counted_once_and_their_files_named():
    findings = [finding(0, "a.json"), finding(0, "a.json"), finding(0, "b.jsonl")]
    assert describe_unusable(["a.json", "b.jsonl"], findings, 9).splitlines() == [
        "a.json, b.jsonl: 2 of 9 rows can't be used",
        "  a.json, row 0: reason 0",
        "  a.json, row 0: reason 0",
        "  b.jsonl, row 0: reason 0",
    ]
    assert list_findings(findings, shown=1) == ["  a.json, row 0: reason 0", "  ... and 2 more"]


def test_the_code_decides_whether_a_row_is_lost():
    assert all(Finding(code, "d", 0, "").is_unusable for code in UNUSABLE)
    assert not any(Finding(code, "d", 0, "").is_unusable for code in WARNINGS)


def test_the_way_out_follows_the_message_unless_it_is_there():
    assert with_way_out("empty_turn", "it is empty") == "it is empty; write its text, or remove the row"
    assert with_way_out("image_missing", "gone; pass --image_folder") == "gone; pass --image_folder"
