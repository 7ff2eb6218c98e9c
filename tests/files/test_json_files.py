"""One reader for all JSON: what Python would stumble over is an error of the text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava.files.json_files import MAX_DEPTH, NestingError, parse_json, parse_json_at, read_settings

ROOT = Path(__file__).resolve().parents[2]


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "x", true]}', "[]", "5", '"é"', nested(MAX_DEPTH)])
def test_values_are_those_of_the_library(text):
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode("utf-16")) == json.loads(text)
    assert parse_json_at(f"  {text} x", 2) == (json.loads(text), 2 + len(text))


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 100_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}"), ('[{"a":', "}]")])
def test_nesting_is_limited(depth, pair):
    text = nested(depth, pair[0], pair[-1]).replace(":}", ":0}")
    with pytest.raises(NestingError, match=r"^nested too deep"):
        parse_json(text)


def test_many_brackets_side_by_side_are_no_depth():
    assert len(parse_json("[" + ",".join(["[[]]"] * 1000) + "]")) == 1000
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000


def test_rows_that_are_nested_too_deep():
    with pytest.raises(NestingError, match="nested too deep: line 2 column 1"):
        parse_json_at("\n" + nested(100_000), 1)


@pytest.mark.parametrize("text", ["9" * 5000, "[1,", "", "nope", '{"a" 1}'])
def test_errors_are_json_errors(text):
    for read in (parse_json, lambda text: parse_json_at(text, 0)):
        with pytest.raises(json.JSONDecodeError):
            read(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_numbers_that_are_not_finite_are_refused_in_settings_alone(tmp_path, number):
    path = tmp_path / "config.json"
    path.write_text(f'{{"x": [{number}]}}')
    assert list(read_settings(path, is_finite=False)) == ["x"]
    with pytest.raises(
        ValueError, match=rf"^{path} is not valid JSON \({number} is not a (JSON|finite) number.*; fetch"
    ):
        read_settings(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested(100_000), r"is not valid JSON \(nested too deep: line 1 column 1 \(char 0\)\); fetch the file again$"),
        ("[1]", "is not a JSON object; fetch the file again$"),
        ('{"x": 1}' + " " * 100_000_000, "has more than 100 MB, which no such file needs; fetch the file again$"),
    ],
)
def test_settings(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        read_settings(path)


@pytest.mark.parametrize(
    "path", sorted(path for folder in ("llava", "scripts") for path in (ROOT / folder).rglob("*.py")), ids=str
)
def test_nobody_else_reads_json(path):
    """A reader of its own would raise RecursionError; use `parse_json` or `files.read_settings`."""
    if path.name != "json_files.py":
        assert not re.search(r"\bjson\.loads?\(|JSONDecoder\(", path.read_text(encoding="utf-8"))
