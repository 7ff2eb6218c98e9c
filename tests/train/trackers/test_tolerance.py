"""A tracker's failure is a warning; after a few the tracker is left alone; nothing else is touched."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from llava.train.callbacks import LastValidation
from llava.train.trackers.tolerance import MOST_FAILURES, tolerate_failures, tracker_callbacks


class Tracker(TrainerCallback):
    def __init__(self, error=None):
        self.error, self.calls = error, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return logs


@pytest.fixture
def tracker(monkeypatch):
    """Return the function error -> callback, which `--report_to mine` stands for."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mine", Tracker)
    return Tracker


def test_errors_become_warnings_and_end(tracker, caplog):
    callback = tracker(ConnectionError("no\n   server" + "!" * 1000))
    counts = tolerate_failures([callback, LastValidation()])
    for _ in range(MOST_FAILURES + 2):
        assert callback.on_log(None, None, None, logs={}) is None
    assert callback.calls == counts["mine"].count == MOST_FAILURES
    first, *_, last = caplog.messages
    assert first.startswith("--report_to mine failed (ConnectionError: no server!!!")
    assert first.endswith("); training goes on, train_log.jsonl has all figures")
    assert last.startswith(f"--report_to mine is given up after {MOST_FAILURES} failures (ConnectionError: no server!")
    assert len(caplog.messages) == MOST_FAILURES
    assert max(map(len, caplog.messages)) < 450


def test_what_works_is_as_it_was(tracker, caplog):
    callback = tracker()
    tolerate_failures([callback])
    assert callback.on_log(None, None, None, logs={"loss": 1}) == {"loss": 1}
    assert callback.on_evaluate(None, None, None) is None
    assert caplog.messages == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_end_that_is_asked_for_is_no_failure(tracker, error):
    callback = tracker(error)
    tolerate_failures([callback])
    with pytest.raises(type(error)):
        callback.on_log(None, None, None)


def test_callbacks_of_training_itself_still_raise(tracker):
    class Training(TrainerCallback):
        def on_log(self, *_, **__):
            raise ValueError("stop")

    training = Training()
    assert tracker_callbacks([training, tracker()]).keys() == {"mine"}
    tolerate_failures([training])
    with pytest.raises(ValueError, match="stop"):
        training.on_log()
