"""Attention of few queries over many keys, where kernels made for many queries leave most of a GPU without work.

The last layer of a pack is computed for supervised tokens alone. PyTorch's memory-efficient attention, which takes the
mask, needed 6.1 ms for the backward pass of 192 queries over 9,856 keys with 32 heads on an H100 (PyTorch 2.11,
`benchmarks/train_speed.py --profile`); FlexAttention needed 1.4 ms for all queries of another layer.

Letters: `R` rows, `H` heads, `K` queries, `S` keys, `W` width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

MOST_SCORES = 1 << 26
"""Scores of all heads above which PyTorch's kernels are taken, which don't keep them: 256 MiB in fp32."""


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return what each query sees, (R, H, K, W); scores and their softmax are at least in fp32.

    Args:
        query: (R, H, K, W).
        key: (R, H or fewer, S, W).
        value: likewise.
        mask: (R, 1, K, S) bool, True = sees; every query sees something.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 or query.dtype != value.dtype or query.shape[:-1].numel() * key.shape[2] > MOST_SCORES:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups > 1)
    return _FewQueries.apply(query, key, value, mask)


class _FewQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1])
        scores = precise_product(query, key.transpose(-1, -2)).mul_(scale).masked_fill_(~mask, -torch.inf)
        shares = scores.softmax(dim=-1)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, shares)
        return shares.to(value.dtype) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, shares = ctx.saved_tensors
        to_value = shares.to(value.dtype).transpose(-1, -2) @ gradient
        to_shares = precise_product(gradient, value.transpose(-1, -2))
        to_scores = (to_shares - (to_shares * shares).sum(dim=-1, keepdim=True)).mul_(shares).mul_(ctx.scale)
        to_scores = to_scores.to(query.dtype)
        return to_scores @ key, to_scores.transpose(-1, -2) @ query, to_value, None


def precise_product(left: Tensor, right: Tensor) -> Tensor:
    """Return a product of (R, H, K, W) and (R, H, W, S), whose sums in half precision stay in fp32."""
    if left.dtype not in (torch.float16, torch.bfloat16):
        return left @ right
    if not left.is_cuda:
        return left.float() @ right.float()
    flat = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
    return flat.unflatten(0, left.shape[:2])
