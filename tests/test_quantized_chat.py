"""`benchmarks/quantized_chat.py` on the CPU: every figure is there, and answers have the length asked for."""

from __future__ import annotations

import json
import subprocess

import pytest

pytest.importorskip("bitsandbytes")

TINY = ("--device", "cpu", "--new-tokens", "4", "--runs", "1")


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("benchmarks/quantized_chat.py")


@pytest.fixture(scope="module")
def measured(program, root):
    """One case each in 16 and 4 bit."""
    words = ["--model-path", str(root / "playground/llava-tiny"), *TINY]
    return {case: program.measure(program.parse_options([*words, "--only", case])) for case in ("16", "4")}


def test_a_case_is_measured(measured):
    for case, row in measured.items():
        assert row["case"] == {"16": "16 bit", "4": "4 bit (NF4)"}[case]
        assert row["new_tokens"] == 4
        assert row["load_seconds"] > 0
        assert row["first_token_seconds"] > 0
        assert row["peak_allocated"] is row["peak_reserved"] is None


def test_the_size_counts_the_statistics(measured):
    """llava-tiny has 5 x 442,368 weights in linear layers of the LLM: 4 bytes in fp32; in NF4 half a byte, a scale of
    a byte per 64 values, a scale of these per 16,384, two tables of levels and a text per layer."""
    sizes = [(192, 192)] * 4 + [(512, 192)] * 2 + [(192, 512)]
    count = 5 * sum(rows * columns for rows, columns in sizes)
    tables = 5 * sum(4 * (16 + 256) + 4 * -(-rows * columns // 64 // 256) for rows, columns in sizes)
    saved = measured["16"]["weight_bytes"] - measured["4"]["weight_bytes"]
    texts = 4 * count - count // 2 - count // 64 - tables - saved
    assert 100 * 35 < texts < 256 * 35


def test_the_table_has_a_row_per_case(program, root, monkeypatch, tmp_path, capsys):
    def run_case(words, case, device):
        figures = dict.fromkeys(program.COLUMNS, 2_500_000_000) | {"case": program.CASES[case], "peak_device": None}
        return {**figures, "tokens_per_second": 12.345}

    monkeypatch.setattr(program, "run_case", run_case)
    words = ["--model-path", "somewhere", "--quantized-path", "elsewhere", *TINY]
    assert program.main([*words, "--output", str(tmp_path / "chat.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("one image, 4 new tokens, median of 1 answers")
    assert lines[3] == "| --- | --- | --- | --- | --- | --- | --- | --- |"
    assert lines[4] == "| 16 bit | 2.50 | 2.50 | 2.50 | 2.50 | - | 2.50 | 12.35 |"
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| 16 bit",
        "| 8 bit (LLM.int8)",
        "| 4 bit (NF4)",
        "| saved quantised directory",
    ]
    assert len(json.loads((tmp_path / "chat.json").read_text())["rows"]) == 4


def test_a_case_that_fails_leaves_the_others(program, monkeypatch, tmp_path, capsys):
    def run_case(words, case, device):
        if case == "8":
            raise subprocess.CalledProcessError(3, "python")
        return dict.fromkeys(program.COLUMNS, 1.0) | {"case": program.CASES[case]}

    monkeypatch.setattr(program, "run_case", run_case)
    assert program.main(["--model-path", "somewhere", *TINY, "--output", str(tmp_path / "chat.json")]) == 1
    assert "8 bit (LLM.int8): Command 'python' returned non-zero exit status 3." in capsys.readouterr().err
    rows = json.loads((tmp_path / "chat.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["16 bit", "4 bit (NF4)"]


def test_an_answer_of_another_length_is_refused(program, root):
    session = program.Session.load(str(root / "playground/llava-tiny"), device="cpu")
    picture = program.Image.new("RGB", program.PICTURE)
    length = session.spliced_length(session.prepare(program.QUESTION, [picture]))
    chat = program.Chat(program.EndlessSession(**vars(session)))
    assert program.answer_seconds(chat, picture, length, 3) > 0
    with pytest.raises(RuntimeError, match=r"^4 tokens were generated instead of 3; the times mean nothing$"):
        program.answer_seconds(chat, picture, length - 1, 3)
