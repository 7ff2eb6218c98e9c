"""Fixtures of benchmarks: files of questions and answers, and programs on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_lines(tmp_path) -> Callable[[str, Sequence[Mapping[str, Any]]], Path]:
    """Return the function that writes JSON lines to a file of the test's folder."""

    def write(name: str, records: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_document(tmp_path) -> Callable[[Any], Path]:
    """Return the function that writes a JSON value, or a text as it is, to a file of the test's folder."""

    def write(content: Any) -> Path:
        path = tmp_path / "document.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def converter(load_program) -> Callable[..., int]:
    """Return the function (script, flag="value", ...) -> exit code."""

    def run(script: str, **flags: Any) -> int:
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return load_program(f"scripts/{script}").main(words)

    return run
