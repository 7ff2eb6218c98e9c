"""Llama's layers over ragged tokens: tokens of many slots without padding between them; the caller computes attention.

All but attention treats each token alone, so tokens of many prompts go through the linear layers together. The layers'
own modules are called, so that 8 bit, 4 bit and adapters work as they are. Source of the steps: transformers'
`LlamaDecoderLayer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.model.attention.rope import apply_rope, signed_sin
from llava.model.configuration import context_length
from llava.model.fp8.linear import Fp8Linear
from llava.model.llava_llama import LlavaLlamaForCausalLM

CHANGING_ROPE = ("dynamic", "longrope")
"""Types of rotary embedding whose frequencies depend on the length of the whole prompt."""


class Attend(Protocol):
    """Attention of one layer, whose keys and values are in the KV cache already."""

    def __call__(self, layer: int, query: Tensor) -> Tensor:
        """Return a layer's attention, (tokens, H, d) -> (tokens, H d); in the last layer of kept tokens alone."""


class TokenPlaces(NamedTuple):
    """Position id, slot and offset of each token of a call, (tokens,) int64 each.

    Attributes:
        position_ids: for the rotary embedding.
        slots: of the KV cache.
        offsets: positions in these slots.
    """

    position_ids: Tensor
    slots: Tensor
    offsets: Tensor


class RaggedLlama:
    """The language model of a LLaVA on one device.

    Args:
        model: in eval mode, or wrapped by peft.
        compiled: run the operations between attentions, and the vision tower's layers, through `torch.compile`.

    Attributes:
        layers: of the language model, in the order of their use.
        n_layers: their number.
        key_shape: (Hkv, d) of a cached key.
        device: of weights and tokens.
        dtype: of hidden states.
        embed: token embedding.
        cosine: (positions, 1, d) of the rotary embedding.
        sine: (positions, 1, d).
        norm: after the last layer.
        head: gives the logits.
    """

    def __init__(self, model: LlavaLlamaForCausalLM, *, compiled: bool = False) -> None:
        body = model.get_model()
        config = model.config
        self.embed = model.get_input_embeddings()
        self.compiled = compiled
        self.layers: Sequence[nn.Module] = list(body.layers)
        self.n_layers = len(self.layers)
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        self.key_shape = (config.num_key_value_heads, body.layers[0].self_attn.head_dim)
        self.norm, self.head = body.norm, model.get_output_embeddings()
        positions = torch.arange(context_length(config), device=self.device)
        cosine, sine = body.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions[None])
        self.cosine, self.sine = cosine[0, :, None], sine[0, :, None]  # (positions, 1, d)
        self._project, self._add_mlp = project_qkv, add_attention_and_mlp
        if compiled:
            # Only the number of tokens changes from call to call; one graph serves all layers and numbers.
            self._project = torch.compile(project_qkv, dynamic=True)
            if has_plain_weights(model) and not (config.attention_bias or config.mlp_bias):
                self._add_mlp = functools.partial(add_in_place, torch.compile(gate_mlp, dynamic=True))
            else:
                self._add_mlp = torch.compile(add_attention_and_mlp, dynamic=True)
            for module in body.modules():
                if isinstance(module, CLIPEncoderLayer):
                    module.compile(dynamic=False)

    def forward(
        self,
        embeds: Tensor,
        places: TokenPlaces,
        cache: Sequence[tuple[Tensor, Tensor]],
        attend: Attend,
        kept: Tensor,
        *,
        is_once: bool = False,
    ) -> Tensor:
        """Write keys and values of tokens into a KV cache and return the logits of kept tokens, (kept, W).

        Args:
            embeds: (tokens, D).
            places: of the tokens.
            cache: keys and values of each layer, (slots, capacity, Hkv, d).
            attend: attention; in the last layer it returns that of the kept tokens alone, (kept, H d).
            kept: (kept,) int64, tokens whose logits are needed; the last layer computes only keys and values of others.
            is_once: run uncompiled: the shapes occur once.
        """
        project, add_mlp = (project_qkv, add_attention_and_mlp) if is_once else (self._project, self._add_mlp)
        angles = self.cosine[places.position_ids], signed_sin(self.sine[places.position_ids])
        hidden = embeds.clone() if self.compiled else embeds  # compiled layers may write in place
        for number, layer in enumerate(self.layers):
            query = project(layer, hidden, *angles, *cache[number], places.slots, places.offsets)
            attended = attend(number, query)
            if number == self.n_layers - 1:
                hidden = hidden[kept]  # (kept, D)
            hidden = add_mlp(layer, hidden, attended)
        return self.head(self.norm(hidden))  # (kept, W)


def project_qkv(
    layer: nn.Module,
    hidden: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Write key and value of a layer into the KV cache and return the query, (tokens, D) -> (tokens, H, d).

    Args:
        layer: of the language model.
        hidden: (tokens, D).
        cosine: (tokens, 1, d).
        sine: (tokens, 1, d), `signed_sin`.
        keys: (slots, capacity, Hkv, d).
        values: (slots, capacity, Hkv, d).
        slots: as in `TokenPlaces`.
        offsets: as in `TokenPlaces`.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (-1, attention.head_dim)
    query = attention.q_proj(normed).unflatten(-1, heads)
    key = attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads)
    keys[slots, offsets] = apply_rope(key, cosine, sine)
    values[slots, offsets] = value
    return apply_rope(query, cosine, sine)


def add_attention_and_mlp(layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """Return a layer's output from its input and its attention, (tokens, D), (tokens, H d) -> (tokens, D)."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def gate_mlp(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return the input of a layer's down projection, (tokens, D) -> (tokens, inner width)."""
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


def add_in_place(
    gate: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, hidden: Tensor, attended: Tensor
) -> Tensor:
    """Return what `add_attention_and_mlp` does, for plain weights without bias, in the memory of `hidden`.

    The sums are part of the products. Left to `torch.compile` each would first copy what it is added to.

    Args:
        gate: `gate_mlp`, compiled.
        layer: of the language model.
        hidden: (tokens, D), overwritten.
        attended: (tokens, H d).
    """
    hidden.addmm_(attended, layer.self_attn.o_proj.weight.t())
    return hidden.addmm_(gate(layer, hidden), layer.mlp.down_proj.weight.t())


def masked_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Return attention under a mask, (B, queries, H, d) and (B, keys, Hkv, d) twice -> (B queries, H d).

    Args:
        query: of each row.
        key: of each row.
        value: of each row.
        bias: (B or 1, 1, queries, keys), added to the scores.
    """
    return _attention(query, key, value, attn_mask=bias).flatten(0, 1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention of queries that are the last of the keys; shapes as in `masked_attention`."""
    return _attention(query, key, value, attn_mask=causal_lower_right(query.shape[1], key.shape[1])).flatten(0, 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return (B, queries, H d)."""
    if key.shape[2] != query.shape[2]:
        times = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(times, dim=2), value.repeat_interleave(times, dim=2)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2).flatten(2)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask, True = attends, as the bias that attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def supports_ragged(model: nn.Module) -> bool:
    """Return whether `RaggedLlama` can compute a model: on one device, with rotary embeddings of fixed frequency."""
    devices = set(getattr(model, "hf_device_map", {}).values())  # accelerate sets it on models that it spreads
    return len(devices) < 2 and model.config.rope_parameters["rope_type"] not in CHANGING_ROPE


def can_be_captured(model: LlavaLlamaForCausalLM) -> bool:
    """Return whether the language model's layers can be compiled and captured as CUDA graphs: plain ones, and FP8."""
    return all(type(module) in (nn.Linear, Fp8Linear) for module in _linears(model))


def has_plain_weights(model: LlavaLlamaForCausalLM) -> bool:
    """Return whether the language model's linear layers are neither quantised nor adapted."""
    return all(type(module) is nn.Linear for module in _linears(model))


def _linears(model: LlavaLlamaForCausalLM) -> Iterator[nn.Module]:
    for layer in model.get_model().layers:
        for part in (layer.self_attn, layer.mlp):
            yield from (module for module in part.children() if hasattr(module, "weight"))
