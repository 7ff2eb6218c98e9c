"""Attention of few queries is PyTorch's, values and gradients, whichever way it takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava.model import few_queries
from llava.model.few_queries import attend_few

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(device="cpu", dtype=torch.float64, heads=2):
    """Query, key, value and mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 5, 8), (2, heads, 11, 8), (2, heads, 11, 8)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    mask = torch.rand(2, 1, 5, 11, generator=generator) < 0.4
    mask[..., 0] = True
    return [tensor.requires_grad_() for tensor in tensors], mask.to(device)


def with_gradients(compute, tensors):
    output = compute()
    return output, *torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("heads", [2, 1], ids=["a head each", "grouped heads"])
@pytest.mark.parametrize("most", [few_queries.MOST_SCORES, 10], ids=["few", "many"])
def test_values_and_gradients_are_those_of_pytorch(heads, most, monkeypatch):
    monkeypatch.setattr(few_queries, "MOST_SCORES", most)
    tensors, mask = make(heads=heads)
    found = with_gradients(lambda: attend_few(*tensors, mask), tensors)
    expected = with_gradients(
        lambda: scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=heads == 1), tensors
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA]),
    ],
)
def test_half_precision_rounds_the_shares_and_not_the_scores(device):
    tensors, mask = make(device, torch.bfloat16)
    found = with_gradients(lambda: attend_few(*tensors, mask), tensors)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = with_gradients(lambda: scaled_dot_product_attention(*exact, attn_mask=mask), exact)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 1e-2 * other.norm()


def test_scores_in_half_precision_are_summed_in_fp32():
    left, right = torch.full((1, 1, 1, 3), 1.0), torch.tensor([256.0, 1.0, 1.0]).view(1, 1, 3, 1)
    product = few_queries.precise_product(left.bfloat16(), right.bfloat16())
    assert product.item() == 258.0  # bf16 has 8 bits: 256 + 1 is 256
