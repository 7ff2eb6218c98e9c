"""Layers over flat tokens compute what the model's own forward computes."""

import types

import pytest
import torch

from llava.inference.engine.ragged_llama import (
    RaggedLlama,
    TokenPlaces,
    additive_mask,
    causal_attention,
    has_plain_weights,
    masked_attention,
    supports_ragged,
)
from llava.model.cached_inputs import CACHE_ARGUMENT

KINDS = [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}]


def _cached(cache, layer):
    return cache.layers[layer].keys, cache.layers[layer].values


@pytest.mark.parametrize("changes", KINDS)
def test_equals_the_models_forward(tiny_model, changes):
    model = tiny_model(**changes)
    rows = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    llama = RaggedLlama(model)
    kept = torch.tensor([2, 6, 9, 20])

    cache = [tuple(torch.zeros(4, 9, *llama.key_shape) for _ in range(2)) for _ in range(llama.n_layers)]

    def attend(layer, query):
        keys, values = (part[1:, 2:] for part in cache[layer])
        attended = causal_attention(query.unflatten(0, (3, 7)), keys, values)
        return attended[kept] if layer == llama.n_layers - 1 else attended

    with torch.no_grad():
        positions = torch.arange(7).repeat(3)
        places = TokenPlaces(positions, torch.arange(1, 4).repeat_interleave(7), positions + 2)
        logits = llama.forward(llama.embed(rows.flatten()), places, cache, attend, kept)
        output = model(rows, use_cache=True)
        expected = output.logits.flatten(0, 1)[kept]
    for layer, (keys, values) in enumerate(cache):
        for found, theirs in zip((keys, values), _cached(getattr(output, CACHE_ARGUMENT), layer), strict=True):
            torch.testing.assert_close(found[1:, 2:], theirs.transpose(1, 2), rtol=0, atol=1e-5)
            assert not found[0].any()
            assert not found[:, :2].any()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 4, 6])
def test_causal_queries_are_the_last_of_the_keys(queries):
    query, key, value = (torch.randn(2, 6, 2, 8, dtype=torch.float64) for _ in range(3))
    whole = causal_attention(query, key, value).unflatten(0, (2, 6))
    part = causal_attention(query[:, -queries:], key, value).unflatten(0, (2, queries))
    torch.testing.assert_close(part, whole[:, -queries:], rtol=0, atol=1e-12)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None, -queries:]
    dense = masked_attention(query[:, -queries:], key, value, additive_mask(mask, torch.float64)).unflatten(
        0, (2, queries)
    )
    torch.testing.assert_close(dense, whole[:, -queries:], rtol=0, atol=1e-12)


def test_an_additive_mask_written_out():
    mask = torch.tensor([[True, False]])
    assert additive_mask(mask, torch.bfloat16).tolist() == [[0.0, float("-inf")]]


def test_angles_of_scaled_positions(tiny_model):
    """A factor of 4 makes 256 positions of the model's 64, and position 4 turns as position 1 did."""
    plain = RaggedLlama(tiny_model())
    scaled = RaggedLlama(tiny_model(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}))
    assert (len(plain.cosine), len(scaled.cosine)) == (64, 256)
    torch.testing.assert_close(scaled.cosine[::4], plain.cosine)
    torch.testing.assert_close(scaled.sine[::4], plain.sine)


def test_which_models_are_flat(tiny_model):
    assert supports_ragged(tiny_model())
    for kind, is_fixed in (("linear", True), ("dynamic", False)):
        rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
        assert supports_ragged(tiny_model(rope_parameters=rope)) == is_fixed
    for devices, is_one in (({"": "cuda:0"}, True), ({"model.layers.0": 0, "model.layers.1": "cpu"}, False)):
        spread = types.SimpleNamespace(hf_device_map=devices, config=tiny_model().config)
        assert supports_ragged(spread) == is_one


def test_which_weights_are_plain(tiny_model):
    import peft

    assert has_plain_weights(tiny_model())
    for name in ("q_proj", "v_proj", "down_proj"):
        adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=[name], r=2))
        assert not has_plain_weights(adapted)
