"""The set-up installs step by step, shows what pip does, and names what failed with the way out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def program(load_program):
    return load_program("scripts/install_packages.py")


def plan(program, **changes):
    settings = {
        "device": "cpu",
        "extras": "train",
        "constraints": "pins.txt",
        "shows_progress": True,
        "asks_cpu_index": False,
    }
    return [step.arguments for step in program.plan_steps(**settings | changes)]


def test_torch_comes_first_and_everything_is_pinned(program):
    shown = ("--progress-bar", "raw")
    assert plan(program) == [(*shown, "-c", "pins.txt", "torch"), (*shown, "-c", "pins.txt", "-e", ".[train]")]
    assert plan(program, constraints="", extras="", shows_progress=False) == [("torch",), ("-e", ".")]


def test_the_index_of_cpu_builds_is_asked_first_and_may_be_missing(program):
    steps = program.plan_steps(device="cpu", extras="", constraints="", shows_progress=True, asks_cpu_index=True)
    assert [step.is_optional for step in steps] == [True, False, False]
    assert (
        steps[0].arguments[-3:] == ("--index-url", program.CPU_INDEX, "torch")
        or program.CPU_INDEX in steps[0].arguments
    )
    assert "--no-deps" in steps[0].arguments  # what torch needs comes from the user's own index


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("  Downloading torch-2.13.0-cp311.whl (186.1 MB)", "downloading torch-2.13.0-cp311.whl (186.1 MB)"),
        ("  Downloading https://host/a/b/six-1.17.whl (11 kB)", "downloading six-1.17.whl (11 kB)"),
        ("Using cached numpy-2.4.whl (18.2 MB)", "downloaded before: numpy-2.4.whl (18.2 MB)"),
        ("  Downloading deepspeed-0.19.8.tar.gz (1.8 MB)", "downloading deepspeed-0.19.8.tar.gz (1.8 MB)"),
        ("Downloading torch-2.13.0.whl.metadata (29 kB)", None),
        ("Collecting torch", None),
        ("  Building wheel for deepspeed (pyproject.toml): started", "building deepspeed"),
        ("  Building editable for llava (pyproject.toml): started", "building llava"),
        ("  Building wheel for deepspeed (pyproject.toml): finished with status 'done'", None),
        ("Installing collected packages: a, b, c", "unpacking 3 packages, which takes a minute"),
    ],
)  # fmt: skip
def test_lines_of_pip(program, line, text):
    assert program.describe(line) == text


def test_percentages(program):
    lines = ["Progress 0 of 400", "Progress 120 of 400", "Progress 400 of 400", "Progress 7 of 0", "Collecting x"]
    assert [program.percentage(line) for line in lines] == [0, 30, 100, None, None]


NO_NETWORK = [
    "Collecting torch==2.13.0",
    "  WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...: Failed to establish a "
    "new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/",
    "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)",
    "ERROR: No matching distribution found for torch==2.13.0",
]


def explain(program, lines, extras="train", constraints="requirements/cpu.txt"):
    step = program.Step("torch", "", ())
    return program.explain_failure(step, lines, extras=extras, constraints=constraints, log=Path("setup.log"))


def test_without_a_network_the_package_and_the_offline_way_are_named(program):
    text = explain(program, NO_NETWORK)
    assert text.startswith("the step 'torch' failed: pip can't fetch torch==2.13.0 (no network, or")
    assert "pip download --dest wheels pip setuptools wheel -c requirements/cpu.txt '.[train]'\n" in text
    assert "PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels bash scripts/quickstart.sh" in text
    assert "Python {}.{}".format(*sys.version_info) in text


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["Collecting x", "ERROR: Could not install packages: [Errno 28] No space left on device", ""],
         "Could not install packages: [Errno 28] No space left on device"),
        (["Traceback", "ValueError: odd", " "], "ValueError: odd"),
        ([], "pip gave no reason"),
    ],
)  # fmt: skip
def test_other_failures_say_pips_reason(program, lines, reason):
    assert explain(program, lines) == f"the step 'torch' failed: {reason}\nAll of pip's output is in setup.log."


@pytest.fixture
def installed(tmp_path):
    """Return the function (lines of pip, exit code, *flags) -> (process of the program, calls of that pip)."""
    pip = tmp_path / "site/pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").touch()
    calls = tmp_path / "calls"

    def run(lines, code, *flags, is_new=True):
        (pip / "__main__.py").write_text(
            "import sys\n"
            f"if '--help' in sys.argv: print({'raw' if is_new else 'on'!r}); sys.exit()\n"
            "if 'config' in sys.argv: print(\":env:.find-links='wheels'\"); sys.exit()\n"
            f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"print('\\n'.join({lines!r}))\nsys.exit({code})\n"
        )
        start = f"import sys, runpy; sys.prefix = {str(tmp_path)!r}; sys.argv = ['x', *{list(flags)!r}]; "
        start += "runpy.run_path('scripts/install_packages.py', run_name='__main__')"
        names = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-c", start]
        done = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_run_prints_its_steps_and_the_next_has_nothing_to_do(installed, tmp_path):
    lines = ["Collecting x", "Downloading x.whl (5 MB)", "Progress 1 of 2", "Installing collected packages: x"]
    done, calls = installed(lines, 0)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in printed if line.startswith("   ") and not line.startswith("      ")] == [
        "   torch and what it needs (about 200 MB to download, 1 GB on disk)",
        "   llava[train]: transformers, peft, ... (about 100 MB to download, 0.5 GB on disk)",
    ]
    assert printed[1:3] == [
        "      downloading x.whl (5 MB)",
        "      unpacking 1 package",
    ]
    assert "Progress" not in (tmp_path / "setup.log").read_text()
    assert len(calls) == 2
    again, calls = installed(["ERROR: not called"], 1)
    assert (again.returncode, again.stdout, len(calls)) == (0, "", 2)
    other, calls = installed([], 0, "--extras", "train,quant")
    assert other.returncode == 0 and len(calls) == 4


def test_a_failed_run_names_the_step_and_the_next_tries_again(installed):
    done, calls = installed(NO_NETWORK, 1)
    assert done.returncode == 1 and len(calls) == 1
    assert done.stderr.startswith("error: the step 'torch and what it needs' failed: pip can't fetch torch==2.13.0")
    assert installed([], 0)[0].returncode == 0


def test_an_old_pip_is_upgraded_first_and_used_as_it_is_where_that_fails(installed):
    done, calls = installed(["Requirement already satisfied: pip"], 0, is_new=False)
    assert done.returncode == 0
    assert calls[0] == "install --upgrade pip"
    assert [call for call in calls if "--progress-bar" in call] == []


def test_environment_without_pip_is_refused_with_uvs_command(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(program, "pip_options", lambda: "")
    assert program.main(["--extras", "train"]) == 1
    assert re.search(r"has no pip, .*uv pip install -e .* and the script with VENV=none", capsys.readouterr().err)
