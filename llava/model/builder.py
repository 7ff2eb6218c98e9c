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
from llava.model.checkpoint import Checkpoint, file_name, open_checkpoint
from llava.model.devices import best_device, parse_dtype
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.quantization import plain_parameter, quantize_linears, quantized_parameter
from llava.model.weights import LazyTensors
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
        attention: transformers' name of the attention implementation.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape.
    """
    config = checkpoint.config
    target = _single_device(device, device_map)
    weight_dtype = parse_dtype(dtype, target)
    config.dtype = weight_dtype
    if config.conversation_template is None:
        logger.info("the weights carry no prompt template; using %s", DEFAULT_TEMPLATE)
        config.conversation_template = DEFAULT_TEMPLATE
    config._attn_implementation = attention
    with accelerate.init_empty_weights(include_buffers=False):
        model = LlavaLlamaForCausalLM(config)
    spread = None if device is not None else _spread(model, device_map, weight_dtype)
    if bits != 16:
        quantize_linears(model.model.layers, bits, weight_dtype)
    make_parameter = plain_parameter if bits == 16 else quantized_parameter
    load_tensors(model, checkpoint.tensors, weight_dtype, spread or {"": target}, make_parameter)
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


def _spread(model: nn.Module, device_map: str | Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any] | None:
    """Return where each module goes, or None for a single device."""
    if not isinstance(device_map, str):
        return dict(device_map) if len(set(device_map.values())) > 1 else None
    if device_map != "auto":
        raise ValueError(f"device_map is {device_map!r}; pass 'auto', a map from module to device, or device=")
    weight_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if torch.cuda.device_count() < 2 or weight_bytes < 0.9 * torch.cuda.mem_get_info(0)[0]:
        return None
    return accelerate.infer_auto_device_map(
        model, dtype=dtype, no_split_module_classes=["LlamaDecoderLayer", "CLIPVisionTower"]
    )


def load_tensors(
    model: LlavaLlamaForCausalLM,
    tensors: LazyTensors,
    dtype: torch.dtype,
    devices: Mapping[str, Any],
    make_parameter: Callable[[nn.Module, Tensor, torch.dtype, Any], nn.Parameter] = plain_parameter,
) -> None:
    """Fill an empty model, strictly.

    Args:
        model: with parameters on `meta`.
        tensors: by released name.
        dtype: of the parameters.
        devices: by module name, as in accelerate's device maps; "" stands for the whole model.
        make_parameter: from module, tensor, dtype and device.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape (they are named), or have no device.
    """
    names = {file_name(name): name for name, _ in model.named_parameters()}
    unused = {name for name in tensors if name not in names and _is_unused_tower_layer(name, model)}
    derived = {name for name in tensors if name.endswith(_DERIVED)}
    check_names(names.keys(), tensors.keys() - unused - derived)
    for name, parameter_name in names.items():
        module_name, _, leaf = parameter_name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor, expected = tensors[name], getattr(module, leaf).shape
        if tensor.shape != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)} in the file, but the config makes it {tuple(expected)}")
        prefix = next((prefix for prefix in _prefixes(parameter_name) if prefix in devices), None)
        if prefix is None:
            raise ValueError(f"device_map has no place for {parameter_name}; add its module or '' for the rest")
        setattr(module, leaf, make_parameter(module, tensor, dtype, devices[prefix]))
    if unused:
        model.get_vision_tower().unused_tensors = {name: tensors[name] for name in sorted(unused)}


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
