"""Capture and restore the state of every random generator that training draws from."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class RngState(NamedTuple):
    """States of Python's generator, numpy's, torch's on the CPU and on the current GPU (None before its first use)."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None


def capture() -> RngState:
    """Return the generators' states."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return RngState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def restore(state: RngState) -> None:
    """Put the generators back into the states that `capture` returned."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)
