"""Run a launcher, and pass the signals that this process gets on to the training processes, which save and end.

Which processes train depends on the launcher: python itself, torchrun's children, deepspeed's grandchildren. Launchers
themselves would end them without a checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
"""Schedulers send the first two, a terminal the third to all its processes; Windows has no SIGUSR1."""


def run_launcher(words: Sequence[str], environment: Mapping[str, str], *, launcher: str) -> int:
    """Run a command and wait for its end; signals are passed on to the processes that train.

    Args:
        words: the command.
        environment: of the command.
        launcher: deepspeed, torchrun or python.

    Returns:
        the exit code; 128 + N if signal N ended it, as a shell has it.
    """
    early: list[int] = []
    with _handled(early.append):
        process = subprocess.Popen(words, env=environment)
        root = psutil.Process(process.pid)
        with _handled(lambda number: pass_on(number, root, launcher)):
            for number in early:
                pass_on(number, root, launcher)
            code = process.wait()
    return 128 - code if code < 0 else code


def pass_on(number: int, root: psutil.Process, launcher: str) -> None:
    """Send a signal to the training processes; if there are none yet, end the launcher.

    On Windows the console has sent Ctrl-C to all of them already, and nothing else can.

    Args:
        number: of the signal.
        root: the launcher's process.
        launcher: deepspeed, torchrun or python.
    """
    if number == signal.SIGINT and sys.platform == "win32":
        return
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        sent = [_send(process, number) for process in _training_processes(root, launcher)]
        if not any(sent):
            root.terminate()


def _training_processes(root: psutil.Process, launcher: str) -> list[psutil.Process]:
    if launcher == "python":
        return [root]
    children = root.children()
    if launcher == "torchrun":
        return children
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += child.children()
    return found


def _send(process: psutil.Process, number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return True
    return False


@contextlib.contextmanager
def _handled(handler: Callable[[int], object]) -> Iterator[None]:
    """Call `handler` with the number of each signal that arrives within `with`; one that is ignored stays ignored."""
    former = {}
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, lambda number, _frame: handler(number))
    try:
        yield
    finally:
        for number, handle in former.items():
            signal.signal(number, handle)
