"""Compare weights with the model they are for, strictly; a difference is reported with its likely cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llava.model.checkpoint.lazy_tensors import LazyTensor, LazyTensors
from llava.model.checkpoint.quantized import StoredPart
from llava.model.configuration import LlavaConfig
from llava.model.projector import projector_depth
from llava.model.vision_tower import TOWER_PREFIX

_SHOWN = 5  # names in a message
_PROJECTOR = "model.mm_projector."
_TOWER = "model.vision_tower."
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_QUANTIZE_HERE = "use the 16-bit weights; scripts/quantize_checkpoint.py makes 4 or 8 bit of them that load here"


class _Difference(NamedTuple):
    """Two sets of tensor names that differ."""

    missing: Sequence[str]  # in the files
    unexpected: Sequence[str]  # in the files, not in the model
    sources: Mapping[str, str]  # file of each tensor

    def first_unexpected(self, pattern: str) -> str | None:
        """Return the first unexpected name in which the pattern is found."""
        return next((name for name in self.unexpected if re.search(pattern, name)), None)


def check_fit(layout: Mapping[str, Mapping[str, StoredPart]], tensors: LazyTensors, ignored: set[str]) -> None:
    """Compare what a model needs, by weight and part, with what the files hold.

    Raises:
        ValueError: if they differ; names, then the first shape or dtype, are reported.
    """
    expected = {part: kind for parts in layout.values() for part, kind in parts.items()}
    check_names(expected.keys(), tensors.keys() - ignored, tensors)
    for name, kind in expected.items():
        found = tensors.entries[name]
        if kind.dtype is None and kind.shape is not None and not found.dtype.is_floating_point:
            cause = f"the weights are quantised, and config.json has no quantization_config: {_QUANTIZE_HERE}"
            raise _misfit(name, found, f"{tuple(found.shape)} {found.dtype}", "floating point", cause)
        if kind.shape is not None:
            _check_shape(name, found, kind.shape)
        if kind.dtype is not None and found.dtype != kind.dtype:
            raise _misfit(name, found, found.dtype, kind.dtype, None)


def check_sizes(config: LlavaConfig, tensors: LazyTensors) -> None:
    """Compare the sizes in a config with the shapes of weights, before a model of these sizes is built.

    Raises:
        ValueError: if they differ, or there is no such projector.
    """
    width = config.hidden_size
    head_width = width // config.num_attention_heads if config.head_dim is None else config.head_dim
    block = "model.layers.0."
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        f"{block}self_attn.q_proj.weight": (config.num_attention_heads * head_width, width),
        f"{block}self_attn.k_proj.weight": ((config.num_key_value_heads or 1) * head_width, width),
        f"{block}mlp.gate_proj.weight": (config.intermediate_size, width),
    }
    if vision := config.mm_vision_config:
        projector_depth(config.mm_projector_type)
        side, tower = vision["patch_size"], f"{TOWER_PREFIX}vision_model."
        positions = (vision["image_size"] // side) ** 2 + 1
        expected |= {
            f"{tower}embeddings.patch_embedding.weight": (vision["hidden_size"], 3, side, side),
            f"{tower}embeddings.position_embedding.weight": (positions, vision["hidden_size"]),
            f"{tower}encoder.layers.0.mlp.fc1.weight": (vision["intermediate_size"], vision["hidden_size"]),
        }
    for name, shape in expected.items():
        entry = tensors.entries.get(name)
        if entry is not None and entry.dtype.is_floating_point:
            _check_shape(name, entry, torch.Size(shape))


def check_names(expected: set[str], found: set[str], tensors: LazyTensors | None = None) -> None:
    """Compare the tensor names of a model with those of its files.

    Raises:
        ValueError: if they differ; the first ones of each kind are named, and the cause where the names show it, for
            which `tensors` tell the file of each name.
    """
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            problems.append(f"{len(names)} {kind} ({shown})")
    sources = {name: entry.source for name, entry in tensors.entries.items()} if tensors is not None else {}
    difference = _Difference(missing, unexpected, sources)
    cause = next((text for find in _CAUSES if (text := find(difference))), "use the config.json that belongs to them")
    raise ValueError(f"the weights don't fit the config: {'; '.join(problems)}; {cause}")


def projector_kind(leaves: set[str]) -> str | None:
    """Return the `mm_projector_type` whose parameters have these names, None for a type that is not supported."""
    if leaves == {"weight", "bias"}:
        return "linear"
    count = len(leaves) // 2
    expected = {f"{2 * index}.{leaf}" for index in range(count) for leaf in ("weight", "bias")}
    return f"mlp{count}x_gelu" if leaves == expected and count else None


def _check_shape(name: str, found: LazyTensor, expected: torch.Size) -> None:
    if found.shape != expected:
        raise _misfit(name, found, tuple(found.shape), tuple(expected), _cause_of_shape(name, found.shape, expected))


def _misfit(name: str, entry: LazyTensor, found: object, expected: object, cause: str | None) -> ValueError:
    return ValueError(
        f"{name} is {found} in {entry.source}, but the config makes it {expected}; "
        f"{cause or 'use the config.json that belongs to the weights'}"
    )


def _cause_of_shape(name: str, shape: torch.Size, expected: torch.Size) -> str | None:
    if not shape.numel():
        return (
            "ZeRO-3 saved its own part instead of the whole tensor; run the zero_to_fp32.py beside DeepSpeed's states, "
            "or save with stage3_gather_16bit_weights_on_model_save"
        )
    if name in ("model.embed_tokens.weight", "lm_head.weight") and shape[1:] == expected[1:]:
        return (
            f"use the config.json and tokenizer saved with these weights, whose vocabulary was resized, or set "
            f"vocab_size to {shape[0]} there if these files belong together"
        )
    if name.startswith(_PROJECTOR) and len(shape) == len(expected) == 2 and shape[0] == expected[0]:
        return f"the projector was trained for a vision tower of width {shape[1]}; use that one with --vision-tower"
    if name.startswith(_PROJECTOR):
        return f"the projector was trained for a language model of width {shape[0]}; use that one as base"
    if name.startswith(_TOWER):
        return "the vision tower has other sizes than mm_vision_config says; use the config.json that belongs to it"
    return None


def _unexpected(pattern: str, text: str) -> Callable[[_Difference], str | None]:
    """Return the function that looks for an unexpected name, and puts it before a text."""

    def find(difference: _Difference) -> str | None:
        name = difference.first_unexpected(pattern)
        return name and f"{name} {text}"

    return find


def _common_prefix(difference: _Difference) -> str | None:
    missing, unexpected = difference.missing, difference.unexpected
    if not missing or not unexpected:
        return None
    if {f"model.{name}" for name in unexpected} <= set(missing):
        return "the names lack 'model.' in front: only the inner model was saved; save the whole one"
    inner = max((name for name in missing if unexpected[0].endswith(name)), key=len, default=None)
    prefix = unexpected[0].removesuffix(inner or "")
    has_all = {prefix + name for name in missing} <= set(unexpected)
    if inner and has_all and all(name.startswith(prefix) for name in unexpected):
        return f"the names begin with {prefix!r}, which a wrapper put there; save them without it"
    return None


def _other_projector(difference: _Difference) -> str | None:
    lacking = {name.removeprefix(_PROJECTOR) for name in difference.missing if name.startswith(_PROJECTOR)}
    extra = difference.first_unexpected(r"mm_projector|vision_resampler")
    held = sorted(name for name in difference.sources if "mm_projector" in name)
    kind = projector_kind({name.removeprefix(_PROJECTOR) for name in held})
    is_all = bool(lacking) and len(lacking) == len(difference.missing) and not difference.unexpected
    if is_all and not held:
        return (
            "there is no projector: a language model alone, such as Vicuna; give a projector's directory as "
            "--model-path and these weights as --model-base, or start from LLaVA-1.5 weights"
        )
    if extra is None and not (is_all and kind):
        return None
    place = difference.sources.get(extra or held[0], "the file")
    if kind is None:
        return f"{place} holds a projector of a type that is not supported ({extra}); linear and mlp2x_gelu are"
    return (
        f"{place} holds a projector of type {kind}: set mm_projector_type to {kind} in config.json, or pass "
        f"--mm_projector_type {kind} in training"
    )


def _other_depth(difference: _Difference) -> str | None:
    missing, unexpected, held = map(_layers, (difference.missing, difference.unexpected, difference.sources))
    if unexpected and not missing:
        return (
            f"the weights have {max(unexpected) + 1} layers, num_hidden_layers in config.json says {min(unexpected)}; "
            "use the config.json that belongs to them"
        )
    if not missing or not held or missing & held or difference.unexpected:
        return None
    unread = _unread_files(difference.sources)
    if min(missing) > max(held) and not unread:
        return (
            f"the weights have {max(held) + 1} layers, num_hidden_layers in config.json says {max(missing) + 1}; use "
            "the config.json that belongs to them, or fetch the weights again"
        )
    layers = ", ".join(map(str, sorted(missing)))
    return f"layer {layers} is in no file that was read{unread}; fetch the weights again"


def _layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _LAYER.match(name))}


def _unread_files(sources: Mapping[str, str]) -> str:
    """Return the shards beside the files that were read, as a part of a sentence."""
    read = {Path(source) for source in sources.values()}
    unread = {path for place in read for path in place.parent.glob(f"*-of-*{place.suffix}")} - read
    return f" ({', '.join(sorted(path.name for path in unread))} is not named in the index)" if unread else ""


def _tied_head(difference: _Difference) -> str | None:
    if difference.missing != ["lm_head.weight"] or difference.unexpected:
        return None
    return (
        "set tie_word_embeddings to true in config.json if the embedding is the head too; else fetch the weights again"
    )


_QUANTIZED = "belongs to weights quantised by {}: " + _QUANTIZE_HERE
_CAUSES: tuple[Callable[[_Difference], str | None], ...] = (
    _unexpected(
        r"\.lora_|\.base_layer\.",
        "is part of a LoRA adapter: the file was saved from a model with its adapter attached (zero_to_fp32.py of a "
        "LoRA run writes such files); use the directory with adapter_config.json that training wrote, with "
        "--model-base",
    ),
    _unexpected(
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
        _QUANTIZED.format("bitsandbytes, and config.json has no quantization_config that says so"),
    ),
    _unexpected(r"\.(qweight|qzeros|g_idx|scales)$", _QUANTIZED.format("GPTQ or AWQ")),
    _unexpected(
        r"\.(weight_scale|weight_scale_inv|input_scale|weight_packed|k_scale|v_scale)$",
        _QUANTIZED.format("FP8 or compressed-tensors"),
    ),
    _unexpected(
        r"image_newline$",
        "is LLaVA-1.6's (LLaVA-NeXT), which arranges image features otherwise; this code runs LLaVA-1.5: use its "
        "weights, or the code that these were made for",
    ),
    _common_prefix,
    _other_projector,
    _unexpected(
        rf"^{re.escape(_TOWER)}",
        "is not CLIP's (SigLIP's, perhaps), and LLaVA-1.5's vision tower is CLIP; use weights of LLaVA-1.5, with "
        "openai/clip-vit-large-patch14-336",
    ),
    _unexpected(
        r"self_attn\.[qkv]_(proj\.bias$|norm\.)|\.experts\.|\.block_sparse_moe\.|transformer\.blocks\.",
        "is not Llama's: these weights have another language model (Qwen's, Mixtral's, MPT's); this code runs "
        "LLaVA-1.5, whose language model is Llama's",
    ),
    _other_depth,
    _tied_head,
)
"""What the names say about the cause of a difference, the surest first."""
