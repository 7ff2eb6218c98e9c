"""Values on their way from the device, which meanwhile is given more to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Arrival:
    """Tensors that are being copied to the CPU.

    Args:
        tensors: on the device.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        is_cuda = device.type == "cuda"
        self._tensors = [tensor.to("cpu", non_blocking=is_cuda) for tensor in tensors]
        self._event = None
        if is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[list[Any]]:
        """Return the values, as soon as they are there: what the device was given later is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
