"""Keep a failing experiment tracker from ending a training: its errors are logged, and at last it is left alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from llava.files.terminal_text import shorten
from llava.train.output_files import LOG_FILE

logger = logging.getLogger(__name__)

_REASON_SHOWN = 240  # characters
MOST_FAILURES = 3
"""Failures after which a tracker gets nothing more: each may have waited for a server."""


def tracker_callbacks(callbacks: Iterable[TrainerCallback]) -> dict[str, TrainerCallback]:
    """Return transformers' callbacks of trackers among others, by their names for `--report_to`."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    return {names[type(callback)]: callback for callback in callbacks if type(callback) in names}


def tolerate_failures(callbacks: Iterable[TrainerCallback]) -> dict[str, Failures]:
    """Let the callbacks of trackers log a warning where they would raise; return the counts by the trackers' names."""
    counts = {}
    for name, callback in tracker_callbacks(callbacks).items():
        counts[name] = Failures(name)
        for event in dir(callback):
            if event.startswith("on_"):
                setattr(callback, event, counts[name].tolerated(getattr(callback, event)))
    return counts


class Failures:
    """Counts the errors of one tracker.

    Args:
        name: of the tracker, for the log.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def tolerated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that logs a warning where `function` raises, and after `MOST_FAILURES` does nothing."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if self.count >= MOST_FAILURES:
                return None
            try:
                return function(*arguments, **named)
            except Exception as error:  # trackers and their transports raise many types
                self._note(error)
                return None

        return call

    def _note(self, error: Exception) -> None:
        self.count += 1
        logger.debug("", exc_info=True)
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), _REASON_SHOWN)
        end = "is given up after {} failures" if self.count == MOST_FAILURES else "failed"
        logger.warning(
            "--report_to %s %s (%s); training goes on, %s has all figures",
            self.name,
            end.format(self.count),
            reason,
            LOG_FILE,
        )
