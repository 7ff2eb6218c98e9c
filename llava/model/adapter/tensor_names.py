"""Tensor names in LoRA files of every program and version, translated to the released names."""

from __future__ import annotations

import re
from typing import NamedTuple

from llava.model.checkpoint.hf_layout import hf_name, original_name
from llava.model.vision_tower import TOWER_PREFIX, released_name

PEFT_PREFIX = "base_model.model."
RELEASED = ("model.", "lm_head.")
"""Prefixes of all tensor names of a released model."""
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Levels of a name that DDP, torch.compile, FSDP and activation checkpointing add."""
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.weight)?"  # peft's name of the adapter, `default` as a rule
)
_OF_HF = ("language_model.", "multi_modal_projector.", "vision_tower.")
_BACKBONE = ("layers.", "embed_tokens.", "norm.")
"""Prefixes of names where a `LlamaModel` was wrapped without its head."""
_TRAINED = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)\.")
"""Levels that peft adds to the name of a weight with an adapter, or in `modules_to_save`."""


class LoraTensor(NamedTuple):
    """Which part of an adapter a tensor is."""

    module: str  # name in the model that was trained, without peft's prefix
    kind: str  # "A", "B", "embedding_A", "embedding_B" or "magnitude_vector"


def bare_name(name: str) -> str:
    """Return a name in the model that was trained, without the levels of peft and other wrappers."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    name = _TRAINED.sub(".", name)
    name = name.removeprefix("model.") if name.startswith("model.model.") else name
    return f"model.{name}" if name.startswith(_BACKBONE) else name


def plain_name(name: str) -> str:
    """Return a tensor's or module's released name, whatever wrapped the model that was trained."""
    bare = bare_name(name)
    return released_name(original_name(bare) or bare)


def lora_tensor(name: str) -> LoraTensor | None:
    """Return which part of a low-rank product a tensor of an adapter's file is; None for other tensors."""
    found = _LORA.fullmatch(name)
    return LoraTensor(bare_name(found["module"]), found["kind"]) if found else None


def is_hf_name(name: str) -> bool:
    """Tell whether a name from `bare_name` is of the llava-hf layout, as any version of transformers writes it."""
    inner = name.removeprefix("model.")
    return inner.startswith(_OF_HF) and not name.startswith(TOWER_PREFIX)


def is_derived(name: str) -> bool:
    """Tell whether a tensor is computed from the config, so that a file's is not read."""
    return original_name(bare_name(name)) is None


def hf_names(name: str) -> tuple[str, ...]:
    """Return a released tensor name as old and as new versions of transformers call it in the llava-hf layout."""
    if not name.startswith(RELEASED):
        return ()
    old = hf_name(name)
    new = old.removeprefix("language_model.") if name.startswith("lm_head.") else f"model.{old}"
    return old, new.replace("model.language_model.model.", "model.language_model.")
