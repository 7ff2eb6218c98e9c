"""Quantisation of the LLM's linear layers: 4 and 8 bit by bitsandbytes, and FP8; all other weights stay in 16 bit.

Source: Dettmers et al. 2022 (LLM.int8), Dettmers et al. 2023 (NF4, double quantisation).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn

from llava.constants import FP8
from llava.files.install_command import install_command
from llava.model.adapter.lora import is_llm_block
from llava.model.capabilities import capabilities_of
from llava.model.configuration import LlavaConfig
from llava.model.fp8.linear import Fp8Linear, find_product_problem, find_size_problem

OUTLIER_THRESHOLD = 6.0
"""LLM.int8: columns with activations beyond this are computed in 16 bit."""
BLOCK = 64
"""NF4: number of values that share a scale."""
DEVICES = ("cuda", "cpu")
_CPU_ROWS = 32
"""Outputs that bitsandbytes' 4-bit kernel for the CPU computes at a time."""
_OUTSIDE = ["lm_head", "model.mm_projector", "model.vision_tower"]
_CAST_LOGGER = "bitsandbytes.autograd._functions"
_SETTINGS_KEY = "quantization_config"
_METHOD = "bitsandbytes"
_REQUIRED: dict[int, dict[str, Any]] = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    8: {"load_in_8bit": True, "llm_int8_threshold": OUTLIER_THRESHOLD},
}
"""By bits, the settings of a checkpoint that can be read."""


def import_bitsandbytes() -> ModuleType:
    """Return bitsandbytes.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f"4 and 8 bit need bitsandbytes ({error}); run: {install_command('quant')}") from error
    return bitsandbytes


def quantization_settings(bits: int, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return `quantization_config` of a `config.json`, as transformers writes it.

    Raises:
        ValueError: if `bits` is neither 4 nor 8.
    """
    if bits not in _REQUIRED:
        raise ValueError(f"bits is {bits}; choose 4 or 8")
    settings = transformers.BitsAndBytesConfig(
        **_REQUIRED[bits], bnb_4bit_compute_dtype=compute_dtype, llm_int8_skip_modules=list(_OUTSIDE)
    )
    return {**settings.to_dict(), "quant_method": _METHOD}


def is_quantized(config: LlavaConfig) -> bool:
    """Tell whether a config's weights are stored quantised, by any method."""
    return config.to_dict().get(_SETTINGS_KEY) is not None


def saved_bits(config: LlavaConfig, place: str | Path) -> int | None:
    """Return the bits of stored weights: 4 or 8; None if they are not quantised.

    Args:
        config: of the weights.
        place: path for messages.

    Raises:
        ValueError: if they are quantised in a way that is not supported.
    """
    if not is_quantized(config):
        return None
    settings = config.to_dict()[_SETTINGS_KEY]
    for bits, required in _REQUIRED.items():
        if settings.get("quant_method") == _METHOD and required.items() <= settings.items():
            return bits
    found = {key: settings[key] for required in _REQUIRED.values() for key in required if key in settings}
    how = f"{settings.get('quant_method')} with {found}" if found else settings.get("quant_method")
    raise ValueError(
        f"{place} is quantised by {how}; supported are bitsandbytes' NF4 with "
        "double quantisation and LLM.int8: make one from the 16-bit weights with scripts/quantize_checkpoint.py"
    )


def choose_bits(requested: int | str, config: LlavaConfig, place: str | Path) -> int | str:
    """Return the bits to load weights in: the stored ones, else `requested` (16, 8, 4 or "fp8").

    Raises:
        ValueError: if both are quantised and differ.
    """
    saved = saved_bits(config, place)
    if saved is None:
        return requested
    if requested not in (16, saved):
        raise ValueError(
            f"{place} holds {saved}-bit weights, but {describe_bits(requested)} is requested; leave the option out, or "
            "load the 16-bit weights they were made from with it"
        )
    return saved


def forget_quantization(config: LlavaConfig) -> None:
    """Remove `quantization_config` from an adapter's config, and record its bits as those of the base.

    A QLoRA run of the original writes how it held its base, whose files are in 16 bit.
    """
    if is_quantized(config):
        config.base_model_bits = 4 if config.to_dict()[_SETTINGS_KEY].get("load_in_4bit") else 8
        del config.quantization_config


def refuse_quantized(config: LlavaConfig, place: str | Path, use: str) -> None:
    """Refuse quantised weights for a use that needs 16-bit values.

    Args:
        config: of the weights.
        place: path for messages.
        use: a participle, as in "they can't be USE".

    Raises:
        ValueError: if the weights are stored quantised.
    """
    if is_quantized(config):
        method = config.to_dict()[_SETTINGS_KEY].get("quant_method")
        kind = "quantised weights, which load for inference but can't"
        kind = kind if method == _METHOD else f"weights quantised by {method}, which can't"
        raise ValueError(f"{place} holds {kind} be {use}; give the directory of the 16-bit weights they were made from")


def quantization_note(bits: int) -> str | None:
    """Return a warning for merging an adapter that was trained on a base in `bits`; None for 16."""
    if bits == 16:
        return None
    return (
        f"the adapter was trained on its base held in {bits} bit and is added to the 16-bit weights here: the rounding "
        "errors that it compensated are gone, so answers can differ a little from those seen in training; score the "
        "merged model on your own questions"
    )


def is_quantized_weight(name: str, shape: torch.Size) -> bool:
    """Tell whether a weight is quantised in 4 and 8 bit: the linear layers of the LLM's layers."""
    return is_llm_block(name) and len(shape) == 2


def narrow_dtypes(model: nn.Module, bits: int | str) -> dict[str, Any]:
    """Return the dtypes of weights to quantise, by parameter name, for accelerate's size functions."""
    if bits == 16:
        return {}
    narrow = accelerate.utils.CustomDtype.INT4 if bits == 4 else torch.int8
    return {name: narrow for name, weight in model.named_parameters() if is_quantized_weight(name, weight.shape)}


def check_placement(layers: nn.Module, bits: int | str, devices: Collection[torch.device]) -> None:
    """Check that these layers can be computed on these devices, before tensors are read.

    Args:
        layers: of the LLM.
        bits: 4, 8 or "fp8".
        devices: of all parts of the model.

    Raises:
        ValueError: if a device has no kernels, if the model is spread over kinds of devices, or if a layer's sizes
            don't fit the CPU's 4-bit kernels.
    """
    kinds = {device.type for device in devices}
    strangers = sorted(kinds - set(DEVICES))
    if strangers:
        raise ValueError(
            f"{describe_bits(bits)} is supported on CUDA and the CPU, not on {strangers[0]}; load 16 bit there, or "
            "pass device cpu"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{describe_bits(bits)} can't be spread over GPU and CPU; name GPUs alone in device_map, or one device"
        )
    if bits == FP8:
        _refuse_without_fp8(layers, devices)
        return
    if bits == 8:
        _refuse_without_int8(devices)
        return
    if kinds != {"cpu"}:
        return
    for name, layer in layers.named_modules():
        # In rows that don't end with a block, bitsandbytes' kernel reads the scale of another block, silently.
        if isinstance(layer, nn.Linear) and (layer.in_features % BLOCK or layer.out_features % _CPU_ROWS):
            raise ValueError(
                f"layer {name} turns {layer.in_features} features into {layer.out_features}, but 4 bit on the CPU "
                f"needs a multiple of {BLOCK} and of {_CPU_ROWS}; load 8 or 16 bit, or use a GPU"
            )


def _refuse_without_int8(devices: Collection[torch.device]) -> None:
    for device in devices:
        if not (here := capabilities_of(device)).has_int8:
            raise ValueError(f"8 bit: {here.machine} has no kernels for LLM.int8; load 4 or 16 bit")


def _refuse_without_fp8(layers: nn.Module, devices: Collection[torch.device]) -> None:
    for device in devices:
        if not (here := capabilities_of(device)).has_fp8:
            raise ValueError(f"FP8: {here.machine} has no FP8 products; load 16, 8 or 4 bit")
        if problem := find_product_problem(device):
            raise ValueError(f"{problem}; load 16, 8 or 4 bit")
    if problem := find_size_problem(layers):
        raise ValueError(f"{problem}; load 16 bit")


def describe_bits(bits: int | str) -> str:
    """Return how weights are held, for messages: "4 bit", "FP8"."""
    return "FP8" if bits == FP8 else f"{bits} bit"


def quantize_linears(layers: nn.Module, bits: int | str, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers inside `layers` by empty ones of 4 or 8 bit or FP8; `quantized_parameter` fills them.

    Raises:
        ValueError: if `bits` is none of these.
        ImportError: if bitsandbytes is not installed.
    """
    if bits == FP8:
        _replace_linears(layers, lambda child: Fp8Linear(child.in_features, child.out_features))
        return
    bnb = import_bitsandbytes()
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; choose 4, 8, 16 or {FP8!r}")
    # LLM.int8 computes in fp16 whatever its input, and bitsandbytes logs so for each layer and token.
    logging.getLogger(_CAST_LOGGER).addFilter(_is_other_message)

    def replace(child: nn.Linear) -> nn.Module:
        sizes = {"input_features": child.in_features, "output_features": child.out_features, "bias": False}
        if bits == 4:
            kind = {"compute_dtype": compute_dtype, "compress_statistics": True, "quant_type": "nf4"}
            return bnb.nn.Linear4bit(**sizes, **kind, device="meta")
        kind = {"has_fp16_weights": False, "threshold": OUTLIER_THRESHOLD}
        return bnb.nn.Linear8bitLt(**sizes, **kind, device="meta")

    _replace_linears(layers, replace)


def _replace_linears(layers: nn.Module, replace: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, replace(child).requires_grad_(False))


def has_4bit_weights(layers: nn.Module) -> bool:
    """Tell whether `layers` hold 4-bit linear layers, and none with an adapter."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    kind = import_bitsandbytes().nn.Linear4bit
    modules = list(layers.modules())
    return any(isinstance(module, kind) for module in modules) and not any(hasattr(part, "lora_A") for part in modules)


def _is_other_message(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg


def quantized_parameter(module: nn.Module, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a weight for `module`: quantised if `quantize_linears` made the module, else in `dtype`."""
    if isinstance(module, Fp8Linear):
        return module.quantize(tensor.to(dtype))
    if importlib.util.find_spec("bitsandbytes") is None:
        return plain_parameter(module, tensor, dtype)
    bnb = import_bitsandbytes()
    if isinstance(module, bnb.nn.Linear4bit):
        return quantize_4bit(tensor.to(dtype), module)
    if isinstance(module, bnb.nn.Linear8bitLt):
        return quantize_8bit(tensor.to(torch.float16))
    return plain_parameter(module, tensor, dtype)


def quantize_4bit(tensor: Tensor, module: nn.Module | None = None) -> nn.Parameter:
    """Return a weight in NF4 with its statistics, quantised on its device.

    Args:
        tensor: (out, in).
        module: its layer, if any.
    """
    kind = {"compress_statistics": True, "quant_type": "nf4", "blocksize": BLOCK, "module": module}
    parameter = import_bitsandbytes().nn.Params4bit(tensor.contiguous(), requires_grad=False, **kind)
    return parameter.to(tensor.device)


def quantize_8bit(tensor: Tensor) -> nn.Parameter:
    """Return a weight in int8 with one scale per row, quantised on its device.

    Args:
        tensor: (out, in) float16.
    """
    # Moving an `Int8Params` quantises on the way from the CPU alone; a tensor on a GPU would stay in 16 bit until the
    # first forward pass.
    bnb = import_bitsandbytes()
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.contiguous())
    return int8_parameter(rows, scales)


def int8_parameter(rows: Tensor, scales: Tensor) -> nn.Parameter:
    """Return an LLM.int8 weight.

    Args:
        rows: (out, in) int8.
        scales: (out,) float32, the largest absolute value of each row.
    """
    kind = {"requires_grad": False, "has_fp16_weights": False}
    return import_bitsandbytes().nn.Int8Params(rows, **kind, CB=rows, SCB=scales)


def plain_parameter(module: nn.Module, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Return a weight in `dtype`; `module` has no effect."""
    return nn.Parameter(tensor.to(dtype))
