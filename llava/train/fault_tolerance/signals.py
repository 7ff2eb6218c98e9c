"""Signals end a run in good order: the step is finished, a checkpoint saved, and the message says how to continue."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.fault_tolerance.checkpoint_dir import checkpoint_path

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


class StopRequest(TrainerCallback):
    """Ends a run with a checkpoint after the step in which a signal arrived on any rank; a second one ends it at once.

    Handlers are installed within `with`.

    Attributes:
        received: number of the signal that this process got, 0 for none.
        agreed: number of a signal that every rank knows of, 0 for none; the trainer sets it once a step.
    """

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in _numbers():
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint that a run can resume from, and for no validation."""
        if self.agreed:
            args.save_only_model = False
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run, once its checkpoint is in place.

        Raises:
            Stopped: if a signal asked for it.
        """
        if self.agreed:
            checkpoint = checkpoint_path(args.output_dir, state.global_step)
            raise Stopped(self.agreed, state.global_step, str(checkpoint))

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = number, now
            text = f"{signal.Signals(number).name}: saving after this step; send it again to end at once\n"
            os.write(2, text.encode())  # print may be in the middle of a line
        elif now - self._since > _SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def outlive_launcher() -> None:
    """Let a data worker ignore signals that a launcher sends to all processes: its own process still needs it to save.

    It still ends at once when its own process ends it. Nothing changes where the system doesn't say who sent a signal.
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
