"""Several files are one list of rows, and each row is known by its file."""

from __future__ import annotations

import json

import pytest

from llava.data.data_files import join_rows, locate_rows, read_files, split_paths
from llava.data.records import DataError, UnreadableLine


def test_commas_stand_between_paths_but_for_existing_files(tmp_path):
    assert split_paths("data.json") == ["data.json"]
    assert split_paths("a.json, b.jsonl,") == ["a.json", "b.jsonl"]
    assert split_paths(",") == [","]
    (tmp_path / "a,b.json").write_text("[]")
    assert split_paths(f"{tmp_path}/a,b.json") == [f"{tmp_path}/a,b.json"]


def test_rows_are_joined_and_located(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1}, {"id": 2}]))
    (tmp_path / "b.jsonl").write_text('{"id": 3}\n\n{"id": \n{"id": 4}\n')
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")
    files = read_files([a, b])
    bad = UnreadableLine("line 3 is not valid JSON (Expecting value, column 8)")
    assert join_rows(files) == [{"id": 1}, {"id": 2}, {"id": 3}, bad, {"id": 4}]
    assert locate_rows(files) == [(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)]
    assert read_files([b, a])[0].path == b


def test_a_file_counts_once(tmp_path):
    (tmp_path / "a.json").write_text("[{}]")
    path = str(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"^data file .*a.json is named twice; leave one of them out$"):
        read_files([path, path])
