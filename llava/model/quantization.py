"""4 and 8 bit through bitsandbytes, for the LLM's linear layers; tower, projector and head stay in 16 bit.

Source: Dettmers et al. 2022 (LLM.int8), Dettmers et al. 2023 (NF4, double quantisation).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

OUTLIER_THRESHOLD = 6.0
"""LLM.int8: columns with activations beyond this are computed in 16 bit."""


def import_bitsandbytes() -> ModuleType:
    """Return bitsandbytes.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(f'4 and 8 bit need bitsandbytes ({error}); run: pip install -e ".[quant]"') from error
    return bitsandbytes


def quantize_linears(layers: nn.Module, bits: int, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers inside `layers` by empty ones of 4 or 8 bit; `quantized_parameter` fills them.

    Raises:
        ValueError: if `bits` is neither 4 nor 8.
        ImportError: if bitsandbytes is not installed.
    """
    bnb = import_bitsandbytes()
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; choose 4, 8 or 16")
    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                sizes = {"input_features": child.in_features, "output_features": child.out_features, "bias": False}
                if bits == 4:
                    kind = {"compute_dtype": compute_dtype, "compress_statistics": True, "quant_type": "nf4"}
                    linear = bnb.nn.Linear4bit(**sizes, **kind, device="meta")
                else:
                    kind = {"has_fp16_weights": False, "threshold": OUTLIER_THRESHOLD}
                    linear = bnb.nn.Linear8bitLt(**sizes, **kind, device="meta")
                setattr(parent, name, linear.requires_grad_(False))


def quantized_parameter(module: nn.Module, tensor: Tensor, dtype: torch.dtype, device: Any) -> nn.Parameter:
    """Return a weight for `module` on `device`: quantised if `quantize_linears` made the module, else in `dtype`."""
    bnb = import_bitsandbytes()
    if isinstance(module, bnb.nn.Linear4bit):
        kind = {"compress_statistics": True, "quant_type": "nf4", "module": module}
        return bnb.nn.Params4bit(tensor.to(dtype).contiguous(), requires_grad=False, **kind).to(device)
    if isinstance(module, bnb.nn.Linear8bitLt):
        half = tensor.to(torch.float16).contiguous()
        return bnb.nn.Int8Params(half, requires_grad=False, has_fp16_weights=False).to(device)
    return plain_parameter(module, tensor, dtype, device)


def plain_parameter(module: nn.Module, tensor: Tensor, dtype: torch.dtype, device: Any) -> nn.Parameter:
    """Return a weight on `device` in `dtype`; the module makes no difference."""
    return nn.Parameter(tensor.to(device, dtype))
