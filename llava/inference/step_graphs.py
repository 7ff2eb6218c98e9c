"""Steps of answers recorded as CUDA graphs: launching a step's kernels one by one takes longer than they take."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava.inference.tree_rows import round_up

logger = logging.getLogger(__name__)

RECORDED_FROM = 3
"""So often a shape has to occur unless said otherwise; recording costs about as much as a step."""
_FINE, _COARSE = 16, 64
USED_MULTIPLE = 128
"""Of positions that a recorded step looks at."""


class StepShape(NamedTuple):
    """Sizes of a step: answers, rows and branches of a row that are looked at, and positions of a row in use."""

    n_answers: int
    n_rows: int
    n_columns: int
    used: int

    def rounded(self, all_rows: int) -> StepShape:
        """Return a shape at least as large, of which there are few.

        Args:
            all_rows: of the cache.
        """
        answers = round_up(self.n_answers, _FINE if self.n_answers <= 4 * _FINE else _COARSE)
        rows = min(all_rows, _power(self.n_rows)) if 2 * self.n_rows <= all_rows else all_rows
        return StepShape(answers, rows, _power(self.n_columns), round_up(self.used, USED_MULTIPLE))


class StepGraphs:
    """Calls a function, recorded once its shape has occurred a few times; where CUDA refuses that, unrecorded.

    It keeps no reference to the function: a cache whose step it is would live on until the next garbage collection,
    and with it the memory that the next cache needs.

    Args:
        recorded_from: so often a shape has to occur, at least twice: kernels are loaded by a call that is not recorded.
    """

    def __init__(self, recorded_from: int = RECORDED_FROM) -> None:
        self._recorded_from = recorded_from
        self._seen: Counter[StepShape] = Counter()
        self._recorded: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._is_refused = False

    def __call__(
        self,
        compute: Callable[[Tensor, StepShape], Tensor],
        entries: Tensor,
        shape: StepShape,
        *,
        is_early: bool = False,
    ) -> Tensor:
        """Return the result, which lasts until the next call.

        Args:
            compute: (entries (4, M), shape) -> (M, W), without any wait for the device; the same each time.
            entries: of the step.
            shape: of the step.
            is_early: the device is busy for longer than a recording takes, so that a new shape is recorded at once.
        """
        with torch.cuda.device_of(entries):
            return self._compute(compute, entries, shape, is_early)

    def _compute(
        self, compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape, is_early: bool
    ) -> Tensor:
        self._seen[shape] += 1
        is_wanted = shape not in self._recorded and not self._is_refused
        if is_wanted and (self._seen[shape] >= self._recorded_from or (is_early and self._seen[shape] > 1)):
            self._try_to_record(compute, entries, shape)
        if shape not in self._recorded:
            result = compute(entries, shape)
            if is_wanted and is_early and not self._is_refused:
                self._try_to_record(compute, entries, shape)
            return result
        graph, taken, result = self._recorded[shape]
        taken.copy_(entries, non_blocking=True)
        graph.replay()
        return result

    def _try_to_record(self, compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape) -> None:
        try:
            self._recorded[shape] = self._record(compute, entries, shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("steps are computed without being recorded, which is slower: %s", error)
            self._is_refused = True

    def _record(
        self, compute: Callable[[Tensor, StepShape], Tensor], entries: Tensor, shape: StepShape
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record without `torch.cuda.graph`, which waits for the device and gives all spare memory back."""
        taken = entries.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(_recording_stream(entries.device)):
            # Other threads go on copying pictures meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = compute(taken, shape)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what was recorded so far can't be used, and CUDA says so
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, taken, result


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a device's one stream for all recordings: each that has multiplied matrices keeps memory for that."""
    return torch.cuda.Stream(device)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
