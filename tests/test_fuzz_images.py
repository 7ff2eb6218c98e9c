"""`benchmarks/fuzz_images.py` finds nothing in a few hundred inputs, and would find what escapes."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("benchmarks/fuzz_images.py")


def test_nothing_escapes(program, tmp_path, capsys):
    assert program.main(["--count", "400", "--seed", "3", "--seconds", "60", "--keep", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("400 inputs, seed 3: image_corrupt ")
    assert "\n0 findings; slowest " in printed
    assert not (tmp_path / "kept").exists()


def test_an_input_follows_from_seed_and_number(program):
    files = program.seed_files()
    inputs = [program.make_input(1, number, files) for number in range(50)]
    assert inputs == [program.make_input(1, number, program.seed_files()) for number in range(50)]
    assert len(set(inputs)) > 45
    assert inputs[0] != program.make_input(2, 0, files)


@pytest.mark.parametrize(
    ("error", "result"),
    [(TypeError("x"), "TypeError: x"), (SystemExit(1), "SystemExit: 1"), (KeyError(2), "KeyError: 2")],
)
def test_what_escapes_is_a_finding(program, monkeypatch, tmp_path, error, result):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(program, "decode_image", fail)
    assert program.try_one(b"", tmp_path / "image") == (result, True)


def test_an_input_that_ends_the_process_is_a_finding(program, monkeypatch):
    processes, calls = program.fuzz_processes, []

    class Process:
        stderr = ""

        def __init__(self, words, **options):
            first, count = int(words[words.index("--first") + 1]), int(words[words.index("--count") + 1])
            calls.append((first, count))
            dies = first <= 7 < first + count
            numbers = range(first, 7 if dies else first + count)
            self.stdout = "".join(f'[{number}, "image", 0.0, false]\n' for number in numbers)
            self.returncode = -11 if dies else 0

    monkeypatch.setattr(processes.subprocess, "run", Process)
    outcomes = processes.run_range(["python", "fuzz.py"], 4, 6)
    assert [outcome.number for outcome in outcomes] == [4, 5, 6, 7, 8, 9]
    assert [outcome.number for outcome in outcomes if outcome.is_finding] == [7]
    assert outcomes[3].result == "the process ended with -11"
    assert calls == [(4, 6), (8, 2)]
