"""Recorded steps: shapes are few and large enough, and a recording always ends."""

import contextlib
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.inference import step_graphs
from llava.inference.step_graphs import StepGraphs, StepShape

ROWS = 108


@given(st.integers(1, 900), st.integers(1, ROWS), st.integers(1, 32), st.integers(1, 1024))
def test_rounded_shapes_hold_the_step(answers, rows, columns, used):
    shape = StepShape(answers, rows, columns, used)
    rounded = shape.rounded(ROWS)
    assert all(size <= larger for size, larger in zip(shape, rounded, strict=True))
    assert rounded.n_rows <= ROWS


def test_rounded_shapes_are_few():
    shapes = {StepShape(rows * 4, rows, 8, 700).rounded(ROWS) for rows in range(1, ROWS + 1)}
    assert len(shapes) < 16


@pytest.fixture
def failing():
    """Not empty, if recordings can't be ended."""
    return []


@pytest.fixture
def moves(monkeypatch, failing):
    """What is asked of CUDA, in order."""
    moves = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            moves.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            moves.append("end")
            if failing:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self):
            moves.append("replay")

    def on_device_of(entries):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def on(stream):
        moves.append(stream)
        try:
            yield
        finally:
            moves.append("back")

    monkeypatch.setattr(
        torch,
        "cuda",
        types.SimpleNamespace(CUDAGraph=Graph, stream=on, graph_pool_handle=lambda: 7, device_of=on_device_of),
    )
    monkeypatch.setattr(step_graphs, "_recording_stream", lambda device: f"stream of {device}")
    return moves


def test_a_shape_is_recorded_when_it_comes_for_the_third_time(moves):
    graphs, shape, computed = StepGraphs(), StepShape(1, 1, 1, 8), []

    def compute(entries, shape):
        computed.append((entries.tolist(), shape))
        return entries + 1

    for number in range(5):
        graphs(compute, torch.tensor([[number]]), shape)
    assert computed == [([[number]], shape) for number in range(3)]
    assert moves == ["stream of cpu", ("begin", 7, "thread_local"), "end", "back", *["replay"] * 3]


def test_while_the_device_is_busy_a_shape_is_recorded_at_once(moves):
    graphs, computed = StepGraphs(), []
    new, known = StepShape(1, 1, 1, 8), StepShape(2, 1, 1, 8)

    def compute(entries, shape):
        computed.append(shape)
        return entries + 1

    graphs(compute, torch.tensor([[0]]), known)
    for shape in (new, known):
        for is_early in (True, False):
            assert graphs(compute, torch.tensor([[4]]), shape, is_early=is_early).item() == 5
    assert computed == [known, new, new, known]  # the second of each was a recording
    recording = ["stream of cpu", ("begin", 7, "thread_local"), "end", "back"]
    assert moves == [*recording, "replay", *recording, "replay", "replay"]


@pytest.mark.parametrize("ends", [True, False])
def test_a_recording_that_fails_ends(moves, failing, ends):
    failing += [] if ends else ["out of memory"]

    def compute(entries, shape):
        if moves:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return entries

    graphs = StepGraphs()
    for _ in range(2):
        graphs(compute, torch.tensor([[0]]), StepShape(1, 1, 1, 8))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        graphs(compute, torch.tensor([[0]]), StepShape(1, 1, 1, 8))
    assert moves[:3] == ["stream of cpu", ("begin", 7, "thread_local"), "end"]


@pytest.mark.parametrize("is_early", [True, False])
def test_where_recording_is_refused_steps_go_on_without(moves, caplog, is_early):
    def compute(entries, shape):
        if moves and moves[-1] != "back":
            raise RuntimeError("operation not permitted when stream is capturing")
        return entries + 1

    graphs, shape = StepGraphs(), StepShape(1, 1, 1, 8)
    results = [graphs(compute, torch.tensor([[number]]), shape, is_early=is_early).item() for number in range(5)]
    assert results == [1, 2, 3, 4, 5]
    assert moves == ["stream of cpu", ("begin", 7, "thread_local"), "end", "back"]
    assert "without being recorded, which is slower: operation not permitted" in caplog.text
