"""As many layers keep their activations as memory allows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llava.model import memory
from llava.model.memory import ModelSizes
from llava.train import recompute
from llava.train.recompute import KeepActivations, layers_to_recompute

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


def block(dropout):
    return memory.layer_activations(SIZES, length=0, rank=128, dropout=dropout, is_padded=False)


STEP = {"positions": 4096, "block": block(0.05), "reserved": 5_000_000_000}


def test_ample_memory_recomputes_nothing_and_none_everything():
    assert layers_to_recompute(SIZES, **STEP, available=10**12) == 0
    assert layers_to_recompute(SIZES, **STEP, available=0) == 32


def test_more_memory_never_means_more_layers():
    counts = [layers_to_recompute(SIZES, **STEP, available=size * 10**9) for size in range(0, 80, 2)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 10


def test_what_is_chosen_fits_and_one_layer_fewer_does_not():
    available = 30 * 10**9
    count = layers_to_recompute(SIZES, **STEP, available=available)

    def needed(layers):
        per_position = layers * 2 * 4096 + (32 - layers) * block(0.05) + block(0.05)
        per_position += 8 * 4096 + memory.backward_workspace(SIZES) + 2 * (1024 + 2 * 4096)
        return STEP["reserved"] + STEP["positions"] * per_position

    assert 0 < count < 32
    assert needed(count) <= recompute.USABLE * available < needed(count - 1)


def test_without_dropout_fewer_are_recomputed():
    with_dropout, without = (
        layers_to_recompute(SIZES, **{**STEP, "block": block(rate)}, available=30 * 10**9) for rate in (0.05, 0.0)
    )
    assert without < with_dropout


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
def test_the_layers_that_keep_their_activations(tiny_model, monkeypatch, changes, free, recomputed):
    model = tiny_model(num_hidden_layers=4).train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    monkeypatch.setattr(recompute, "free_memory", lambda device: free)
    KeepActivations(model, rank=0, positions=64).on_train_begin(arguments(**changes), None, None)
    flags = [layer.gradient_checkpointing for layer in model.model.layers]
    assert flags == [True] * recomputed + [False] * (4 - recomputed)


def test_compiled_fused_layers_are_counted_as_such(tiny_model, monkeypatch):
    """They keep less, so that with the same memory fewer are computed again."""
    counts, positions = [], 10**6
    whole = memory.layer_activations(ModelSizes.of(tiny_model().config), length=0, rank=3, dropout=0.0, is_padded=False)
    monkeypatch.setattr(recompute, "free_memory", lambda device: positions * 20 * whole)
    for fused in (None, SimpleNamespace(compiled=False), SimpleNamespace(compiled=True)):
        model = tiny_model(num_hidden_layers=40).train()
        model.fused_layers = fused
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
        KeepActivations(model, rank=3, positions=positions).on_train_begin(arguments(), None, None)
        counts.append(sum(layer.gradient_checkpointing for layer in model.model.layers))
    assert 0 < counts[2] < counts[1] == counts[0]


def test_nothing_is_changed_without_checkpointing(tiny_model):
    model = tiny_model()
    model.model.layers[0].gradient_checkpointing = True
    KeepActivations(model, rank=0, positions=64).on_train_begin(
        arguments(checkpoints_activations=False, checkpoint_layers="0"), None, None
    )
    assert model.model.layers[0].gradient_checkpointing is True
