"""A result is kept until something that it depends on changes."""

from __future__ import annotations

import json
import os

import pytest

from llava.data.doctor.check_cache import cache_places, describe_inputs, load_result, store_result
from llava.data.doctor.checks import Examination
from llava.data.row_errors import RowError
from llava.data.table.options import TableOptions

RESULT = Examination(
    {"d.json": 2}, [RowError("empty_turn", "it is empty", "d.json", 1)], {"rows": 2, "tokens": None}, True, False
)


@pytest.fixture
def inputs(tmp_path, tokenizers):
    data, image = tmp_path / "data.json", tmp_path / "a.png"
    data.write_text("[1]")
    image.write_bytes(b"1")

    def describe(paths=(data,), images=(image,), errors=(), legacy=False, **changes):
        settings = {"template": "v1", "max_length": 64, "patches_per_image": 16, **changes}
        return describe_inputs(list(map(str, paths)), images, errors, tokenizer=tokenizers[legacy], **settings)

    return describe, data, image


def test_the_same_inputs_have_the_same_digest(inputs):
    describe, _, image = inputs
    assert describe() == describe(images=[image, image]) == describe(template="vicuna_v1")


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "llava_v0"},
        {"max_length": 65},
        {"patches_per_image": 17},
        {"legacy": True},
        {"images": []},
        {"errors": [RowError("image_missing", "gone")]},
        {"options": TableOptions()},
    ],
    ids=str,
)
def test_another_setting_has_another_digest(inputs, changes):
    describe, _, _ = inputs
    assert describe(**changes) != describe()


def test_the_columns_of_a_table_and_all_files_of_a_directory_count(inputs, tmp_path):
    describe, _, _ = inputs
    one, two = describe(options=TableOptions(question="a")), describe(options=TableOptions(question="b"))
    assert one != two
    assert one == describe(options=TableOptions(question="a"))
    (tmp_path / "saved/train").mkdir(parents=True)
    rows = tmp_path / "saved/train/data.arrow"
    rows.write_bytes(b"1")
    before, time = describe(paths=[tmp_path / "saved"]), rows.stat().st_mtime_ns
    rows.write_bytes(b"12")
    os.utime(rows, ns=(time, time))
    assert describe(paths=[tmp_path / "saved"]) != before


@pytest.mark.parametrize("which", ["data", "image"])
@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_another_time_or_size_has_another_digest(inputs, which, change):
    describe, data, image = inputs
    path, before = {"data": data, "image": image}[which], describe()
    state = path.stat()
    if change == "time":
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"2")
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        path.unlink()
    assert describe() != before


def test_a_result_comes_back_as_it_was(tmp_path):
    places = cache_places(tmp_path / "data" / "d.json", tmp_path / "out")
    assert places == [tmp_path / "data" / "d.json.checked", tmp_path / "out" / "d.json.checked"]
    assert load_result(places, "x") is None
    assert store_result(places, "x", RESULT) == places[0]
    assert load_result(places, "x") == (RESULT, places[0])
    assert load_result(places, "y") is None


def test_a_closed_folder_leaves_the_next_place(tmp_path):
    (tmp_path / "data").write_text("no folder")
    places = cache_places(tmp_path / "data" / "d.json", tmp_path / "out")
    assert store_result(places, "x", RESULT) == places[1]
    assert load_result(places, "x") == (RESULT, places[1])
    assert store_result(places[:1], "x", RESULT) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"inputs": "x"}', '{"inputs": "x", "findings": [{}], "checked": {}}', "\0"]
)
def test_a_damaged_result_is_none(tmp_path, text):
    place = tmp_path / "d.json.checked"
    place.write_text(text)
    assert load_result([place], "x") is None


def test_the_kept_file_is_json_with_the_whole_report(tmp_path):
    place = tmp_path / "d.json.checked"
    store_result([place], "x", RESULT)
    kept = json.loads(place.read_text())
    assert kept["inputs"] == "x"
    assert kept["counts"] == {"empty_turn": 1}
