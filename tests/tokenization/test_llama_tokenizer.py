"""Token ids are the original's, for either `legacy`, and come back as the text they were made of."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import AddedToken, AutoProcessor, AutoTokenizer

from llava.chat_template import chat_template
from llava.clip_image_processor import CLIPPixels
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import get_template
from llava.data.supervision import encode_example
from llava.image_processing import hf_image_processor_settings, hf_processor_settings
from llava.inference.prompts import first_turn_ids, place_question
from llava.mm_utils import process_images, tokenizer_image_token
from llava.tokenization.llama_tokenizer import LlavaTokenizer, load_tokenizer, save_tokenizer, write_hf_tokenizer
from llava.tokenization.sentencepiece_model import load_pieces

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


def test_transformers_own_tokenizer_on_what_save_pretrained_writes(tokenizers, tmp_path, golden_json):
    """Its ids are ours, `<s>` in front, but where a text begins with a space or has one after `</s>`."""
    for legacy, tokenizer in tokenizers.items():
        paths = tokenizer.save_pretrained(tmp_path / str(legacy))
        assert [path.rpartition("/")[2] for path in paths] == [
            *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"),
        ]
        written = json.loads((tmp_path / str(legacy) / "tokenizer_config.json").read_text())
        assert (written["tokenizer_class"], written["add_bos_token"], written["legacy"]) == (
            "LlamaTokenizer",
            True,
            legacy,
        )
        merges = json.loads((tmp_path / str(legacy) / "tokenizer.json").read_text())["model"]["merges"]
        assert all(isinstance(pair, str) for pair in merges)  # transformers before 4.45 reads no other form
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path / str(legacy)), load_tokenizer(tmp_path / str(legacy))
        cases = [case for case in golden_json("tokenization") if case["legacy"] is legacy and "ids" in case]
        for case in cases:
            assert ours(case["text"]).input_ids == case["ids"]
            assert theirs(case["text"]).input_ids[0] == 1
            if not case["text"].startswith(" ") and "</s> " not in case["text"]:
                assert theirs(case["text"]).input_ids == case["ids"], case
        assert len(cases) > 20


def test_save_pretrained_keeps_added_tokens_end_and_template(goldens, tmp_path):
    path = goldens / "llava-v1.5-golden" / "tokenizer.model"
    tokenizer = LlavaTokenizer(str(path), add_eos_token=True, legacy=False)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a<im_start>b").input_ids == tokenizer("a<im_start>b").input_ids
    assert theirs("a<im_start>b").input_ids[-1] == 2
    assert theirs.chat_template == "{{ messages }}"


def test_save_pretrained_without_a_list_of_merges(goldens, tmp_path, caplog):
    """A gap in the ids of added tokens, which `tokenizer.json` can't have."""
    caplog.set_level("INFO")
    path = goldens / "llava-v1.5-golden" / "tokenizer.model"
    tokenizer = LlavaTokenizer(str(path), added_tokens_decoder={32005: AddedToken("<far>", special=True)})
    (tmp_path / "tokenizer.json").write_text("of another tokenizer")
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert "has no tokenizer.json, since added tokens have ids [32005]" in caplog.text
    assert load_tokenizer(tmp_path)("<far>").input_ids == [1, 32005]


def test_bytes_do_for_a_file(goldens, tmp_path):
    path = goldens / "llava-v1.5-golden" / "tokenizer.model"
    tokenizer = pickle.loads(pickle.dumps(LlavaTokenizer(vocabulary=path.read_bytes(), legacy=False)))
    assert tokenizer("a</s>b").input_ids == [1, 264, 2, 28726]
    assert tokenizer.save_vocabulary(str(tmp_path)) == (str(tmp_path / "tokenizer.model"),)
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()


def test_neither_file_nor_bytes():
    with pytest.raises(
        ValueError, match=r"^no vocabulary; pass vocab_file=, the path of tokenizer.model, or its bytes$"
    ):
        LlavaTokenizer()


def test_a_vocabulary_cut_off_between_two_pieces(goldens):
    whole = sentencepiece_model_pb2.ModelProto.FromString((goldens / "llava-v1.5-golden/tokenizer.model").read_bytes())
    cut = sentencepiece_model_pb2.ModelProto(pieces=whole.pieces[:500]).SerializeToString()
    assert whole.SerializeToString().startswith(cut)
    with pytest.raises(ValueError, match=r"^x is damaged \(cut off, or no pieces\); fetch it again, or copy it from"):
        load_pieces(cut, "x")


def test_rows_that_no_token_has_are_empty_text(hf_directories):
    tokenizer = load_tokenizer(hf_directories[False])
    assert tokenizer.decode([32002, 5081, 32063, 287, 2, 32010]) == "yes b</s>"
    assert tokenizer.convert_ids_to_tokens([32063]) == [""]
    assert tokenizer.decode([32002]) == ""
    with pytest.raises(IndexError, match="out of range"):
        tokenizer.decode([IMAGE_TOKEN_INDEX])


IMAGE_ID, PAD_ID = 32000, 32001


@pytest.fixture(scope="module")
def hf_directories(tokenizers, tmp_path_factory):
    """A complete processor directory by `legacy`, as it stands beside converted weights."""
    directories = {}
    for legacy, tokenizer in tokenizers.items():
        path = directories[legacy] = tmp_path_factory.mktemp(f"legacy_{legacy}".lower())
        template = chat_template(get_template("v1"))
        write_hf_tokenizer(tokenizer, path, image_token_id=IMAGE_ID, pad_token_id=PAD_ID, chat_template=template)
        pixels = hf_image_processor_settings(CLIPPixels(56), do_pad=True)
        processor = hf_processor_settings(patch_size=14, select_feature="patch", image_token="<image>")
        for name, content in (("preprocessor", pixels), ("processor", processor), ("", {"model_type": "llava"})):
            (path / f"{name}_config.json".lstrip("_")).write_text(json.dumps(content))
    return directories


@pytest.fixture(scope="module")
def hf_tokenizers(hf_directories):
    return {legacy: AutoTokenizer.from_pretrained(str(path)) for legacy, path in hf_directories.items()}


def with_image_id(ids, count=1):
    return [new for token in ids for new in ([IMAGE_ID] * count if token == IMAGE_TOKEN_INDEX else [token])]


def test_the_files_for_transformers(hf_directories):
    path = hf_directories[False]
    assert sorted(file.name for file in path.iterdir()) == [
        *("added_tokens.json", "chat_template.jinja", "config.json", "preprocessor_config.json"),
        *("processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
        "tokenizer_config.json",
    ]
    assert json.loads((path / "added_tokens.json").read_text()) == {"<image>": 32000, "<pad>": 32001}
    assert json.loads((path / "special_tokens_map.json").read_text()) == {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }


def test_transformers_gives_every_golden(hf_tokenizers, golden_json):
    for case in golden_json("tokenization"):
        ids = hf_tokenizers[case["legacy"]](case["text"])["input_ids"]
        assert ids == with_image_id(case["image_ids"]), case


spans = st.sampled_from(
    [*MARKS, " ", "  ", "\n", "\t", "é", "e\u0301", "漢", "🦙", "a", "The", "USER:", "[INST]", "▁", "</", "<0x0A>"]
)
turns = st.lists(st.lists(spans, min_size=1).map("".join).filter(str.strip), min_size=2, max_size=6)


@pytest.mark.parametrize("name", ["v1", "llava_v1", "llava_llama_2", "mistral_instruct"])
@given(turns, st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_transformers_gives_the_ids_of_our_dialogues(hf_tokenizers, tokenizers, name, dialogue, images):
    template = get_template(name)
    dialogue = dialogue[: len(dialogue) // 2 * 2]
    records, messages = [], []
    for index, text in enumerate(dialogue):
        n_images = images if index == 0 else 0
        value = text if index % 2 else place_question(text, n_images)
        parts = [*[{"type": "image"}] * n_images, {"type": "text", "text": text}]
        records.append({"from": ("human", "gpt")[index % 2], "value": value})
        messages.append({"role": ("user", "assistant")[index % 2], "content": parts})
    for legacy, engine in hf_tokenizers.items():
        engine.chat_template = chat_template(template)
        prompt = engine.apply_chat_template(messages, tokenize=False)
        ids, _ = encode_example(records, template, tokenizers[legacy])
        assert engine(prompt)["input_ids"] == with_image_id(ids)
        prompt = engine.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = first_turn_ids(dialogue[0], images, template, tokenizers[legacy])
        assert engine(prompt)["input_ids"] == with_image_id(ids)


def test_what_transformers_saves_again_is_the_same(hf_directories, golden_json, tmp_path):
    """transformers writes no `tokenizer.model`; the settings come from its `tokenizer.json`."""
    for legacy, path in hf_directories.items():
        AutoProcessor.from_pretrained(str(path)).save_pretrained(tmp_path)
        assert not (tmp_path / "tokenizer.model").exists()
        loaded = load_tokenizer(tmp_path)
        assert (loaded.legacy, loaded.pad_token_id, loaded.convert_tokens_to_ids("<image>")) == (legacy, 32001, 32000)
        for case in golden_json("tokenization"):
            if case["legacy"] is legacy:
                assert tokenizer_image_token(case["text"], loaded) == case["image_ids"]


@pytest.mark.parametrize("legacy", [False, True])
def test_legacy_shows_in_what_the_engine_does(hf_directories, legacy, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((hf_directories[legacy] / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).legacy is legacy
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": not legacy}))
    assert load_tokenizer(tmp_path).legacy is not legacy


def test_added_tokens_for_images_change_no_example(hf_directories, tokenizers, golden_json):
    for legacy, path in hf_directories.items():
        loaded = load_tokenizer(path)
        for case in golden_json("supervision"):
            if case["legacy"] is legacy:
                arguments = case["conversations"], case["version"]
                assert encode_example(*arguments, loaded) == encode_example(*arguments, tokenizers[legacy])


def test_settings_as_found_in_the_wild(hf_directories, tmp_path):
    """As on the hub for llava-1.5-7b-hf, with nulls as older releases wrote them."""
    (tmp_path / "tokenizer.json").write_bytes((hf_directories[False] / "tokenizer.json").read_bytes())
    mark = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    content = {
        "add_bos_token": None,
        "add_prefix_space": None,
        "added_tokens_decoder": {"32000": {**mark, "content": "<image>"}},
        "additional_special_tokens": None,
        "bos_token": {"__type": "AddedToken", "content": "<s>", **mark},
        "chat_template": None,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": None,
        "model_max_length": None,
        "pad_token": None,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<pad>", **mark}, "eos_token": None, "image_token": "<image>"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a<image>b</s>c").input_ids == [1, 264, 32000, 28726, 2, 28717]
    assert (tokenizer.legacy, tokenizer.padding_side, tokenizer.pad_token_id) == (False, "left", 32001)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**content, "added_tokens_decoder": None}))
    assert load_tokenizer(tmp_path).convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]


def test_a_row_that_pads_already(tokenizer, tmp_path):
    write_hf_tokenizer(tokenizer, tmp_path, image_token_id=IMAGE_ID, pad_token_id=0, chat_template="")
    engine = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (engine.pad_token, engine.pad_token_id, len(engine)) == ("<unk>", 0, 32001)


def test_rows_that_are_taken(tokenizer, hf_directories, tmp_path):
    with pytest.raises(
        ValueError, match=r"^'<image>' can't have id 5081: id 5081 is '▁yes'; give it the next free row$"
    ):
        write_hf_tokenizer(tokenizer, tmp_path, image_token_id=5081, pad_token_id=0, chat_template="")
    with pytest.raises(ValueError, match=r"^'<pad>' can't have id 32000: id 32000 is '<image>'; give it the next free"):
        write_hf_tokenizer(tokenizer, tmp_path, image_token_id=32000, pad_token_id=32000, chat_template="")
    has_both = load_tokenizer(hf_directories[False])
    with pytest.raises(
        ValueError, match=r"^'<image>' can't have id 32002: it has id 32000; give it the next free row$"
    ):
        write_hf_tokenizer(has_both, tmp_path, image_token_id=32002, pad_token_id=32001, chat_template="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["alpha.png", "gray.jpg", "landscape.jpg", "palette.png", "tiny.png", "wide.png"])
def test_a_processor_of_transformers_asks_as_we_do(hf_directories, tokenizers, goldens, name):
    image = Image.open(goldens / "images" / name)
    pixels = process_images([image.convert("RGB")], CLIPPixels(56), SimpleNamespace(image_aspect_ratio="pad"))
    question = "What are the  colors? "
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    shown = [{"role": "user", "content": [{"type": "image", "image": image}, *messages[0]["content"][1:]]}]
    for legacy, path in hf_directories.items():
        processor = AutoProcessor.from_pretrained(str(path), backend="pil")
        assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"
        ids = first_turn_ids(question, 1, get_template("v1"), tokenizers[legacy])
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        for inputs in (
            processor(images=image, text=prompt, return_tensors="pt"),
            processor.apply_chat_template(
                shown, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ),
        ):
            assert inputs["input_ids"].tolist() == [with_image_id(ids, count=16)]
            assert torch.equal(inputs["pixel_values"], pixels)


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
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON .*; fetch the file again"):
        load_tokenizer(tmp_path)
