"""Fused Llama layers under LoRA for packs: fewer and larger kernels than layer by layer and adapter by adapter.

Layers with the same input (q, k, v; gate, up) are one product with their concatenated frozen weights, and one with
their adapters' concatenated `A`; fp32 master weights are cast once, inputs not at all. The last layer's output is
computed at supervised positions alone; other positions give it only keys and values. Without dropout the results are
peft's. With dropout, layers of one input share a dropout mask; in peft each has its own.

The arithmetic is transformers' `LlamaDecoderLayer`, on weights instead of modules because their storage is fused;
`ragged_llama` (which must run quantised modules) and the chat's Triton kernels compute the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from llava.model.attention.rope import apply_rope_to_heads, signed_sin, split_heads, split_rotated_heads
from llava.model.attention.sdpa_backends import without_cudnn
from llava.model.fp8.linear import MULTIPLE, Fp8Linear, quantize_rows
from llava.model.packed.lora_linear import Fp8Weight, lora_linear


class LoraFactors(NamedTuple):
    """`A` (rank, in) and `B` (out, rank) of one layer's adapter, the scale of their product, dropout on their input."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float


class FusedLinear(NamedTuple):
    """Linear layers of one input: concatenated weights (out of all, in), each layer's out, their adapters or None."""

    weight: Tensor | Fp8Weight
    widths: tuple[int, ...]
    adapters: tuple[LoraFactors | None, ...]

    def divide(self) -> tuple[FusedLinear, FusedLinear]:
        """Return the first layer and the others."""
        first, weight = self.widths[0], self.weight
        if isinstance(weight, Fp8Weight):
            parts = weight.rows(0, first), weight.rows(first, len(weight.values))
        else:
            parts = weight[:first], weight[first:]
        return (
            FusedLinear(parts[0], self.widths[:1], self.adapters[:1]),
            FusedLinear(parts[1], self.widths[1:], self.adapters[1:]),
        )


class LayerWeights(NamedTuple):
    """Weights of one layer, in the order of their use."""

    attention_norm: Tensor
    qkv: FusedLinear
    out: FusedLinear
    mlp_norm: Tensor
    gate_up: FusedLinear
    down: FusedLinear


class LayerSizes(NamedTuple):
    """Sizes that weights don't show: H, Hkv, epsilon of the norms."""

    heads: int
    key_value_heads: int
    epsilon: float


KeysAndValues = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`project_keys_values`, compiled or not."""


class FusedLora:
    """Llama's layers and last norm over packs, fused.

    Args:
        model: with frozen weights and adapters in place; see `why_not_fused`. Its weights move into fused storage.
        compiled: run each layer through `torch.compile`.
        fp8: hold the frozen weights in FP8; the model's own layers too, for what runs through them.

    Attributes:
        compiled: as above.
    """

    def __init__(self, model: LlamaForCausalLM, *, compiled: bool, fp8: bool = False) -> None:
        self.body = model.model
        config = model.config
        self.compiled = compiled
        self.sizes = LayerSizes(config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps)
        self.weights = [_layer_weights(layer, fp8=fp8) for layer in self.body.layers]
        self.run: Callable[..., Tensor] = torch.compile(run_layer, dynamic=False) if compiled else run_layer
        # The only part of the last layer with the same shapes in every step.
        self.project: KeysAndValues = (
            torch.compile(project_keys_values, dynamic=False) if compiled else project_keys_values
        )

    def __call__(
        self,
        inputs_embeds: Tensor,
        mask: Tensor | BlockMask,
        position_ids: Tensor,
        queries: Tensor,
        query_mask: Tensor,
    ) -> Tensor:
        """Run all layers and the last norm, with activation checkpointing in the layers that have it.

        Args:
            inputs_embeds: (B, S, D).
            mask: of all positions.
            position_ids: (B, S) int64.
            queries: (queries,) int64, flat indices of the positions whose output is returned.
            query_mask: (1, 1, queries, B x S) bool, their mask over the keys of all rows.

        Returns:
            the normed output, (queries, D).
        """
        cos, sin = self.body.rotary_emb(inputs_embeds, position_ids)  # (B, S, d)
        rope = cos, signed_sin(sin)
        hidden = inputs_embeds
        training = self.body.training
        for layer, weights in zip(self.body.layers[:-1], self.weights[:-1], strict=True):
            arguments = (hidden, rope, mask, weights, self.sizes, training)
            if layer.gradient_checkpointing and training:
                hidden = checkpoint(self.run, *arguments, use_reentrant=False)
            else:
                hidden = self.run(*arguments)
        with without_cudnn():
            hidden = run_last_layer(
                hidden, rope, queries, query_mask, self.weights[-1], self.sizes, training, self.project
            )
        return self.body.norm(hidden)


def run_layer(
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | BlockMask,
    weights: LayerWeights,
    sizes: LayerSizes,
    training: bool,
) -> Tensor:
    """Run one layer, (B, S, D) -> (B, S, D)."""
    normed = rms_norm(hidden, weights.attention_norm, sizes.epsilon)
    qkv = fused_linear(normed, weights.qkv, training)  # (B, S, (H + 2 Hkv) d)
    attended = attend(*split_rotated_heads(qkv, rope, sizes.heads, sizes.key_value_heads), mask)  # (B, H, S, d)
    return output_and_mlp(hidden, attended, weights, sizes, training)


def run_last_layer(
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    queries: Tensor,
    query_mask: Tensor,
    weights: LayerWeights,
    sizes: LayerSizes,
    training: bool,
    project: KeysAndValues,
) -> Tensor:
    """Run the last layer with some positions as queries and all of them as keys, (B, S, D) -> (queries, D)."""
    rope = tuple(table.flatten(0, 1)[None] for table in rope)
    hidden = hidden.flatten(0, 1)[None]  # (1, B x S, D)
    normed, key, value = project(hidden, rope, weights, sizes, training)
    query_layer, _ = weights.qkv.divide()
    (query,) = split_linear(normed[:, queries], query_layer, training)
    query_rope = tuple(table[:, queries] for table in rope)
    query = apply_rope_to_heads(split_heads(query, sizes.heads), query_rope)  # (1, H, queries, d)
    attended = attend(query, key, value, query_mask)  # (1, H, queries, d)
    return output_and_mlp(hidden[:, queries], attended, weights, sizes, training)[0]


def project_keys_values(
    hidden: Tensor, rope: tuple[Tensor, Tensor], weights: LayerWeights, sizes: LayerSizes, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed input (1, B x S, D) of a layer, and its keys and values (1, Hkv, B x S, d)."""
    normed = rms_norm(hidden, weights.attention_norm, sizes.epsilon)
    _, key_value_layers = weights.qkv.divide()
    key, value = split_linear(normed, key_value_layers, training)
    heads = sizes.key_value_heads
    return normed, apply_rope_to_heads(split_heads(key, heads), rope), split_heads(value, heads)


def output_and_mlp(
    hidden: Tensor, attended: Tensor, weights: LayerWeights, sizes: LayerSizes, training: bool
) -> Tensor:
    """Return a layer's output (B, S, D) from its input and its heads' attention (B, H, S, d)."""
    (out,) = split_linear(attended.transpose(1, 2).flatten(2), weights.out, training)
    hidden = hidden + out
    gate, up = split_linear(rms_norm(hidden, weights.mlp_norm, sizes.epsilon), weights.gate_up, training)
    (down,) = split_linear(nn.functional.silu(gate) * up, weights.down, training)
    return hidden + down


def split_linear(inputs: Tensor, layers: FusedLinear, training: bool) -> tuple[Tensor, ...]:
    """Return the output of each of the layers, adapters added."""
    return fused_linear(inputs, layers, training).split(layers.widths, dim=-1)


def fused_linear(inputs: Tensor, layers: FusedLinear, training: bool) -> Tensor:
    """Return the layers' concatenated outputs, adapters added; see `lora_linear`."""
    adapters = [adapter for adapter in layers.adapters if adapter is not None]
    if not adapters:
        return nn.functional.linear(inputs, layers.weight)
    dtype = product_dtype(inputs)
    values = inputs.to(dtype)
    drops = training and adapters[0].dropout > 0
    dropped = nn.functional.dropout(values, adapters[0].dropout) if drops else None
    a = torch.cat([adapter.a.to(dtype) for adapter in adapters])
    b = [(adapter.b * adapter.scale).to(dtype) for adapter in adapters]
    with torch.no_grad():
        low = nn.functional.linear(values if dropped is None else dropped, a)
    starts = [
        start for start, adapter in zip(_starts(layers.widths), layers.adapters, strict=True) if adapter is not None
    ]
    return lora_linear(values, dropped, low, _frozen_factors(values, layers.weight), a, b, starts)


def _frozen_factors(inputs: Tensor, weight: Tensor | Fp8Weight) -> list[Tensor]:
    """Return `weight` of `lora_linear`; inputs are quantised here, where `torch.compile` can fuse it."""
    if isinstance(weight, Fp8Weight):
        return [*quantize_rows(inputs.flatten(0, -2)), *weight]
    return [weight.to(inputs.dtype)]


def product_dtype(inputs: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with these inputs is computed, autocast considered."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return Llama's RMSNorm, computed at least in fp32 as transformers does."""
    precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scaled = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(hidden.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Return attention of each head, (B, H, queries, d), (B, Hkv, keys, d) twice -> (B, H, queries, d)."""
    is_grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=is_grouped)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=is_grouped)


def why_not_fused(model: LlamaForCausalLM, *, fp8: bool = False) -> str | None:
    """Return why `FusedLora` can't run a model's layers; None if it can.

    Args:
        model: with adapters.
        fp8: with frozen weights in FP8.
    """
    if model.config.hidden_act != "silu":
        return f"the activation is {model.config.hidden_act}"
    modules = [module for layer in model.model.layers for module in _linears(layer)]
    if not any(isinstance(module, lora.LoraLayer) for module in modules):
        return "there are no adapters"
    dropouts = set()
    for module in modules:
        if isinstance(module, lora.LoraLayer):
            if type(module) is not lora.Linear or len(module.active_adapters) != 1 or module.lora_variant:
                return "the adapters are not plain LoRA in 16 bit"
            dropouts.add(_factors(module).dropout)
        base = _base(module)
        if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
            return "the layers have biases, are trained themselves or are quantised"
        if fp8 and not isinstance(module, lora.LoraLayer):
            return "some layers have no adapter"
        if fp8 and (base.in_features % MULTIPLE or base.out_features % MULTIPLE):
            return f"a layer turns {base.in_features} features into {base.out_features}, no multiples of {MULTIPLE}"
    return None if len(dropouts) == 1 else "the adapters have different dropout"


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    qkv_out = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*qkv_out, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _layer_weights(layer: nn.Module, *, fp8: bool) -> LayerWeights:
    query, key, value, out, gate, up, down = _linears(layer)
    return LayerWeights(
        layer.input_layernorm.weight,
        _fuse([query, key, value], fp8=fp8),
        _fuse([out], fp8=fp8),
        layer.post_attention_layernorm.weight,
        _fuse([gate, up], fp8=fp8),
        _fuse([down], fp8=fp8),
    )


@torch.no_grad()
def _fuse(modules: Sequence[nn.Module], *, fp8: bool) -> FusedLinear:
    """Concatenate the frozen weights of layers with one input; each layer's own weight becomes a view of the result."""
    bases = [_base(module) for module in modules]
    widths = tuple(len(base.weight) for base in bases)
    weight = bases[0].weight.data if len(bases) == 1 else torch.cat([base.weight.data for base in bases])
    if fp8:
        weight = Fp8Weight.quantize(weight)
        for module, base, start in zip(modules, bases, _starts(widths), strict=True):
            part = weight.rows(start, start + len(base.weight))
            module.base_layer = Fp8Linear.of(part.values, part.scales)
    elif len(bases) > 1:
        for base, part in zip(bases, weight.split(widths), strict=True):
            base.weight.data = part
    adapters = [_factors(module) if isinstance(module, lora.LoraLayer) else None for module in modules]
    return FusedLinear(weight, widths, tuple(adapters))


def _starts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:index]) for index in range(len(widths))]


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, lora.LoraLayer) else module


def _factors(module: lora.LoraLayer) -> LoraFactors:
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    return LoraFactors(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], rate)
