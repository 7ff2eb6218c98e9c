"""Several files, JSON and tables, are one list of rows; each row is known by its file, and a table equals its JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.data.data_files import (
    find_unused_flags,
    fit_options,
    has_tables,
    join_rows,
    list_files,
    locate_rows,
    read_files,
    split_paths,
)
from llava.data.records import DataError, UnreadableLine
from llava.data.row_errors import Place
from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions

TABLE = "image;question;answer\nфото 1.jpg;Что это?;кот\nфото 2.jpg;А это?;дом\n"
LETTERS = st.text("абвяюё АЯQz9,;.\"'?\n", min_size=1, max_size=12).filter(lambda text: text.strip())
ROWS = st.lists(st.tuples(st.sampled_from(["фото 1.jpg", "a/b.png", "c.jpg"]), LETTERS, LETTERS), min_size=1)


def test_commas_stand_between_paths_but_for_existing_files(tmp_path):
    assert split_paths("data.json") == ["data.json"]
    assert split_paths("a.json, b.jsonl,c.xlsx,") == ["a.json", "b.jsonl", "c.xlsx"]
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
    assert locate_rows(files) == [Place(a, 0), Place(a, 1), Place(b, 0), Place(b, 1), Place(b, 2)]
    assert read_files([b, a])[0].path == b


def test_a_file_counts_once(tmp_path):
    (tmp_path / "a.json").write_text("[{}]")
    path = str(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"^data file .*a.json is named twice; leave one of them out$"):
        read_files([path, path])


def test_tables_and_json_are_one_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1}]))
    (tmp_path / "b.csv").write_text(TABLE, encoding="cp1251")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.csv")
    files = read_files([a, b], TableOptions(encoding="cp1251"))
    assert [row["id"] for row in join_rows(files)] == [1, "0", "1"]
    assert join_rows(files)[2]["image"] == "фото 2.jpg"
    assert locate_rows(files) == [Place(a, 0), Place(b, 0, 2), Place(b, 1, 3)]
    assert [has_tables([file]) for file in files] == [False, True]


def test_of_several_tables_each_takes_the_flags_of_its_kind():
    options = TableOptions(question="q", encoding="cp1251", delimiter=";", sheet="Лист1")
    assert fit_options("t.csv", options) == TableOptions(question="q", encoding="cp1251", delimiter=";")
    assert fit_options("t.XLSX", options) == TableOptions(question="q", sheet="Лист1")
    assert fit_options("t.parquet", options) == TableOptions(question="q")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, delimiter=st.sampled_from(",;\t"), encoding=st.sampled_from(["utf-8", "cp1251", "utf-16"]))
def test_a_table_is_read_as_the_json_that_is_written_of_it(tmp_path, load_program, rows, delimiter, encoding):
    table, data = tmp_path / "table.csv", tmp_path / "data.json"
    with table.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([("файл", "вопрос", "ответ"), *rows])
    words = ["--input", table, "--output", data, "--encoding", encoding, "--image_column", "файл"]
    words += ["--question_column", "вопрос", "--answer_column", "ответ", "--delimiter", delimiter]
    assert load_program("task_data_preprocessing.py").main(list(map(str, words))) == 0
    options = TableOptions("файл", "вопрос", answer="ответ", encoding=encoding, delimiter=delimiter)
    [direct], [written] = read_files([str(table)], options), read_files([str(data)])
    assert direct.rows == written.rows
    assert [row["conversations"][1]["value"] for row in direct.rows] == [answer for _, _, answer in rows]


def test_of_ten_answers_the_most_frequent_is_trained_on(tmp_path):
    ten = ["two"] * 4 + ["2"] * 5 + ["3"]
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "question", "answers"), ("a.jpg", "How many?", json.dumps(ten))])
    [record] = read_files([str(tmp_path / "t.csv")])[0].rows
    assert record["conversations"][1]["value"] == "2"
    assert record["answers"] == ten


def test_a_bad_row_of_a_table_is_named_by_line_and_column(tmp_path):
    (tmp_path / "t.csv").write_text("image,question,answer\na.jpg,What?,red\nb.jpg,,blue\n")
    with pytest.raises(TableError, match=r"(?s)t.csv: 1 bad row\n  line 3: question is empty\n.*run again") as refusal:
        read_files([str(tmp_path / "t.csv")])
    assert "line 2" not in str(refusal.value)


def test_the_files_of_a_table_in_a_directory(tmp_path):
    (tmp_path / "saved/train").mkdir(parents=True)
    for name in ("state.json", "train/data.arrow"):
        (tmp_path / "saved" / name).touch()
    folder = str(tmp_path / "saved")
    assert list_files(folder) == [folder, f"{folder}/state.json", f"{folder}/train/data.arrow"]
    assert list_files("t.csv") == ["t.csv"]
    assert list_files("\0") == ["\0"]


def test_flags_of_tables_need_a_table(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").touch()
    for table in ("t.csv", "T.XLSX", "t.parquet", str(tmp_path / "saved")):
        assert find_unused_flags(["--image_column"], {"--data_path": ["a.json", table]}) is None
    both = {"--data_path": ["t.csv"], "--eval_data_path": ["T.XLSX"]}
    assert find_unused_flags(["--sheet", "--encoding", "--delimiter"], both) is None
    for flag, table in (("--sheet", "t.csv"), ("--encoding", "t.xlsx"), ("--delimiter", "t.parquet")):
        message = find_unused_flags(["--image_column", flag], {"--data_path": [table]})
        assert message.startswith(f"{flag} has no effect for --data_path {table}, which is not a table in .")
    assert find_unused_flags([], {"--data_path": ["a.json"]}) is None
    message = "--sheet, --encoding has no effect for --data_path a.json,b.jsonl, which is not a table; leave it out"
    assert find_unused_flags(["--sheet", "--encoding"], {"--data_path": ["a.json", "b.jsonl"]}) == message
    message = "--sheet has no effect for --questions q.jsonl, which is not a table; leave it out"
    assert find_unused_flags(["--sheet"], {"--questions": "q.jsonl", "--annotations": None}) == message
    message = "--sheet has no effect without --annotations; leave it out"
    assert find_unused_flags(["--sheet"], {"--annotations": None}) == message


def test_a_path_may_be_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.csv").write_text("image,question,answer\na.jpg,What?,red\n")
    [file] = read_files(split_paths("~/t.csv"))
    assert Path(file.path) == tmp_path / "t.csv"
