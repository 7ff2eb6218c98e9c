"""Eager attention for one call: the implementation that returns attention weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION_OF_CALL: ContextVar[str | None] = ContextVar("attention_of_call", default=None)
"""Per thread: calls of other threads on the same model keep their attention."""


@contextlib.contextmanager
def eager_attention(is_wanted: bool) -> Iterator[None]:
    """Take eager attention in all parts of LLaVA while the block runs in this thread, if `is_wanted`."""
    if not is_wanted:
        yield
        return
    token = _ATTENTION_OF_CALL.set("eager")
    try:
        yield
    finally:
        _ATTENTION_OF_CALL.reset(token)


def refuse_recomputation(model: PreTrainedModel) -> None:
    """Refuse eager attention for one call under activation checkpointing, whose recomputation would not take it.

    Raises:
        ValueError: if a layer is checkpointed and the model's own attention is another.
    """
    is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if is_checkpointed and model.config._attn_implementation != "eager":
        raise ValueError(
            "output_attentions=True takes eager attention, which activation checkpointing would not repeat; load the "
            'model with attn_implementation="eager", or switch activation checkpointing off'
        )


class AttentionOfCall:
    """Mixin of a transformers config: `eager_attention` overrides its attention."""

    @property
    def _attn_implementation(self) -> str | None:
        """transformers' name of the attention, read in every layer."""
        override = None if torch.compiler.is_compiling() else _ATTENTION_OF_CALL.get()
        return override or self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)
