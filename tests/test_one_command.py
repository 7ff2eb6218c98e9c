"""`llava NAME` and the older spelling of each program are one code; the table of commands is complete."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava
from llava import __main__ as command
from llava.files.program_parser import program_name

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = command.COMMANDS
SCRIPTS = {
    "prepare": "task_data_preprocessing.py",
    "merge": "scripts/merge_lora_weights.py",
    "convert": "scripts/convert_checkpoint.py",
    "quantize": "scripts/quantize_checkpoint.py",
    "push": "scripts/push_to_hub.py",
}
MODULES = {
    "check": "llava.data.doctor",
    "plan": "llava.model.plan",
    "answer": "llava.eval.model_vqa_loader",
    "score": "llava.eval.vqa_score",
    "report": "llava.eval.report",
    "chat": "llava.serve.cli",
    "web": "llava.serve.web",
    "eval": "llava.eval.suite",
}


def spelling_before(name):
    return SCRIPTS[name] if name in SCRIPTS else f"-m {MODULES[name]}" if name in MODULES else "train_mem.py"


def test_all_commands_in_the_order_of_the_job():
    assert list(command.COMMANDS) == (
        [
            "prepare",
            "check",
            "plan",
            "train",
            "merge",
            "answer",
            "score",
            "report",
            "chat",
            "web",
            "convert",
            "quantize",
            "push",
            "eval",
        ]
    )
    assert SCRIPTS.keys() | MODULES.keys() | {"train"} == COMMANDS.keys()  # train: tests/train/launch


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_the_main_of_a_program(name):
    main = importlib.import_module(COMMANDS[name].module).main
    assert main.__annotations__ == {"argv": "Sequence[str] | None", "return": "int"}


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_the_script_runs_the_same_main(name, script):
    """Nothing but an import and a call."""
    *_, program, guard = body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    assert len(body) == 5  # with the docstring and two imports of Python's own
    assert ast.unparse(program) == f"from {COMMANDS[name].module} import main"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    sys.exit(main())"


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_the_module_is_the_same_file(name, module):
    assert COMMANDS[name].module.removesuffix(".__main__") == module


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_the_spelling_that_was_used(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: llava {name} ")
    assert f"python {spelling_before(name)}" not in shown


@pytest.mark.parametrize("name", sorted(SCRIPTS | MODULES))
def test_help_of_the_other_spelling(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(COMMANDS[name].module).main(["--help"])
    shown = capsys.readouterr().out
    assert " ".join(shown.split()).startswith(f"usage: python {spelling_before(name)} ")
    assert f"llava {name}" not in shown


@pytest.mark.parametrize("path", ["/usr/bin/llava", "llava", "llava merge.py", "my llava merge", "llava merge x"])
def test_only_the_command_renames_a_program(monkeypatch, path):
    monkeypatch.setattr(sys, "argv", [path])
    assert program_name("python x.py") == "python x.py"


@pytest.mark.parametrize("end", [0, 1, 7, SystemExit(3), KeyboardInterrupt()])
def test_flags_and_exit_codes_are_passed_on(monkeypatch, end):
    def main(words):
        seen.append((words, sys.argv))
        if isinstance(end, BaseException):
            raise end
        return end

    seen, before = [], sys.argv
    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(name=name, main=main))
    if isinstance(end, BaseException):
        with pytest.raises(type(end)):
            command.main(["score", "--json", "a b"])
    else:
        assert command.main(["score", "--json", "a b"]) == end
    assert seen == [(["--json", "a b"], ["llava score", "--json", "a b"])]
    assert sys.argv is before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "llava has no command trian; did you mean llava train?"),
        (["quantise"], "llava has no command quantise; did you mean llava quantize?"),
        (["--model-path", "x"], "llava has no command --model-path; llava --help lists the commands"),
        (["xyz\x1b[31m"], "llava has no command xyz\\x1b[31m; llava --help lists the commands"),
        ([], "no command is given; name one, such as llava check"),
        ([""], "no command is given; name one, such as llava check"),
    ],
)
def test_unknown_commands(capsys, words, message):
    assert command.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == f"error: {message}"


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_is_the_table_of_contents(capsys, flag):
    assert command.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(command.COMMANDS)
    assert max(map(len, lines)) <= 80


def test_help_of_a_command_in_other_words(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["help", "merge"])
    assert capsys.readouterr().out.startswith("usage: llava merge ")


def test_version(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava {llava.__version__}\n"


def test_python_m_llava_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "llava", "plan", "--batch", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "llava plan: error: --batch is 0; choose a positive number"


def test_an_installed_package_has_the_command_and_its_files():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["scripts"] == {"llava": "llava.__main__:main"}
    shipped = settings["tool"]["setuptools"]["package-data"]["llava.train.launch"]
    found = {path.name for pattern in shipped for path in (ROOT / "llava/train/launch").glob(pattern)}
    assert found == {path.name for path in (ROOT / "scripts").glob("zero*.json")}


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("zero*.json")), ids=lambda path: path.name)
def test_deepspeed_configs_are_shipped_as_they_are_in_scripts(script):
    assert (ROOT / "llava/train/launch" / script.name).read_bytes() == script.read_bytes()


def test_the_page_lists_every_command_with_its_older_spelling():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `llava (\w+)` \| .+? \| `(?:python|bash) (.+?)` \| ", page, re.MULTILINE)
    assert dict(rows) == {name: spelling_before(name) for name in COMMANDS} | {
        "train": "scripts/v1_5/finetune_task_lora.sh"
    }
    assert [name for name, _ in rows] == list(COMMANDS)
