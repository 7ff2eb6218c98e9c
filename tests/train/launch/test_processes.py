"""A signal to the process that started a launcher reaches those that train; the exit code comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.train.launch.processes import pass_on

ROOT = Path(__file__).parents[3]
TRAINING = """
import signal, sys
def end(number, frame):
    print("training got", number, flush=True)
    sys.exit(40)
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), end)
print("ready", flush=True)
while True:
    signal.pause()
"""
LAUNCHER = """
import signal, subprocess, sys
for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
    signal.signal(getattr(signal, name), lambda *_: print("the launcher got it", flush=True))
sys.exit(subprocess.call(sys.argv[1:]))
"""
ALONE = "print('ready', flush=True); import signal; signal.pause()"
PARENT = """
import json, os, sys
from llava.train.launch.processes import run_launcher
words, launcher = json.loads(sys.argv[1])
code = run_launcher(words, os.environ, launcher=launcher)
print("code", code)
"""
DEPTH = {"python": 0, "torchrun": 1, "deepspeed": 2}
"""Processes between the one that starts a launcher and those that train."""


def python(code, *words):
    return [sys.executable, "-S", "-c", code, *words]


def rest_of(process):
    return process.communicate(timeout=60)[0].decode()


@pytest.fixture
def start():
    """Return the function (words, launcher) -> process that runs them through `run_launcher`, once they are ready."""
    started = []

    def run(words, launcher):
        command = [sys.executable, "-c", PARENT, json.dumps([words, launcher])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"  # without a buffer, which `communicate` would pass over
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", DEPTH)
def test_a_signal_reaches_the_training_and_not_its_launcher(start, launcher, number):
    words = python(TRAINING)
    for _ in range(DEPTH[launcher]):
        words = python(LAUNCHER, *words)
    process = start(words, launcher)
    process.send_signal(number)
    assert rest_of(process) == f"training got {int(number)}\ncode 40\n"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_without_training_processes_is_ended(start, launcher):
    process = start(python(ALONE), launcher)
    process.send_signal(signal.SIGUSR1)
    assert rest_of(process) == "code 143\n"


def test_on_windows_the_console_has_sent_ctrl_c_to_all(monkeypatch):
    sent = []
    root = SimpleNamespace(send_signal=sent.append, terminate=lambda: sent.append("end"))
    pass_on(signal.SIGINT, root, "python")
    monkeypatch.setattr(sys, "platform", "win32")
    pass_on(signal.SIGINT, root, "python")
    pass_on(signal.SIGTERM, root, "python")
    assert sent == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("3", 3), ("signal.SIGKILL", 137)])
def test_exit_codes_are_those_of_a_shell(start, code, expected):
    end = f"os.kill(os.getpid(), {code})" if "SIG" in code else f"sys.exit({code})"
    process = start(python(f"import os, signal, sys; print('ready', flush=True); {end}"), "python")
    assert rest_of(process) == f"code {expected}\n"
