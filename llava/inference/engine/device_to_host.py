"""Asynchronous device-to-host copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copy of tensors to the CPU that does not keep the device from further work.

    Args:
        tensors: on one device.
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
        """Wait for the copy alone, not for work queued after it, and return the values."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
