"""Decoding loops of other code, which pass images and masks over tokens at every step, equal `generate`."""

from __future__ import annotations

import re

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.model.cached_inputs import CACHE_ARGUMENT

STEPS = 5
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PROMPT = [1, IMAGE, 5, 6, 7]
ROWS = {
    "left": [[0, 1, IMAGE, 5, 6, 7], [1, 9, 8, IMAGE, 5, 6]],
    "right": [[1, IMAGE, 5, 6, 7, 0], [1, 9, 8, IMAGE, 5, 6]],
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(eos_token_id=None)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def expected(model, pixels):
    return model.generate(torch.tensor([PROMPT]), images=pixels[:1], **OPTIONS)


@pytest.fixture(scope="module")
def expected_rows(model, pixels):
    ids = torch.tensor(ROWS["left"])
    return model.generate(ids, images=pixels, attention_mask=(ids != 0).long(), **OPTIONS)


def cache_of(output):
    return getattr(output, CACHE_ARGUMENT)


def as_tuples(cache):
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def decode(model, ids, images, mask=None, *, last=None, again=True, convert=lambda cache: cache, **options):
    """A greedy loop: `last` are the places of the prompts' last logits, `again` passes the images at every step."""
    output = model(input_ids=ids, images=images, attention_mask=mask, use_cache=True)
    logits, tokens = output.logits[:, -1], []
    if last is not None:
        logits = output.logits[torch.arange(len(ids)), torch.tensor(last)]
    for _ in range(STEPS):
        tokens.append(logits.argmax(-1, keepdim=True))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        given = {name: value(mask) for name, value in options.items()}
        output = model(
            input_ids=tokens[-1],
            images=images if again else None,
            attention_mask=mask,
            past_key_values=convert(cache_of(output)),
            use_cache=True,
            **given,
        )
        logits = output.logits[:, -1]
    return torch.cat(tokens, dim=1)


def positions_by_tokens(mask):
    return (mask.cumsum(dim=1) - 1)[:, -1:]


@pytest.mark.parametrize("again", [True, False], ids=["images again", "images once"])
@pytest.mark.parametrize("dtype", [None, torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("convert", [lambda cache: cache, as_tuples], ids=["cache", "tuples"])
@torch.no_grad()
def test_one_row(model, pixels, expected, again, dtype, convert):
    mask = None if dtype is None else torch.ones(1, len(PROMPT), dtype=dtype)
    found = decode(model, torch.tensor([PROMPT]), pixels[:1], mask, again=again, convert=convert)
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_positions_counted_by_tokens_are_counted_again(model, pixels, expected):
    mask = torch.ones(1, len(PROMPT), dtype=torch.long)
    found = decode(model, torch.tensor([PROMPT]), pixels[:1], mask, position_ids=positions_by_tokens)
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_padding_of_a_single_row_is_dropped(model, pixels, expected):
    mask = torch.tensor([[0, 0] + [1] * len(PROMPT)])
    assert decode(model, torch.tensor([[0, 0, *PROMPT]]), pixels[:1], mask).tolist() == expected.tolist()


@pytest.mark.parametrize("again", [True, False], ids=["images again", "images once"])
@torch.no_grad()
def test_left_padded_rows(model, pixels, expected_rows, again):
    ids = torch.tensor(ROWS["left"])
    assert decode(model, ids, pixels, (ids != 0).long(), again=again).tolist() == expected_rows.tolist()


@pytest.mark.parametrize(("side", "last"), [("right", [7, 8]), ("left", [8, 8])])
@torch.no_grad()
def test_right_padded_rows_lie_as_the_config_says(tiny_model, pixels, expected_rows, side, last):
    model = tiny_model(eos_token_id=None, tokenizer_padding_side=side)
    ids = torch.tensor(ROWS["right"])
    assert decode(model, ids, pixels, (ids != 0).long(), last=last).tolist() == expected_rows.tolist()


MIXED = [[1, IMAGE, 5, 6], [1, IMAGE, 8, IMAGE, 5], [1, 9, 8, 7, 5, 6, 5, 6, 7, 9, 8]]  # one image, two, none


def padded(rows, side):
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([fill + row if side == "left" else row + fill for row, fill in zip(rows, padding, strict=True)])


@pytest.fixture(scope="module")
def expected_mixed(model):
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    given = images[:1], images[1:], None
    rows = [model.generate(torch.tensor([ids]), images=own, **OPTIONS) for ids, own in zip(MIXED, given, strict=True)]
    return images, torch.cat(rows).tolist()


@pytest.mark.parametrize(("side", "last"), [("left", None), ("right", [6, 10, 10])])
@torch.no_grad()
def test_rows_with_different_numbers_of_images(model, expected_mixed, side, last):
    images, expected = expected_mixed
    ids = padded(MIXED, side)
    assert decode(model, ids, images, (ids != 0).long(), last=last).tolist() == expected
    given = {"position_ids": positions_by_tokens}
    assert decode(model, ids, images, (ids != 0).long(), last=last, **given).tolist() == expected


@torch.no_grad()
def test_padding_that_no_mask_shows(model, expected_mixed):
    """Ids of one length, a row with an image and one without: the second is padded where the first has patches."""
    images, expected = expected_mixed
    ids = torch.tensor([MIXED[0], [1, 9, 8, 7]])
    alone = model.generate(ids[1:], **OPTIONS).tolist()
    assert decode(model, ids, images[:1], last=[6, 3]).tolist() == [expected[0], *alone]


@torch.no_grad()
def test_prepared_inputs_of_rows_with_different_numbers_of_images(model, expected_mixed):
    images, expected = expected_mixed
    ids = padded(MIXED, "left")
    options = {"images": images, "use_cache": True, "attention_mask": (ids != 0).long()}
    for _ in range(STEPS):
        output = model(**model.prepare_inputs_for_generation(ids, **options))
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        mask = options["attention_mask"]
        options |= {CACHE_ARGUMENT: cache_of(output), "attention_mask": torch.cat([mask, mask[:, -1:]], dim=1)}
    assert ids[:, -STEPS:].tolist() == expected


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_inputs_prepared_by_hand(model, pixels, expected_rows, masked):
    rows, expected = ROWS["left"][1:], expected_rows[1:]
    if masked:
        rows, expected = ROWS["left"], expected_rows
    ids = torch.tensor(rows)
    options = {"images": pixels[-len(rows) :], "image_sizes": [(28, 28)] * len(rows), "use_cache": True}
    options["attention_mask"] = (ids != 0).long() if masked else None
    for _ in range(STEPS):
        inputs = model.prepare_inputs_for_generation(ids, **options)
        assert inputs["images"] is options["images"]
        assert inputs["image_sizes"] is options["image_sizes"]
        output = model(**inputs, return_dict=True)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        options = model._update_model_kwargs_for_generation(output, options)
    assert ids[:, len(rows[0]) :].tolist() == expected.tolist()


@torch.no_grad()
def test_inputs_prepared_by_hand_for_several_new_tokens(model, pixels):
    output = model(input_ids=torch.tensor([PROMPT]), images=pixels[:1], use_cache=True)
    cache = cache_of(output)
    ids = torch.tensor([[*PROMPT, 9, 10, 11]])
    inputs = model.prepare_inputs_for_generation(ids, past_key_values=cache, images=pixels[:1], use_cache=True)
    assert inputs["input_ids"].tolist() == [[9, 10, 11]]
    whole = model(input_ids=ids, images=pixels[:1]).logits[:, -3:]
    torch.testing.assert_close(model(**inputs).logits, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_logits_processor_that_runs_the_model_at_every_step(model, pixels, expected):
    """Contrastive decoding as a logits processor: both sides have the same image, so nothing changes."""
    prompt, state = torch.tensor([PROMPT]), {}

    def contrast(input_ids, scores):
        if not state:
            output = model(input_ids=prompt, images=pixels[:1], use_cache=True)
        else:
            output = model(
                input_ids=input_ids[:, -1:], images=pixels[:1], use_cache=True, past_key_values=state["past"]
            )
        state["past"] = cache_of(output)
        return 2 * scores - output.logits[:, -1]

    answer = model.generate(prompt, images=pixels[:1], logits_processor=[contrast], **OPTIONS)
    assert answer.tolist() == expected.tolist()


@torch.no_grad()
def test_images_of_a_step_are_not_encoded(tiny_model, pixels, monkeypatch):
    model = tiny_model()
    output = model(input_ids=torch.tensor([PROMPT]), images=pixels[:1], use_cache=True)
    plain = model(input_ids=torch.tensor([[9]])).logits
    monkeypatch.setattr(model, "encode_images", lambda *_: pytest.fail("the images were encoded again"))
    model(input_ids=torch.tensor([[9, 10]]), images=pixels, past_key_values=cache_of(output))
    assert torch.equal(model(input_ids=torch.tensor([[9]]), images=pixels).logits, plain)


@torch.no_grad()
def test_a_prompt_of_one_image_is_one_token_wide(model, pixels):
    assert model(input_ids=torch.tensor([[IMAGE]]), images=pixels[:1]).logits.shape == (1, 4, 64)


@torch.no_grad()
def test_generate_continues_from_the_cache_of_a_prefix(model, pixels, expected):
    output = model(input_ids=torch.tensor([PROMPT[:3]]), images=pixels[:1], use_cache=True)
    answer = model.generate(
        torch.tensor([PROMPT]), images=pixels[:1], past_key_values=as_tuples(cache_of(output)), **OPTIONS
    )
    assert answer.tolist() == expected.tolist()


MISFITS = {
    "placeholder in the cache": (
        "forward",
        {"input_ids": [PROMPT]},
        "input_ids hold 1 image placeholders, but the cache holds 8 positions already; pass the new tokens alone",
    ),
    "long mask": (
        "forward",
        {"input_ids": [[9]], "attention_mask": [[1] * 10]},
        "attention_mask is (1, 10), but there are 1 new tokens in 1 rows and 8 cached positions; it needs 9 columns",
    ),
    "rows of the mask": (
        "forward",
        {"input_ids": [[9]], "attention_mask": [[1] * 9] * 2},
        "attention_mask is (2, 9), but there are 1 new tokens in 1 rows and 8 cached positions",
    ),
    "positions": (
        "forward",
        {"input_ids": [[9]], "position_ids": [[7, 8]]},
        "position_ids are (1, 2), but there are 1 new tokens; pass one for each",
    ),
    "whole prompt in the cache": (
        "generate",
        {"input_ids": [[IMAGE, 9]]},
        "the prompts take 5 positions, the cache holds 8; pass whole prompts",
    ),
}


@pytest.mark.parametrize(("call", "inputs", "message"), MISFITS.values(), ids=MISFITS)
@torch.no_grad()
def test_misfits_are_named(model, pixels, call, inputs, message):
    past = cache_of(model(input_ids=torch.tensor([PROMPT]), images=pixels[:1], use_cache=True))
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(model, call)(images=pixels[:1], past_key_values=past, **given)


def test_a_prompt_mask_of_another_width_is_named(model, pixels):
    message = r"^attention_mask is \(1, 4\), but input_ids are \(1, 5\); it needs a column for each id, of which"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids=torch.tensor([PROMPT]), images=pixels[:1], attention_mask=torch.ones(1, 4))


def test_images_beside_embeddings_are_refused(model, pixels):
    with pytest.raises(ValueError, match=r"^images need input_ids with placeholders; pass images or inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 16), images=pixels[:1], **OPTIONS)
