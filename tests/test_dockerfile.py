"""The Dockerfile installs with environment.sh, and copies what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """Pairs of instruction and its arguments, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == name]


def test_packages_come_from_environment_sh(tmp_path: Path) -> None:
    """The line that installs, run with a Python that prints its arguments, asks for what a machine with a GPU gets."""
    _, line = arguments("RUN")
    assert re.search(r"\bpip\b", " ".join(arguments("RUN"))) is None  # one home for the commands: environment.sh
    stub = tmp_path / "python3"
    stub.write_text(
        '#!/bin/bash\ncase "$*" in -c*) ;; *venv*) /bin/mkdir -p "$3/bin"; echo "PATH=$PATH" >"$3/bin/activate" ;;\n'
        '*) echo "$*" ;; esac\n',
        encoding="utf-8",
    )
    stub.chmod(0o755)
    (tmp_path / "python").symlink_to(stub)
    (tmp_path / "nvidia-smi").symlink_to(stub)
    shell = [*re.findall(r'"([^"]+)"', arguments("SHELL")[0])]
    assert shell == ["/bin/bash", "-euo", "pipefail", "-c"]
    printed = []
    for number, command in enumerate([line, "EXTRAS=train,quant; source scripts/environment.sh"]):
        names = {"PATH": f"{tmp_path}:/bin", "VENV": str(tmp_path / f"venv{number}")}
        done = subprocess.run([*shell, command], cwd=ROOT, env=names, capture_output=True, text=True, check=True)
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert printed[0] == "scripts/install_packages.py --extras train,quant --constraints  --device cuda\n"


def test_copied_paths_exist_and_suffice() -> None:
    copied = [word for rest in arguments("COPY") for word in shlex.split(rest)[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    needed = re.findall(r"scripts/\w+\.(?:py|sh)", (ROOT / "scripts/environment.sh").read_text("utf-8"))
    first = copied[: copied.index(".")]
    assert set(needed) <= set(first) and "scripts/environment.sh" in first
    assert {"pyproject.toml", "README.md", "LICENSE", "requirements"} <= set(first)  # what pyproject.toml reads


def test_scripts_run_in_the_image_as_in_an_active_environment() -> None:
    settings = [dict(pair.split("=", 1) for pair in shlex.split(rest)) for rest in arguments("ENV")]
    assert settings[0]["VENV"] == "/opt/venv"
    assert settings[1] == {"PATH": "/opt/venv/bin:$PATH", "VENV": "none"}


def test_ignored_files_are_not_those_of_the_repository() -> None:
    """What git ignores stays out of the image; of what it tracks only the figures of benchmarks do."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )

    def is_ignored(path: str) -> bool:
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        return any(fnmatch(name, pattern.removeprefix("**/")) for name in parents for pattern in patterns)

    assert [path for path in tracked if path and is_ignored(path) and not path.startswith("benchmarks/results/")] == []
    for line in (ROOT / ".gitignore").read_text("utf-8").splitlines():
        assert is_ignored(line.strip("/")), line
