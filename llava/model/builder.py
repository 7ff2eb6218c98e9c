"""From files to a model ready to answer: `load_pretrained_model`, and the strict loading underneath it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from llava.constants import DEFAULT_TEMPLATE
from llava.image_processing import CLIPPixels
from llava.model.adapter import OUTSIDE_LLM
from llava.model.checkpoint import Checkpoint, open_checkpoint
from llava.model.devices import best_device, parse_dtype
from llava.model.lazy_tensors import LazyTensor, LazyTensors, check_finite, is_finite
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import (
    check_placement,
    choose_bits,
    narrow_dtypes,
    plain_parameter,
    quantize_linears,
    quantized_parameter,
    saved_bits,
)
from llava.model.quantized_files import StoredPart, stored_layout, stored_parameter
from llava.model.transfer import Mover
from llava.model.vision_tower import released_name
from llava.tokenization import LlavaTokenizer

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of tensors that older checkpoints carry though they are computed from the config."""


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | Mapping[str, Any] = "auto",
    device: str | torch.device | None = None,
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[LlavaTokenizer, LlavaLlamaForCausalLM, CLIPPixels | None, int]:
    """Load full weights, a LoRA adapter on its base (merged while loading), or a projector on its base.

    Args:
        model_path: directory or hub id.
        model_base: of the weights under an adapter or projector; None = as recorded.
        model_name: accepted as in the original; the directory's files decide, not its name.
        load_8bit: bitsandbytes LLM.int8 for the LLM's linear layers.
        load_4bit: bitsandbytes NF4, double quantisation, for the LLM's linear layers.
        device_map: "auto" = the best device, spread over all GPUs if one is too small; or a map as accelerate takes it.
        device: a single device; wins over `device_map`.
        use_flash_attn: FlashAttention 2 instead of PyTorch's SDPA.
        kwargs: `torch_dtype` or `dtype`, `vision_tower`, `allow_other_base`.

    Returns:
        tokenizer, model in eval mode, image processor, context length in tokens.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if files or options don't fit each other.
    """
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    places = {key: kwargs.pop(key) for key in ("vision_tower", "allow_other_base") if key in kwargs}
    if kwargs:
        raise ValueError(
            f"load_pretrained_model has no option {', '.join(kwargs)}; choose dtype, vision_tower, allow_other_base"
        )
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other; pass one")
    checkpoint = open_checkpoint(model_path, model_base, **places)
    model = build_model(
        checkpoint,
        dtype=dtype,
        device=device,
        device_map=device_map,
        bits=4 if load_4bit else 8 if load_8bit else 16,
        attention="flash_attention_2" if use_flash_attn else "sdpa",
    )
    context_length = checkpoint.config.tokenizer_model_max_length or DEFAULT_CONTEXT_LENGTH
    return checkpoint.tokenizer, model.eval(), checkpoint.image_processor, context_length


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] = "auto",
    bits: int = 16,
    attention: str = "sdpa",
) -> LlavaLlamaForCausalLM:
    """Make a model of an opened checkpoint; each tensor goes from the file to its device, none through a second copy.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: of the weights; None = the device's.
        device: a single device; wins over `device_map`.
        device_map: see `load_pretrained_model`.
        bits: 16, or 8 or 4 for the LLM's linear layers through bitsandbytes; then `dtype` is that of computation.
            Weights stored in 8 or 4 bit need no saying.
        attention: transformers' name of the attention implementation.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape, or if `bits` doesn't fit them or the
            device.
    """
    config = checkpoint.config
    place = checkpoint.directory
    bits, stored_bits = choose_bits(bits, config, place), saved_bits(config, place)
    target = _single_device(device, device_map)
    weight_dtype = parse_dtype(dtype, target)
    config.dtype = weight_dtype
    if config.conversation_template is None:
        logger.info("the weights carry no prompt template; using %s", DEFAULT_TEMPLATE)
        config.conversation_template = DEFAULT_TEMPLATE
    config._attn_implementation = attention
    with accelerate.init_empty_weights(include_buffers=False):
        model = LlavaLlamaForCausalLM(config)
    spread = None if device is not None else _spread(model, device_map, weight_dtype, bits)
    places = spread or {"": target}
    if bits != 16:
        quantize_linears(model.model.layers, bits, weight_dtype)
        check_placement(model.model.layers, bits, {torch.device(place) for place in places.values()})
    make_parameter = plain_parameter if bits == 16 else quantized_parameter
    stored = stored_layout(model, stored_bits)
    load_tensors(model, checkpoint.tensors, weight_dtype, places, make_parameter, stored)
    if checkpoint.image_processor is not None:
        model.get_vision_tower().image_processor = checkpoint.image_processor
    if spread:
        return accelerate.dispatch_model(model, spread)
    return model.to(target)


def _single_device(device: str | torch.device | None, device_map: str | Mapping[str, Any]) -> torch.device:
    """Return the device asked for, a map's first, or the best one."""
    if device is None and not isinstance(device_map, str) and device_map:
        device = next(iter(device_map.values()))
    return best_device() if device is None else torch.device(device)


def _spread(
    model: nn.Module, device_map: str | Mapping[str, Any], dtype: torch.dtype, bits: int
) -> dict[str, Any] | None:
    """Return where each module goes, or None for a single device."""
    if not isinstance(device_map, str):
        _refuse_disk(device_map)
        return dict(device_map) if len(set(device_map.values())) > 1 else None
    if device_map != "auto":
        raise ValueError(f"device_map is {device_map!r}; pass 'auto', a map from module to device, or device=")
    sizes = {"dtype": dtype, "special_dtypes": narrow_dtypes(model, bits)}
    weight_bytes = accelerate.utils.compute_module_sizes(model, **sizes)[""]
    if torch.cuda.device_count() < 2 or weight_bytes < 0.9 * torch.cuda.mem_get_info(0)[0]:
        return None
    spread = accelerate.infer_auto_device_map(
        model, **sizes, no_split_module_classes=["LlamaDecoderLayer", "CLIPVisionTower"]
    )
    _refuse_disk(spread)
    return spread


def _refuse_disk(device_map: Mapping[str, Any]) -> None:
    for name, place in device_map.items():
        if place == "disk":
            raise ValueError(f"device_map leaves {name or 'the model'} on disk; load 4 bit, or use more or larger GPUs")


def load_tensors(
    model: LlavaLlamaForCausalLM,
    tensors: LazyTensors,
    dtype: torch.dtype,
    devices: Mapping[str, Any],
    make_parameter: Callable[[nn.Module, Tensor, torch.dtype], nn.Parameter] = plain_parameter,
    stored: Mapping[str, Mapping[str, StoredPart]] | None = None,
) -> None:
    """Fill an empty model, strictly; names and shapes are compared before anything is read.

    Args:
        model: with parameters on `meta`.
        tensors: by released name.
        dtype: of the parameters.
        devices: by module name, as in accelerate's device maps; "" stands for the whole model.
        make_parameter: from module, tensor on its device, and dtype.
        stored: of the weights that are quantised in the file, the parts each is stored in; see `stored_layout`.

    Raises:
        ValueError: if tensors are missing, unexpected, of the wrong shape or hold NaN (they are named), or have no
            device.
    """
    names = {released_name(name): name for name, _ in model.named_parameters()}
    layout, unused = _fitting_layout(model, names, tensors, stored or {})
    move, finite = Mover(), {}
    for name, parameter_name in names.items():
        place = _place_of(parameter_name, devices)
        parts = layout[name]
        finite |= _fill(
            model, parameter_name, name, {part: move(tensors[part], place) for part in parts}, dtype, make_parameter
        )
    for name, flag in finite.items():  # all at the end: asking a GPU at once would make it wait each time
        if not flag:
            check_finite(name, tensors[name], tensors.entries[name].source)
    if unused:
        model.get_vision_tower().unused_tensors = {name: tensors[name].clone() for name in sorted(unused)}


def check_complete(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with those of the model that the config makes, before anything is read or written.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape; they are named.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        model = LlavaLlamaForCausalLM(checkpoint.config)
    names = {released_name(name): name for name, _ in model.named_parameters()}
    _fitting_layout(model, names, checkpoint.tensors, {})


def _fitting_layout(
    model: LlavaLlamaForCausalLM,
    names: Mapping[str, str],
    tensors: LazyTensors,
    stored: Mapping[str, Mapping[str, StoredPart]],
) -> tuple[dict[str, Mapping[str, StoredPart]], set[str]]:
    """Return what each weight is made of, and the tensors of layers that never run, once names and shapes fit."""
    unused = {name for name in tensors if name not in names and _is_unused_tower_layer(name, model)}
    derived = {name for name in tensors if name.endswith(_DERIVED)}
    layout = {
        name: stored.get(name, {name: StoredPart(model.get_parameter(parameter_name).shape, None)})
        for name, parameter_name in names.items()
    }
    check_fit(layout, tensors, unused | derived)
    return layout, unused


def _fill(
    model: nn.Module,
    parameter_name: str,
    name: str,
    parts: Mapping[str, Tensor],
    dtype: torch.dtype,
    make_parameter: Callable[[nn.Module, Tensor, torch.dtype], nn.Parameter],
) -> dict[str, Tensor]:
    """Set a parameter; return, by name of what it was made of, a scalar that tells whether that is finite.

    What was read lives no longer than this call, so that there is never more than one weight in two forms.
    """
    module_name, _, leaf = parameter_name.rpartition(".")
    module = model.get_submodule(module_name)
    is_plain = parts.keys() == {name}
    parameter = make_parameter(module, parts[name], dtype) if is_plain else stored_parameter(module, name, parts)
    setattr(module, leaf, parameter)
    return {part: is_finite(tensor) for part, tensor in parts.items()}


def check_fit(layout: Mapping[str, Mapping[str, StoredPart]], tensors: LazyTensors, ignored: set[str]) -> None:
    """Compare what a model needs, by weight and part, with what the files hold.

    Raises:
        ValueError: if they differ; names, then the first shape or dtype, are told.
    """
    expected = {part: kind for parts in layout.values() for part, kind in parts.items()}
    check_names(expected.keys(), tensors.keys() - ignored)
    for name, kind in expected.items():
        found = tensors.entries[name]
        if kind.shape is not None and found.shape != kind.shape:
            raise _misfit(name, found, tuple(found.shape), tuple(kind.shape))
        if kind.dtype is not None and found.dtype != kind.dtype:
            raise _misfit(name, found, found.dtype, kind.dtype)


def _misfit(name: str, entry: LazyTensor, found: object, expected: object) -> ValueError:
    return ValueError(
        f"{name} is {found} in {entry.source}, but the config makes it {expected}; use the config.json that belongs to "
        "the weights"
    )


def _place_of(parameter_name: str, devices: Mapping[str, Any]) -> torch.device:
    prefix = next((prefix for prefix in _prefixes(parameter_name) if prefix in devices), None)
    if prefix is None:
        raise ValueError(f"device_map has no place for {parameter_name}; add its module or '' for the rest")
    return torch.device(devices[prefix])


def check_names(expected: set[str], found: set[str]) -> None:
    """Compare two sets of tensor names.

    Raises:
        ValueError: if they differ; the first ones of each kind are named.
    """
    problems = []
    for kind, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            problems.append(f"{len(names)} {kind} ({shown})")
    if problems:
        raise ValueError(
            f"the weights don't fit the config: {'; '.join(problems)}; use the config.json that belongs to them"
        )


def attach_adapter(model: LlavaLlamaForCausalLM, directory: str | Path) -> nn.Module:
    """Wrap a model with a LoRA adapter through peft, unmerged.

    Args:
        model: the adapter's base, with the projector of the adapter's directory.
        directory: of the adapter.
    """
    import peft

    settings = peft.PeftConfig.from_pretrained(str(directory))
    settings.exclude_modules = OUTSIDE_LLM
    return peft.PeftModel.from_pretrained(model, str(directory), config=settings).eval()


def _is_unused_tower_layer(name: str, model: LlavaLlamaForCausalLM) -> bool:
    return ".vision_tower." in name and model.config.mm_vision_config is not None and ".encoder.layers." in name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:stop]) for stop in range(len(parts), -1, -1)]
