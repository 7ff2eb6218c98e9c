"""Activation checkpointing covers as few layers as memory allows."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.llama.modeling_llama import LlamaAttention

from llava.model import memory
from llava.model.memory import ModelSizes, StepLoad, fewest_checkpointed
from llava.model.vision_tower import CLIPVisionTower
from llava.train import activation_checkpointing as recompute
from llava.train.activation_checkpointing import FewestCheckpoints

SIZES = ModelSizes(
    layers=32,
    hidden=4096,
    intermediate=11008,
    key_value=4096,
    heads=32,
    vocabulary=32000,
    tower_layers=23,
    tower_hidden=1024,
    tower_intermediate=4096,
    patches=576,
    patch_values=588,
)


def peak(count, dropout=0.05):
    load = StepLoad(positions=4096, images=8, predicted=0)
    return memory.training_peak(SIZES, load, rank=128, dropout=dropout, is_fused=False, checkpointed=count)


def test_ample_memory_checkpoints_no_layer_and_no_memory_all():
    assert fewest_checkpointed(peak, 32, 10**12) == 0
    assert fewest_checkpointed(peak, 32, 0) == 32


def test_more_memory_never_means_more_layers():
    counts = [fewest_checkpointed(peak, 32, size * 10**9) for size in range(0, 60, 2)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 10


def test_what_is_chosen_fits_and_one_layer_fewer_does_not():
    budget = 20 * 10**9
    count = fewest_checkpointed(peak, 32, budget)
    assert 0 < count < 32
    assert peak(count) <= budget < peak(count - 1)


def test_without_dropout_fewer_layers_are_checkpointed():
    budget = 20 * 10**9
    assert fewest_checkpointed(lambda count: peak(count, 0.0), 32, budget) < fewest_checkpointed(peak, 32, budget)


def arguments(**changes):
    flags = {"checkpoints_activations": True, "checkpoint_layers": "auto", "share_image_prefix": True, "bits": 16}
    flags |= {"deepspeed": None, "world_size": 1, "lora_dropout": 0.0, "device": torch.device("cuda")}
    return SimpleNamespace(**(flags | changes))


@pytest.mark.parametrize(
    ("changes", "free", "recomputed"),
    [
        ({}, 10**12, 0),
        ({}, 0, 4),
        ({"checkpoint_layers": "all"}, 10**12, 4),
        ({"checkpoint_layers": "3"}, 10**12, 3),
        ({"checkpoint_layers": "0", "device": torch.device("cpu")}, 0, 0),
        ({"device": torch.device("cpu")}, 10**12, 4),
        ({"share_image_prefix": False}, 10**12, 4),
        ({"bits": 4}, 10**12, 4),
    ],
)
def test_the_layers_that_keep_their_activations(tiny_packed_model, monkeypatch, changes, free, recomputed):
    model = tiny_packed_model(num_hidden_layers=4).train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    monkeypatch.setattr(recompute, "free_memory", lambda device: free)
    FewestCheckpoints(model, rank=0, positions=64).on_train_begin(arguments(**changes), None, None)
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [True] * recomputed + [False] * (4 - recomputed)


def test_compiled_fused_layers_need_less_memory(tiny_packed_model, monkeypatch):
    """They keep less, so that with the same memory fewer layers are checkpointed."""
    counts, positions = [], 10**6
    sizes = ModelSizes.of(tiny_packed_model().config)
    whole = memory.layer_activations(sizes, length=0, rank=3, dropout=0.0, is_padded=False)
    monkeypatch.setattr(recompute, "free_memory", lambda device: positions * 20 * whole)
    for fused in (None, SimpleNamespace(compiled=False), SimpleNamespace(compiled=True)):
        model = tiny_packed_model(num_hidden_layers=40).train()
        model.fused_lora = fused
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
        FewestCheckpoints(model, rank=3, positions=positions).on_train_begin(arguments(), None, None)
        counts.append(sum(layer.gradient_checkpointing for layer in model.model.layers))
    assert 0 < counts[2] < counts[1] == counts[0]


def test_nothing_is_changed_without_checkpointing(tiny_packed_model):
    model = tiny_packed_model()
    model.model.layers[0].gradient_checkpointing = True
    FewestCheckpoints(model, rank=0, positions=64).on_train_begin(
        arguments(checkpoints_activations=False, checkpoint_layers="0"), None, None
    )
    assert model.model.layers[0].gradient_checkpointing is True


@pytest.fixture
def outputs():
    """Return the list that fills with (module, output) of every module that runs."""
    seen = []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append((module, output)))
    yield seen
    handle.remove()


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_enable", "True", "--lora_r", "2"],
        ["--lora_enable", "True", "--lora_r", "2", "--share_image_prefix", "False"],
        ["--lora_enable", "True", "--lora_r", "2", "--bits", "4"],
        ["--tune_mm_mlp_adapter", "True"],
        [],
    ],
    ids=["lora", "separate rows", "4 bit", "projector", "full"],
)
def test_a_frozen_tower_is_neither_recomputed_nor_given_gradients(train_tiny, tmp_path, outputs, flags):
    """With --gradient_checkpointing True, as the scripts in scripts/v1_5 pass it."""
    rows = [
        {
            "id": str(index),
            "image": "landscape.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {index}?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for index in range(2)
    ]
    flags = [*flags, "--gradient_checkpointing", "True", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    assert train_tiny(tmp_path / "out", rows, *flags) == 0
    towers = [module for module, _ in outputs if isinstance(module, CLIPVisionTower)]
    parts = set(towers[0].modules())
    tensors = [output for module, output in outputs if module in parts and isinstance(output, torch.Tensor)]
    assert len(tensors) > 50
    assert not any(tensor.requires_grad for tensor in tensors)
    kinds = Counter(type(module) for module, _ in outputs)
    layers = towers[0].config.num_hidden_layers
    assert kinds[CLIPMLP] == len(towers) * layers
    assert kinds[LlamaAttention] == 2 * 5  # each of the LLM's layers runs again in the backward pass


def test_the_hook_of_adapters_reaches_token_embeddings_alone(tiny_packed_model):
    model = tiny_packed_model().requires_grad_(False).train()
    pixels, ids = torch.zeros(1, 3, 28, 28), torch.tensor([[1, -200, 5]])
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert model(input_ids=ids, images=pixels).logits.requires_grad
    assert not model.encode_images(pixels).requires_grad
    model.disable_input_require_grads()
    assert not model(input_ids=ids, images=pixels).logits.requires_grad
