"""The original's `llava.utils`: loggers, and switches that have nothing to do here."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path
from typing import Any

from llava.constants import LOGDIR
from llava.inference.distributed import read_rank

server_error_msg = "**The server is busy. Try again, or reload this page.**"
moderation_msg = "This input can't be answered here. Try another one."


class StreamToLogger:
    """File-like object whose lines go to a logger."""

    def __init__(self, logger: logging.Logger, log_level: int = logging.INFO) -> None:
        self.logger = logger
        self.log_level = log_level
        self._line = ""

    def write(self, buf: str) -> int:
        """Log the lines that are complete; return the number of characters."""
        *lines, self._line = (self._line + buf).split("\n")
        for line in lines:
            self.logger.log(self.log_level, line.rstrip())
        return len(buf)

    def flush(self) -> None:
        """Log what is left of a line."""
        if self._line:
            self.logger.log(self.log_level, self._line.rstrip())
        self._line = ""


def build_logger(logger_name: str, logger_filename: str) -> logging.Logger:
    """Return a logger that also writes into `LOGDIR`; unlike the original it leaves stdout and stderr alone."""
    logger = logging.getLogger(logger_name)
    logger.setLevel(logging.INFO)
    path = Path(LOGDIR, logger_filename).resolve()
    if not any(getattr(handler, "baseFilename", None) == str(path) for handler in logger.handlers):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.TimedRotatingFileHandler(path, when="D", utc=True, encoding="utf-8", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
        logger.addHandler(handler)
    return logger


def disable_torch_init() -> None:
    """Do nothing: models are built without initial values anyway, and torch stays as it is for everybody else."""


def auto_upgrade(config: str) -> None:
    """Do nothing: older checkpoints load as they are."""


def rank0_print(*args: Any) -> None:
    """Print in the first process alone."""
    if read_rank().rank == 0:
        print(*args)


def pretty_print_semaphore(semaphore: Any) -> str:
    """Return a semaphore's state as text."""
    if semaphore is None:
        return "None"
    locked = semaphore.locked() if hasattr(semaphore, "locked") else semaphore._value == 0  # asyncio's, threading's
    return f"Semaphore(value={semaphore._value}, locked={locked})"
