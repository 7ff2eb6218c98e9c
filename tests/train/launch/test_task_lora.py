"""`llava train` starts what `scripts/v1_5/finetune_task_lora.sh` starts, and works without a checkout."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from llava import __main__ as command
from llava.train.launch import __main__ as launch
from llava.train.launch import choose_launcher, task_lora
from tests.train.launch.conftest import ROOT, VARIABLES

SCRIPT = "finetune_task_lora.sh"


@pytest.fixture
def train(stubs, monkeypatch):
    """Return the function (*flags, launchers=, **variables) -> words that `llava train` starts, or its exit code."""

    def run(*flags, launchers=("deepspeed",), **variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        folder, started = stubs(launchers), []
        monkeypatch.setattr(task_lora.sysconfig, "get_path", lambda _: str(folder))
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.setattr(launch, "run_launcher", lambda words, *_, **__: started.append(words) or 0)
        code = command.main(["train", *flags])
        if code:
            return code
        ((program, *words),) = started
        assert Path(program).parent == folder
        return [Path(program).name, *words]

    return run


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ((), {}),
        (("--num_train_epochs", "2", "--lora_r", "16"), {}),
        ((), {"BASE_MODEL": "a base", "DATA": "my data", "OUT": "out dir"}),
        ((), {"BASE_MODEL": "", "DATA": "", "OUT": "", "ZERO": "", "GPUS": "", "VAL_SHARE": "", "LAUNCHER": ""}),
        ((), {"ZERO": "none", "GPUS": "2", "PORT": "1234"}),
        ((), {"ZERO": "scripts/zero3.json", "HOSTFILE": "my hosts"}),
        (("--eval_max_questions", "50"), {"VAL_SHARE": "0.1"}),
        ((), {"VAL_SHARE": "0.1", "EVAL_STEPS": "20"}),
        ((), {"EVAL_STEPS": "20"}),
        ((), {"LAUNCHER": "torchrun", "GPUS": "2"}),
        ((), {"LAUNCHER": "python"}),
    ],
    ids=str,
)
def test_the_script_and_the_command_start_the_same(launched, train, monkeypatch, flags, variables):
    monkeypatch.chdir(ROOT)
    launchers = ("deepspeed", "torchrun")
    words = train(*flags, launchers=launchers, **variables)
    assert len(words) > 50
    assert words == launched(SCRIPT, *flags, launchers=launchers, **variables)


def test_variables_of_the_help_are_those_of_the_script():
    shown = re.findall(r"^  ([A-Z][A-Z_, ]+?)  ", task_lora.VARIABLES, re.MULTILINE)
    assert sorted(", ".join(name.strip() for name in shown).split(", ")) == sorted(VARIABLES)
    text = "".join((ROOT / "scripts/v1_5" / name).read_text(encoding="utf-8") for name in (SCRIPT, "launch.sh"))
    assert all(re.search(rf"\b{name}\b", text) for name in VARIABLES)


def test_without_a_checkout_deepspeeds_config_is_the_packages(train, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    package = ROOT / "llava/train"
    words = train(GPUS="2")
    assert words[:6] == [
        "deepspeed", "--num_gpus", "2", str(package / "train_mem.py"), "--deepspeed", str(package / "launch/zero2.json")
    ]  # fmt: skip
    assert train(ZERO="zero3", GPUS="1")[-1:] != 1
    assert str(package / "launch/zero3.json") in train(ZERO="zero3")
    assert "mine.json" in train(ZERO="mine.json")  # its absence is reported by the training


@pytest.mark.parametrize("name", ["none", "scripts/zero2.json", "mine.json", "zero9"])
def test_configs_that_are_files_or_unknown_are_taken_as_they_are(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    assert choose_launcher.find_zero_config(name) == name


@pytest.mark.parametrize(
    ("flags", "variables", "code", "message"),
    [
        (["--lora_alhpa", "1"], {}, 2, "error: unknown flag --lora_alhpa; did you mean --lora_alpha?"),
        (["--bits", "3"], {}, 2, "error: --bits 3: choose 4, 8 or 16"),
        ([], {"GPUS": "two"}, 1, "error: GPUS=two is not a number of GPUs; give 1 or more, or leave it out to use all"),
        ([], {"LAUNCHER": "torchrun", "GPUS": "2", "ZERO": "none"}, 127, "error: torchrun is not on the PATH; activate "
         "the environment that has torch"),
    ],
)  # fmt: skip
def test_refusals_come_before_the_launcher(train, capsys, flags, variables, code, message):
    assert train(*flags, launchers=(), **variables) == code
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_help_ends_with_the_variables(train, capsys):
    with pytest.raises(SystemExit) as end:
        train("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: llava train ")
    assert shown.endswith(f"{task_lora.VARIABLES}\n")


def test_the_exit_code_of_the_training_is_passed_on(train, monkeypatch):
    assert train() != 5
    monkeypatch.setattr(launch, "run_launcher", lambda *_, **__: 5)
    assert command.main(["train"]) == 5


def test_programs_of_this_python_come_first_on_the_path():
    found = task_lora.task_environment({"PATH": "/a:/b", "OTHER": ""})
    assert found["PATH"].split(os.pathsep)[-2:] == ["/a", "/b"]
    assert str(Path(sys.executable).parent) in found["PATH"].split(os.pathsep)[:2]
    assert found["OTHER"] == ""
