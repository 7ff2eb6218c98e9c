"""Linear layer in FP8: e4m3 weights with a scale per output channel, inputs quantised with a scale per token.

Both factors of a product are in FP8, its sums in fp32, its result in bf16. The format is that of W8A8 checkpoints
("float-quantized", weights by channel, activations by token) which vLLM and llm-compressor use.

Source: Micikevicius et al. 2022, FP8 formats for deep learning. The product is PyTorch's `torch._scaled_mm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

FP8_DTYPE = torch.float8_e4m3fn
MULTIPLE = 16  # features in and out; the product's kernels need it
_LARGEST = torch.finfo(FP8_DTYPE).max
_SMALLEST_SCALE = 1e-12  # of rows of zeros
_LARGEST_DISTANCE = 0.02  # relative, of a product rounded to bf16 from the exact one


class Fp8Linear(nn.Module):
    """Linear layer without bias whose weight is in FP8.

    Args:
        in_features: width of the input, a multiple of 16.
        out_features: width of the output, a multiple of 16.
        device: of the empty weight.

    Attributes:
        weight: (out, in) uint8, the bytes of e4m3: not every library moves, sends or leaves alone what is e4m3.
        scales: (out, 1) fp32, of the outputs.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = torch.empty(out_features, in_features, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.scales = torch.empty(out_features, 1, device=device)

    @classmethod
    def of(cls, values: Tensor, scales: Tensor) -> Fp8Linear:
        """Return a layer with a weight that is in FP8 already, (out, in) e4m3 and (out, 1), in the same memory."""
        layer = cls(values.shape[1], values.shape[0])
        layer.weight, layer.scales = nn.Parameter(values.view(torch.uint8), requires_grad=False), scales
        return layer

    @property
    def values(self) -> Tensor:
        """The weight as e4m3, (out, in), in the same memory."""
        return self.weight.view(FP8_DTYPE)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product with the weight, (..., in) -> (..., out), in the dtype of the inputs."""
        rows = quantize_rows(inputs.flatten(0, -2))
        return scaled_product(*rows, self.values, self.scales, inputs.dtype).unflatten(0, inputs.shape[:-1])

    def quantize(self, weight: Tensor) -> nn.Parameter:
        """Set the scales to those of a weight (out, in), and return its bytes."""
        values, self.scales = quantize_rows(weight)
        return nn.Parameter(values.view(torch.uint8), requires_grad=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Move to another device, and keep the formats whatever dtype the model around is given."""
        super()._apply(function, recurse)
        self.scales = self.scales.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """`in_features=64, out_features=64`, as `nn.Linear` has it."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in FP8 and its scales: (rows, columns) -> (rows, columns) e4m3, (rows, 1) fp32.

    The largest magnitude of a row becomes the largest of the format, 448.
    """
    precise = values.float()
    scales = (precise.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)
    return (precise / scales).to(FP8_DTYPE), scales


def scaled_product(rows: Tensor, row_scales: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return inputs times a transposed weight, (rows, out).

    Args:
        rows: (rows, in) e4m3, of the inputs.
        row_scales: (rows, 1) fp32.
        values: (out, in) e4m3, of the weight.
        scales: (out, 1) fp32.
        dtype: of the result, which is rounded to bf16 first.
    """
    product = torch._scaled_mm(rows, values.t(), scale_a=row_scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    return product.to(dtype)


def find_product_problem(device: torch.device) -> str | None:
    """Return what is wrong with FP8 products on a device, tried on a small one; None if nothing is."""
    draw = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(shape, generator=draw).to(device) for shape in ((8, 64), (32, 64)))
    layer = Fp8Linear.of(*quantize_rows(weight))
    rows, row_scales = quantize_rows(inputs)
    expected = (rows.float() * row_scales) @ (layer.values.float() * layer.scales).t()
    try:
        distance = float((layer(inputs) - expected).norm() / expected.norm())
    except RuntimeError as error:
        return f"FP8 products fail on {device} ({str(error).strip().splitlines()[0]})"
    return None if distance < _LARGEST_DISTANCE else f"FP8 products on {device} are wrong by {distance:.0%}"


def find_size_problem(layers: nn.Module) -> str | None:
    """Return which linear layer's sizes the product does not support; None if it supports all."""
    for name, layer in layers.named_modules():
        if isinstance(layer, Fp8Linear) and (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE):
            return (
                f"layer {name} turns {layer.in_features} features into {layer.out_features}, but FP8 needs multiples "
                f"of {MULTIPLE}"
            )
    return None
