"""Install this package and its optional dependencies into the interpreter's environment, step by step.

Called by environment.sh with the environment's own Python; needs nothing but the standard library. Each download is
printed with its size; all of pip's output goes into setup.log in the environment. A second run has nothing to do.
Example: .venv/bin/python scripts/install_packages.py --extras train --device cpu
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for Linux holds CUDA
SIZES = {"cpu": "about 200 MB to download, 1 GB on disk", "cuda": "about 3 GB to download, 7 GB on disk"}
_STALE_LOCK = 1800  # seconds: no compilation of DeepSpeed takes longer
_NO_NETWORK = re.compile(
    r"ConnectionError|NewConnection|Failed to establish|Max retries|ProxyError|Timeout|timed out|name resolution|"
    r"getaddrinfo|unreachable|from versions: none"
)
_SOUGHT = re.compile(
    r"satisfies the requirement (.+?) \(|No matching distribution found for (.+)|Collecting (\S+)|"
    r"The user requested (?:\(constraint\) )?(\S+)"
)
_PROGRESS = "raw"  # a choice of --progress-bar since pip 24.1
_COMPILE = "from deepspeed.ops.op_builder.cpu import {0} as builder; builder().load(verbose=False)"


class Step(NamedTuple):
    """One call of pip: what it installs, the download's size in words, and pip's arguments."""

    name: str
    size: str
    arguments: tuple[str, ...]
    is_optional: bool = False


def plan_steps(*, device: str, extras: str, constraints: str, shows_progress: bool, asks_cpu_index: bool) -> list[Step]:
    """Return the calls of pip in order; torch comes first, so that packages built from source find it.

    Args:
        device: "cpu" or "cuda".
        extras: names of pyproject.toml's optional dependencies, with commas.
        constraints: a file of pinned versions, "" for none.
        shows_progress: this pip reports how much of a download has arrived.
        asks_cpu_index: look for torch in PyTorch's own index of CPU builds first.
    """
    pins = (*(("--progress-bar", _PROGRESS) if shows_progress else ()), *(("-c", constraints) if constraints else ()))
    steps = []
    if asks_cpu_index:
        found = ("--no-deps", "--retries", "1", "--timeout", "20", "--index-url", CPU_INDEX, *pins, "torch")
        steps.append(Step("torch, a CPU build", "about 200 MB", found, is_optional=True))
    steps.append(Step("torch and what it needs", SIZES[device], (*pins, "torch")))
    name = f"llava[{extras}]" if extras else "llava"
    target = f".[{extras}]" if extras else "."
    return [
        *steps,
        Step(f"{name}: transformers, peft, ...", "about 100 MB to download, 0.5 GB on disk", (*pins, "-e", target)),
    ]


def describe(line: str) -> str | None:
    """What to print for a line of pip's output, None for nothing."""
    if found := re.search(r"(Downloading|Using cached) (?:\S*/)?([^\s/]+) \((.+)\)", line):
        verb, name, size = found.groups()
        if name.endswith(".metadata"):
            return None
        return f"{'downloading' if verb == 'Downloading' else 'downloaded before:'} {name} ({size})"
    if found := re.search(r"Building (?:editable|wheel)s? for (\S+).*: started", line):
        return f"building {found[1]}"
    if line.startswith("Installing collected packages:"):
        count = line.count(",") + 1
        return "unpacking 1 package" if count == 1 else f"unpacking {count} packages, which takes a minute"
    return None


def percentage(line: str) -> int | None:
    """The share of a download that has arrived, from pip's `Progress 120 of 400`."""
    found = re.match(r"Progress (\d+) of (\d+)", line)
    return 100 * int(found[1]) // int(found[2]) if found and int(found[2]) else None


def explain_failure(step: Step, lines: Sequence[str], *, extras: str, constraints: str, log: Path) -> str:
    """Name the step that failed, pip's reason and the way out.

    Args:
        step: the call of pip that failed.
        lines: its output.
        extras, constraints: as in `plan_steps`.
        log: the file with all of pip's output.
    """
    errors = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
    reason = errors[-1] if errors else next((line for line in reversed(lines) if line.strip()), "pip gave no reason")
    if not any(_NO_NETWORK.search(line) for line in lines):
        return f"the step '{step.name}' failed: {reason}\nAll of pip's output is in {log}."
    sought = [next(filter(None, found.groups())) for line in lines if (found := _SOUGHT.search(line))]
    python, pins = "{}.{}".format(*sys.version_info), f"-c {constraints} " if constraints else ""
    target = f"'.[{extras}]'" if extras else "."
    return (
        f"the step '{step.name}' failed: pip can't fetch {sought[-1] if sought else 'its packages'} (no network, or "
        f"the package index can't be reached).\nWith a network, run the same command again.\n"
        f"Without one: on a machine with a network, the same system and Python {python}, in a clone of the repository\n"
        f"    python3 -m pip download --dest wheels pip setuptools wheel {pins}{target}\n"
        f"copy the folder wheels here and run the same command with two variables:\n"
        f"    PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels bash scripts/quickstart.sh\n"
        f"All of pip's output is in {log}."
    )


def run_pip(step: Step, log: Path) -> list[str] | None:
    """Run one call of pip in the repository's root and print its progress; its output if it failed, else None."""
    command = [sys.executable, "-m", "pip", "install", *step.arguments]
    lines, is_terminal, is_open = [], sys.stdout.isatty(), False
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
        for line in process.stdout or ():
            share = percentage(line)
            if share is not None:
                if is_terminal:
                    print(f"\r        {share:3d} %", end="", flush=True)
                    is_open = True
                continue
            stream.write(line)
            lines.append(line.rstrip("\n"))
            if text := describe(line):
                print(f"{chr(13) if is_open else ''}      {text}", flush=True)
                is_open = False
    if is_open:
        print("\r             \r", end="")
    return None if process.wait() == 0 else lines


def compile_extensions(builders: Sequence[str], log: Path) -> None:
    """Compile DeepSpeed's extensions for CPUs, which its first run on a CPU would do.

    A killed compilation leaves a lock, on which the next one would wait.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    for lock in folder.rglob("lock"):
        if time.time() - lock.stat().st_mtime > _STALE_LOCK:
            lock.unlink(missing_ok=True)
    for builder in builders:
        print(f"   DeepSpeed's {builder} for CPUs, which the tests use (compiling takes a minute)", flush=True)
        with log.open("a", encoding="utf-8") as stream:
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE.format(builder)], stdout=stream, stderr=stream, check=False
            )
        if done.returncode:
            print(f"      it could not compile; the reason is in {log}")


def describe_wish(extras: str, constraints: str) -> str:
    """Text that changes when an installation has to be made again."""
    files = [ROOT / "pyproject.toml", *([ROOT / constraints] if constraints else [])]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return f"{digest} {extras}\n"


def pip_options() -> str:
    """The text of `pip install --help`, "" without pip."""
    command = [sys.executable, "-m", "pip", "install", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout


def has_own_index() -> bool:
    """Whether the user has told pip where to look for packages."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return re.search(r"\.(index-url|extra-index-url|find-links|no-index)=", settings) is not None


def install(device: str, extras: str, constraints: str, log: Path) -> str:
    """Run the calls of pip in order; the message about the first that fails, "" if none does."""
    options = pip_options()
    if not options:
        command = f"uv pip install -e '.[{extras}]'"
        return f"{sys.prefix} has no pip, as uv makes environments: run {command} and the script with VENV=none"
    if _PROGRESS not in options:
        print("   pip, a newer one that shows its progress (2 MB)", flush=True)
        run_pip(Step("pip", "2 MB", ("--upgrade", "pip")), log)
        options = pip_options()
    steps = plan_steps(
        device=device,
        extras=extras,
        constraints=constraints,
        shows_progress=_PROGRESS in options,
        asks_cpu_index=device == "cpu" and sys.platform == "linux" and not has_own_index(),
    )
    for step in steps:
        print(f"   {step.name} ({step.size})", flush=True)
        failed = run_pip(step, log)
        if failed is not None and not step.is_optional:
            return explain_failure(step, failed, extras=extras, constraints=constraints, log=log)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Install what is missing; 1 if a step fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="train", help="optional dependencies of pyproject.toml, with commas")
    parser.add_argument("--constraints", default="", help="file of pinned versions")
    parser.add_argument("--device", choices=list(SIZES), default="cpu", help="build of torch")
    args = parser.parse_args(argv)
    mark, log = Path(sys.prefix, "installed.txt"), Path(sys.prefix, "setup.log")
    wish = describe_wish(args.extras, args.constraints)
    if mark.is_file() and mark.read_text("utf-8") == wish:
        return 0
    log.unlink(missing_ok=True)
    error = install(args.device, args.extras, args.constraints, log)
    if error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.device == "cpu" and sys.platform == "linux" and {"dev", "train"} <= set(args.extras.split(",")):
        compile_extensions(("ShareMemCommBuilder", "CPUAdamBuilder"), log)
    mark.write_text(wish, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
