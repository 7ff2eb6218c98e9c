"""The peer of `train_speed.py`: transformers' LLaVA with peft's adapters, every question a row of its own."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import peft
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vqa_workload import LLAMA_MORE, SYSTEM_TOKENS, counted_flops, fill, model_config

from llava.model.memory import ModelSizes

QUESTION, ANSWER = 14 + LLAMA_MORE, 3
"""Tokens of a row after its image, about the table's mean."""


def measure_peer(batch: int, checkpointing: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps on pixels and ids that are on the device already; return its figures."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    model = build_peer(device, torch.bfloat16 if on_cuda else torch.float32, tiny=options.tiny)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # since 5.24
        enable({"use_reentrant": False})
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-4, fused=True)
    rows = example_rows(model, batch, device)
    autocast = torch.autocast("cuda", torch.bfloat16) if on_cuda else contextlib.nullcontext()
    seconds = []
    for step in range(options.warm_up + options.steps):
        start = time.perf_counter()
        with autocast:
            loss = model(**rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_cuda:
            torch.cuda.synchronize()
        if step >= options.warm_up:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    sizes = ModelSizes.of(model_config(tiny=options.tiny))
    flops = counted_flops(sizes, 4 if options.tiny else 128, rows["input_ids"].numel(), batch)
    return {
        "case": f"transformers + peft, batches of {batch}{', activations computed again' if checkpointing else ''}",
        "variant": {"batch": batch, "checkpointing": checkpointing},
        "samples_per_s": round(batch / median, 1),
        "tflops": round(flops / median / 1e12, 1),
        "step_s": [round(value, 4) for value in seconds],
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_cuda else None,
    }


def build_peer(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> peft.PeftModel:
    """Return transformers' LLaVA with random weights, adapters on the LLM's linear layers, the projector trained."""
    ours = model_config(tiny=tiny)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = LlamaConfig(**{name: getattr(ours, name) for name in names}, vocab_size=ours.vocab_size + 64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**ours.mm_vision_config),
        text_config=text,
        image_token_index=ours.vocab_size,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    fill(model)
    model.config.use_cache = False
    rank = 4 if tiny else 128
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        learns = "lora_" in name or "multi_modal_projector" in name
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()
    return wrapped


def example_rows(model: peft.PeftModel, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return rows of equal length: system prompt, image, question, answer."""
    config = model.config
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    length = SYSTEM_TOKENS + patches + QUESTION + ANSWER
    input_ids = torch.randint(3, config.image_token_index - 1, (batch, length), device=device)
    input_ids[:, SYSTEM_TOKENS : SYSTEM_TOKENS + patches] = config.image_token_index
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWER:] = input_ids[:, -ANSWER:]
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, device=device)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
    }
