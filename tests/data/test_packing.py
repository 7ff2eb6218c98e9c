"""Which records share a prefix, and literal packs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.constants import NO_GROUP, SYSTEM_PREFIX
from llava.data.packing import (
    RecordGroup,
    fill_rows,
    group_records,
    image_prefix_length,
    pack_records,
    padded_length,
    sharing_key,
    system_prefix_length,
)
from llava.data.records import EncodedRecord, spliced_length

__, IMAGE = -100, -200
PATCHES = 2


def record(ids, labels, *images):
    return EncodedRecord(ids, labels, [Path(name) for name in images])


def lengths(records):
    return [spliced_length(item.input_ids, PATCHES) for item in records]


RED = record([1, IMAGE, 5, 6, 7, 2], [__, __, __, __, 7, 2], "a.png")
BLUE = record([1, IMAGE, 5, 8, 9, 2], [__, __, __, __, 9, 2], "a.png")
OTHER = record([1, IMAGE, 4, 3, 2], [__, __, __, 3, 2], "b.png")
TEXT = record([1, 4, 3], [__, __, 3])


def test_a_pack_written_out():
    a, b = range(2), range(2, 4)
    pack = pack_records([RED, TEXT, BLUE, OTHER], [[a], [], [a], [b]], multiple=8)
    #                          system  image     red     blue     text   other          padding
    assert pack.input_ids.tolist() == [[1, 0, 0, 5, 6, 7, 2, 8, 9, 2, 4, 3, 0, 0, 4, 3, 2, *[0] * 7]]
    supervised = [__, __, __, __, __, 7, 2, __, 9, 2, __, 3, __, __, __, 3, 2]
    assert pack.labels.tolist() == [[*supervised, *[__] * 7]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 1, 2, 1, 2, 3, 4, 5, *[0] * 7]]
    assert pack.groups.tolist() == [[SYSTEM_PREFIX, *[0] * 9, *[1] * 2, *[2] * 5, *[NO_GROUP] * 7]]
    assert pack.suffixes.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, *[0] * 14]]
    assert pack.supervised.tolist() == [4, 5, 7, 8, 10, 14, 15]
    assert pack.image_positions.tolist() == [1, 2, 12, 13]
    assert pack.patches.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("positions", "padded"), [(1, 7), (7, 7), (8, 20), (20, 20), (21, 32), (32, 32), (33, 64)])
def test_rows_are_as_long_as_the_shortest_length_that_holds_them(positions, padded):
    assert padded_length(positions, 32, [20, 7]) == padded
    rows = [record([1] * positions, [*[__] * (positions - 1), 2])]
    assert pack_records(rows, [[]], multiple=32, lengths=[20, 7]).input_ids.shape == (1, padded)


def test_rows_within_a_budget():
    pack = pack_records([RED, TEXT, BLUE, OTHER], [[range(2)], [], [range(2)], [range(2, 4)]], budget=10)
    assert pack.input_ids.tolist() == [[1, 0, 0, 5, 6, 7, 2, 8, 9, 2], [1, 4, 3, 0, 0, 4, 3, 2, 0, 0]]
    assert pack.groups.tolist() == [[0] * 10, [SYSTEM_PREFIX, 0, 0, 1, 1, 1, 1, 1, NO_GROUP, NO_GROUP]]
    assert pack.image_positions.tolist() == [1, 2, 13, 14]


def test_a_group_above_the_budget_is_divided_and_its_image_encoded_once():
    pack = pack_records([RED, BLUE], [[range(2)], [range(2)]], budget=9)
    assert pack.input_ids.tolist() == [[1, 0, 0, 5, 6, 7, 2], [1, 0, 0, 5, 8, 9, 2]]
    assert pack.patches.tolist() == [0, 1, 0, 1]


def test_a_record_above_the_budget_has_a_row_of_its_own():
    pack = pack_records([TEXT, OTHER], [[], [range(2)]], budget=4)
    assert pack.groups.tolist() == [[0] * 6, [0] * 3 + [NO_GROUP] * 3]


def test_the_image_prefix_ends_before_the_token_that_predicts_an_answer():
    twins = [record([1, IMAGE, 5, 6, 7], [__, __, __, __, 7], "a.png")] * 2
    assert image_prefix_length(twins) == 3  # 6 predicts 7, so each suffix has its own
    assert image_prefix_length([RED, BLUE]) == 3


@pytest.mark.parametrize(
    ("reason", "other"),
    [
        ("another image", record(RED.input_ids, RED.labels, "b.png")),
        ("another system prompt", record([3, *RED.input_ids[1:]], RED.labels, "a.png")),
        ("no image", TEXT),
    ],
)
def test_what_keeps_records_apart(reason, other):
    assert group_records([RED, other], lengths([RED, other])) == [
        RecordGroup([0], 6),
        RecordGroup([1], len(other.input_ids)),
    ]


def test_an_image_after_or_right_before_supervised_text_is_not_shared():
    late = record([1, 5, 3, IMAGE, 4, 2], [__, __, 3, __, __, 2], "a.png")
    caption = record([1, IMAGE, 7, 2], [__, __, 7, 2], "a.png")  # the image itself predicts the answer
    for item in (late, caption):
        assert sharing_key(item) is None
        assert len(group_records([item, item], lengths([item, item]))) == 2


def test_several_images_and_several_turns_share():
    first = record([1, IMAGE, IMAGE, 5, 6, 7, 8, 2], [__, __, __, __, __, 7, __, 2], "a.png", "b.png")
    second = record([1, IMAGE, IMAGE, 4, 6, 2], [__, __, __, __, __, 2], "a.png", "b.png")
    assert group_records([first, second], lengths([first, second])) == [RecordGroup([0, 1], 3)]


def test_the_first_position_of_a_group_is_no_target():
    pack = pack_records([TEXT, record([5, 6], [5, 6])], [[], []])
    assert pack.labels.tolist() == [[__, __, 3, __, 6]]
    assert pack.supervised.tolist() == [1, 3]


def test_the_system_prefix_ends_before_images_and_predictors():
    assert system_prefix_length([RED, OTHER]) == 1
    assert system_prefix_length([TEXT, TEXT]) == 1  # 4 predicts 3
    assert (
        system_prefix_length(
            [record([1, 8, 8, IMAGE, 5, 2], [__] * 5 + [2]), record([1, 8, 8, 7, 4, 2], [__] * 5 + [2])]
        )
        == 3
    )
    assert system_prefix_length([record([5, 6], [5, 6]), record([5, 6], [5, 6])]) == 0


def test_a_row_of_one_group_has_no_system_prefix():
    assert SYSTEM_PREFIX not in pack_records([RED, BLUE], [[range(2)], [range(2)]]).groups


def test_rows_are_filled_longest_first():
    assert fill_rows([3, 5, 2, 4], 7) == [[1, 2], [0, 3]]
    assert fill_rows([3, 9], 7) == [[1], [0]]
    assert fill_rows([3, 9], None) == [[0, 1]]


questions = st.tuples(st.sampled_from("ab"), st.lists(st.integers(3, 5), min_size=1, max_size=5))


@given(st.lists(questions, min_size=1, max_size=12), st.integers(9, 40))
def test_no_row_exceeds_its_budget_and_nothing_is_lost(asked, budget):
    records = [record([1, IMAGE, *ids, 2], [__] * (2 + len(ids)) + [2], name) for name, ids in asked]
    place = {"a": range(PATCHES), "b": range(PATCHES, 2 * PATCHES)}
    pack = pack_records(records, [[place[name]] for name, _ in asked], budget=budget)
    assert pack.input_ids.shape[1] <= budget
    assert len(pack.supervised) == len(records)
    groups = group_records(records, lengths(records), budget)
    assert sorted(index for group in groups for index in group.members) == list(range(len(records)))
    used = int((pack.groups != NO_GROUP).sum())
    saved = sum(max(len(set(row.tolist()) - {NO_GROUP, SYSTEM_PREFIX}) - 1, 0) for row in pack.groups)  # one token each
    assert used + saved == sum(
        group.prefix + PATCHES - 1 + sum(len(records[index].input_ids) - group.prefix for index in group.members)
        for group in groups
    )
