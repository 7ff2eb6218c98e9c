"""Packs have the loss and every gradient of the same records in rows of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.packed_dataset import PackCollator, PackedRow
from llava.data.records import EncodedRecord
from llava.model.packed.forward import mean_loss
from llava.model.splice import splice_image_features
from llava.train.lora import add_lora, choose_trainable
from llava.train.packing_setup import inner_llava

PATCHES, SIZE = 4, 28
SYSTEM = [1, 11, 12]
IMAGES = {
    name: torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("abc")
}

tokens = st.lists(st.integers(3, 9), min_size=1, max_size=4)
"""Few ids, so that questions often begin alike."""
turns = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=3)
image_names = st.lists(st.sampled_from("aaab"), max_size=2)
dialogues = st.lists(st.tuples(image_names, turns, st.booleans()), min_size=1, max_size=7)


def record(images, turns, late=False):
    """System prompt, images, questions and answers; `late` puts the images after the first answer."""
    ids, labels = list(SYSTEM), [IGNORE_INDEX] * len(SYSTEM)

    def add(values, supervised=False):
        ids.extend(values)
        labels.extend(values if supervised else [IGNORE_INDEX] * len(values))

    for index, (question, answer) in enumerate(turns):
        if index == int(late and len(turns) > 1):
            add([IMAGE_TOKEN_INDEX] * len(images) + [13] * bool(images))
        add(question)
        add([*answer, 2], supervised=True)
    return EncodedRecord(ids, labels, [Path(name) for name in images])


def pack_of(records, **options):
    rows = [PackedRow(record, [IMAGES[str(path)] for path in record.images]) for record in records]
    return PackCollator(PATCHES, SIZE, **{"budget": None, "multiple": 1, **options})(rows)


def separate_loss(model, records):
    """Sum over rows of their own, divided by all supervised tokens; in the model's precision throughout."""
    total, count = 0.0, 0
    for item in records:
        ids, labels = torch.tensor([item.input_ids]), torch.tensor([item.labels])
        images = torch.stack([IMAGES[str(path)] for path in item.images]) if item.images else None
        logits = model(input_ids=ids, images=images).logits[0, :-1]
        features = [torch.zeros(PATCHES, 1)] * len(item.images)
        spliced = splice_image_features(ids, features, lambda ids: torch.zeros(len(ids), 1), labels=labels)
        targets = spliced.labels[0, 1:]
        total = total + nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((targets != IGNORE_INDEX).sum())
    return total / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def precise_norms(model):
    """transformers' norm computes in fp32 whatever the model's dtype; PyTorch's own stands in for it."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def build(tiny_packed_model, kind, dtype):
    model = tiny_packed_model(max_position_embeddings=128).to(dtype)
    if dtype == torch.float64:
        model = precise_norms(model)
    if kind != "full":
        model = add_lora(model, rank=3, alpha=6, dropout=0.0, bias="none", base_name="tiny")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    choose_trainable(model, lora=kind != "full", projector=True, backbone=kind == "full", dtype=dtype)
    if kind == "fused":
        assert inner_llava(model).fuse_lora(compiled=False) is None
    return model.train()


@pytest.fixture(scope="module")
def models(tiny_packed_model):
    return {
        (kind, dtype): build(tiny_packed_model, kind, dtype)
        for kind in ("lora", "fused", "full")
        for dtype in (torch.float64, torch.float32)
    }


def compare(model, records, *, rtol, atol, **options):
    separate = separate_loss(model, records)
    expected = gradients(model, separate)
    packed = model(**pack_of(records, **options)).loss
    found = gradients(model, packed)
    torch.testing.assert_close(packed, separate, rtol=rtol, atol=atol)
    largest = max(gradient.abs().max().item() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:  # no image anywhere: the pack's blank image gives the projector zeros
            assert "mm_projector" in name
            assert not found[name].any()
        else:
            difference = (found[name] - gradient).abs().max().item()
            assert difference <= max(rtol * gradient.abs().max().item(), atol * largest), name


@pytest.mark.parametrize("kind", ["lora", "fused", "full"])
@given(data=dialogues, budget=st.sampled_from([None, 30, 60]), multiple=st.sampled_from([1, 8]))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_and_gradients_in_fp64(models, kind, data, budget, multiple):
    records = [record(*dialogue) for dialogue in data]
    compare(models[kind, torch.float64], records, rtol=1e-10, atol=1e-12, budget=budget, multiple=multiple)


@pytest.mark.parametrize("kind", ["lora", "fused", "full"])
@given(data=dialogues, budget=st.sampled_from([None, 40]))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_and_gradients_in_fp32(models, kind, data, budget):
    records = [record(*dialogue) for dialogue in data]
    compare(models[kind, torch.float32], records, rtol=1e-5, atol=1e-6, budget=budget)


def test_other_positions_or_a_wider_mask_change_the_loss(models):
    model = models["full", torch.float64]
    records = [record(["a"], [([5, 6], [7])]), record(["a"], [([8, 4], [9])])]
    expected = separate_loss(model, records).item()
    pack = pack_of(records)
    assert model(**pack).loss.item() == pytest.approx(expected, rel=1e-12)
    counting_on = torch.arange(pack["input_ids"].numel())[None]
    assert abs(model(**{**pack, "position_ids": counting_on}).loss.item() - expected) > 1e-3
    one_suffix = {**pack, "suffixes": pack["suffixes"].clamp(max=1)}
    assert abs(model(**one_suffix).loss.item() - expected) > 1e-3


def test_logits_are_those_of_supervised_tokens(models):
    records = [record(["a"], [([5], [7, 8])]), record(["a"], [([6], [9])])]
    output = models["full", torch.float32](**pack_of(records))
    assert output.logits.shape == (5, 64)


def test_the_loss_is_divided_by_the_items_of_the_whole_step(models):
    model = models["lora", torch.float32]
    pack = pack_of([record(["a"], [([5], [7, 8])])])  # with the end of the answer three supervised tokens
    mean = model(**pack).loss.item()
    assert model(**pack, num_items_in_batch=torch.tensor(6)).loss.item() == pytest.approx(mean / 2, rel=1e-6)


def test_half_precision_logits_are_summed_in_fp32():
    logits, targets = torch.randn(300, 5).bfloat16(), torch.zeros(300, dtype=torch.int64)
    loss = mean_loss(logits, targets, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.float(), targets))


def test_features_and_positions_that_do_not_match_are_refused(models):
    pack = pack_of([record(["a"], [([5], [7])])])
    pack["patches"] = pack["patches"][:-1]
    with pytest.raises((RuntimeError, IndexError), match="index_copy"):
        models["full", torch.float32](**pack)


@torch.no_grad()
def test_flex_attention_gives_the_same(tiny_packed_model):
    model = tiny_packed_model(max_position_embeddings=128).double()
    records = [record(["a"], [([5, 6], [7])]), record(["a"], [([5, 4], [9, 8])]), record([], [([4], [3])])]
    pack = pack_of(records, multiple=128)
    dense = model(**pack).loss
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5]])
    logits = model(input_ids=ids, images=IMAGES["a"][None]).logits
    model.use_flex_attention()
    kinds = set()
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kwargs: kinds.add(type(kwargs["attention_mask"])), with_kwargs=True)
    with torch.compiler.set_stance("force_eager"):  # FlexAttention uncompiled, so that no compiler is needed here
        torch.testing.assert_close(model(**pack).loss, dense, rtol=1e-7, atol=0)
    assert kinds == {BlockMask}
    torch.testing.assert_close(model(input_ids=ids, images=IMAGES["a"][None]).logits, logits)


def test_the_mode_is_switched_throughout(tiny_packed_model):
    wrapped = add_lora(tiny_packed_model(), rank=3, alpha=6, dropout=0.5, bias="none", base_name="tiny")
    frozen = set(inner_llava(wrapped).get_vision_tower().modules())
    for mode in (True, False, True):
        wrapped.train(mode)
        assert {module.training for module in set(wrapped.modules()) - frozen} == {mode}
        assert {module.training for module in frozen} == {False}


@torch.no_grad()
@pytest.mark.parametrize("layers", ["dense", "FlexAttention", "fused"])
def test_prompts_are_computed_as_by_the_base_class(tiny_model, tiny_packed_model, layers):
    base, model = tiny_model(), tiny_packed_model()
    if layers == "FlexAttention":
        model.use_flex_attention()
    if layers == "fused":
        wrapped = add_lora(model, rank=3, alpha=6, dropout=0.0, bias="none", base_name="tiny")
        choose_trainable(wrapped, lora=True, projector=True, backbone=False)
        assert model.fuse_lora(compiled=False) is None
    ids, mask = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5], [1, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "images": IMAGES["a"][None]}
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), base.generate(**inputs, **options))
