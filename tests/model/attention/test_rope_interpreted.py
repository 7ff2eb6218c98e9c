"""The Triton kernel for the gradient of concatenated q, k and v computes what PyTorch does, in Triton's interpreter."""

import pytest
import torch

from llava.model.attention import rope
from llava.model.attention.rope import qkv_gradient, signed_sin

pytestmark = pytest.mark.usefixtures("triton_interpreter")

ROWS, POSITIONS, WIDTH = 2, 3, 8
HEADS = [(2, 2), (4, 2), (3, 1)]
"""Of queries, and of keys and values."""


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_kernel_computes_the_gradient_of_plain_code(heads, kv_heads, dtype, is_transposed, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(ROWS, n, POSITIONS, WIDTH, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]
    if is_transposed:
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    angles = torch.randn(ROWS, POSITIONS, WIDTH // 2, generator=generator).repeat(1, 1, 2)
    tables = angles.cos().to(dtype), signed_sin(angles.sin()).to(dtype)
    expected = qkv_gradient(*(tensor.float() for tensor in (*parts, *tables)))
    from llava.model.attention.rope_triton import write_qkv_gradient  # needs Triton

    launched = []

    class Launcher:
        def __getitem__(self, grid):
            launched.append(grid)
            return write_qkv_gradient[grid]

    with monkeypatch.context() as patch:
        patch.setattr(rope, "_kernel", lambda device: Launcher())
        found = qkv_gradient(*parts, *tables)
    assert len(launched) == 1
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
