"""SDPA without cuDNN's backend, which plans a kernel for every new shape."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

SDPA_WITHOUT_CUDNN = "llava_sdpa_without_cudnn"
"""Name under which transformers knows this attention."""


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Return a context in which SDPA does not choose cuDNN's backend.

    Seen in a profile of LoRA training of LLaVA-1.5-7B on an H100 (PyTorch 2.11), where each step has another number of
    images and of supervised tokens: 24 calls of cuDNN's attention took the host 137 ms of a step, its kernels 2 ms.

    Not for layers that may be checkpointed: the context is not in force when the backward pass recomputes them, and the
    recomputation would choose another kernel. Use `attend_without_cudnn` for these.
    """
    return sdpa_kernel(WITHOUT_CUDNN)


def attend_without_cudnn(model: PreTrainedModel) -> None:
    """Let a model's layers choose among the kernels of `without_cudnn`, each inside its own attention.

    The choice is part of the layer, so that a layer recomputed by activation checkpointing chooses the same kernel.
    """
    AttentionInterface.register(SDPA_WITHOUT_CUDNN, _sdpa_without_cudnn)
    AttentionMaskInterface.register(SDPA_WITHOUT_CUDNN, AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation(SDPA_WITHOUT_CUDNN)


def _sdpa_without_cudnn(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    with without_cudnn():
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)
