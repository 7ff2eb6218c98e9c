"""`tokenizer.model` and `tokenizer.json` become each other without changing an id."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AddedToken, LlamaTokenizer

from llava.tokenization.llama_tokenizer import LlavaTokenizer
from llava.tokenization.tokenizer_json import (
    added_tokens_of_json,
    puts_space_after_special_tokens,
    sentencepiece_from_json,
    tokenizer_json,
)

MARKS = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
ADDED = {index: AddedToken(mark, normalized=False, special=True) for index, mark in MARKS.items()}
ENDS = {"begin": ("<s>", 1), "end": None, "text_starts_after": ("<image>",)}

SPACES = (" ", "  ", " " * 7, "\n", "\t", "\0", "\xa0", "\u200b", "▁")
WORDS = ("the", "The", "er", "ere", "é", "e\u0301", "漢", "🦙", "1", "12", "-", "----", "USER:", "[INST]")
NEARLY_MARKS = ("<0x0A>", "</", "s>")
atoms = st.sampled_from([*MARKS.values(), *SPACES, *WORDS, *NEARLY_MARKS])
texts = st.one_of(st.lists(atoms, max_size=12).map("".join), st.text(st.characters(exclude_categories=["Cs"])))


@pytest.fixture(scope="module")
def model(goldens):
    return (goldens / "llava-v1.5-golden" / "tokenizer.model").read_bytes()


@pytest.fixture(scope="module")
def contents(model):
    """Our `tokenizer.json` by `legacy`."""
    return {legacy: tokenizer_json(model, ADDED, legacy=legacy, **ENDS) for legacy in (False, True)}


@pytest.fixture(scope="module")
def directory(contents, tmp_path_factory):
    """Where these are files: `False.json`, `True.json`."""
    path = tmp_path_factory.mktemp("engine")
    for legacy, content in contents.items():
        (path / f"{legacy}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def engines(directory):
    return {legacy: Tokenizer.from_file(str(directory / f"{legacy}.json")) for legacy in (False, True)}


@pytest.fixture(scope="module")
def ours(model):
    marks = {index: token for index, token in ADDED.items() if index != 32000}
    return {
        legacy: LlavaTokenizer(vocabulary=model, legacy=legacy, added_tokens_decoder=marks) for legacy in (False, True)
    }


@pytest.fixture(scope="module")
def rebuilt(directory):
    return {
        legacy: LlavaTokenizer(vocabulary=sentencepiece_from_json(directory / f"{legacy}.json"), legacy=legacy)
        for legacy in (False, True)
    }


def encode_between_images(text, tokenizer):
    first, *others = text.split("<image>")
    ids = tokenizer.encode_text(first)
    for chunk in others:
        ids += [32000, *tokenizer.encode_text(chunk)]
    return ids


@given(texts)
@example("a\n </s>b<image>\n <unk>")  # a line's start is no text's start
@example("<s>USER: a</s> b")
@example("</s>USER: a<image>USER: b<image></s>")
@settings(max_examples=300, deadline=None)
def test_the_engine_encodes_as_ours_does(engines, ours, text):
    for legacy, engine in engines.items():
        assert engine.encode(text).ids == [1, *encode_between_images(text, ours[legacy])]


@given(texts)
@settings(max_examples=300, deadline=None)
def test_the_engine_decodes_what_it_encoded(engines, text):
    text = "".join(text.split("▁"))
    if not any(mark in text for mark in MARKS.values()):
        for engine in engines.values():
            assert engine.decode(engine.encode(text).ids) == text


def test_runs_of_one_character(engines, ours, rebuilt):
    """In the goldens' vocabulary the pieces of spaces share one score, so that only their place orders them."""
    for character in (" ", "-", "=", "e", "#", "\n"):
        for length in range(1, 70):
            for text in (character * length, f"a{character * length}b"):
                ids = ours[False].encode_text(text)
                assert engines[False].encode(text, add_special_tokens=False).ids == ids
                assert rebuilt[False].encode_text(text) == ids


@given(texts)
@settings(max_examples=300, deadline=None)
def test_the_rebuilt_vocabulary_encodes_as_the_original(rebuilt, tokenizers, text):
    for legacy, tokenizer in tokenizers.items():
        assert rebuilt[legacy].encode_text(text) == tokenizer.encode_text(text)


def test_the_rebuilt_vocabulary_has_the_original_pieces(model, directory):
    original = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_from_json(directory / "False.json"))
    assert [(piece.piece, piece.type) for piece in proto.pieces] == [
        (piece.piece, piece.type) for piece in original.pieces
    ]
    for field in ("model_type", "vocab_size", "byte_fallback", "unk_id", "bos_id", "eos_id"):
        assert getattr(proto.trainer_spec, field) == getattr(original.trainer_spec, field)
    for field in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(proto.normalizer_spec, field) == getattr(original.normalizer_spec, field)


@pytest.fixture(scope="module", params=[False, True])
def transformers_conversion(request, model, tmp_path_factory):
    """Legacy flag, the vocabulary of a model whose scores fall with its ids, as in Llama's, and what transformers
    makes of it."""
    path = tmp_path_factory.mktemp("conversion")
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for index, piece in enumerate(proto.pieces):
        piece.score = -float(index) if piece.type == piece.NORMAL else 0.0
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = LlamaTokenizer.from_pretrained(str(path), legacy=request.param)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.save_pretrained(path / "converted")
    return request.param, proto.SerializeToString(), path / "converted" / "tokenizer.json"


def test_conversions_by_transformers_are_undone(transformers_conversion):
    legacy, original, path = transformers_conversion
    assert puts_space_after_special_tokens(path) is legacy
    assert {index: token.content for index, token in added_tokens_of_json(path).items()} == MARKS
    rebuilt = LlavaTokenizer(vocabulary=sentencepiece_from_json(path))
    expected = LlavaTokenizer(vocabulary=original)

    @given(texts)
    @settings(max_examples=200, deadline=None)
    def law(text):
        assert rebuilt.encode_text(text) == expected.encode_text(text)

    law()
    assert rebuilt.encode_text(" " * 40) == expected.encode_text(" " * 40)


def test_ours_say_where_spaces_go(directory):
    assert puts_space_after_special_tokens(directory / "False.json") is False
    assert puts_space_after_special_tokens(directory / "True.json") is True


def test_begin_and_end_of_texts(model):
    both = Tokenizer.from_str(json.dumps(tokenizer_json(model, ADDED, legacy=False, begin=("<s>", 1), end=("</s>", 2))))
    assert both.encode("a").ids == [1, 264, 2]
    assert both.encode("a", "a").ids == [1, 264, 2, 1, 264, 2]
    neither = Tokenizer.from_str(json.dumps(tokenizer_json(model, ADDED, legacy=False, begin=None, end=None)))
    assert neither.encode("a", "a").ids == [264, 264]


def small(pieces):
    """A sentencepiece model of bytes and these (piece, score)."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = proto.SentencePiece
    proto.pieces.add(piece="<unk>", type=kinds.UNKNOWN)
    for value in range(256):
        proto.pieces.add(piece=f"<0x{value:02X}>", type=kinds.BYTE)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    return proto.SerializeToString()


def test_the_left_of_two_that_share_a_neighbour_is_joined_first():
    letters = [(letter, -9.0) for letter in "abe"]
    longer_left = tokenizer_json(small([*letters, ("ea", -1.0), ("aea", 0.0), ("ae", -2.0)]), {}, legacy=True, **ENDS)
    assert longer_left["model"]["merges"] == ["ae a", "a ea", "e a", "a e"]
    periodic = [("ab", -1.0), ("aba", -2.0), ("ababa", 0.0), ("ba", -3.0)]
    merges = tokenizer_json(small([*letters, *periodic]), {}, legacy=True, **ENDS)["model"]["merges"]
    assert merges[:2] == ["ab aba", "aba ba"]  # as in ab|aba|ba


def test_runs_that_alternate_share_a_score(damaged):
    """As transformers 4 sorts the runs of one score: by the length of the left part, then of the right."""

    def with_runs(content):
        content["model"]["vocab"] |= {"aa": 263, "aaa": 264, "aaaa": 265}
        content["model"]["merges"] += ["aaa a", "aa aa", "aa a", "a aaa", "a aa", "a a"]

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_from_json(damaged(with_runs)))
    scores = {piece.piece: piece.score for piece in proto.pieces}
    assert scores["abc"] > scores["aaaa"] == scores["aaa"] > scores["aa"] > scores["a"]


def test_rows_between_added_tokens(model):
    added = {**ADDED, 32003: AddedToken("<im_start>")}
    with pytest.raises(
        ValueError, match=r"^added tokens have ids \[32000, 32001, 32003\]; let them follow each other f"
    ):
        tokenizer_json(model, added, legacy=True, **ENDS)


def test_scores_that_no_list_of_merges_can_say():
    pieces = [("a", -9.0), ("b", -9.0), ("ab", -1.0), ("ba", -1.0)]
    with pytest.raises(
        ValueError, match=r"^pieces 'ab' and 'ba' have the same score, so no list of merges has their o"
    ):
        tokenizer_json(small(pieces), {}, legacy=True, **ENDS)


@pytest.fixture
def damaged(tmp_path):
    """The function that writes a small `tokenizer.json`, changed by a function, and returns its path."""
    pieces = [*((letter, -9.0) for letter in "abc"), ("ab", 0.0), ("bc", -1.0), ("abc", -2.0)]
    content = tokenizer_json(small(pieces), {}, legacy=True, **ENDS)

    def write(change):
        changed = copy.deepcopy(content)
        change(changed)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        return path

    return write


def test_merges_as_lists_and_an_unnamed_unknown_are_read(damaged):
    def as_newer_releases(content):
        content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
        content["model"]["unk_token"] = None

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_from_json(damaged(as_newer_releases)))
    scores = {piece.piece: piece.score for piece in proto.pieces if len(piece.piece) < 4}
    assert scores == {"a": -3, "b": -3, "c": -3, "ab": 0, "bc": -1, "abc": -2}
    assert proto.pieces[0].type == proto.SentencePiece.UNKNOWN


def test_merges_of_special_and_byte_pieces_are_left_out(damaged):
    def as_transformers_does(content):
        content["model"]["vocab"] |= {"<0x4": 263, "1>": 264, "<0x": 265, "41>": 266}
        content["model"]["merges"][1:1] = ["<0x4 1>"]
        content["model"]["merges"] += ["<0x 41>"]

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_from_json(damaged(as_transformers_does)))
    pieces = {piece.piece: piece for piece in proto.pieces}
    assert (pieces["<0x41>"].type, pieces["<0x41>"].score) == (proto.SentencePiece.BYTE, 0)
    assert pieces["1>"].type == proto.SentencePiece.NORMAL


def test_what_the_engine_cannot_read_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    for content in ("{}", '{"model": 3}', '{"model": {"type": "BPE", "byte_fallback": true}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer \(.*; put the base model's toke"):
            puts_space_after_special_tokens(path)
        with pytest.raises(ValueError, match=r"tokenizer.json is not BPE with byte fallback"):
            sentencepiece_from_json(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["model"].update(type="Unigram"),
            "is not BPE with byte fallback, as Llama's vocabulary is",
        ),
        (
            lambda content: content["model"].update(byte_fallback=False),
            "is not BPE with byte fallback, as Llama's vocabulary is",
        ),
        (lambda content: content.pop("model"), "is not BPE with byte fallback, as Llama's vocabulary is"),
        (lambda content: content["model"]["vocab"].update(a=900), "the ids of its vocabulary are not 0 to 262"),
        (
            lambda content: content["model"]["vocab"].update({"x": content["model"]["vocab"].pop("<0x41>")}),
            "its vocabulary has no '<0x41>'",
        ),
        (lambda content: content["model"]["merges"].pop(0), "'a' and 'b' make a piece, but no merge says so"),
        (
            lambda content: content["model"]["merges"].insert(0, content["model"]["merges"].pop()),
            "its merges make 'abc' and 'ab' by turns",
        ),
    ],
)
def test_what_no_sentencepiece_model_does_is_refused(damaged, change, message):
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}; put the base model's tokenizer.model beside it$"):
        sentencepiece_from_json(damaged(change))
