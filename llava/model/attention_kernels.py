"""Which of PyTorch's attention kernels run where shapes change from call to call."""

from __future__ import annotations

import contextlib

from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def without_plans() -> contextlib.AbstractContextManager[None]:
    """Return a context in which attention takes no kernels that are planned anew for every shape: cuDNN's are.

    Seen in a profile of LoRA training of LLaVA-1.5-7B on an H100 (PyTorch 2.11), where each step has another number of
    images and of supervised tokens: 24 calls of cuDNN's attention took the host 137 ms of a step, its kernels 2 ms.
    """
    return sdpa_kernel(WITHOUT_PLANS)
