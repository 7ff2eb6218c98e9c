"""The program that fuzzes model directories finds what it is for, and finds nothing in a few inputs."""

from __future__ import annotations

import json
import random

import pytest


@pytest.fixture(scope="module")
def fuzz(load_program):
    return load_program("benchmarks/fuzz_models.py")


def test_a_few_inputs(fuzz, tmp_path, capsys):
    assert fuzz.main(["--count", "25", "--seconds", "300", "--keep", str(tmp_path / "found")]) == 0
    assert "25 inputs, seed 0: " in capsys.readouterr().out
    assert not (tmp_path / "found").exists()


def test_inputs_follow_from_seed_and_number(fuzz, tmp_path):
    content = {"a": 1, "b": {"c": [2, 3]}}
    texts = [fuzz.change_settings(json.loads(json.dumps(content)), random.Random(5)) for _ in range(2)]
    assert texts[0] == texts[1]


def test_an_escape_is_a_finding(fuzz, monkeypatch, tmp_path):
    given = fuzz.Input(tmp_path, fuzz.PLANS[0], "answer", "x", True)

    def fail(words):
        raise RecursionError("deep")

    monkeypatch.setattr(fuzz, "import_program", lambda program: fail)
    result, is_finding = fuzz.try_one(given, tmp_path, set())
    assert is_finding
    assert result.startswith("RecursionError: deep (test_fuzz_models.py:")
    monkeypatch.setattr(fuzz, "import_program", lambda program: lambda words: 0)
    assert fuzz.try_one(given, tmp_path, {"red"}) == ("another answer, ''", True)
    assert fuzz.try_one(given, tmp_path, {""}) == ("the model's answer", False)
    monkeypatch.setattr(fuzz, "import_program", lambda program: lambda words: 2)
    assert fuzz.try_one(given, tmp_path, set()) == ("exit code 2 with ''", True)
