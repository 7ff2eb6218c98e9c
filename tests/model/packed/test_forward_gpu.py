"""Packs on CUDA in bf16: FlexAttention, compiled and fused layers are no further from fp32 than separate rows are."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.dataset import SupervisedCollator
from llava.data.packed_dataset import PackCollator, PackedRow
from llava.data.records import EncodedRecord
from llava.train.lora import add_lora, choose_trainable
from llava.train.packing_setup import inner_llava

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 4, "max_position_embeddings": 512}


def question(image, *words):
    ids = [1, 11, IMAGE_TOKEN_INDEX, *words, 2]
    return EncodedRecord(ids, [IGNORE_INDEX] * (len(ids) - 2) + ids[-2:], [Path(image)])


RECORDS = [question(image, *range(5, 5 + count), 9, 7) for image in "ab" for count in (2, 9, 17)]


def to_cuda(value):
    if isinstance(value, dict):
        return {name: to_cuda(inner) for name, inner in value.items()}
    return value.cuda()


@pytest.fixture
def model(tiny_packed_model):
    wrapped = add_lora(tiny_packed_model(**SIZES).cuda(), rank=8, alpha=16, dropout=0.0, bias="none", base_name="tiny")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.normal_(std=0.05) if "norm" not in name else parameter.fill_(1.0)
    choose_trainable(wrapped, lora=True, projector=True, backbone=False, dtype=torch.float32)
    return wrapped.train()


def gradient(model, batch, half):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        loss = model(**batch).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("layers", ["dense", "blocks", "compiled", "fused"])
def test_packs_in_half_precision(model, layers):
    generator = torch.Generator().manual_seed(0)
    pixels = {Path(name): torch.randn(3, 28, 28, generator=generator) for name in "ab"}
    rows = [PackedRow(record, [pixels[path] for path in record.images]) for record in RECORDS]
    pack = to_cuda(PackCollator(4, 28, budget=None, multiple=128)(rows))
    apart = [
        {"input_ids": torch.tensor(r.input_ids), "labels": torch.tensor(r.labels), "images": row.images}
        for r, row in zip(RECORDS, rows, strict=True)
    ]
    separate = to_cuda(SupervisedCollator(0, 28)(apart))
    exact = gradient(model, separate, half=False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    expected = gradient(model, separate, half=True)
    if layers != "dense":
        inner_llava(model).use_flex_attention()
    if layers == "compiled":
        inner_llava(model).compile_layers()
    if layers == "fused":
        assert inner_llava(model).fuse_lora(compiled=True) is None
    found = gradient(model, pack, half=True)
    noise = (expected - exact).norm()
    assert 0 < noise < 0.1 * exact.norm()
    assert (found - exact).norm() < 1.5 * noise
