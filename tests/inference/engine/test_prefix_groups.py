"""Prefix groups hold every request once, cut so that what is shared is really the same."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.engine.prefix_groups import common_system_prefix, group_length, group_requests, split_work
from llava.inference.engine.sequence import Request

PATCHES = 4
IMAGE = IMAGE_TOKEN_INDEX


def group(requests, group_size=32):
    """System prefix and prefix groups of all requests."""
    system_prefix = common_system_prefix(requests)
    return system_prefix, group_requests(requests, system_prefix, PATCHES, group_size=group_size)


@st.composite
def some_requests(draw):
    """Prompts that share beginnings, images, both or nothing."""
    heads = draw(st.lists(st.lists(st.integers(3, 5), max_size=3), min_size=1, max_size=2))
    image_lists = draw(st.lists(st.lists(st.sampled_from("ab"), max_size=2).map(tuple), min_size=1, max_size=4))
    requests = []
    for key in range(draw(st.integers(1, 12))):
        images = draw(st.sampled_from(image_lists))
        ids = [1, *draw(st.sampled_from(heads)), *[IMAGE] * len(images), *draw(st.lists(st.integers(3, 5), max_size=3))]
        targets = tuple(draw(st.lists(st.integers(3, 5), max_size=2)))
        requests.append(Request(key, [*ids, 9, *targets], images, targets))
    return requests


@given(some_requests(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_request_is_there_once_and_whole(requests, group_size):
    system_prefix, groups = group(requests, group_size)
    found = {}
    for each in groups:
        assert 1 <= len(each.sequences) <= group_size
        for sequence in each.sequences:
            request = sequence.request
            assert [*system_prefix, *each.prefix_ids, *sequence.suffix_ids] == request.input_ids
            assert each.images == request.images
            assert IMAGE not in sequence.suffix_ids
            assert len(sequence.suffix_ids) >= request.n_logits
            found[request.key] = request
    assert IMAGE not in system_prefix
    assert [found[key] for key in sorted(found)] == requests


@given(some_requests(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_file_does_not_matter(requests, random):
    def described(requests):
        system_prefix, groups = group(requests, 100)
        found = [(each.images, each.prefix_ids, {one.request.key for one in each.sequences}) for each in groups]
        return system_prefix, sorted(found, key=repr)

    shuffled = random.sample(requests, len(requests))
    assert described(shuffled) == described(requests)


def test_groups_written_out():
    requests = [
        Request(0, [1, 7, IMAGE, 8, 3, 9], ("a",)),
        Request(1, [1, 7, 5, 9]),
        Request(2, [1, 7, IMAGE, 8, 4, 9], ("a",)),
        Request(3, [1, 7, IMAGE, 8, 4, 9], ("b",)),
    ]
    system_prefix, groups = group(requests)
    assert system_prefix == [1, 7]
    assert [(each.images, each.prefix_ids, [one.suffix_ids for one in each.sequences]) for each in groups] == [
        (("a",), [IMAGE, 8], [[3, 9], [4, 9]]),
        (("b",), [IMAGE, 8], [[4, 9]]),
        ((), [5], [[9]]),
    ]


def test_many_requests_about_an_image():
    requests = [Request(key, [1, IMAGE, *range(3, 4 + key % 5), 9], ("a",)) for key in range(106)]
    assert sorted(len(each.sequences) for each in group(requests)[1]) == [26, 26, 27, 27]


def test_nothing_to_group():
    assert group([]) == ([], [])


@given(some_requests(), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_work_is_split_evenly_and_once(requests, world_size):
    groups = group(requests, 2)[1]

    def cost(each):
        return group_length(each, PATCHES)

    shares = split_work(groups, cost, world_size)
    assert len(shares) == world_size
    assert {id(each) for each in itertools.chain(*shares)} == {id(each) for each in groups}
    assert sum(map(len, shares)) == len(groups)
    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(cost, groups))
    order = {id(each): number for number, each in enumerate(groups)}
    assert all([order[id(each)] for each in share] == sorted(order[id(each)] for each in share) for share in shares)


def test_the_length_of_a_group():
    [each] = group(
        [Request(0, [1, IMAGE, 2, IMAGE, 3, 4], ("a", "b")), Request(1, [1, IMAGE, 2, IMAGE, 5], ("a", "b"))]
    )[1]
    assert group_length(each, PATCHES) == 2 * PATCHES + 1 + 2 + 1
