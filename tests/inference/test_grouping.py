"""A plan holds every prompt once, cut so that what is shared is really the same."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.grouping import MAX_BRANCHES, Ask, deal_groups, plan_groups, spliced_length

PATCHES = 4
IMAGE = IMAGE_TOKEN_INDEX


@st.composite
def some_asks(draw):
    """Prompts that share beginnings, pictures, both or nothing."""
    heads = draw(st.lists(st.lists(st.integers(3, 5), max_size=3), min_size=1, max_size=2))
    pictures = draw(st.lists(st.lists(st.sampled_from("ab"), max_size=2).map(tuple), min_size=1, max_size=4))
    asks = []
    for key in range(draw(st.integers(1, 12))):
        images = draw(st.sampled_from(pictures))
        ids = [1, *draw(st.sampled_from(heads)), *[IMAGE] * len(images), *draw(st.lists(st.integers(3, 5), max_size=3))]
        targets = tuple(draw(st.lists(st.integers(3, 5), max_size=2)))
        asks.append(Ask(key, [*ids, 9, *targets], images, targets))
    return asks


@given(some_asks(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_prompt_is_there_once_and_whole(asks, max_branches):
    plan = plan_groups(asks, PATCHES, max_branches=max_branches)
    found = {}
    for group in plan.groups:
        assert 1 <= len(group.branches) <= max_branches
        for branch in group.branches:
            assert [*plan.stem_ids, *group.trunk_ids, *branch.ids] == branch.ask.ids
            assert group.images == branch.ask.images
            assert IMAGE not in branch.ids
            assert len(branch.ids) >= branch.ask.n_kept
            found[branch.ask.key] = branch.ask
    assert IMAGE not in plan.stem_ids
    assert [found[key] for key in sorted(found)] == asks


@given(some_asks(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_file_does_not_matter(asks, random):
    def described(asks):
        plan = plan_groups(asks, PATCHES, max_branches=100)
        groups = [
            (group.images, group.trunk_ids, {branch.ask.key for branch in group.branches}) for group in plan.groups
        ]
        return plan.stem_ids, sorted(groups, key=repr)

    shuffled = random.sample(asks, len(asks))
    assert described(shuffled) == described(asks)


def test_a_plan_written_out():
    asks = [
        Ask(0, [1, 7, IMAGE, 8, 3, 9], ("a",)),
        Ask(1, [1, 7, 5, 9]),
        Ask(2, [1, 7, IMAGE, 8, 4, 9], ("a",)),
        Ask(3, [1, 7, IMAGE, 8, 4, 9], ("b",)),
    ]
    plan = plan_groups(asks, PATCHES)
    assert plan.stem_ids == [1, 7]
    assert [(group.images, group.trunk_ids, [branch.ids for branch in group.branches]) for group in plan.groups] == [
        (("a",), [IMAGE, 8], [[3, 9], [4, 9]]),
        (("b",), [IMAGE, 8], [[4, 9]]),
        ((), [5], [[9]]),
    ]


def test_many_questions_about_a_picture():
    asks = [Ask(key, [1, IMAGE, *range(3, 4 + key % 5), 9], ("a",)) for key in range(106)]
    sizes = [len(group.branches) for group in plan_groups(asks, PATCHES).groups]
    assert sum(sizes) == 106
    assert sorted(sizes) == [26, 26, 27, 27]
    assert max(sizes) <= MAX_BRANCHES


def test_nothing_to_plan():
    assert plan_groups([], PATCHES) == ([], [])


@given(some_asks(), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_work_is_dealt_evenly_and_once(asks, parts):
    groups = plan_groups(asks, PATCHES, max_branches=2).groups
    shares = deal_groups(groups, PATCHES, parts)
    assert len(shares) == parts
    assert {id(group) for group in itertools.chain(*shares)} == {id(group) for group in groups}
    assert sum(map(len, shares)) == len(groups)

    def cost(group):
        return spliced_length(group.trunk_ids, lambda: PATCHES) + group.branch_length

    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(cost, groups))
    order = {id(group): number for number, group in enumerate(groups)}
    assert all([order[id(group)] for group in share] == sorted(order[id(group)] for group in share) for share in shares)


@pytest.mark.parametrize("ids, expected", [([], 0), ([1, 2], 2), ([1, IMAGE, 2, IMAGE], 10)])
def test_spliced_length(ids, expected):
    assert spliced_length(ids, lambda: PATCHES) == expected
