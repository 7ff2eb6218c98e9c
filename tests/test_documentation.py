"""What documents and scripts say exists: files, programs, flags; the README's Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_SCRIPTS = [
    ROOT / "inference.sh",
    ROOT / ".ci/run",
    *sorted(path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).rglob("*.sh")),
]
PROGRAMS = (
    "task_data_preprocessing.py",
    "scripts/merge_lora_weights.py",
    "scripts/convert_checkpoint.py",
    "scripts/quantize_checkpoint.py",
    "scripts/tiny/make_world.py",
    "scripts/tiny/train_base.py",
    "llava/train/train_mem.py",
    "-m llava.data.doctor",
    "-m llava.model.plan",
    "-m llava.eval.model_vqa_loader",
    "-m llava.eval.run_llava",
    "-m llava.eval.vqa_score",
    "-m llava.eval.contact_sheet",
    "-m llava.eval.report",
    "-m llava.model.plan",
    "-m llava.serve.cli",
)
WRAPPED = {"inference.sh": "-m llava.eval.model_vqa_loader", "launch ": "llava/train/train_mem.py"} | {
    f"scripts/v1_5/{path.name}": "llava/train/train_mem.py" for path in (ROOT / "scripts/v1_5").glob("*.sh")
}
"""Shell scripts that hand their flags on, and the program that takes them."""
LAUNCHER_FLAGS = {"--num_gpus", "--hostfile"}  # of deepspeed itself
LAUNCHER_FLAGS |= {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}  # of torchrun


@cache
def help_text(program: str) -> str:
    done = subprocess.run(
        [sys.executable, *program.split(), "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(text: str) -> list[str]:
    """The command lines of shell text, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [re.sub(r"(^|\s)#.*", "", line) for line in joined.splitlines()]


def program_of(command: str) -> str | None:
    known = {**{program: program for program in PROGRAMS}, **WRAPPED}
    return next((known[name] for name in known if name in command), None)


def document_commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:bash|powershell)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            found += [(path.name, command) for command in commands(block) if command.strip()]
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_answers_help(program: str) -> None:
    assert "usage:" in help_text(program)


@pytest.mark.parametrize(("document", "command"), document_commands())
def test_command_of_a_document_exists(document: str, command: str) -> None:
    for name in re.findall(r"[\w/.]+\.(?:py|sh)\b", command):
        assert (ROOT / name).is_file(), f"{document}: {name}"
    for module in re.findall(r"-m (llava[\w.]+)", command):
        assert f"-m {module}" in PROGRAMS, f"{document}: {module}"
    flags = set(re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", command)) - LAUNCHER_FLAGS
    program = program_of(command)
    if program and flags:
        missing = [flag for flag in flags if not re.search(rf"{flag}\b", help_text(program))]
        assert not missing, f"{document}: {command}"


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_parses_and_its_flags_exist(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text or script.name in ("environment.sh", "launch.sh")
    for command in commands(text):
        program = program_of(command)
        for flag in set(re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", command)) - LAUNCHER_FLAGS if program else ():
            assert re.search(rf"{flag}\b", help_text(program)), f"{script.name}: {flag}"


def test_messages_of_the_checkpoint_page_are_those_of_the_code() -> None:
    sources = [
        path.read_text(encoding="utf-8") for folder in ("llava", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # texts written in several pieces, joined
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page.partition("## Messages")[2], re.MULTILINE)
    assert len(rows) > 12
    for message in re.findall(r"`(.*?)`", " ".join(rows)):
        for piece in re.split(r"\(?\.\.\.\)?|\b[A-Z]\b|[\d.]+ GB|model-\S+|\([A-Z].*\)", message):
            assert piece.strip(" ,;:") in code, message


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_python_of_the_readme_runs(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    block = block.replace('"llava_merged_model"', repr(str(goldens / "llava-v1.5-golden")))
    block = block.replace('"man.jpg"', repr(str(goldens / "images/landscape.jpg"))).replace(": 512", ": 4")
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["answer"], str)
    assert capsys.readouterr().out == f"{names['answer']}\n"


def test_documents_and_code_name_no_machine_of_ours() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".json") and path.is_file():
            assert "/work" + "/" not in path.read_text(encoding="utf-8", errors="ignore"), name
