"""The plan's counts are the real ones: parameters, quantised weights, tensors that autograd saves."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava.model.configuration import LlavaConfig
from llava.model.memory import (
    ModelSizes,
    StepLoad,
    cache_bytes,
    fused_activations,
    layer_activations,
    loss_bytes,
    optimizer_bytes,
    training_peak,
    weight_bytes,
)
from llava.model.packed.fused_lora import FusedLora, run_layer
from llava.model.vision_tower import VIT_L_14_336
from llava.train.lora import add_lora, choose_trainable

LLAVA_7B = ModelSizes.of(
    LlavaConfig(mm_vision_config=dict(VIT_L_14_336), mm_hidden_size=1024, mm_projector_type="mlp2x_gelu")
)
LLAVA_TINY = Path(__file__).parents[2] / "playground" / "llava-tiny"
ROWS, TOKENS = 3, 20
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}


def test_the_sizes_of_llava_7b():
    """performance.md's figures: 6.476 G in the layers, 320 M at rank 128, 0.524 MB of KV cache a token."""
    assert LLAVA_7B.block_weights == 6_476_005_376
    assert LLAVA_7B.lora_parameters(128) == 319_815_680
    assert cache_bytes(LLAVA_7B, 1) == 524_288
    assert LLAVA_7B.llm_parameters == 6_738_415_616
    assert LLAVA_7B.projector_parameters == 20_979_712


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, **WIDE}, {**WIDE, "num_key_value_heads": 2}])
def test_parameters_are_those_of_the_model(tiny_model, changes):
    model = tiny_model(**changes)
    sizes = ModelSizes.of(model.config)
    counted = {"tower": 0, "projector": 0, "llm": 0}
    for name, parameter in model.named_parameters():
        kind = "tower" if "vision_tower" in name else "projector" if "mm_projector" in name else "llm"
        counted[kind] += parameter.numel()
    assert counted == {
        "tower": sizes.tower_parameters,
        "projector": sizes.projector_parameters,
        "llm": sizes.llm_parameters,
    }
    assert weight_bytes(sizes, 16) == 2 * sum(counted.values())
    wrapped = add_lora(model, rank=3, alpha=6, dropout=0.0, bias="none", base_name="x")
    adapters = sum(parameter.numel() for name, parameter in wrapped.named_parameters() if "lora_" in name)
    assert adapters == sizes.lora_parameters(3)


def kept_bytes(model, **inputs):
    """Bytes that autograd saves in a forward pass besides parameters, every storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(storage.nbytes() for storage in kept.values())
    assert loss.isfinite()
    return total


def step_bytes(tiny_model, layers, changes, rank, dropout):
    model = tiny_model(num_hidden_layers=layers, max_position_embeddings=64, **changes)
    sizes = ModelSizes.of(model.config)
    if rank:
        model = add_lora(model, rank=rank, alpha=2 * rank, dropout=dropout, bias="none", base_name="x")
    choose_trainable(model, lora=bool(rank), projector=True, backbone=not rank)
    ids = torch.randint(3, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return kept_bytes(model.train(), input_ids=ids, labels=ids), sizes


@pytest.mark.parametrize(
    ("changes", "rank", "dropout"),
    [*itertools.product([{}, WIDE], [4, 8], [0.0, 0.1]), ({**WIDE, "intermediate_size": 80}, 4, 0.1), (WIDE, 0, 0.0)],
)
def test_a_layer_saves_the_counted_bytes(tiny_model, changes, rank, dropout):
    """The difference of three layers and two is one layer; in fp32 on the CPU dropout's mask is fp32 too."""
    (three, sizes), (two, _) = (step_bytes(tiny_model, layers, changes, rank, dropout) for layers in (3, 2))
    counted = layer_activations(
        sizes, length=TOKENS, rank=rank, dropout=dropout, is_padded=False, element=4, mask_element=4
    )
    assert three - two == counted * ROWS * TOKENS


def compiled_step_bytes(tiny_model, layers, changes, dropout):
    """Bytes that autograd saves of packs through compiled layers, and the sizes; the last layer is not counted."""
    model = tiny_model(num_hidden_layers=layers + 1, max_position_embeddings=64, **changes)
    wrapped = add_lora(model, rank=4, alpha=8, dropout=dropout, bias="none", base_name="x")
    choose_trainable(wrapped, lora=True, projector=True, backbone=False)
    fused = FusedLora(model.train(), compiled=False)
    torch._dynamo.reset()
    fused.run = torch.compile(run_layer, dynamic=False, backend="aot_eager_decomp_partition")  # parts as inductor does
    embeds, wanted = torch.randn(ROWS, TOKENS, model.config.hidden_size, requires_grad=True), torch.tensor([2])
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril().expand(ROWS, -1, -1, -1).contiguous()
    last_mask = torch.ones(1, 1, 1, ROWS * TOKENS, dtype=torch.bool)
    positions = torch.arange(TOKENS).expand(ROWS, -1)

    class Step(nn.Module):
        def forward(self):
            return SimpleNamespace(loss=fused(embeds, mask, positions, wanted, last_mask).sum())

        def parameters(self):
            joined = [
                part.weight for layer in fused.weights for part in (layer.qkv, layer.out, layer.gate_up, layer.down)
            ]
            return [*model.parameters(), *joined, embeds, mask]

    return kept_bytes(Step()), ModelSizes.of(model.config)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("changes", [{}, WIDE])
def test_a_compiled_layer_saves_the_counted_bytes(tiny_model, changes, dropout):
    """On the CPU with a dense mask, which is saved as numbers; concatenated adapters are copies."""
    (three, sizes), (two, _) = (compiled_step_bytes(tiny_model, layers, changes, dropout) for layers in (3, 2))
    counted = fused_activations(sizes, rank=4, dropout=dropout, element=4, mask_element=1) + 4 * TOKENS
    copies = 4 * sizes.lora_parameters(4) // sizes.layers
    assert three - two == counted * ROWS * TOKENS + copies


def test_weights_in_fewer_bits_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    from llava.model.builder import build_model
    from llava.model.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(LLAVA_TINY)
    sizes = ModelSizes.of(checkpoint.config)
    for bits in (8, 4):
        model = build_model(open_checkpoint(LLAVA_TINY), dtype="bfloat16", device="cpu", bits=bits)
        stored = sum(parameter.nbytes for parameter in model.parameters())
        for parameter in model.parameters():
            state = getattr(parameter, "quant_state", None)
            if bits == 8 and getattr(parameter, "SCB", None) is not None:
                stored += parameter.SCB.nbytes
            elif state is not None:
                stored += state.absmax.nbytes + state.state2.absmax.nbytes
        assert weight_bytes(sizes, bits) == pytest.approx(stored, rel=1e-3)


def test_a_padded_batch_saves_a_row_of_the_mask_for_each_position():
    options = {"length": 640, "rank": 8, "dropout": 0.05}
    padded, even = (layer_activations(LLAVA_7B, is_padded=is_padded, **options) for is_padded in (True, False))
    assert padded - even == 2 * 640


def test_checkpointing_saves_one_layer_and_every_layers_input():
    load = StepLoad(positions=2 * 640, images=2, predicted=2 * 640)
    options = {"rank": 128, "dropout": 0.05, "is_fused": False}
    peaks = [training_peak(LLAVA_7B, load, checkpointed=count, **options) for count in range(33)]
    block = layer_activations(LLAVA_7B, length=0, rank=128, dropout=0.05, is_padded=False)
    assert peaks[0] - peaks[32] == 2 * 640 * 32 * (block - 2 * 4096)
    assert loss_bytes(LLAVA_7B) > block  # so the peak is where the logits are, in all of them
    assert {one - other for one, other in itertools.pairwise(peaks)} == {2 * 640 * (block - 2 * 4096)}


def test_the_peak_of_packs_is_where_the_first_checkpointed_layer_is_computed_again():
    """Few logits are computed, so that all layers' inputs, one layer's activations and its gradients are most."""
    load = StepLoad(positions=1000, images=0, predicted=64)
    peak = training_peak(LLAVA_7B, load, rank=128, dropout=0.05, is_fused=True, checkpointed=32)
    block = fused_activations(LLAVA_7B, rank=128, dropout=0.05)
    kept_by_all = 31 * 2 * 4096 + block + 2 * (3 * 11008 + 2 * 4096) + 8 * 4096
    assert peak == 1000 * kept_by_all


@pytest.mark.parametrize("is_fused", [False, True])
def test_more_checkpointed_layers_never_need_more(is_fused):
    load = StepLoad(positions=3328, images=5, predicted=64)
    options = {"rank": 128, "dropout": 0.05, "is_fused": is_fused}
    peaks = [training_peak(LLAVA_7B, load, checkpointed=count, **options) for count in range(1, 32)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_masks_rows_are_counted_for_packs_with_dense_masks():
    options = {"rank": 8, "dropout": 0.0, "is_fused": False, "checkpointed": 0}
    dense, blocks = (training_peak(LLAVA_7B, StepLoad(2048, 3, 64, length), **options) for length in (2048, 0))
    assert dense - blocks == 32 * 2048 * 2 * 2048


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"zero": 0, "gpus": 1, "offload": False}, 18),  # fp32 parameter, gradient, two moments; autocast's copy
        ({"zero": 0, "gpus": 2, "offload": False}, 22),  # and DDP's buckets
        ({"zero": 2, "gpus": 1, "offload": False}, 16),
        ({"zero": 2, "gpus": 4, "offload": False}, 5.5),
        ({"zero": 3, "gpus": 4, "offload": False}, 4),
        ({"zero": 2, "gpus": 4, "offload": True}, 2.5),
        ({"zero": 3, "gpus": 4, "offload": True}, 0.5),
    ],
)
def test_bytes_of_a_trainable_parameter(options, expected):
    assert optimizer_bytes(1000, **options) == 1000 * expected


def test_a_model_without_a_vision_tower_is_refused():
    with pytest.raises(ValueError, match=r"^the model has no vision tower, so its memory can't be planned; pass"):
        ModelSizes.of(LlavaConfig())
