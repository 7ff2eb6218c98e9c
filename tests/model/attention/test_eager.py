"""`output_attentions=True` gives what a model loaded with eager attention gives, and changes nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import GenerationConfig

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.model.attention.eager import eager_attention

IDS = torch.tensor([[0, 1, IMAGE, 5, 6], [1, 9, IMAGE, 5, 6]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def models(tiny_model):
    """Under SDPA, and eager: the same weights."""
    models = tiny_model(eos_token_id=None), tiny_model(eos_token_id=None, attn_implementation="eager")
    assert [model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    return models


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_forward(models, pixels):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "images": pixels, "output_attentions": True}
    ours, theirs = (model(**inputs, output_hidden_states=True) for model in models)
    assert [attention.shape for attention in ours.attentions] == [(2, 2, 8, 8)] * 2
    assert_same(ours.attentions, theirs.attentions)
    assert_same(ours.hidden_states, theirs.hidden_states)
    assert models[0].config._attn_implementation == "sdpa"
    plain = models[0](**{**inputs, "output_attentions": False})
    assert plain.attentions is None
    torch.testing.assert_close(plain.logits[MASK[:, :1].bool()[:, 0]], ours.logits[1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_body_alone(models, pixels):
    spliced = models[0].splice(IDS, pixels, attention_mask=MASK)
    inputs = {"inputs_embeds": spliced.inputs_embeds, "attention_mask": spliced.attention_mask}
    ours, theirs = (model.get_model()(**inputs, output_attentions=True) for model in models)
    assert [attention.shape for attention in ours.attentions] == [(2, 2, 8, 8)] * 2
    assert_same(ours.attentions, theirs.attentions)
    assert models[0].get_model()(**inputs).attentions is None


STATIC = {"cache_implementation": "static"}  # its masks are made outside of forward


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, STATIC], ids=str)
def test_generate(models, pixels, images, options):
    options = {**options, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = IDS if images else IDS.clamp(min=0)
    options |= {"images": pixels if images else None, "attention_mask": MASK}
    ours, theirs = (
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **options) for model in models
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(ours.attentions) == 3
    for our, their in zip(ours.attentions, theirs.attentions, strict=True):
        assert_same(our, their)


def test_generate_by_its_config(models, pixels):
    settings = GenerationConfig(
        max_new_tokens=2, do_sample=False, output_attentions=True, return_dict_in_generate=True, **STATIC
    )
    ours, theirs = (model.generate(IDS, images=pixels, generation_config=settings) for model in models)
    for our, their in zip(ours.attentions, theirs.attentions, strict=True):
        assert_same(our, their)


@torch.no_grad()
def test_other_threads_keep_their_attention(models):
    found = []
    with eager_attention(True):
        thread = threading.Thread(target=lambda: found.append(models[0].config._attn_implementation))
        thread.start()
        thread.join()
        found.append(models[0].config._attn_implementation)
        with eager_attention(False):
            found.append(models[0].config._attn_implementation)
    assert found == ["sdpa", "eager", "eager"]


def test_a_failed_call_leaves_the_attention_as_it_was(models):
    with pytest.raises(ValueError, match="placeholders"):
        models[0](input_ids=IDS, output_attentions=True)
    with pytest.raises(RuntimeError), eager_attention(True):
        raise RuntimeError
    assert models[0].config._attn_implementation == "sdpa"


@torch.no_grad()
def test_the_vision_towers_encoder(models, pixels):
    encoder, theirs = (model.get_vision_tower().vision_tower for model in models)
    theirs.set_attn_implementation("eager")
    found = encoder(pixels, output_attentions=True)
    assert_same(found.attentions, theirs(pixels, output_attentions=True).attentions)
    torch.testing.assert_close(found.last_hidden_state, encoder(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert found.attentions[0].shape == (2, 2, 5, 5)


def test_checkpointed_layers_are_not_recomputed_with_other_attention(tiny_model, pixels):
    inputs = {"input_ids": IDS[1:], "labels": IDS[1:], "images": pixels[:1], "output_attentions": True}
    model = tiny_model().train()
    model.enable_input_require_grads()
    newest = hasattr(model, "activation_checkpointing_enable")  # transformers 5.24's name
    getattr(model, "activation_checkpointing_enable" if newest else "gradient_checkpointing_enable")()
    with pytest.raises(ValueError, match=r"^output_attentions=True takes eager attention, which activation checkpoin"):
        model(**inputs)
    assert len(model.eval()(**inputs).attentions) == 2
