"""Values exchanged between distributed ranks; without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def max_over_ranks(flags: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """Return the largest value of each flag over all ranks; every rank must call it.

    Waits for the device once if a flag is a tensor or there are several ranks.
    """
    is_alone = not torch.distributed.is_initialized()
    if is_alone and not any(isinstance(flag, Tensor) for flag in flags):
        return [float(flag) for flag in flags]
    values = torch.stack(
        [
            # `full` runs on the device without waiting for it; a copied number would wait.
            torch.full((), float(flag), device=device) if not isinstance(flag, Tensor) else flag.to(device).float()
            for flag in flags
        ]
    )
    if not is_alone:
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values.tolist()


def is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error of a collective says that another rank has ended; that rank says why."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
    return torch.distributed.is_initialized() and any(text in str(error) for text in texts)


def gather_objects(value: object) -> list[Any]:
    """Return each rank's value, in the order of ranks; every rank must call it."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
