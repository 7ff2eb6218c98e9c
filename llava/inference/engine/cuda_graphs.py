"""CUDA graph capture and replay of decode steps: launching a step's kernels one by one takes longer than they run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava.inference.engine.kv_layout import round_up

logger = logging.getLogger(__name__)

CAPTURE_AT = 3
"""Call of a shape that captures it; a capture costs about as much as a step."""
LENGTH_MULTIPLE = 128
"""Lengths of captured steps are multiples of it."""
_FINE, _COARSE = 16, 64


class StepShape(NamedTuple):
    """Sizes of a decode step.

    Attributes:
        n_sequences: queries.
        n_slots: slots whose keys are read.
        n_columns: highest column in a slot.
        length: positions of a slot that are read.
    """

    n_sequences: int
    n_slots: int
    n_columns: int
    length: int

    def padded(self, all_slots: int) -> StepShape:
        """Return one of few shapes, at least as large.

        Args:
            all_slots: slots of the KV cache.
        """
        sequences = round_up(self.n_sequences, _FINE if self.n_sequences <= 4 * _FINE else _COARSE)
        slots = min(all_slots, _next_power(self.n_slots)) if 2 * self.n_slots <= all_slots else all_slots
        return StepShape(sequences, slots, _next_power(self.n_columns), round_up(self.length, LENGTH_MULTIPLE))


class CudaGraphs:
    """Calls a function through CUDA graphs, one per shape; where CUDA refuses a capture, without them.

    It keeps no reference to the function: a KV cache whose step it is would live on until the next garbage collection,
    and with it the memory that the next cache needs.

    Args:
        capture_at: call of a shape that captures it, at least the second: kernels are loaded by a call outside a graph.
    """

    def __init__(self, capture_at: int = CAPTURE_AT) -> None:
        self._capture_at = capture_at
        self._calls: Counter[StepShape] = Counter()
        self._captured: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._is_refused = False

    def __call__(
        self,
        compute: Callable[[Tensor, StepShape], Tensor],
        entries: Tensor,
        shape: StepShape,
        *,
        capture_now: bool = False,
    ) -> Tensor:
        """Return the result, which lasts until the next call.

        Args:
            compute: (entries, shape) -> result, without any wait for the device; the same function each time.
            entries: int64, inputs of the step.
            shape: of the step.
            capture_now: the device is busy for longer than a capture takes; capture a new shape at its first call.
        """
        self._calls[shape] += 1
        is_new = shape not in self._captured and not self._is_refused
        with torch.cuda.device_of(entries):
            if is_new and (self._calls[shape] >= self._capture_at or (capture_now and self._calls[shape] > 1)):
                self._try_capture(compute, entries, shape)
            if shape not in self._captured:
                result = compute(entries, shape)
                if is_new and capture_now and not self._is_refused:
                    self._try_capture(compute, entries, shape)
                return result
            graph, inputs, result = self._captured[shape]
            inputs.copy_(entries, non_blocking=True)
            graph.replay()
            return result

    def _try_capture(self, compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape) -> None:
        try:
            self._captured[shape] = self.capture(compute, entries, shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("CUDA graph capture failed, decode steps run without graphs and are slower: %s", error)
            self._is_refused = True

    def capture(
        self, compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Return the graph of a step, its input and its result.

        `torch.cuda.graph` is not used: it waits for the device and gives all cached memory back.
        """
        inputs = entries.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_capture_stream(entries.device)):
            # Other threads go on copying images meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = compute(inputs, shape)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture so far can't be used, and CUDA says so
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, inputs, result


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a device's one stream for all captures: each that has multiplied matrices keeps memory for that."""
    return torch.cuda.Stream(device)


def _next_power(number: int) -> int:
    return 1 << (number - 1).bit_length()
