"""Text that grows token by token ends as the text decoded at once, and never shows half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.inference.detokenizer import AnswerStream, clean_answer, decode_answer
from llava.tokenization.llama_tokenizer import load_tokenizer

tokens = st.lists(st.integers(0, 31999) | st.integers(0, 300), max_size=25)


@pytest.fixture(scope="module")
def tokenizer(goldens):
    return load_tokenizer(goldens / "llava-v1.5-golden")


def stream(ids, tokenizer, stop_text):
    answer = AnswerStream(tokenizer, stop_text)
    pieces = [answer.push(token) for token in ids]
    return [*pieces, answer.finish()]


@given(ids=tokens, stop_text=st.sampled_from(["</s>", "###", "\n", "ab"]))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole_answer(tokenizer, ids, stop_text):
    assert "".join(stream(ids, tokenizer, stop_text)) == decode_answer(ids, tokenizer, stop_text)


@pytest.mark.parametrize(
    "text", [" a llama 🦙 and 两 ", "naïve  two spaces", "𝔘𝔫𝔦", "plain", "ends ##", "####x", " \n\n a"]
)
@pytest.mark.parametrize("stop_text", ["</s>", "###"])
def test_no_piece_is_taken_back(tokenizer, text, stop_text):
    ids = tokenizer.encode_text(text, at_start=False)
    shown = ""
    for piece in stream(ids, tokenizer, stop_text):
        shown += piece
        assert clean_answer(text, stop_text).startswith(shown)
    assert shown == clean_answer(text, stop_text)


def test_bytes_are_held_back_until_they_are_a_character(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>", "▁b"])
    assert stream(ids, tokenizer, "</s>") == ["a", "", "", "", "🦙", " b", ""]


def test_bytes_that_never_become_a_character_are_shown_in_the_end(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xF0>"])
    assert stream(ids, tokenizer, "</s>") == ["a", "", "\ufffd"]


def test_spaces_between_words_come_with_the_next_word(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["▁yes", "▁", "▁no", "▁"])
    assert stream(ids, tokenizer, "</s>") == ["yes", "", "  no", "", ""]


def test_the_end_mark_is_no_text(tokenizer):
    assert decode_answer([*tokenizer.encode_text(" yes", at_start=False), 2], tokenizer, "</s>") == "yes"


@pytest.mark.parametrize("text, clean", [(" yes ###Human: a", "yes"), ("###", ""), (" a\n", "a"), ("# a", "# a")])
def test_cleaning_cuts_at_the_stop_text(text, clean):
    assert clean_answer(text, "###") == clean
