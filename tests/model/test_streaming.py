"""A streamed model computes what a loaded one does, to the last bit, and holds one module's weights at a time."""

from __future__ import annotations

import pytest
import torch

from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint import open_checkpoint
from llava.model.streaming import stream_model

FULL, LORA = "llava-v1.5-golden", "llava-v1.5-golden-task-lora"
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_loaded(goldens, dtype):
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    loaded = build_model(open_checkpoint(goldens / FULL), dtype=dtype, device="cpu").eval()
    streamed = stream_model(open_checkpoint(goldens / FULL), CPU, dtype)
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=ids, images=images).logits, loaded(input_ids=ids, images=images).logits)
    answers = [model.generate(ids, images=images, do_sample=False, max_new_tokens=5) for model in (streamed, loaded)]
    assert torch.equal(*answers)
    assert {parameter.device.type for parameter in streamed.parameters()} == {"meta"}


def test_an_unmerged_adapter_is_streamed_too(goldens):
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    apart = [open_checkpoint(goldens / LORA, goldens / FULL, with_adapter=False) for _ in range(2)]
    loaded = attach_adapter(build_model(apart[0], dtype="float32", device="cpu"), goldens / LORA)
    streamed = stream_model(apart[1], CPU, torch.float32, goldens / LORA)
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=ids, images=images).logits, loaded(input_ids=ids, images=images).logits)
