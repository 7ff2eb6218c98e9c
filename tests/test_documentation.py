"""What documents and scripts say exists: files, programs, flags; the README's Python runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, RUSSIAN = ROOT / "README.md", ROOT / "README.ru.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ENGLISH, RUSSIAN, ROOT / "CONTRIBUTING.md", *PAGES]
SHELL_SCRIPTS = [
    ROOT / "inference.sh",
    ROOT / ".ci/run",
    *sorted(path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).rglob("*.sh")),
]
PROGRAMS = (
    "-m llava",
    "task_data_preprocessing.py",
    "scripts/merge_lora_weights.py",
    "scripts/convert_checkpoint.py",
    "scripts/quantize_checkpoint.py",
    "scripts/push_to_hub.py",
    "scripts/convert_answer_to_mme.py",
    "scripts/convert_mmbench_for_submission.py",
    "scripts/convert_mmvet_for_eval.py",
    "scripts/convert_seed_for_submission.py",
    "scripts/convert_vizwiz_for_submission.py",
    "scripts/convert_vqav2_for_submission.py",
    "examples/shapes_world/make_world.py",
    "examples/shapes_world/train_base.py",
    "llava/train/train_mem.py",
    "-m llava.data.doctor",
    "-m llava.model.plan",
    "-m llava.eval.eval_gpt_review_bench",
    "-m llava.eval.summarize_gpt_review",
    "-m llava.eval.model_vqa_loader",
    "-m llava.eval.model_vqa_mmbench",
    "-m llava.eval.model_vqa_science",
    "-m llava.eval.run_llava",
    "-m llava.eval.suite",
    "-m llava.eval.vqa_score",
    "-m llava.eval.eval_pope",
    "-m llava.eval.eval_textvqa",
    "-m llava.eval.eval_gqa",
    "-m llava.eval.eval_science_qa",
    "scripts/convert_gqa_for_eval.py",
    "-m llava.eval.report",
    "-m llava.serve.cli",
    "-m llava.serve.web",
)
WRAPPED = {"inference.sh": "-m llava.eval.model_vqa_loader", "launch ": "llava/train/train_mem.py"} | {
    f"scripts/v1_5/{path.name}": "llava/train/train_mem.py" for path in (ROOT / "scripts/v1_5").glob("*.sh")
}
WRAPPED |= {
    f"scripts/v1_5/eval/{path.name}": "-m llava.eval.suite" for path in (ROOT / "scripts/v1_5/eval").glob("*.sh")
}
"""Shell scripts that hand their flags on, and the program that takes them."""
LAUNCHER_FLAGS = {"--num_gpus", "--hostfile"}  # of deepspeed itself
LAUNCHER_FLAGS |= {"--gpus", "--ipc"}  # of docker
LAUNCHER_FLAGS |= {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}  # of torchrun


@cache
def help_text(program: str) -> str:
    """What a program prints for `--help`, run as `__main__` in this process, which has imported the libraries."""
    printed, words = io.StringIO(), program.split()
    module_flag = words[:1] == ["-m"]
    name, *words = words[module_flag:]
    path = [str((ROOT / name).parent), *sys.path]
    with (
        contextlib.redirect_stdout(printed),
        patch.multiple(sys, argv=[name, *words, "--help"], path=path),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as end,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        if module_flag:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert not end.value.code
    return printed.getvalue()


def commands(text: str) -> list[str]:
    """The command lines of shell text, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [re.sub(r"(^|\s)#.*", "", line) for line in joined.splitlines()]


def program_of(command: str) -> str | None:
    if found := re.match(r"(?:\w+=\S+ )*(?:python -m )?llava (\w+)", command):
        return f"-m llava {found[1]}"
    known = {**{program: program for program in PROGRAMS}, **WRAPPED}
    return next((known[name] for name in known if re.search(rf"{re.escape(name)}(?![\w.])", command)), None)


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
    assert "set -euo pipefail" in text or script.name in ("benchmark.sh", "environment.sh", "launch.sh")
    for command in commands(text):
        program = program_of(command)
        for flag in set(re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", command)) - LAUNCHER_FLAGS if program else ():
            assert re.search(rf"{flag}\b", help_text(program)), f"{script.name}: {flag}"


@pytest.mark.parametrize(
    ("name", "section", "column", "at_least"),
    [("checkpoints", "## Messages", 0, 12), ("models", "## What does not load", 1, 8), ("hub", "## Messages", 0, 7)],
)
def test_messages_of_a_page_are_those_of_the_code(name: str, section: str, column: int, at_least: int) -> None:
    sources = [
        path.read_text(encoding="utf-8") for folder in ("llava", "scripts") for path in (ROOT / folder).rglob("*.py")
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # texts written in several pieces, joined
    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8").partition(section)[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > at_least
    for message in re.findall(r"`(.*?)`", " ".join(row[column] for row in rows)):
        for piece in re.split(r"\(?\.\.\.\)?|\b[A-Z]\b|[\d.]+ GB|model-\S+|\([A-Z].*\)", message):
            assert piece.strip(" ,;:") in code, message


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for link in links(path):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```.*?```", path.read_text(encoding="utf-8"), re.DOTALL)


def numbers(text: str) -> Counter[str]:
    """The numbers of a text without separators: 1,234.5 is written 1 234,5 in Russian, with a no-break space."""
    return Counter(re.findall(r"\d+", re.sub(r"(?<=\d)[.,\u00a0](?=\d)", "", text)))


def test_both_readmes_have_the_same_commands_links_and_numbers() -> None:
    assert code_blocks(RUSSIAN) == code_blocks(ENGLISH)
    other = {ENGLISH.name, RUSSIAN.name}
    english, russian = (
        [link for link in links(path) if link[0] != "#" and link not in other] for path in (ENGLISH, RUSSIAN)
    )
    assert Counter(russian) == Counter(english)  # the order of words differs, and so may that of links
    assert numbers(RUSSIAN.read_text("utf-8")) == numbers(ENGLISH.read_text("utf-8"))
    levels = [re.findall(r"^#+(?= )", path.read_text("utf-8"), re.MULTILINE) for path in (ENGLISH, RUSSIAN)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_page_says_for_whom_it_is_and_is_in_the_index(path: Path) -> None:
    title, _, text = path.read_text("utf-8").partition("\n\n")
    assert title.startswith("# ")
    assert text.startswith("For ")
    if path.name != "README.md":
        assert path.name in links(ROOT / "docs/README.md")


def test_images_of_documents_are_small_and_used() -> None:
    shown = {(path.parent / link).resolve() for path in DOCUMENTS for link in links(path)}
    for image in (ROOT / "docs/images").iterdir():
        assert image.stat().st_size <= 200_000, image
        assert image in shown, f"{image} is shown nowhere; remove it"


def place_of(module: str) -> bool:
    """Whether a dotted name is a module, a package, or a name in a module."""
    *folders, name = module.split(".")
    folder = ROOT.joinpath(*folders)
    in_package = folders == ["llava"] and f"\ndef {name}(" in (folder / "__init__.py").read_text(encoding="utf-8")
    is_module = (folder / name).is_dir() or (folder / f"{name}.py").is_file()
    return is_module or folder.with_suffix(".py").is_file() or in_package


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_modules_in_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders = "llava|tests|benchmarks|docs|scripts|examples|requirements"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", re.sub(r"\S*NAME\S*", "", text))
    assert [name for name in named if not (ROOT / name).exists()] == []
    if path.name != "python.md":  # the original's import paths, which are no files here
        modules = re.findall(r"(?<![/\w])llava(?:\.\w+)+", text)  # after a slash it is a file
        assert [name for name in modules if not place_of(name)] == []


def test_the_tree_names_every_folder_of_the_package() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The tree")[2].partition("## ")[0]
    folders = {path.parent.relative_to(ROOT / "llava") for path in (ROOT / "llava").rglob("__init__.py")}
    assert {f"{folder.name}/" for folder in folders if folder.name} - set(tree.split()) == set()


def imports_of_llava(path: Path) -> list[tuple[str, str]]:
    """Pairs of module and name that a program imports from the package."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    found = [(node.module, alias.name) for node in nodes for alias in node.names if node.module]
    return [(module, name) for module, name in found if module.split(".")[0] == "llava"]


def test_programs_import_what_exists() -> None:
    """Benchmarks run on GPUs and seldom; a renamed import must not wait for that."""
    folders = [ROOT / name for name in ("benchmarks", "examples", "scripts")]
    pairs = {pair for folder in folders for path in folder.rglob("*.py") for pair in imports_of_llava(path)}
    assert len(pairs) > 50
    wrong = [
        (module, name)
        for module, name in sorted(pairs)
        if not module.endswith("_triton")  # imports Triton
        and not hasattr(importlib.import_module(module), name)
        and importlib.util.find_spec(f"{module}.{name}") is None
    ]
    assert wrong == []


def calls_of_llava(path: Path) -> list[tuple[ast.Call, Callable[..., object]]]:
    """Calls in a program of what it imports from the package."""
    names = dict(name[::-1] for name in imports_of_llava(path) if not name[0].endswith("_triton"))
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    direct = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]
    return [(call, getattr(importlib.import_module(names[call.func.id]), call.func.id)) for call in direct]


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "scripts"])
def test_programs_pass_arguments_that_exist(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for call, function in calls_of_llava(path):
            is_open = any(isinstance(argument, ast.Starred) for argument in call.args)
            signature = inspect.signature(function)
            named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            is_open = is_open or len(named) < len(call.keywords)  # *args and **kwargs may hold the rest
            bind = signature.bind_partial if is_open else signature.bind
            bind(*(argument for argument in call.args if not isinstance(argument, ast.Starred)), **named)


def python_block(word: str) -> str:
    """The README's Python that holds a word."""
    blocks = re.findall(r"```python\n(.*?)```", ENGLISH.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if word in block)


def test_python_of_the_readme_runs(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = python_block("eval_model").replace('"llava_merged_model"', repr(str(goldens / "llava-v1.5-golden")))
    block = block.replace('"man.jpg"', repr(str(goldens / "images/landscape.jpg"))).replace(": 512", ": 4")
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["answer"], str)
    assert capsys.readouterr().out == f"{names['answer']}\n"


def test_python_of_the_readme_makes_a_table_of_vqav2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_program: Callable[[str], Any]
) -> None:
    """The official files' keys, with texts that a table must quote."""
    texts = {262_000: 'Is it "red", or not?', 262_001: "What's this?"}
    entries = [{"image_id": 262, "question": text, "question_id": key} for key, text in texts.items()]
    right = [{"question_id": key, "multiple_choice_answer": "yes, 2", "answers": []} for key in reversed(texts)]
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": entries}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": right}))
    (tmp_path / "playground/data_train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(python_block("multiple_choice_answer"), {})
    table, records = "playground/data_train/Train_Qs.csv", "playground/data_train/data.json"
    assert load_program("task_data_preprocessing.py").main(["--input", table, "--output", records]) == 0
    found = json.loads(Path(records).read_text(encoding="utf-8"))
    assert [record["image"] for record in found] == ["COCO_val2014_000000000262.jpg"] * 2
    assert [record["conversations"][0]["value"] for record in found] == [f"<image>\n{text}" for text in texts.values()]
    assert {record["conversations"][1]["value"] for record in found} == {"yes, 2"}


def test_the_record_of_the_readme_is_what_preprocessing_writes(
    tmp_path: Path, load_program: Callable[[str], Any]
) -> None:
    text = ENGLISH.read_text(encoding="utf-8").partition("## Get the data")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = "\n".join(",".join(row) for row in (cells[0], *cells[2:])) + "\n"
    (tmp_path / "table.csv").write_text(table, encoding="utf-8")
    words = ["--input", str(tmp_path / "table.csv"), "--output", str(tmp_path / "data.json")]
    assert load_program("task_data_preprocessing.py").main(words) == 0
    shown = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))[0] == shown


def test_documents_and_code_name_no_machine_of_ours() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".txt", ".json") and path.is_file():
            assert "/work" + "/" not in path.read_text(encoding="utf-8", errors="ignore"), name


def test_each_promise_of_reliability_has_its_test() -> None:
    promises, _, figures = (ROOT / "docs/reliability.md").read_text("utf-8").partition("## Fuzzing")
    assert figures
    rows = re.findall(r"^\| (?!promise|---)(.*) \| (.*) \|$", promises, re.MULTILINE)
    assert len(rows) > 30
    for promise, tests in rows:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", tests)
        assert named, promise
        for path, name in named:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{promise}: {path}::{name}"
