"""Llama's layers over tokens that lie flat, whatever rows they belong to; attention is the caller's.

Everything but attention treats each token alone, so tokens of many prompts go through the linear layers together,
without padding. The layers' own modules are called, so that 8 bit, 4 bit and adapters work as they are. Source of the
steps: transformers' `LlamaDecoderLayer`.

Letters: `N` tokens, `M` of them whose logits are wanted, `H` heads, `K` key heads, `d` width of a head, `D` LLM width,
`R` rows of a cache, `C` positions of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.rotary import signed, turn

CHANGING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the whole prompt."""


class Attend(Protocol):
    """Attention of one layer, whose keys and values are in the cache already."""

    def __call__(self, layer: int, query: Tensor) -> Tensor:
        """Return what the queries of a layer attend to, (N, H, d) -> (M, H d)."""


class Places(NamedTuple):
    """Where the tokens of a call go.

    Attributes:
        positions: (N,) int64, position ids.
        slots: (N,) int64, rows of the cache.
        places: (N,) int64, positions in these rows.
    """

    positions: Tensor
    slots: Tensor
    places: Tensor


class FlatLlama:
    """The body of a LLaVA on one device.

    Args:
        model: in eval mode, or wrapped by peft.
        compiled: run the steps between two attentions through `torch.compile`, and the image encoder's layers.

    Attributes:
        n_layers: of the LLM.
        key_shape: (K, d) of a cached key.
        device: of weights and tokens.
        dtype: of hidden states.
        cosine: (positions, 1, d) of the rotary embedding.
        sine: (positions, 1, d).
        norm: behind the last.
        head: gives the logits.
    """

    def __init__(self, model: LlavaLlamaForCausalLM, *, compiled: bool = False) -> None:
        body = model.get_model()
        config = model.config
        self.embed = model.get_input_embeddings()
        self.compiled = compiled
        self.n_layers = len(body.layers)
        self.device, self.dtype = self.embed.weight.device, self.embed.weight.dtype
        head_width = body.layers[0].self_attn.head_dim
        self.key_shape = (config.num_key_value_heads, head_width)
        self._layers = list(body.layers)
        self.norm, self.head = body.norm, model.get_output_embeddings()
        positions = torch.arange(config.max_position_embeddings, device=self.device)
        cosine, sine = body.rotary_emb(torch.empty(0, dtype=self.dtype, device=self.device), positions[None])
        self.cosine, self.sine = cosine[0, :, None], sine[0, :, None]  # (positions, 1, d)
        self._project, self._finish = project_heads, finish_layer
        if compiled:
            # Only the number of tokens changes from call to call; one graph serves all layers and numbers.
            self._project = torch.compile(project_heads, dynamic=True)
            if has_plain_weights(model) and not (config.attention_bias or config.mlp_bias):
                self._finish = functools.partial(finish_in_place, torch.compile(gate_states, dynamic=True))
            else:
                self._finish = torch.compile(finish_layer, dynamic=True)
            for module in body.modules():
                if isinstance(module, CLIPEncoderLayer):
                    module.compile(dynamic=False)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The LLM's, in the order of their use."""
        return self._layers

    def fill_and_read(
        self,
        embeds: Tensor,
        places: Places,
        cache: Sequence[tuple[Tensor, Tensor]],
        attend: Attend,
        kept: Tensor,
        *,
        is_once: bool = False,
    ) -> Tensor:
        """Put keys and values of tokens into a cache, and return the logits of some of them, (N, D) -> (M, W).

        Args:
            embeds: (N, D).
            places: of the tokens.
            cache: keys and values of each layer, (R, C, K, d).
            attend: attention; in the last layer its result is wanted for the kept tokens alone, (M, H d).
            kept: (M,) int64, tokens whose logits are wanted; of the others the last layer gives keys and values alone.
            is_once: not worth compiling.
        """
        project, finish = (project_heads, finish_layer) if is_once else (self._project, self._finish)
        angles = self.cosine[places.positions], signed(self.sine[places.positions])
        hidden = embeds.clone() if self.compiled else embeds  # compiled layers may write in place
        for number, layer in enumerate(self._layers):
            query = project(layer, hidden, *angles, *cache[number], *places[1:])
            attended = attend(number, query)
            if number == self.n_layers - 1:
                hidden = hidden[kept]  # (M, D)
            hidden = finish(layer, hidden, attended)
        return self.head(self.norm(hidden))  # (M, W)


def project_heads(
    layer: nn.Module,
    hidden: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    places: Tensor,
) -> Tensor:
    """Put key and value of a layer into the cache, (R, C, K, d), and return the query, (N, D) -> (N, H, d).

    Args:
        layer: of the LLM.
        hidden: (N, D).
        cosine: (N, 1, d).
        sine: (N, 1, d), `signed`.
        keys: of the cache.
        values: of the cache.
        slots: as in `Places`.
        places: as in `Places`.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    heads = (-1, attention.head_dim)
    query = attention.q_proj(normed).unflatten(-1, heads)
    key = attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads)
    keys[slots, places] = turn(key, cosine, sine)
    values[slots, places] = value
    return turn(query, cosine, sine)


def finish_layer(layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
    """Return a layer's output from its input and what attention found, (N, D), (N, H d) -> (N, D)."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def gate_states(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return what a layer's last product takes, (N, D) -> (N, inner width)."""
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)


def finish_in_place(
    gate: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, hidden: Tensor, attended: Tensor
) -> Tensor:
    """Return what `finish_layer` does, with plain weights without bias, in the memory of `hidden`.

    The sums are part of the products. Left to `torch.compile` each would first copy what it is added to.

    Args:
        gate: `gate_states`, compiled.
        layer: of the LLM.
        hidden: (N, D), overwritten.
        attended: (N, H d).
    """
    hidden.addmm_(attended, layer.self_attn.o_proj.weight.t())
    return hidden.addmm_(gate(layer, hidden), layer.mlp.down_proj.weight.t())


def attend_dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Return attention of rows of tokens, (B, S, H, d), (B, L, K, d) twice -> (B S, H d).

    Args:
        query: of each row.
        key: of each row.
        value: of each row.
        bias: (B or 1, 1, S, L), added to the scores.
    """
    return _attend(query, key, value, attn_mask=bias).flatten(0, 1)


def attend_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention of queries that are the last of the keys; shapes as in `attend_dense`."""
    return _attend(query, key, value, attn_mask=causal_lower_right(query.shape[1], key.shape[1])).flatten(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """Return (B, S, H d)."""
    if key.shape[2] != query.shape[2]:
        times = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(times, dim=2), value.repeat_interleave(times, dim=2)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2).flatten(2)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask, True = sees, as what attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def is_flat(model: nn.Module) -> bool:
    """Return whether `FlatLlama` computes what this model does: on one device, with frequencies that stay the same."""
    places = set(getattr(model, "hf_device_map", {}).values())  # accelerate sets it on models that it spreads
    return len(places) < 2 and model.config.rope_parameters["rope_type"] not in CHANGING_ROPE


def has_plain_weights(model: LlavaLlamaForCausalLM) -> bool:
    """Return whether the LLM's linear layers are just that: neither quantised nor with an adapter."""
    modules = (
        module
        for layer in model.get_model().layers
        for part in (layer.self_attn, layer.mlp)
        for module in part.children()
    )
    return all(type(module) is nn.Linear for module in modules if hasattr(module, "weight"))
