"""Llama's layers under LoRA, written so that there is less to compute than layer by layer and adapter by adapter.

Layers with the same input (q, k, v; gate, up) are one product with their frozen weights joined, and one with the `A` of
their adapters joined; masters in fp32 are cast once, inputs not at all. The last layer's output is computed where it is
wanted: other positions are no more than keys and values to it. Without dropout the results are peft's. With dropout,
layers of one input drop the same of it; in peft each draws its own.

Letters: `R` rows, `S` positions, `D` width, `K` positions whose output is wanted, `r` rank of an adapter.
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

from llava.model.adapted_linear import adapted_linear
from llava.model.attention_kernels import without_plans
from llava.model.few_queries import attend_few
from llava.model.rotary import rotate, rotated_heads, signed, split_heads


class Adapter(NamedTuple):
    """One LoRA: `A` (r, in), `B` (out, r), the factor of their product, the share of inputs dropped in training."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class Joined(NamedTuple):
    """Linear layers of one input: weights one below the other (out of all, in), out of each, adapters or None."""

    weight: Tensor
    widths: tuple[int, ...]
    adapters: tuple[Adapter | None, ...]

    def divide(self) -> tuple[Joined, Joined]:
        """Return the first layer and the others."""
        first = self.widths[0]
        return (
            Joined(self.weight[:first], self.widths[:1], self.adapters[:1]),
            Joined(self.weight[first:], self.widths[1:], self.adapters[1:]),
        )


class LayerWeights(NamedTuple):
    """Of one layer, in the order of their use."""

    attention_norm: Tensor
    qkv: Joined
    out: Joined
    mlp_norm: Tensor
    gate_up: Joined
    down: Joined


class Shape(NamedTuple):
    """What weights don't tell: heads of queries, heads of keys and values, epsilon of the norms."""

    heads: int
    key_value_heads: int
    epsilon: float


ReadAll = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""`read_all`, compiled or not."""


class FusedLayers:
    """Stands in for a Llama body over packs.

    Args:
        model: with frozen weights and adapters in place; see `why_not_fused`. Its weights move into joined storage.
        compiled: run each layer through `torch.compile`.

    Attributes:
        compiled: as above.
    """

    def __init__(self, model: LlamaForCausalLM, *, compiled: bool) -> None:
        self.body = model.model
        config = model.config
        self.compiled = compiled
        self.shape = Shape(config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps)
        self.weights = [_layer_weights(layer) for layer in self.body.layers]
        self.run: Callable[..., Tensor] = torch.compile(run_layer, dynamic=False) if compiled else run_layer
        # Of the last layer only this part has the same shapes in every step.
        self.read: ReadAll = torch.compile(read_all, dynamic=False) if compiled else read_all

    def __call__(
        self,
        inputs_embeds: Tensor,
        mask: Tensor | BlockMask,
        position_ids: Tensor,
        wanted: Tensor,
        wanted_mask: Tensor,
    ) -> Tensor:
        """Run all layers and the last norm; layers whose activations are checkpointed are computed again.

        Args:
            inputs_embeds: (R, S, D).
            mask: of all positions.
            position_ids: (R, S) int64.
            wanted: (K,) int64, flat indices of the positions whose output is returned.
            wanted_mask: (1, 1, K, R x S) bool, their mask over all rows.

        Returns:
            the normed output, (K, D).
        """
        cos, sin = self.body.rotary_emb(inputs_embeds, position_ids)
        rotary = cos, signed(sin)
        hidden = inputs_embeds
        training = self.body.training
        for layer, weights in zip(self.body.layers[:-1], self.weights[:-1], strict=True):
            arguments = (hidden, rotary, mask, weights, self.shape, training)
            if layer.gradient_checkpointing and training:
                hidden = checkpoint(self.run, *arguments, use_reentrant=False)
            else:
                hidden = self.run(*arguments)
        with without_plans():
            hidden = run_last_layer(
                hidden, rotary, wanted, wanted_mask, self.weights[-1], self.shape, training, self.read
            )
        return self.body.norm(hidden)


def run_layer(
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | BlockMask,
    weights: LayerWeights,
    shape: Shape,
    training: bool,
) -> Tensor:
    """Run one layer, (R, S, D) -> (R, S, D)."""
    normed = norm(hidden, weights.attention_norm, shape.epsilon)
    joined = joined_linear(normed, weights.qkv, training)
    attended = attend(*rotated_heads(joined, rotary, shape.heads, shape.key_value_heads), mask)  # (R, heads, S, width)
    return finish_layer(hidden, attended, weights, shape, training)


def run_last_layer(
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    wanted: Tensor,
    wanted_mask: Tensor,
    weights: LayerWeights,
    shape: Shape,
    training: bool,
    read: ReadAll,
) -> Tensor:
    """Run the last layer for the positions that are wanted, (R, S, D) -> (K, D); all are keys and values."""
    rotary = tuple(table.flatten(0, 1)[None] for table in rotary)
    hidden = hidden.flatten(0, 1)[None]  # (1, R x S, D)
    normed, key, value = read(hidden, rotary, weights, shape, training)
    queries, _ = weights.qkv.divide()
    (query,) = linear(normed[:, wanted], queries, training)
    query = rotate(split_heads(query, shape.heads), tuple(table[:, wanted] for table in rotary))  # (1, heads, K, width)
    attended = attend_few(query, key, value, wanted_mask)
    return finish_layer(hidden[:, wanted], attended, weights, shape, training)[0]


def read_all(
    hidden: Tensor, rotary: tuple[Tensor, Tensor], weights: LayerWeights, shape: Shape, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a layer needs of all positions: the normed input (1, N, D), keys and values (1, heads, N, width)."""
    normed = norm(hidden, weights.attention_norm, shape.epsilon)
    _, keys_values = weights.qkv.divide()
    key, value = linear(normed, keys_values, training)
    heads = shape.key_value_heads
    return normed, rotate(split_heads(key, heads), rotary), split_heads(value, heads)


def finish_layer(hidden: Tensor, attended: Tensor, weights: LayerWeights, shape: Shape, training: bool) -> Tensor:
    """Return a layer's output from its input (R, S, D) and what its heads saw (R, heads, S, width)."""
    (out,) = linear(attended.transpose(1, 2).flatten(2), weights.out, training)
    hidden = hidden + out
    gate, up = linear(norm(hidden, weights.mlp_norm, shape.epsilon), weights.gate_up, training)
    (down,) = linear(nn.functional.silu(gate) * up, weights.down, training)
    return hidden + down


def linear(inputs: Tensor, joined: Joined, training: bool) -> tuple[Tensor, ...]:
    """Return the outputs of layers with one input, adapters added."""
    return joined_linear(inputs, joined, training).split(joined.widths, dim=-1)


def joined_linear(inputs: Tensor, joined: Joined, training: bool) -> Tensor:
    """Return the outputs of layers with one input, adapters added, one behind the other; see `adapted_linear`."""
    adapters = [adapter for adapter in joined.adapters if adapter is not None]
    if not adapters:
        return nn.functional.linear(inputs, joined.weight)
    dtype = product_dtype(inputs)
    values = inputs.to(dtype)
    drops = training and adapters[0].dropout > 0
    dropped = nn.functional.dropout(values, adapters[0].dropout) if drops else None
    downs = torch.cat([adapter.down.to(dtype) for adapter in adapters])
    ups = [(adapter.up * adapter.scale).to(dtype) for adapter in adapters]
    with torch.no_grad():
        low = nn.functional.linear(values if dropped is None else dropped, downs)
    starts = [sum(joined.widths[:index]) for index, adapter in enumerate(joined.adapters) if adapter is not None]
    return adapted_linear(values, dropped, low, joined.weight.to(dtype), downs, ups, starts)


def product_dtype(inputs: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with these inputs is computed, autocast considered."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return Llama's norm, computed at least in fp32 as transformers does."""
    precise = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scaled = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(hidden.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Return what each query sees, (R, heads, S, width)."""
    is_grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=is_grouped)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=is_grouped)


def why_not_fused(model: LlamaForCausalLM) -> str | None:
    """Return why `FusedLayers` can't run a model's layers; None if it can."""
    if model.config.hidden_act != "silu":
        return f"the activation is {model.config.hidden_act}"
    modules = [module for layer in model.model.layers for module in _linears(layer)]
    if not any(isinstance(module, lora.LoraLayer) for module in modules):
        return "there are no adapters"
    dropouts = set()
    for module in modules:
        if isinstance(module, lora.LoraLayer):
            if type(module) is not lora.Linear or len(module.active_adapters) != 1 or module.lora_variant:
                return "the adapters are no plain LoRA in 16 bit"
            dropouts.add(_adapter(module).dropout)
        base = _base(module)
        if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
            return "the layers have biases, learn themselves or are quantised"
    return None if len(dropouts) == 1 else "the adapters have different dropout"


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    queries = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*queries, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _layer_weights(layer: nn.Module) -> LayerWeights:
    query, key, value, out, gate, up, down = _linears(layer)
    return LayerWeights(
        layer.input_layernorm.weight,
        _join([query, key, value]),
        _join([out]),
        layer.post_attention_layernorm.weight,
        _join([gate, up]),
        _join([down]),
    )


@torch.no_grad()
def _join(modules: Sequence[nn.Module]) -> Joined:
    """Move frozen weights of layers with one input into one storage, of which each layer's own becomes a part."""
    bases = [_base(module) for module in modules]
    widths = tuple(len(base.weight) for base in bases)
    weight = bases[0].weight.data if len(bases) == 1 else torch.cat([base.weight.data for base in bases])
    if len(bases) > 1:
        for base, part in zip(bases, weight.split(widths), strict=True):
            base.weight.data = part
    adapters = [_adapter(module) if isinstance(module, lora.LoraLayer) else None for module in modules]
    return Joined(weight, widths, tuple(adapters))


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, lora.LoraLayer) else module


def _adapter(module: lora.LoraLayer) -> Adapter:
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], rate)
