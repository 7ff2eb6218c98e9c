"""Copy tensors from a mapped file to a device, to a GPU through pinned buffers."""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER_BYTES = 32 * 2**20


class Mover:
    """Copies tensors to devices; to a GPU through two pinned buffers, so that reading and copying overlap."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.buffer_bytes = buffer_bytes
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of `tensor` on `device` that shares no memory with it, in the same dtype."""
        if device.type != "cuda" or tensor.device.type != "cpu":
            return tensor.to(device, copy=True)
        if not self._pinned:
            self._pinned = [
                (torch.empty(self.buffer_bytes, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                for _ in range(2)
            ]
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        target = result.reshape(-1).view(torch.uint8)
        with torch.cuda.device(device):
            for start in range(0, len(source), self.buffer_bytes):
                self._copy(source[start : start + self.buffer_bytes], target[start : start + self.buffer_bytes])
        return result

    def _copy(self, source: Tensor, target: Tensor) -> None:
        buffer, is_free = self._pinned[self._turn]
        self._turn = 1 - self._turn
        is_free.synchronize()  # after the last copy from this buffer
        part = buffer[: len(source)]
        part.copy_(source)
        target.copy_(part, non_blocking=True)
        is_free.record()
