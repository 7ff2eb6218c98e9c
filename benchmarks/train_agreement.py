"""Agreement of packs in bf16 with separate rows: FlexAttention, a dense mask, fused adapters, noise of bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vqa_workload import make_records, model_config, random_model

from llava.data.dataset import SupervisedCollator
from llava.data.packed_dataset import PackCollator, PackedRow
from llava.data.records import EncodedRecord
from llava.model.configuration import features_per_image
from llava.train.lora import add_lora, choose_trainable

QUESTIONS = [[(14, 3), (11, 2), (17, 4), (12, 2)], [(13, 3), (15, 2), (12, 3)]]
LAYERS = 8


def measure_agreement(tiny: bool) -> dict[str, Any]:
    """Return relative differences of loss and gradient from fp32 on separate rows, and between the ways in bf16.

    The model has true widths and eight layers, so that it fits in fp32 too.
    """
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    config = model_config(tiny=tiny)
    config.num_hidden_layers = min(config.num_hidden_layers, LAYERS)
    model = random_model(config, device, torch.float32)
    rank = 4 if tiny else 128
    wrapped = add_lora(model, rank=rank, alpha=2 * rank, dropout=0.0, bias="none", base_name="random")
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    choose_trainable(wrapped, lora=True, projector=True, backbone=False, dtype=torch.float32)
    wrapped.train()
    records = make_records(QUESTIONS, [Path("a"), Path("b")], config.vocab_size)
    side = config.mm_vision_config["image_size"]
    pixels = {Path(name): torch.randn(3, side, side) for name in "ab"}
    patches = features_per_image(config, config.mm_vision_config)
    rows = [PackedRow(record, [pixels[path] for path in record.images]) for record in records]
    pack = to_device(PackCollator(patches, side, budget=None, multiple=128)(rows), device)

    def separate(count: int) -> Callable[[], Tensor]:
        return lambda: separate_loss(wrapped, records, pixels, side, count, device)

    def packed() -> Tensor:
        return wrapped(**pack).loss

    exact = gradient(wrapped, separate(1), contextlib.nullcontext())
    for parameter in wrapped.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16)

    ways = {"separate rows": gradient(wrapped, separate(1), autocast())}
    ways["separate rows, batched"] = gradient(wrapped, separate(len(records)), autocast())
    ways["pack, dense mask"] = gradient(wrapped, packed, autocast())
    if on_cuda:
        model.use_flex_attention()
        ways["pack, FlexAttention"] = gradient(wrapped, packed, autocast())
    model.fuse_lora(compiled=on_cuda)
    ways["pack, fused"] = gradient(wrapped, packed, autocast())
    reference = ways["separate rows"]
    return {
        name: {"from_fp32": differences(way, exact), "from_separate_rows": differences(way, reference)}
        for name, way in ways.items()
    }


def separate_loss(
    model: nn.Module,
    records: list[EncodedRecord],
    pixels: dict[Path, Tensor],
    side: int,
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the mean loss over supervised tokens, `count` rows at a time."""
    collator = SupervisedCollator(0, side)
    rows = [
        {
            "input_ids": torch.tensor(record.input_ids),
            "labels": torch.tensor(record.labels),
            "images": [pixels[path] for path in record.images],
        }
        for record in records
    ]
    items = torch.tensor(sum(int((row["labels"] != -100).sum()) for row in rows), device=device)
    batches = [to_device(collator(rows[start : start + count]), device) for start in range(0, len(rows), count)]
    return sum(model(**batch, num_items_in_batch=items).loss for batch in batches)


def gradient(
    model: nn.Module, compute: Callable[[], Tensor], context: contextlib.AbstractContextManager
) -> SimpleNamespace:
    """Return the loss and all gradients as one vector."""
    model.zero_grad()
    with context:
        loss = compute()
    loss.backward()
    parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return SimpleNamespace(loss=loss.item(), gradient=torch.cat(parts).clone())


def differences(one: SimpleNamespace, other: SimpleNamespace) -> dict[str, float]:
    """Return how far loss and gradient are apart, relative to the second."""
    distance = (one.gradient - other.gradient).norm() / other.gradient.norm()
    return {"loss": abs(one.loss / other.loss - 1), "gradient": distance.item()}


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of nested dictionaries."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
