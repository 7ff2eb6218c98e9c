"""Distributed ranks of batch inference, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

_TIMEOUT = timedelta(days=7)  # a rank that is done waits for the others


class DistributedRank(NamedTuple):
    """Rank of this process, world size, and its rank on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def device(self, requested: str | None) -> str | None:
        """Return the device of this process: of several processes on GPUs, each gets its own.

        Args:
            requested: device of the command line; None = the best available.
        """
        if self.world_size == 1 or requested not in (None, "cuda"):
            return requested
        from torch import cuda

        from llava.model.devices import best_device

        if best_device().type != "cuda":
            return requested
        return f"cuda:{self.local_rank % cuda.device_count()}"


def read_rank() -> DistributedRank:
    """Return the launcher's environment variables; without a launcher the world size is 1."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    defaults = DistributedRank()
    return DistributedRank(*(int(os.environ.get(*pair)) for pair in zip(names, defaults, strict=True)))


@contextlib.contextmanager
def process_group(rank: DistributedRank) -> Iterator[Callable[[], None]]:
    """Open a process group of all ranks, and yield its barrier."""
    if rank.world_size == 1:
        yield lambda: None
        return
    from torch import distributed

    distributed.init_process_group("gloo", rank=rank.rank, world_size=rank.world_size, timeout=_TIMEOUT)
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()
