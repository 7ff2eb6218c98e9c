"""CUDA graphs of decode steps: shapes are few and large enough, and a capture always ends."""

import contextlib
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.inference.engine import cuda_graphs as cuda_graphs
from llava.inference.engine.cuda_graphs import CudaGraphs, StepShape

SLOTS = 108


@given(st.integers(1, 900), st.integers(1, SLOTS), st.integers(1, 32), st.integers(1, 1024))
def test_padded_shapes_hold_the_step(sequences, slots, columns, length):
    shape = StepShape(sequences, slots, columns, length)
    padded = shape.padded(SLOTS)
    assert all(size <= larger for size, larger in zip(shape, padded, strict=True))
    assert padded.n_slots <= SLOTS


def test_padded_shapes_are_few():
    shapes = {StepShape(slots * 4, slots, 8, 700).padded(SLOTS) for slots in range(1, SLOTS + 1)}
    assert len(shapes) < 16


@pytest.fixture
def failing():
    """Not empty, if captures can't be ended."""
    return []


@pytest.fixture
def calls(monkeypatch, failing):
    """Calls to CUDA, in order."""
    calls = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            calls.append("end")
            if failing:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            calls.append("replay")

    def on_device_of(entries):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def on(stream):
        calls.append(stream)
        try:
            yield
        finally:
            calls.append("back")

    monkeypatch.setattr(
        torch,
        "cuda",
        types.SimpleNamespace(
            CUDAGraph=Graph,
            Stream=lambda device: f"stream of {device}",
            stream=on,
            graph_pool_handle=lambda: 7,
            device_of=on_device_of,
        ),
    )
    return calls


def test_a_shape_is_captured_at_its_third_call(calls):
    graphs, shape, computed = CudaGraphs(), StepShape(1, 1, 1, 8), []

    def compute(entries, shape):
        computed.append((entries.tolist(), shape))
        return entries + 1

    for number in range(5):
        graphs(compute, torch.tensor([[number]]), shape)
    assert computed == [([[number]], shape) for number in range(3)]
    assert calls == ["stream of cpu", ("begin", 7, "thread_local"), "end", "back", *["replay"] * 3]


def test_while_the_device_is_busy_a_shape_is_captured_at_once(calls):
    graphs, computed = CudaGraphs(), []
    new, known = StepShape(1, 1, 1, 8), StepShape(2, 1, 1, 8)

    def compute(entries, shape):
        computed.append(shape)
        return entries + 1

    graphs(compute, torch.tensor([[0]]), known)
    for shape in (new, known):
        for capture_now in (True, False):
            assert graphs(compute, torch.tensor([[4]]), shape, capture_now=capture_now).item() == 5
    assert computed == [known, new, new, known]  # the second of each was a capture
    capture = ["stream of cpu", ("begin", 7, "thread_local"), "end", "back"]
    assert calls == [*capture, "replay", *capture, "replay", "replay"]


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_ends(calls, failing, ends):
    failing += [] if ends else ["out of memory"]

    def compute(entries, shape):
        if calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return entries

    graphs = CudaGraphs()
    for _ in range(2):
        graphs(compute, torch.tensor([[0]]), StepShape(1, 1, 1, 8))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        graphs(compute, torch.tensor([[0]]), StepShape(1, 1, 1, 8))
    assert calls[:3] == ["stream of cpu", ("begin", 7, "thread_local"), "end"]


@pytest.mark.parametrize("capture_now", [True, False])
def test_where_capture_is_refused_steps_run_without_graphs(calls, caplog, capture_now):
    def compute(entries, shape):
        if calls and calls[-1] != "back":
            raise RuntimeError("operation not permitted when stream is capturing")
        return entries + 1

    graphs, shape = CudaGraphs(), StepShape(1, 1, 1, 8)
    results = [graphs(compute, torch.tensor([[number]]), shape, capture_now=capture_now).item() for number in range(5)]
    assert results == [1, 2, 3, 4, 5]
    assert calls == ["stream of cpu", ("begin", 7, "thread_local"), "end", "back"]
    assert (
        "CUDA graph capture failed, decode steps run without graphs and are slower: operation not permitted"
        in caplog.text
    )
