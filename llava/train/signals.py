"""What a run does when it is asked to end: it finishes the step, saves, and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
"""Schedulers send the first two, Ctrl-C the third; Windows has no SIGUSR1."""
_SAME_REQUEST = 2.0
"""Seconds: launchers pass a signal on to processes that have already got it from the terminal or the scheduler."""


class Stopped(Exception):
    """Training was asked to end by a signal and did, after saving."""

    def __init__(self, number: int, step: int, checkpoint: str) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; {checkpoint} is saved; run the same command "
            "again to go on"
        )


class StopRequest:
    """Within `with`, notes the first signal and lets a second one end the process at once.

    Attributes:
        number: of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in _numbers():
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            text = f"{signal.Signals(number).name}: saving after this step; send it again to end at once\n"
            os.write(2, text.encode())  # print may be in the middle of a line
        elif now - self._since > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def outlive_launcher() -> None:
    """Let a data worker live on when a launcher signals the whole tree: its process still needs it to save.

    It still ends at once when its own process ends it. Nothing changes where the system doesn't tell who sent a signal.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while True:
        received = signal.sigwaitinfo(_numbers())
        if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
            os._exit(0)


def _numbers() -> list[signal.Signals]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
