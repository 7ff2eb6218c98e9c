"""Worker processes that decode images; if one is killed, all are restarted once, where they stopped.

The out-of-memory killer of Linux ends such a process without a word; so does a user by mistake.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")
_DEAD = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
"""How torch's DataLoader says, in a RuntimeError, that a worker process ended unexpectedly."""
_RESTARTED = "a worker process was killed, perhaps for want of memory; the workers are started again, once"
_OPTIONS = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
    "prefetch_factor", "persistent_workers", "in_order",
)  # fmt: skip


class WorkerKilled(ChildProcessError):
    """Worker processes were killed again after they had been started again."""

    def __init__(self, way_out: str) -> None:
        super().__init__(f"worker processes were killed twice, perhaps for want of memory; {way_out}")


def usable_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    *,
    chunk: int,
    way_out: str,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """Yield the function's result for every item, in order.

    Args:
        function: can be pickled.
        items: its arguments.
        workers: processes.
        chunk: items that a process takes at a time.
        way_out: what to do if the processes are killed twice.
        initializer: called in each process at its start.

    Raises:
        WorkerKilled: if processes are killed twice.
    """
    # A forked process starts at once; the others import torch first, but macOS and Windows have no choice.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done, is_restarted = 0, False
    while done < len(items):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=initializer)
        try:
            for result in pool.map(function, items[done:], chunksize=chunk):
                done += 1
                yield result
        except BrokenProcessPool as error:
            if is_restarted:
                raise WorkerKilled(way_out) from error
            is_restarted = True
            logger.warning(_RESTARTED)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_dead_worker_error(error: Exception) -> bool:
    """Return whether an error of a DataLoader means that a worker process died, not that reading a row failed.

    A batch of tensors is fetched from its worker by a socket, which fails if the worker has died meanwhile.
    """
    is_of_row = str(error).startswith("Caught ")  # torch's words before what a worker raised
    return str(error).startswith(_DEAD) or (isinstance(error, (OSError, EOFError)) and not is_of_row)


class _Replayed:
    """A sampler that remembers what it gave out and what has not come back as a batch yet."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.inner = sampler
        self.pending: deque[Any] = deque()
        self.is_replay = False
        self._source: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        self._source = chain(list(self.pending), self._source) if self.is_replay else iter(self.inner)
        self.pending.clear()
        self.is_replay = False
        for indices in self._source:
            self.pending.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class RestartingLoader(DataLoader):
    """A DataLoader that starts its worker processes again once, with the same batches in the same order.

    Args:
        dataset: indexed by what the sampler gives.
        sampler: of batches of indices, or with `is_batched` False of single ones, which are not collated.
        way_out: what to do if the processes are killed twice.
        is_batched: what the sampler gives.
        options: further ones of `DataLoader`.

    Raises:
        WorkerKilled: while it is iterated, if processes are killed twice.
    """

    def __init__(
        self, dataset: Dataset, sampler: Iterable[Any], *, way_out: str, is_batched: bool = True, **options: Any
    ) -> None:
        self.replayed = _Replayed(sampler)
        self.way_out, self.is_restarted = way_out, False
        place = {"batch_sampler": self.replayed} if is_batched else {"sampler": self.replayed, "batch_size": None}
        super().__init__(dataset, **place, **options)

    @classmethod
    def like(cls, loader: DataLoader, way_out: str) -> RestartingLoader:
        """Return a loader of the same batches as another."""
        options = {name: getattr(loader, name) for name in _OPTIONS if hasattr(loader, name)}
        return cls(loader.dataset, loader.batch_sampler, way_out=way_out, **options)

    def __iter__(self) -> Iterator[Any]:
        return self._deliver(self._start()) if self.num_workers else super().__iter__()

    def _start(self) -> Iterator[Any]:
        """Start the workers; a dead one is noticed when its batch is due, not by a signal in the middle of a step."""
        is_main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        former = signal.getsignal(signal.SIGCHLD) if is_main else None
        iterator = super().__iter__()
        if is_main:
            is_torchs = str(getattr(former, "__module__", "")).startswith("torch.")
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if former is None or is_torchs else former)
        return iterator

    def _start_again(self) -> Iterator[Any]:
        """Start the workers with the batches that are missing, without drawing from a random generator."""
        self.is_restarted = self.replayed.is_replay = True
        self._iterator = None  # of torch, where workers are kept from epoch to epoch
        generator = self.generator or torch.default_generator
        state = generator.get_state()
        iterator = self._start()
        generator.set_state(state)
        return iterator

    def _deliver(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_dead_worker_error(error):
                    raise
                if self.is_restarted:
                    raise WorkerKilled(self.way_out) from error
                logger.warning(_RESTARTED)
                iterator = self._start_again()
                continue
            self.replayed.pending.popleft()
            yield batch
