"""Splicing equals a naive reference, and padding sides differ by a shift alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.splice import splice_image_features

WIDTH = 3
TABLE = torch.arange(10 * WIDTH, dtype=torch.float32).view(10, WIDTH) + 1


def embed(ids):
    return TABLE[ids]


def reference(rows, features, padding_side="right", max_length=None):
    """Token by token: (embedding, label) lists, then padding."""
    features = iter(features)
    spliced = []
    for row in rows:
        line = []
        for token in row:
            if token == IMAGE_TOKEN_INDEX:
                line += [(patch.tolist(), IGNORE_INDEX) for patch in next(features)]
            else:
                line.append((TABLE[token].tolist(), token + 100))
        spliced.append(line[:max_length])
    length = max(len(line) for line in spliced)
    embeds, mask, positions, labels = [], [], [], []
    for line in spliced:
        missing = length - len(line)
        blank = [([0.0] * WIDTH, IGNORE_INDEX)] * missing
        full, counts = (line + blank, [1] * len(line) + [0] * missing)
        places = [*range(len(line)), *[0] * missing]
        if padding_side == "left":
            full, counts, places = blank + line, counts[::-1], [*[0] * missing, *range(len(line))]
        embeds.append([entry[0] for entry in full])
        labels.append([entry[1] for entry in full])
        mask.append(counts)
        positions.append(places)
    return embeds, mask, positions, labels


token = st.integers(0, 9)
row = st.lists(st.one_of(token, token, token, st.just(IMAGE_TOKEN_INDEX)), min_size=1, max_size=8)
batch = st.lists(row, min_size=1, max_size=4)


def make_inputs(rows, input_side):
    """Pad rows of token ids with a 7 that doesn't count; labels are token + 100."""
    length = max(len(row) for row in rows)
    ids, labels, mask = [], [], []
    for row in rows:
        missing = [7] * (length - len(row))
        targets = [IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else token + 100 for token in row]
        parts = [(row, targets, [1] * len(row)), (missing, missing, [0] * len(missing))]
        parts = parts if input_side == "right" else parts[::-1]
        ids.append([*parts[0][0], *parts[1][0]])
        labels.append([*parts[0][1], *parts[1][1]])
        mask.append([*parts[0][2], *parts[1][2]])
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)


def make_features(rows):
    """One image of one to three patches for each placeholder, all values different."""
    count = sum(row.count(IMAGE_TOKEN_INDEX) for row in rows)
    return [-torch.arange(1.0, 1 + WIDTH * (1 + index % 3)).view(-1, WIDTH) - 100 * index for index in range(count)]


@given(batch, st.sampled_from(["right", "left"]), st.sampled_from(["right", "left"]), st.none() | st.integers(1, 12))
@settings(deadline=None)
def test_equals_the_reference(rows, input_side, padding_side, max_length):
    ids, labels, mask = make_inputs(rows, input_side)
    features = make_features(rows)
    spliced = splice_image_features(
        ids,
        features,
        embed,
        labels=labels,
        attention_mask=mask,
        max_length=max_length,
        padding_side=padding_side,
    )
    embeds, masks, positions, targets = reference(rows, features, padding_side, max_length)
    assert spliced.inputs_embeds.tolist() == embeds
    assert spliced.attention_mask.dtype == torch.bool
    assert spliced.attention_mask.int().tolist() == masks
    assert spliced.position_ids.tolist() == positions
    assert spliced.labels.tolist() == targets


@given(batch)
@settings(deadline=None)
def test_left_and_right_padding_differ_by_a_shift(rows):
    ids, labels, mask = make_inputs(rows, "right")
    features = make_features(rows)
    sides = [
        splice_image_features(ids, features, embed, labels=labels, attention_mask=mask, padding_side=side)
        for side in ("right", "left")
    ]
    for index, length in enumerate(sides[0].attention_mask.sum(1).tolist()):
        for right, left in zip(*sides, strict=True):
            assert torch.equal(right[index, :length], left[index, len(left[index]) - length :])


def test_a_literal_example():
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 2], [3, 4, 0]])
    patches = torch.tensor([[-1.0, -2, -3], [-4, -5, -6]])
    spliced = splice_image_features(ids, [patches], embed, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert spliced.inputs_embeds.tolist() == [
        [[4, 5, 6], [-1, -2, -3], [-4, -5, -6], [7, 8, 9]],
        [[10, 11, 12], [13, 14, 15], [0, 0, 0], [0, 0, 0]],
    ]
    assert spliced.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert spliced.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert spliced.labels is None


def test_without_a_mask_every_token_counts():
    spliced = splice_image_features(torch.tensor([[0, 5]]), [], embed)
    assert spliced.attention_mask.tolist() == [[True, True]]


def test_gradients_reach_the_features():
    patches = torch.zeros(2, WIDTH, requires_grad=True)
    spliced = splice_image_features(torch.tensor([[1, IMAGE_TOKEN_INDEX, 2]]), [patches], embed)
    spliced.inputs_embeds.sum().backward()
    assert torch.equal(patches.grad, torch.ones(2, WIDTH))


def test_features_take_the_embeddings_dtype():
    patches = torch.zeros(1, WIDTH, dtype=torch.float64)
    spliced = splice_image_features(torch.tensor([[IMAGE_TOKEN_INDEX]]), [patches], embed)
    assert spliced.inputs_embeds.dtype == torch.float32


@pytest.mark.parametrize(("ids", "images"), [([[1, 2]], 1), ([[IMAGE_TOKEN_INDEX, 2]], 0), ([[IMAGE_TOKEN_INDEX]], 2)])
def test_images_and_placeholders_must_match(ids, images):
    found = int(ids[0][0] == IMAGE_TOKEN_INDEX)
    message = f"^the prompts hold {found} image placeholders, but {images} images were given$"
    with pytest.raises(ValueError, match=message):
        splice_image_features(torch.tensor(ids), [torch.zeros(1, WIDTH)] * images, embed)


def test_placeholders_in_the_padding_do_not_count():
    ids, mask = torch.tensor([[1, IMAGE_TOKEN_INDEX]]), torch.tensor([[1, 0]])
    assert splice_image_features(ids, [], embed, attention_mask=mask).inputs_embeds.tolist() == [[[4, 5, 6]]]


def test_unknown_padding_side():
    with pytest.raises(ValueError, match=r"^padding_side is 'top'; choose right or left$"):
        splice_image_features(torch.tensor([[1]]), [], embed, padding_side="top")
