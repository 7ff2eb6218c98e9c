"""A run planned in windows holds every question once, whatever their size, and tokenises no further than it must."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.inference.batch.questions import Question, number_repeats
from llava.inference.batch.windows import Windows, estimate_positions, find_system_prefix, group_by_images
from llava.inference.engine.prefix_groups import common_system_prefix, has_system_prefix, split_work
from llava.inference.engine.sequence import Request
from llava.inference.prompts import PromptError, place_question

PATCHES = 4


def requests_of(question):
    """Encode a character as its number after a beginning of three ids; the word "stray" changes the beginning."""
    text = place_question(question.text, len(question.images))
    parts = [[ord(character) for character in part] for part in text.split(DEFAULT_IMAGE_TOKEN)]
    ids = [1, 2, 9 if "stray" in text else 3, *parts[0]]
    for part in parts[1:]:
        ids += [IMAGE_TOKEN_INDEX, *part]
    return [Request(question, [*ids, 8], question.images)]


texts = st.sampled_from(["is it?", "why?", "is <image> it?", "", "stray", "a longer question", "ü" * 9])
images = st.sampled_from([(), ("a",), ("b",), ("a", "b"), ("c",)])
some_questions = st.lists(st.builds(Question, st.integers(0, 3), texts, images), max_size=40).map(number_repeats)


@given(some_questions, st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_image_groups_hold_every_question_once_whatever_the_order(questions, largest, random):
    image_groups = group_by_images(questions, largest)
    assert sorted(map(repr, itertools.chain(*image_groups))) == sorted(map(repr, questions))
    assert all(1 <= len(group) <= largest for group in image_groups)
    assert all(len({question.images for question in group}) == 1 for group in image_groups)
    sizes = [(len(group[0].images), sum(len(question.text.encode()) for question in group)) for group in image_groups]
    assert sizes == sorted(sizes, reverse=True)
    by_images = {question.images: len([1 for other in questions if other.images == question.images])
                 for question in questions}  # fmt: skip
    shuffled = group_by_images(random.sample(questions, len(questions)), largest)
    for found in (image_groups, shuffled):
        counts = {images: sum(group[0].images == images for group in found) for images in by_images}
        assert counts == {images: -(-count // largest) for images, count in by_images.items()}


@given(some_questions, st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_image_groups_are_split_evenly_and_once(questions, world_size):
    image_groups = group_by_images(questions, 2)
    shares = split_work(image_groups, lambda group: estimate_positions(group, PATCHES), world_size)
    assert len(shares) == world_size
    assert sorted(map(id, itertools.chain(*shares))) == sorted(map(id, image_groups))
    costs = [[estimate_positions(group, PATCHES) for group in share] for share in shares]
    loads = list(map(sum, costs))
    assert max(loads) - min(loads) <= max(itertools.chain(*costs), default=0)


@given(some_questions, st.integers(1, 50), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_windows_of_any_size_hold_every_question_once_and_whole(questions, size, group_size):
    system_prefix = [1, 2, 3]
    windows = Windows(requests_of, system_prefix, PATCHES, group_size=group_size, size=size)
    found = []
    for group in windows.groups(group_by_images(questions, 32)):
        assert 1 <= len(group.sequences) <= group_size
        for sequence in group.sequences:
            assert [*system_prefix, *group.prefix_ids, *sequence.suffix_ids] == sequence.request.input_ids
            assert group.images == sequence.request.images
            found.append(sequence.request.key)
    errors = windows.take_errors()
    assert not windows.take_errors()
    kinds = {"answered": found, "outside": windows.outside, "error": [answer.question for answer in errors]}
    assert sorted(map(repr, itertools.chain(*kinds.values()))) == sorted(map(repr, questions))
    for kind, members in kinds.items():
        assert {kind_of(question) for question in members} <= {kind}


def kind_of(question):
    try:
        [request] = requests_of(question)
    except PromptError:
        return "error"
    return "answered" if has_system_prefix(request, [1, 2, 3]) else "outside"


@given(some_questions)
@settings(max_examples=100, deadline=None)
def test_the_system_prefix_is_what_all_prompts_start_with(questions):
    """Two questions tell it, for prompts that start alike where their texts do."""
    usual = [question for question in questions if kind_of(question) == "answered"]
    system_prefix = find_system_prefix(usual, requests_of)
    requests = [request for question in usual for request in requests_of(question)]
    assert all(has_system_prefix(request, system_prefix) for request in requests)
    assert system_prefix == common_system_prefix(requests)
    if requests:
        longer = requests[0].input_ids[: len(system_prefix) + 1]
        assert not all(has_system_prefix(request, longer) for request in requests)


def test_no_question_is_tokenised_before_its_window():
    tokenised = []
    questions = [Question(key, "why?" * (1000 - key), (f"{key}.jpg",)) for key in range(1000)]
    windows = Windows(
        lambda question: tokenised.append(question) or requests_of(question), [1, 2, 3], PATCHES, group_size=32, size=7
    )
    for taken, group in enumerate(windows.groups(group_by_images(questions, 32)), start=1):
        assert group.sequences[0].request.key == questions[taken - 1]  # the longest first
        assert len(tokenised) == min(1000, -(-taken // 7) * 7)
