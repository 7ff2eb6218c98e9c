"""RoPE on concatenated q, k and v equals transformers', and so does their concatenated gradient."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.attention.rope import qkv_gradient, signed_sin, split_heads, split_rotated_heads

ROWS, POSITIONS, WIDTH = 2, 5, 8
HEADS = [(2, 2), (4, 2), (3, 1)]
"""Of queries, and of keys and values."""


def make(heads, key_value_heads):
    """Concatenated q, k and v, and transformers' tables."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(ROWS, POSITIONS, WIDTH // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    width = (heads + 2 * key_value_heads) * WIDTH
    qkv = torch.randn(ROWS, POSITIONS, width, generator=generator, dtype=torch.float64)
    return qkv.requires_grad_(), (angles.cos(), angles.sin())


def as_transformers(qkv, tables, heads, key_value_heads):
    widths = [number * WIDTH for number in (heads, key_value_heads, key_value_heads)]
    query, key, value = (
        split_heads(part, part.shape[-1] // WIDTH) for part in qkv.split(widths, dim=-1)
    )  # (B, H, S, d)
    return *apply_rotary_pos_emb(query, key, *tables), value


@pytest.mark.parametrize(("heads", "key_value_heads"), HEADS)
def test_values_and_gradients_are_those_of_transformers(heads, key_value_heads):
    qkv, tables = make(heads, key_value_heads)
    found = split_rotated_heads(qkv, (tables[0], signed_sin(tables[1])), heads, key_value_heads)
    expected = as_transformers(qkv, tables, heads, key_value_heads)
    upstream = [torch.randn_like(part) for part in expected]
    (gradient,) = torch.autograd.grad(found, qkv, upstream)
    (its,) = torch.autograd.grad(expected, qkv, upstream)
    for one, other in zip([*found, gradient], [*expected, its], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "key_value_heads"), HEADS)
def test_the_operation_is_what_pytorch_expects_of_one(heads, key_value_heads):
    qkv, tables = make(heads, key_value_heads)
    parts = [part.detach() for part in as_transformers(qkv, tables, heads, key_value_heads)]
    torch.library.opcheck(qkv_gradient, (*parts, tables[0], signed_sin(tables[1])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "key_value_heads"), HEADS)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_kernel_computes_the_same(heads, key_value_heads, is_transposed):
    qkv, tables = make(heads, key_value_heads)
    parts = [part.detach().float() for part in as_transformers(qkv, tables, heads, key_value_heads)]
    if is_transposed:
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    tables = [table.float() for table in (tables[0], signed_sin(tables[1]))]
    found = qkv_gradient(*(tensor.cuda() for tensor in [*parts, *tables])).cpu()
    torch.testing.assert_close(found, qkv_gradient(*parts, *tables), rtol=0, atol=1e-6)
