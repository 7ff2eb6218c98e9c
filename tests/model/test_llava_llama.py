"""The model computes what transformers' own LLaVA computes on the same weights, however rows are batched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.splice import assign_images

IMAGE_ID = 63  # transformers' placeholder, an id that no prompt here uses
PATCHES = 4
IMAGE = IMAGE_TOKEN_INDEX
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(mm_vision_select_layer=-2)


def theirs_name(name):
    """Our parameter's name in `LlavaForConditionalGeneration`."""
    if name.startswith("model.vision_tower.vision_tower."):
        return name.replace("model.vision_tower.vision_tower.", "model.vision_tower.")
    if name.startswith("model.mm_projector."):
        _, _, index, leaf = name.split(".")
        return f"model.multi_modal_projector.linear_{1 if index == '0' else 2}.{leaf}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.fixture(scope="module")
def theirs(model):
    text = {
        key: getattr(model.config, key)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**model.config.mm_vision_config),
        text_config=transformers.LlamaConfig(**text, max_position_embeddings=64, pad_token_id=0),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    reference = transformers.LlavaForConditionalGeneration(config).eval()
    state = {theirs_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing
    assert all(".encoder.layers.2." in name or "post_layernorm" in name for name in missing)
    return reference


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def expand(ids):
    """Each placeholder becomes as many image ids as there are patches, as transformers' processor writes them."""
    return [token for entry in ids for token in ([IMAGE_ID] * PATCHES if entry == IMAGE else [entry])]


def pad(rows, value=0, side="right"):
    length = max(len(row) for row in rows)
    padded = [
        row + [value] * (length - len(row)) if side == "right" else [value] * (length - len(row)) + row for row in rows
    ]
    return torch.tensor(padded)


ROWS = [[1, IMAGE, 5, 6, 7], [1, 8, IMAGE, 9], [1, 10, 11, 12, 13, 14]]


@pytest.mark.parametrize(
    ("row", "images"),
    [([1, IMAGE, 5, 6], 1), ([1, IMAGE, 5, IMAGE, 6], 2), ([IMAGE, IMAGE], 2), ([1, 5, 6], 0)],
    ids=["one image", "two images", "only images", "no image"],
)
@torch.no_grad()
def test_logits_of_a_row_equal_transformers(model, theirs, pixels, row, images):
    given = pixels[:images] if images else None
    ours = model(input_ids=torch.tensor([row]), images=given).logits
    expected = theirs(input_ids=torch.tensor([expand(row)]), pixel_values=given).logits
    assert ours.shape == (1, len(expand(row)), 64)
    torch.testing.assert_close(ours, expected, **CLOSE)


@torch.no_grad()
def test_logits_and_loss_of_a_padded_batch_equal_transformers(model, theirs, pixels):
    ids, mask = pad(ROWS), pad([[1] * len(row) for row in ROWS])
    labels = torch.where((ids == IMAGE) | (mask == 0), IGNORE_INDEX, ids)
    ours = model(input_ids=ids, attention_mask=mask, labels=labels, images=pixels[:2])
    expanded = [expand(row) for row in ROWS]
    their_ids, their_mask = pad(expanded), pad([[1] * len(row) for row in expanded])
    their_labels = torch.where((their_ids == IMAGE_ID) | (their_mask == 0), IGNORE_INDEX, their_ids)
    expected = theirs(input_ids=their_ids, attention_mask=their_mask, labels=their_labels, pixel_values=pixels[:2])
    counts = their_mask.bool()
    torch.testing.assert_close(ours.logits[counts], expected.logits[counts], **CLOSE)
    torch.testing.assert_close(ours.loss, expected.loss, **CLOSE)


@torch.no_grad()
def test_image_features_equal_transformers(model, theirs, pixels):
    features = theirs.model.get_image_features(pixel_values=pixels, vision_feature_layer=-2)
    features = getattr(features, "pooler_output", features)
    torch.testing.assert_close(model.encode_images(pixels), torch.stack(list(features)), **CLOSE)


@pytest.mark.parametrize("row", [ROWS[0], [1, IMAGE, 5, IMAGE, 6], ROWS[2]], ids=["one", "two", "none"])
def test_greedy_generation_equals_transformers(model, theirs, pixels, row):
    count = row.count(IMAGE)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(torch.tensor([row]), images=pixels[:count] if count else None, **options)
    with torch.no_grad():
        given = {"pixel_values": pixels[:count]} if count else {}
        expected = theirs.generate(input_ids=torch.tensor([expand(row)]), **given, **options)
    assert ours.tolist() == expected[:, len(expand(row)) :].tolist()
    assert ours.shape == (1, 8)


GENERATED = {
    "one": ({}, 1),
    "beams": ({"num_beams": 3}, 1),
    "sequences": ({"num_beams": 3, "num_return_sequences": 2}, 2),
}


@pytest.mark.parametrize(("options", "rows"), GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=["image", "text"])
def test_generate_returns_new_ids_alone(model, pixels, row, options, rows):
    options = {**options, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    images = pixels[:1] if IMAGE in row else None
    ids = model.generate(torch.tensor([row]), images=images, **options)
    assert ids.shape == (rows, 4)
    output = model.generate(torch.tensor([row]), images=images, return_dict_in_generate=True, **options)
    assert output.sequences.tolist() == ids.tolist()


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=["image", "text"])
def test_a_streamer_gets_new_ids_alone(model, pixels, row, skip_prompt):
    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            texts.append(text)

    texts, tokenizer = [], SimpleNamespace(decode=lambda ids, **_: "".join(f"{token} " for token in ids))
    ids = model.generate(
        torch.tensor([row]),
        images=pixels[:1] if IMAGE in row else None,
        streamer=Streamer(tokenizer, skip_prompt=skip_prompt),
        max_new_tokens=4,
        do_sample=False,
    )
    assert "".join(texts).split() == [str(token) for token in ids[0].tolist()]


def test_generate_takes_embeddings_too(model, pixels):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    embeds = model.splice(torch.tensor([ROWS[0]]), pixels[:1]).inputs_embeds
    expected = model.generate(torch.tensor([ROWS[0]]), images=pixels[:1], **options)
    assert model.generate(inputs_embeds=embeds, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_a_batch_is_as_each_row_alone_and_keeps_its_side_of_padding(model, pixels, side):
    ids, mask = pad(ROWS, side=side), pad([[1] * len(row) for row in ROWS], side=side)
    outputs = model(input_ids=ids, attention_mask=mask, images=pixels[:2])
    for index, row in enumerate(ROWS):
        images = pixels[index : index + 1] if IMAGE in row else None
        alone = model(input_ids=torch.tensor([row]), images=images).logits[0]
        found = outputs.logits[index, : len(alone)] if side == "right" else outputs.logits[index, -len(alone) :]
        torch.testing.assert_close(found, alone, **CLOSE)


@torch.no_grad()
def test_left_and_right_padding_give_the_same_logits(model, pixels):
    ids, mask = pad(ROWS), pad([[1] * len(row) for row in ROWS])
    logits = []
    for side in ("right", "left"):
        spliced = model.splice(ids, pixels[:2], attention_mask=mask, padding_side=side)
        output = model(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            position_ids=spliced.position_ids,
        )
        logits.append(output.logits[spliced.attention_mask])
    torch.testing.assert_close(*logits, **CLOSE)


def test_generated_batches_equal_single_rows(model, pixels):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids, mask = pad(ROWS), pad([[1] * len(row) for row in ROWS])
    together = model.generate(ids, images=pixels[:2], attention_mask=mask, **options)
    for index, row in enumerate(ROWS):
        images = pixels[index : index + 1] if IMAGE in row else pixels[:1]
        alone = model.generate(input_ids=torch.tensor([row]), images=images, **options)
        assert together[index].tolist() == alone[0].tolist()


@torch.no_grad()
def test_a_spare_image_of_a_text_row_changes_nothing(model, pixels):
    ids, mask = pad(ROWS), pad([[1] * len(row) for row in ROWS])
    plain = model(input_ids=ids, attention_mask=mask, images=pixels[:2]).logits
    spare = model(input_ids=ids, attention_mask=mask, images=pixels[:3]).logits
    torch.testing.assert_close(plain, spare, **CLOSE)
    text = torch.tensor([ROWS[2]])
    torch.testing.assert_close(model(input_ids=text, images=pixels[:1]).logits, model(input_ids=text).logits, **CLOSE)


@torch.no_grad()
def test_a_text_row_between_others_skips_its_own_image(model, pixels):
    rows = [ROWS[0], ROWS[2], ROWS[1]]
    ids, mask = pad(rows), pad([[1] * len(row) for row in rows])
    spare = model(input_ids=ids, attention_mask=mask, images=pixels[[0, 3, 1]]).logits
    expected = model(input_ids=ids, attention_mask=mask, images=pixels[:2]).logits
    torch.testing.assert_close(spare, expected, **CLOSE)


def test_a_spare_image_keeps_the_projector_in_the_graph(tiny_model, pixels):
    model = tiny_model()
    model.get_vision_tower().requires_grad_(False)
    ids = torch.tensor([ROWS[2]])
    model(input_ids=ids, labels=ids, images=pixels[:1]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.get_model().mm_projector.named_parameters()}
    assert sorted(gradients) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    assert model.lm_head.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.get_vision_tower().parameters())


def test_an_image_that_is_used_gives_the_projector_gradients(tiny_model, pixels):
    model = tiny_model()
    ids = torch.tensor([ROWS[0]])
    model(input_ids=ids, labels=ids.clamp(min=IGNORE_INDEX), images=pixels[:1]).loss.backward()
    assert all(parameter.grad.any() for parameter in model.get_model().mm_projector.parameters())


@torch.no_grad()
def test_images_as_a_list_and_as_tiles(model, pixels):
    row = torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    stacked = model(input_ids=row, images=pixels[:2]).logits
    assert torch.equal(model(input_ids=row, images=[pixels[0], pixels[1]], image_sizes=[(28, 28)] * 2).logits, stacked)
    tiles = model(input_ids=row, images=[pixels[:1], pixels[1:4]]).logits
    assert tiles.shape == (1, 3 + 4 * PATCHES, 64)
    assert torch.equal(model(input_ids=row, images=[pixels[0], pixels[1:4]]).logits, tiles)
    one = model(input_ids=torch.tensor([[1, IMAGE, IMAGE, 6]]), images=pixels[:2]).logits
    assert torch.equal(model(input_ids=torch.tensor([[1, IMAGE, 6]]), images=pixels[None, :2]).logits, one)


def test_other_ways_to_merge_tiles_are_refused(tiny_model, pixels):
    model = tiny_model(mm_patch_merge_type="spatial_unpad")
    with pytest.raises(ValueError, match=r"^mm_patch_merge_type 'spatial_unpad' is not supported; use 'flat'$"):
        model(input_ids=torch.tensor([[1, IMAGE]]), images=pixels[None, :2])


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_placeholders_without_images_are_named(model, call):
    with pytest.raises(ValueError, match=r"^the prompts hold 2 image placeholders, but 0 images were given$"):
        getattr(model, call)(input_ids=torch.tensor([[1, IMAGE, IMAGE, 5]]))


def test_too_many_images_are_named(model, pixels):
    with pytest.raises(ValueError, match=r"^the prompts hold 1 image placeholders, but 3 images were given$"):
        model(input_ids=torch.tensor([[1, IMAGE, 5]]), images=pixels[:3])


@pytest.mark.parametrize(
    ("counts", "images", "used", "spare"),
    [
        ([1, 1], 2, [0, 1], []),
        ([1, 0], 1, [0], []),
        ([0, 1, 0], 3, [1], [0, 2]),
        ([2, 0, 1], 4, [0, 1, 3], [2]),
        ([0, 0], 2, [], [0, 1]),
        ([0, 0], 1, [], [0]),
        ([0], 0, [], []),
    ],
)
def test_images_are_assigned_in_reading_order(counts, images, used, spare):
    assert assign_images(counts, list(range(images))) == (used, spare)


@pytest.mark.parametrize(("counts", "images"), [([1], 0), ([1, 0], 3), ([2, 2], 3)])
def test_numbers_that_fit_no_reading(counts, images):
    message = f"^the prompts hold {sum(counts)} image placeholders, but {images} images were given$"
    with pytest.raises(ValueError, match=message):
        assign_images(counts, list(range(images)))


def test_model_without_a_vision_tower(tiny_model):
    model = tiny_model(mm_vision_config=None)
    assert not [name for name, _ in model.named_parameters() if "mm_projector" in name or "vision" in name]
    assert model(input_ids=torch.tensor([[1, 5]])).logits.shape == (1, 2, 64)


def test_names_that_users_rely_on(model, pixels):
    assert model.get_vision_tower() is model.get_model().vision_tower
    assert model.encode_images(pixels).shape == (4, PATCHES, 16)
    assert model.config.model_type == "llava_llama"
    from llava import LlavaLlamaForCausalLM

    assert type(model) is LlavaLlamaForCausalLM


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_inputs_of_other_shapes_are_named(model, pixels, call):
    ids = torch.tensor([1, IMAGE, 5])
    with pytest.raises(ValueError, match=r"^input_ids are \(3,\); pass \(B, T\), a single prompt as"):
        getattr(model, call)(ids, images=pixels[:1])
    with pytest.raises(ValueError, match=r"^images are \(3, 28, 28\); pass \(N, 3, height, width\), or a list of"):
        getattr(model, call)(ids[None], images=pixels[0])
    with pytest.raises(ValueError, match=r"^images are a list of \(28, 28\); pass \(N, 3, height, width\)"):
        getattr(model, call)(ids[None], images=[pixels[0, 0]])
    with pytest.raises(ValueError, match=r"^images are a list of \(3, 28, 28\), \(3, 28, 14\); pass \(N, 3, height"):
        getattr(model, call)(ids[None], images=[pixels[0], pixels[0, :, :, :14]])
    with pytest.raises(TypeError, match=r"^images hold a ndarray; pass the pixels that process_images makes of them$"):
        getattr(model, call)(ids[None], images=[pixels[0].numpy()])


def test_a_tower_that_is_frozen_later_leaves_the_training_mode(tiny_packed_model):
    model = tiny_packed_model().train()
    tower = model.get_vision_tower().requires_grad_(True)
    assert model.train().get_vision_tower().training or tower.train().training
    tower.requires_grad_(False)
    assert [model.train().training, tower.training, tower.vision_tower.training] == [True, False, False]
