"""Signal handlers are installed while training runs, note the first signal, and are removed."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from llava.train.fault_tolerance.signals import Stopped, StopRequest, outlive_launcher


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_the_first_signal_is_noted(name, capfd):
    number = getattr(signal, name)
    former = signal.getsignal(number)
    with StopRequest() as request:
        assert (request.received, request.agreed) == (0, 0)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once again: the same request, passed on by a launcher
        assert request.received == number
    assert signal.getsignal(number) == former
    assert capfd.readouterr().err == f"{name}: saving after this step; send it again to end at once\n"


def test_other_threads_take_no_handlers():
    former = signal.getsignal(signal.SIGTERM)
    found = []

    def enter():
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [former]


def test_the_message_and_the_code():
    stop = Stopped(signal.SIGTERM, 7, "out/checkpoint-7")
    assert stop.code == 143
    assert str(stop) == (
        "stopped by SIGTERM after step 7; out/checkpoint-7 is saved; run the same command again to go on"
    )


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system doesn't tell who sent a signal")
def test_a_worker_ends_by_its_own_process_alone():
    ready, told = os.pipe()
    worker = os.fork()
    if worker == 0:
        outlive_launcher()
        os.write(told, b"x")
        threading.Event().wait(30)
        os._exit(1)
    os.read(ready, 1)
    stranger = os.fork()
    if stranger == 0:
        os.kill(worker, signal.SIGTERM)
        os._exit(0)
    os.waitpid(stranger, 0)
    time.sleep(0.3)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
