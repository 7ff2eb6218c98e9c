"""LLaVA-1.5 for one job: teach it to answer your questions about images, then answer thousands of them."""

from __future__ import annotations

from typing import Any

__version__ = "2.0.0"


def __getattr__(name: str) -> Any:
    """Give `from llava import LlavaLlamaForCausalLM`, as in the original, importing torch only then."""
    if name == "LlavaLlamaForCausalLM":
        from llava.model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
