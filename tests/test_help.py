"""`--help` and wrong flags are answered before libraries are imported that take seconds, by every program."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_documentation import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "transformers", "numpy", "PIL"]
CHILD = f"""
import contextlib, io, json, runpy, sys
flag, name = sys.argv[1:3] if sys.argv[1] == "-m" else ("", sys.argv[1])
sys.argv = [name, *sys.argv[3 if flag else 2:]]
out, err, code = io.StringIO(), io.StringIO(), 0
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        if flag:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, name.rpartition("/")[0] or ".")
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        code = end.code
heavy = [module for module in {HEAVY} if module in sys.modules]
print(json.dumps([code, out.getvalue(), err.getvalue(), heavy]))
"""
"""Runs a program as `python PROGRAM WORDS` does; prints its exit code, its output, and the modules it has imported."""


def load_benchmark():
    spec = importlib.util.spec_from_file_location("help_speed", ROOT / "benchmarks/help_speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()
FOUND = BENCHMARK.find_programs(ROOT)


def run(words):
    done = subprocess.run([sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_program_is_found():
    found = {" ".join(program) for program in FOUND}
    assert set(PROGRAMS) <= found
    assert found - set(PROGRAMS) == {
        "-m llava.train.launch",
        "-m llava.train.train",
        "scripts/install_packages.py",
    }


@pytest.mark.parametrize("program", FOUND, ids=" ".join)
def test_help_imports_nothing_heavy(program):
    code, out, _, heavy = run([*program, "--help"])
    assert (code or 0, heavy) == (0, [])
    assert out.startswith("usage: ")


@pytest.mark.parametrize("program", FOUND, ids=" ".join)
def test_a_wrong_flag_imports_nothing_heavy(program):
    code, out, err, heavy = run([*program, BENCHMARK.WRONG_FLAG])
    assert (code, out, heavy) == (2, "", [])
    assert "error: " in err


TRAINING = ["llava/train/train_mem.py", "--output_dir", "out", "--data_path", "data.json"]
MODEL = ["--model-path", "model"]
REPORT = ["-m", "llava.eval.report", "--answers", "a", "--questions", "q", "--images", "i", "-o", "o"]
BATCH = ["-m", "llava.eval.model_vqa_loader", *MODEL, "--question-file", "q", "--answers-file", "a"]
TINY = "playground/llava-tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TRAINING, "--lora_alhpa", "3"], "unknown flag --lora_alhpa; did you mean --lora_alpha?"),
        (
            [*TRAINING, "--learning_rate", "high"],
            "argument --learning_rate/--learning-rate: invalid float value: 'high'",
        ),
        ([*TRAINING, "--bits", "3", "--lora_enable", "True"], "--bits 3: choose 4, 8 or 16"),
        ([*TRAINING, "--deepspeed", "no-such.json"], "--deepspeed no-such.json can't be read"),
        ([*TRAINING, "--version", "v9"], "unknown conversation template 'v9'"),
        ([*TRAINING, "--output_dir", TINY, "--model_name_or_path", TINY], "would write over"),
        (TRAINING[:3], "--data_path is missing; name a table, or data.json of task_data_preprocessing.py"),
        (["-m", "llava.serve.cli", *MODEL, "--temperature", "-1"], "--temperature is -1.0; choose 0 (greedy)"),
        (["-m", "llava.serve.cli", *MODEL, "--device", "gpu"], "device 'gpu' is unknown; choose cpu, cuda, cuda:1"),
        (["-m", "llava.model.plan", *MODEL, "--batch", "0"], "--batch is 0; choose a positive number"),
        (["-m", "llava.data.doctor", "--data_path", "x", "--shown", "0"], "0 is not a positive number"),
        (
            [*REPORT, "--thumbnail-size", "3"],
            "--thumbnail-size is 3; choose 48 or more",
        ),
        (
            [*BATCH, "--num_beams", "2", "--with-scores"],
            "--num_beams does not go with --choices and --with-scores; leave it out",
        ),
        (["-m", "llava.eval.run_llava", *MODEL, "--query", "?"], "the following arguments are required: --image-file"),
        (
            ["scripts/convert_checkpoint.py", "--from", "a", "--to", "a", "--layout", "hf"],
            "--to a would write over --from a; choose another --to",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_wrong_values_and_contradictions_import_nothing_heavy(words, message):
    code, _, err, heavy = run(words)
    assert (code, heavy) == (2, [])
    assert message in err


@pytest.mark.parametrize(
    "module", ["llava", "llava.constants", "llava.conversation", "llava.utils", "llava.model", "llava.train.train"]
)
def test_modules_that_import_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_benchmark_measures_every_program(monkeypatch, capsys):
    monkeypatch.setattr(BENCHMARK, "measure", lambda root, words: 1.0 if "--help" in words else 2.0)
    assert BENCHMARK.main(["--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [f"| `{' '.join(program)}` | 1.00 s | 2.00 s |" for program in FOUND]
