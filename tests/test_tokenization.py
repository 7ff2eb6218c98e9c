"""Token ids are the original's, for either `legacy`, and come back as the text they were made of."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from llava.mm_utils import tokenizer_image_token
from llava.tokenization import LlavaTokenizer, load_tokenizer, save_tokenizer

MARKS = ("<s>", "</s>", "<unk>")


def test_every_golden(golden_json, tokenizers):
    cases = golden_json("tokenization")
    assert len(cases) == 112
    for case in cases:
        tokenizer = tokenizers[case["legacy"]]
        if "ids" in case:
            assert tokenizer(case["text"]).input_ids == case["ids"], case
            assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer_image_token(case["text"], tokenizer) == case["image_ids"], case


@pytest.mark.parametrize(
    ("legacy", "text", "ids", "decoded"),
    [
        (False, "a</s>b", [264, 2, 28726], "a</s>b"),
        (True, "a</s>b", [264, 2, 287], "a</s> b"),
        (False, "x <s> y", [1318, 28705, 1, 337], "x <s> y"),
        (True, "x <s> y", [1318, 28705, 1, 28705, 337], "x <s>  y"),
        (False, "</s>", [2], "</s>"),
        (True, "</s>", [2], "</s>"),
    ],
)
def test_special_tokens_inside_text(tokenizers, legacy, text, ids, decoded):
    assert tokenizers[legacy].encode_text(text) == ids
    assert tokenizers[legacy].decode(ids) == decoded


def test_text_that_continues_gets_no_space(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_text("yes")) == ["▁yes"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_text("yes", at_start=False)) == ["yes"]


def test_bytes_stand_for_characters_without_a_piece(tokenizer):
    ids = tokenizer.encode_text("é漢🦙")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("▁é", "<0xE6>", "<0xBC>", "<0xA2>", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>")
    ]
    assert tokenizer.decode(ids) == "é漢🦙"


def test_decoding_can_leave_special_tokens_out(tokenizer):
    ids = tokenizer("yes</s>").input_ids
    assert tokenizer.decode(ids) == "<s> yes</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "yes"
    assert tokenizer.batch_decode([ids, ids[:1]], skip_special_tokens=True) == ["yes", ""]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")).filter(
    lambda text: not any(mark in text for mark in MARKS)
)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_mark_for_a_space_becomes_a_space(tokenizer):
    assert tokenizer.encode_text("a▁b") == tokenizer.encode_text("a b")


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        tokenizer.encode_text("a\ud83d")


def test_pickles(tokenizers):
    for legacy, tokenizer in tokenizers.items():
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy("a</s>b  c").input_ids == tokenizer("a</s>b  c").input_ids
        assert copy.legacy is legacy


def test_begin_and_end_as_configured(goldens):
    path = str(goldens / "llava-v1.5-golden" / "tokenizer.model")
    tokenizer = LlavaTokenizer(path, legacy=False, add_bos_token=False, add_eos_token=True)
    assert tokenizer("a").input_ids == [264, 2]
    assert tokenizer.build_inputs_with_special_tokens([5], [6]) == [5, 2, 6, 2]


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert (tokenizer.vocab_size, len(tokenizer), len(vocabulary)) == (32000, 32000, 32000)
    assert (vocabulary["▁yes"], vocabulary["<0x0A>"], vocabulary["</s>"]) == (5081, 13, 2)
    assert tokenizer.convert_tokens_to_ids(["no such piece"]) == [0]


def test_added_tokens_are_kept_whole_and_saved(goldens, tmp_path):
    tokenizer = load_tokenizer(goldens / "llava-v1.5-golden")
    tokenizer.add_tokens(["<im_start>"], special_tokens=True)
    assert tokenizer.encode_text("a<im_start>b") == [264, 32000, 28726]
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).encode_text("a<im_start>b") == [264, 32000, 28726]


def test_reads_the_releases_settings(goldens):
    tokenizer = load_tokenizer(goldens / "llava-v1.5-golden")
    assert tokenizer.legacy is False
    assert tokenizer.model_max_length == 2048
    assert tokenizer.padding_side == "right"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)


def test_a_bare_vocabulary_means_legacy(goldens, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((goldens / "llava-v1.5-golden" / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.legacy is True
    assert tokenizer("a</s>b").input_ids == [1, 264, 2, 287]
    assert tokenizer.pad_token is None


def test_added_tokens_file_of_older_releases(goldens, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((goldens / "llava-v1.5-golden" / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 32000)
    assert tokenizer.encode_text("<pad>") == [32000]


def test_save_and_load_round_trip(tokenizers, tmp_path, golden_json):
    for legacy, tokenizer in tokenizers.items():
        save_tokenizer(tokenizer, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "special_tokens_map.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
        settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert (settings_["tokenizer_class"], settings_["legacy"]) == ("LlamaTokenizer", legacy)
        loaded = load_tokenizer(tmp_path)
        assert loaded.pad_token == "<unk>"
        for case in golden_json("tokenization"):
            if case["legacy"] is legacy and "ids" in case:
                assert loaded(case["text"]).input_ids == case["ids"]


def test_missing_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model is missing; copy it there from the base model"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_merges_spaces_is_refused(goldens, tmp_path):
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        (goldens / "llava-v1.5-golden" / "tokenizer.model").read_bytes()
    )
    proto.normalizer_spec.remove_extra_whitespaces = True
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="this sentencepiece model changes spaces, so it is not a Llama tokenizer"):
        LlavaTokenizer(str(path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_settings_file_is_named(name, goldens, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((goldens / "llava-v1.5-golden/tokenizer.model").read_bytes())
    (tmp_path / name).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name} is no valid JSON .*; fetch the file again"):
        load_tokenizer(tmp_path)
