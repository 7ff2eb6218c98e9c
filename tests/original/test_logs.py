"""The original's `llava.utils`."""

from __future__ import annotations

import logging
import sys
import threading

import torch
from llava.utils import (
    StreamToLogger,
    build_logger,
    disable_torch_init,
    pretty_print_semaphore,
    rank0_print,
)

from llava.original import logs


def test_torch_stays_as_it_is():
    before = torch.nn.Linear.reset_parameters
    assert disable_torch_init() is None
    assert torch.nn.Linear.reset_parameters is before


def test_a_logger_writes_a_file_and_leaves_the_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOGDIR", str(tmp_path / "logs"))
    streams = sys.stdout, sys.stderr
    logger = build_logger("worker of a test", "worker.log")
    assert build_logger("worker of a test", "worker.log") is logger
    logger.info("seven")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    assert (tmp_path / "logs/worker.log").read_text().count("| INFO | worker of a test | seven\n") == 1
    assert (sys.stdout, sys.stderr) == streams


def test_lines_become_records(caplog):
    stream = StreamToLogger(logging.getLogger("stream of a test"), logging.WARNING)
    stream.write("one\ntw")
    stream.write("o\n\nrest")
    assert caplog.messages == ["one", "two", ""]
    stream.flush()
    stream.flush()
    assert caplog.messages == ["one", "two", "", "rest"]


def test_small_ones(capsys, monkeypatch):
    assert pretty_print_semaphore(None) == "None"
    assert pretty_print_semaphore(threading.Semaphore(2)).startswith("Semaphore(value=2")
    rank0_print("a", 1)
    monkeypatch.setenv("RANK", "1")
    rank0_print("b")
    assert capsys.readouterr().out == "a 1\n"
