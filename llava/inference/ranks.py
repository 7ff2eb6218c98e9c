"""Several processes that share a run, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

_PATIENCE = timedelta(days=7)
"""A process that is done waits so long for the others."""


class Ranks(NamedTuple):
    """Place of this process: its number among all, their number, and its number on this machine."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0

    def device(self, asked: str | None) -> str | None:
        """Return the device of this process: with several processes on GPUs, one for each.

        Args:
            asked: device that the user names; None = the best there is.
        """
        if self.n_ranks == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def read_ranks() -> Ranks:
    """Return what the launcher says in the environment; without one, this process is alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, Ranks(), strict=True)))


@contextlib.contextmanager
def joined(ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Connect the processes, and yield the function that waits until all have called it."""
    if ranks.n_ranks == 1:
        yield lambda: None
        return
    distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.n_ranks, timeout=_PATIENCE)
    try:
        yield distributed.barrier
    finally:
        distributed.destroy_process_group()
