"""Load a model for inference: `load_pretrained_model`, and strict loading of tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from llava.clip_image_processor import CLIPPixels
from llava.constants import DEFAULT_TEMPLATE
from llava.model.adapter.attached import attach
from llava.model.adapter.lora import read_adapter
from llava.model.capabilities import capabilities_of
from llava.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava.model.checkpoint.empty_model import empty_model
from llava.model.checkpoint.hub import resolve_directory
from llava.model.checkpoint.lazy_tensors import DERIVED, LazyTensors, check_finite, is_finite
from llava.model.checkpoint.loading_options import FLASH_ATTENTION, LoadingOptions, read_options
from llava.model.checkpoint.quantized import StoredPart, stored_layout, stored_parameter
from llava.model.checkpoint.strict_load import check_fit
from llava.model.checkpoint.to_device import Mover
from llava.model.devices import best_device, default_dtype, parse_device, parse_dtype
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.placement import DeviceMap, first_device, is_strategy, spread_model, stays_on_host
from llava.model.quantization import (
    check_placement,
    choose_bits,
    plain_parameter,
    quantize_linears,
    quantized_parameter,
    saved_bits,
)
from llava.model.vision_tower import released_name
from llava.tokenization.llama_tokenizer import LlavaTokenizer

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: DeviceMap = "auto",
    device: str | int | torch.device | None = None,
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[LlavaTokenizer, LlavaLlamaForCausalLM, CLIPPixels | None, int]:
    """Load full weights, a LoRA adapter on its base (merged while loading), or a projector on its base.

    Args:
        model_path: directory or hub id.
        model_base: base of an adapter or projector; None = as recorded.
        model_name: accepted as in the original; no effect, as the directory's files decide.
        load_8bit: bitsandbytes LLM.int8 for the LLM's linear layers.
        load_4bit: bitsandbytes NF4, double quantisation, for the LLM's linear layers.
        device_map: "auto" = the best device, spread over all GPUs if one is too small; "balanced", "balanced_low_0" or
            "sequential" as in accelerate; a device; a map from module to device; "" or {} = the best device alone;
            None = the CPU, as in transformers.
        device: a single device; overrides `device_map`, but for "cuda", the original's default.
        use_flash_attn: FlashAttention 2 instead of PyTorch's SDPA.
        kwargs: fields of `LoadingOptions`, such as `torch_dtype`, `attn_implementation`, `cache_dir` and
            `vision_tower`; options of the original's callers without meaning here are accepted.

    Returns:
        tokenizer, model in eval mode, image processor, context length in tokens.

    Raises:
        FileNotFoundError: if a file is missing.
        ImportError: if bitsandbytes or flash-attn is needed and not installed.
        TypeError: if an option is unknown.
        ValueError: if files or options don't fit each other, or this machine lacks a device.
    """
    options = read_options(kwargs, load_8bit=load_8bit, load_4bit=load_4bit, use_flash=use_flash_attn)
    checkpoint, model = load_checkpoint(model_path, model_base or None, options, device_map=device_map, device=device)
    context_length = checkpoint.config.tokenizer_model_max_length or DEFAULT_CONTEXT_LENGTH
    return checkpoint.tokenizer, model, checkpoint.image_processor, context_length


def load_checkpoint(
    model_path: str | Path,
    model_base: str | None,
    options: LoadingOptions,
    *,
    device_map: DeviceMap,
    device: str | int | torch.device | None = None,
    with_tokenizer: bool = True,
    **model_options: Any,
) -> tuple[Checkpoint, LlavaLlamaForCausalLM]:
    """Open a checkpoint and build its model for inference: in eval mode, the vision tower frozen.

    Args, errors: as in `load_pretrained_model`; `with_tokenizer` as in `open_checkpoint`, `model_options` as of
    `empty_model`.
    """
    if device == "cuda" and (not is_strategy(device_map) or parse_device(device)):
        device = None
    dtype = options.dtype
    if device is None and dtype in (None, "auto") and stays_on_host(device_map):
        dtype = default_dtype(best_device())  # callers of the original load there, then move the model themselves
    if device_map is None and options.bits != 16:
        device_map = "auto"  # as in transformers
    if options.revision is not None:
        model_path = resolve_directory(model_path, options.cache_dir, revision=options.revision)
    places = {name: getattr(options, name) for name in ("vision_tower", "allow_other_base", "cache_dir")}
    target = first_device(device_map) if device is None else parse_device(device)  # before anything is read
    checkpoint = open_checkpoint(model_path, model_base, with_tokenizer=with_tokenizer, **places)
    options.change_config(checkpoint.config)
    model = build_model(
        checkpoint,
        dtype=dtype,
        device=target if device is not None or stays_on_host(device_map) else None,
        device_map=device_map,
        bits=options.bits,
        attention=options.attn_implementation,
        max_memory=options.max_memory,
        **model_options,
    )
    if model.config.mm_vision_config is not None:
        model.get_vision_tower().requires_grad_(False)
    return checkpoint, model.eval()


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    device_map: DeviceMap = "auto",
    bits: int | str = 16,
    attention: str = "sdpa",
    max_memory: Mapping[int | str, int | str] | None = None,
    **model_options: Any,
) -> LlavaLlamaForCausalLM:
    """Build the model of an opened checkpoint; each tensor is moved from the file to its device without another copy.

    Args:
        checkpoint: from `open_checkpoint`.
        dtype: of the weights; None = the device's.
        device: a single device; overrides `device_map`.
        device_map: see `load_pretrained_model`.
        bits: 16, or for the LLM's linear layers 8 or 4 through bitsandbytes, or "fp8"; `dtype` is that of all else.
            Weights stored in 8 or 4 bit keep their bits.
        attention: transformers' name of the attention implementation.
        max_memory: see `spread_model`.
        model_options: further arguments of `empty_model`.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape, or if `bits` doesn't fit them or the
            device.
    """
    config = checkpoint.config
    place = checkpoint.directory
    bits, stored_bits = choose_bits(bits, config, place), saved_bits(config, place)
    target = first_device(device_map) if device is None else parse_device(device)
    weight_dtype = parse_dtype(dtype, target)
    config.dtype = weight_dtype
    if config.conversation_template is None:
        logger.info("the weights carry no prompt template; using %s", DEFAULT_TEMPLATE)
        config.conversation_template = DEFAULT_TEMPLATE
    if attention == FLASH_ATTENTION and not (here := capabilities_of(target)).has_flash_attention:
        raise ValueError(f"{FLASH_ATTENTION}: {here.machine} does not run it; leave it out for SDPA")
    config._attn_implementation = attention
    model = empty_model(config, **model_options)
    spread = None if device is not None else spread_model(model, device_map, weight_dtype, bits, max_memory)
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


def load_tensors(
    model: LlavaLlamaForCausalLM,
    tensors: LazyTensors,
    dtype: torch.dtype,
    devices: Mapping[str, Any],
    make_parameter: Callable[[nn.Module, Tensor, torch.dtype], nn.Parameter] = plain_parameter,
    stored: Mapping[str, Mapping[str, StoredPart]] | None = None,
) -> None:
    """Fill an empty model strictly: names and shapes are compared before tensors are read.

    Args:
        model: with parameters on `meta`.
        tensors: by released name.
        dtype: of the parameters.
        devices: by module name, as in accelerate's device maps; "" = the whole model.
        make_parameter: from module, tensor on its device, and dtype.
        stored: by name of a weight that is quantised in the file, its parts there; see `stored_layout`.

    Raises:
        ValueError: if tensors are missing, unexpected, of the wrong shape, not finite, or without a device; the
            message names them.
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
    for name, flag in finite.items():  # at the end: each read synchronises a GPU
        if not flag:
            check_finite(name, tensors[name], tensors.entries[name].source)
    if unused:
        model.get_vision_tower().unused_tensors = {name: tensors[name].clone() for name in sorted(unused)}


def check_complete(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with those of the config's model, before tensors are read or written.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape; the message names them.
    """
    model = empty_model(checkpoint.config)
    names = {released_name(name): name for name, _ in model.named_parameters()}
    _fitting_layout(model, names, checkpoint.tensors, {})


def _fitting_layout(
    model: LlavaLlamaForCausalLM,
    names: Mapping[str, str],
    tensors: LazyTensors,
    stored: Mapping[str, Mapping[str, StoredPart]],
) -> tuple[dict[str, Mapping[str, StoredPart]], set[str]]:
    """Return the stored parts of each weight, and the tensors of layers that never run, if names and shapes fit."""
    unused = {name for name in tensors if name not in names and _is_unused_tower_layer(name, model)}
    derived = {name for name in tensors if name.endswith(DERIVED)}
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
    """Set a parameter; return by the name of each stored part a scalar that says whether it is finite.

    The parts are freed with this call, so that at most one weight is held in two forms.
    """
    module_name, _, leaf = parameter_name.rpartition(".")
    module = model.get_submodule(module_name)
    is_plain = parts.keys() == {name}
    parameter = make_parameter(module, parts[name], dtype) if is_plain else stored_parameter(module, name, parts)
    setattr(module, leaf, parameter)
    return {part: is_finite(tensor) for part, tensor in parts.items()}


def _place_of(parameter_name: str, devices: Mapping[str, Any]) -> torch.device:
    prefix = next((prefix for prefix in _prefixes(parameter_name) if prefix in devices), None)
    if prefix is None:
        raise ValueError(f"device_map has no place for {parameter_name}; add its module or '' for the rest")
    return torch.device(devices[prefix])


def attach_adapter(
    model: LlavaLlamaForCausalLM, directory: str | Path, mm_projector: str | Path | None = None
) -> nn.Module:
    """Wrap a model with a LoRA adapter through peft, unmerged; fully trained weights replace the model's.

    Args:
        model: the adapter's base.
        directory: of the adapter.
        mm_projector: see `open_checkpoint`.

    Raises:
        FileNotFoundError: if one of the adapter's files is missing.
        ValueError: if the adapter is incomplete or doesn't fit the model.
    """
    return attach(model, read_adapter(directory, mm_projector)).eval()


def _is_unused_tower_layer(name: str, model: LlavaLlamaForCausalLM) -> bool:
    return ".vision_tower." in name and model.config.mm_vision_config is not None and ".encoder.layers." in name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:stop]) for stop in range(len(parts), -1, -1)]
