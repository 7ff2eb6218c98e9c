"""Conversion is lossless: a round trip is bit-equal, and transformers computes our logits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.export import convert as program
from llava.inference.session import Session
from llava.model.checkpoint import write_tensors
from llava.model.checkpoint.checkpoint import Layout, detect_layout, open_checkpoint
from llava.model.checkpoint.read_tensors import open_weights

FULL, LORA, TOWER = "llava-v1.5-golden", "llava-v1.5-golden-task-lora", "clip-vit-tiny-patch14-56"
HF_FILES = [
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture(scope="session")
def convert():
    """`main` of the program."""
    return program.main


@pytest.fixture(scope="session")
def converted(goldens, convert, tmp_path_factory):
    """The golden checkpoint in the hf layout."""
    target = tmp_path_factory.mktemp("converted") / "hf"
    assert convert(["--from", str(goldens / FULL), "--to", str(target), "--layout", "hf"]) == 0
    return target


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def their_answers(directory, image, question):
    """Their logits over our vocabulary's prompt positions and greedy ids, through their processor."""
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return logits, answer.tolist(), inputs["pixel_values"]


def our_answers(directory, image, question):
    session = Session.load(str(directory), device="cpu", dtype="float32")
    prompt = session.prepare(question, [image])
    ids, images = torch.tensor([prompt.input_ids]), torch.stack(prompt.pixel_values)
    with torch.no_grad():
        logits = session.model(input_ids=ids, images=images).logits[0]
        answer = session.model.generate(ids, images=images, do_sample=False, max_new_tokens=12)[0]
    return logits, answer.tolist(), images


def test_the_listing(converted):
    assert names(converted) == HF_FILES
    assert detect_layout(converted) is Layout.HF
    assert "{{- bos_token" not in (converted / "chat_template.jinja").read_text()


@pytest.mark.parametrize("file", ["landscape.jpg", "portrait.png", "palette.png", "wide.png"])
@pytest.mark.parametrize("aspect_ratio", ["pad", None])
def test_transformers_computes_what_we_compute(goldens, convert, tmp_path, file, aspect_ratio):
    source = tmp_path / FULL
    shutil.copytree(goldens / FULL, source)
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({**settings, "image_aspect_ratio": aspect_ratio}))
    assert convert(["--from", str(source), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 0
    image = Image.open(goldens / "images" / file).convert("RGB")
    question = "What are the  colors of the bikes?"
    theirs = their_answers(tmp_path / "hf", image, question)
    ours = our_answers(source, image, question)
    assert torch.equal(theirs[2], ours[2])
    torch.testing.assert_close(theirs[0][:, : ours[0].shape[1]], ours[0], atol=1e-5, rtol=1e-5)
    assert theirs[1] == ours[1]
    assert theirs[0].argmax(-1).max() < 32000


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_scaled_positions_are_written_for_transformers_4_too(goldens, convert, tmp_path, layout):
    for name in (FULL, TOWER):
        shutil.copytree(goldens / name, tmp_path / name)
    source = tmp_path / FULL
    (source / "config.json").chmod(0o644)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    assert convert(["--from", str(source), "--to", str(tmp_path / "out"), "--layout", layout]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    written = written.get("text_config", written)
    assert written["rope_scaling"] == {"type": "linear", "factor": 4.0}  # a third key is refused before 4.43
    assert written["rope_theta"] == 10000.0
    assert written["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_ours_computes_the_same_from_the_hf_layout(goldens, converted):
    image = Image.open(goldens / "images/portrait.png").convert("RGB")
    before = our_answers(goldens / FULL, image, "Is there railing?")
    after = our_answers(converted, image, "Is there railing?")
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_from_the_original_and_back(goldens, convert, converted, tmp_path, monkeypatch):
    assert convert(["--from", str(goldens / FULL), "--to", str(tmp_path / "first"), "--layout", "original"]) == 0
    assert convert(["--from", str(converted), "--to", str(tmp_path / "back"), "--layout", "original"]) == 0
    same(open_weights(tmp_path / "back"), open_weights(goldens / FULL))
    for name in names(
        tmp_path / "first"
    ):  # the golden itself says less: its tower and tokenizer settings are filled in
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    assert names(tmp_path / "back") == names(tmp_path / "first")
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (goldens / FULL / "tokenizer.model").read_bytes()


@pytest.fixture
def theirs(converted, tmp_path):
    """A directory as transformers itself writes it: no `tokenizer.model`, no record of ours, fresh random weights."""
    settings = json.loads((converted / "config.json").read_text())
    del settings["llava"]
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(settings))
    model.save_pretrained(tmp_path / "theirs")
    AutoProcessor.from_pretrained(converted, backend="pil").save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs/tokenizer.model").exists()
    return tmp_path / "theirs"


def test_from_transformers_and_back(theirs, convert, goldens, tmp_path):
    assert convert(["--from", str(theirs), "--to", str(tmp_path / "ours"), "--layout", "original"]) == 0
    checkpoint = open_checkpoint(tmp_path / "ours")
    assert (checkpoint.layout, checkpoint.config.vocab_size) == (Layout.FULL, 32064)
    assert checkpoint.config.image_aspect_ratio == "pad"
    assert convert(["--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back"), "--layout", "hf"]) == 0
    same(open_checkpoint(tmp_path / "back").tensors, open_checkpoint(theirs).tensors)
    before, after = (transformers.LlavaConfig.from_pretrained(place) for place in (theirs, tmp_path / "back"))
    for key in ("image_token_index", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length"):
        assert getattr(after, key) == getattr(before, key)
    ignored = {"dtype", "pad_token_id", "architectures", "transformers_version", "_name_or_path"}
    for part in ("text_config", "vision_config"):
        old, new = getattr(before, part).to_dict(), getattr(after, part).to_dict()
        assert {key: new.get(key) for key in old if key not in ignored} == {
            key: value for key, value in old.items() if key not in ignored
        }
    image = Image.open(goldens / "images/landscape.jpg").convert("RGB")
    expected = their_answers(theirs, image, "Is there railing?")
    assert torch.equal(their_answers(tmp_path / "back", image, "Is there railing?")[0], expected[0])
    ours = our_answers(tmp_path / "ours", image, "Is there railing?")
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)


def test_names_of_transformers_452_to_457(converted, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(converted, newer)
    tensors = load_file(converted / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.replace("language_model.model.", "language_model.")
        renamed["lm_head.weight" if "lm_head" in name else f"model.{inner}"] = tensor
    save_file(renamed, newer / "model.safetensors")
    assert "model.language_model.layers.0.mlp.up_proj.weight" in renamed
    same(open_checkpoint(newer).tensors, open_checkpoint(converted).tensors)


def test_an_adapter_is_merged_on_the_way(goldens, convert, tmp_path):
    words = ["--from", str(goldens / LORA), "--model-base", str(goldens / FULL), "--to", str(tmp_path / "hf")]
    assert convert([*words, "--layout", "hf", "--dtype", "bfloat16"]) == 0
    found = open_checkpoint(tmp_path / "hf").tensors
    expected = open_checkpoint(goldens / LORA, goldens / FULL).tensors
    same(found, {name: tensor.to(torch.bfloat16) for name, tensor in expected.items()})


def test_an_adapter_on_a_base_in_the_hf_layout(goldens, convert, converted, tmp_path):
    expected = open_checkpoint(goldens / LORA, goldens / FULL).tensors
    same(open_checkpoint(goldens / LORA, converted).tensors, expected)


def test_an_incomplete_tower_is_named(goldens, converted, convert, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(converted, source)
    tensors = load_file(converted / "model.safetensors")
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    save_file(tensors, source / "model.safetensors")
    assert convert(["--from", str(source), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 1
    missing = "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"
    assert f"the weights don't fit the config: 1 missing ({missing})" in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


def test_a_shape_that_does_not_fit_is_named(converted, convert, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(converted, source)
    tensors = load_file(converted / "model.safetensors")
    tensors["language_model.model.norm.weight"] = torch.zeros(5)
    save_file(tensors, source / "model.safetensors")
    assert convert(["--from", str(source), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 1
    message = f"error: model.norm.weight is (5,) in {source}/model.safetensors, but the config makes it (16,); use the"
    assert message in capsys.readouterr().err


def test_no_room_is_noticed_before_any_work(goldens, convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    assert convert(["--from", str(goldens / FULL), "--to", str(tmp_path / "new/hf"), "--layout", "hf"]) == 1
    message = f"error: {tmp_path}/new/hf needs 4.3 MB, but {tmp_path} has 1 byte; free some space or choose another"
    assert message in capsys.readouterr().err


def test_what_a_killed_process_left_makes_room_first(goldens, convert, tmp_path, monkeypatch):
    left = tmp_path / ".hf.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 0, 0 if left.exists() else 10**9))
    assert convert(["--from", str(goldens / FULL), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_disk_that_fills_up_leaves_nothing(goldens, convert, tmp_path, capsys, monkeypatch):
    def refuse(stream, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_tensors, "write_all", refuse)
    assert convert(["--from", str(goldens / FULL), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_where_nothing_can_be_written(goldens, convert, tmp_path, capsys):
    target = tmp_path / "file" / "hf"
    target.parent.write_text("")
    assert convert(["--from", str(goldens / FULL), "--to", str(target), "--layout", "hf"]) == 1
    assert f"error: {target} can't be written" in capsys.readouterr().err


def test_a_killed_conversion_leaves_nothing_that_looks_whole(goldens, convert, converted, kill_while_writing, tmp_path):
    words = ["--from", str(goldens / FULL), "--to", str(tmp_path / "hf"), "--layout", "hf"]
    kill_while_writing(convert, words)
    assert not (tmp_path / "hf").exists()
    assert convert(words) == 0
    assert names(tmp_path) == ["hf"]
    assert names(tmp_path / "hf") == HF_FILES
    same(load_file(tmp_path / "hf/model.safetensors"), load_file(converted / "model.safetensors"))


def test_quantised_directories_are_refused(goldens, convert, tmp_path, capsys):
    source = tmp_path / FULL
    shutil.copytree(goldens / FULL, source)
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(settings))
    assert convert(["--from", str(source), "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 1
    assert "converted" in capsys.readouterr().err
