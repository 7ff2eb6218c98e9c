"""The Triton kernels of a decode step, in Triton's interpreter on the CPU, compute what plain PyTorch does."""

import pytest
import torch
from torch import nn

from llava.inference.chat.kv_cache import GrowingKVCache
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.model.fp8.linear import Fp8Linear

pytestmark = pytest.mark.usefixtures("triton_interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}


class Norm(nn.Module):
    """RMSNorm as the kernels read it."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(1 + 0.1 * torch.randn(width)), 1e-5

    def forward(self, vector):
        return vector * torch.rsqrt(vector.pow(2).mean() + self.variance_epsilon) * self.weight


def check(found, expected, dtype):
    assert found.dtype == dtype
    tolerance = 1e-6 + 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 1030], ids=["one block", "two blocks"])
def test_matvec(dtype, width):
    from llava.inference.chat.decode_step import matvec

    vector = torch.randn(width).to(dtype)
    linears = [nn.Linear(width, rows, bias=False).to(dtype) for rows in (8, 4, 4)]
    norm = Norm(width).to(dtype)
    plain = [linear.weight.float() for linear in linears]
    output = torch.empty(16, dtype=dtype)
    matvec(vector, linears, output, norm=norm)
    check(output, torch.cat(plain) @ norm.float()(vector.float()), dtype)
    odd = nn.Linear(width, 7, bias=False).to(dtype)  # rows that the tile's don't divide
    output = torch.cat([torch.randn(7).to(dtype), torch.full((5,), 9.0, dtype=dtype)])
    expected = odd.weight.float() @ vector.float() + output[:7].float()
    matvec(vector, [odd], output[:7], residual=output[:7])
    check(output[:7], expected, dtype)
    assert output[7:].tolist() == [9.0] * 5  # nothing is written after the last row


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 1030], ids=["one block", "two blocks"])
def test_gated_matvec(dtype, width):
    from llava.inference.chat.decode_step import gated_matvec

    vector, norm = torch.randn(width).to(dtype), Norm(width).to(dtype)
    gate, up = (nn.Linear(width, 6, bias=False).to(dtype) for _ in range(2))
    output = torch.empty(6, dtype=dtype)
    gated_matvec(vector, gate, up, output, norm=norm)
    normed = norm.float()(vector.float())
    check(output, nn.functional.silu(gate.weight.float() @ normed) * (up.weight.float() @ normed), dtype)


def fp8_linear(width, rows):
    layer = Fp8Linear(width, rows, device="cpu")
    layer.weight = layer.quantize(torch.randn(rows, width))
    return layer, layer.values.float() * layer.scales


@torch.no_grad()
def test_products_with_fp8_weights_are_those_of_their_values():
    from llava.inference.chat.decode_step import gated_matvec, matvec

    vector, norm = torch.randn(48).to(torch.bfloat16), Norm(48).to(torch.bfloat16)
    normed = norm.float()(vector.float())
    layers, values = zip(*(fp8_linear(48, rows) for rows in (16, 32, 16)), strict=True)
    output = torch.empty(64, dtype=torch.bfloat16)
    matvec(vector, layers, output, norm=norm.to(torch.bfloat16))
    check(output, torch.cat(values) @ normed, torch.bfloat16)
    gate, up = layers[0], layers[2]
    output = torch.empty(16, dtype=torch.bfloat16)
    gated_matvec(vector, gate, up, output, norm=norm)
    check(output, nn.functional.silu(values[0] @ normed) * (values[2] @ normed), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize(("n_kv_heads", "split", "at_once"), [(2, 64, 32), (1, 16, 2)])
def test_decode_steps_are_those_of_the_layers(tiny_model, monkeypatch, n_kv_heads, split, at_once):
    """Before, at and after the end of an attention split; with more splits than are combined at once."""
    from llava.inference.chat import decode_step

    monkeypatch.setattr(decode_step, "SPLIT", split)
    monkeypatch.setattr(decode_step, "_SPLITS_AT_ONCE", at_once)
    llama = RaggedLlama(tiny_model(**{**SIZES, "num_key_value_heads": n_kv_heads, "vocab_size": 67}))
    assert decode_step.has_fused_form(llama)
    caches = [GrowingKVCache(llama, fused_step=step) for step in (None, decode_step.FusedDecodeStep(llama))]
    tokens = torch.randint(3, 60, (130,))
    for start, stop in ((0, 63), (65, 127)):
        for cache in caches:
            cache.prefill(llama.embed(tokens[start:stop]))
        for token in tokens[stop : stop + 2].split(1):
            expected, found = (cache.decode(token) for cache in caches)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for layers in zip(caches[0]._layers, caches[1]._layers, strict=True):  # the keys and values that were written
        for kept, written in zip(*layers, strict=True):
            torch.testing.assert_close(written, kept, rtol=0, atol=1e-5 * float(kept.abs().max()))
