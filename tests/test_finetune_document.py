"""docs/finetune.md shows what the programs print, lists every code, and quotes messages that stand in the code."""

from __future__ import annotations

import argparse
import ast
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from llava.data.doctor.__main__ import main
from llava.data.row_errors import UNUSABLE, WARNINGS
from llava.data.table.options import add_table_flags

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
ANY = "…"
MESSAGES = re.findall(r"^\| `(.*?)` \| ", TEXT[TEXT.index("## Troubleshooting by message") :], re.MULTILINE)


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[1]


def without_reason(text: str) -> str:
    """Without Pillow's own words about a broken file, which differ between its versions."""
    return re.sub(r"can't be decoded \(.*?\);", "can't be decoded;", text)


def test_the_doctor_prints_what_the_document_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("park", "street", "beach"):
        Image.new("RGB", (64, 48)).save(f"images/{name}.jpg")
    whole = Path("images/beach.jpg").read_bytes()
    Path("images/beach.jpg").write_bytes(whole[: len(whole) // 2])
    Path("rows.jsonl").write_text(block("jsonl"), encoding="utf-8")
    words = ["--data_path", "rows.jsonl", "--image_folder", "images"]
    assert main([*words, "--model_name_or_path", str(ROOT / "playground/llava-tiny")]) == 1
    assert without_reason(capsys.readouterr().out) == without_reason(block("text"))


def test_every_code_is_explained():
    tables = TEXT[TEXT.index("| rows that can't be trained on") : TEXT.index("Training makes the same pass")]
    first_columns = re.findall(r"^\| (`.*?) \| ", tables, re.MULTILINE)
    named = [code for column in first_columns for code in re.findall(r"`([a-z_]+)`", column)]
    assert sorted(named) == sorted([*UNUSABLE, *WARNINGS])


def test_every_flag_of_a_table_is_explained():
    parser = argparse.ArgumentParser(add_help=False)
    add_table_flags(parser)
    table = TEXT[TEXT.index("| flag | the table |") : TEXT.index("- **Same rows, same result.**")]
    assert sorted(re.findall(r"`(--\w+)`", table)) == sorted(f"--{action.dest}" for action in parser._actions)


@cache
def messages_of_the_code() -> list[str]:
    """Every text in the package, the values in f-strings written as `…`."""
    found = []
    for path in sorted((ROOT / "llava").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_read_from_the_document():
    assert len(MESSAGES) > 10


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_stands_in_the_code(message):
    assert any(message in text for text in messages_of_the_code())
