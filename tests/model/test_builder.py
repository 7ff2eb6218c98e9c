"""Loaded models compute what the original computed; what doesn't fit is refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from llava.conversation import conv_templates
from llava.data.supervision import encode_example
from llava.image_files.decode import open_image
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import placement
from llava.model.builder import build_model, load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.strict_load import check_names
from llava.model.checkpoint.write_tensors import write_weights

IMAGES = ["landscape.jpg", "portrait.png", "square.png", "tiny.png"]
TEXTS = ["Is there railing?", "What are the  colors of the bikes?", " leading space", "trailing space "]
DIRECTORIES = {
    "base": ("llava-v1.5-golden", None),
    "lora": ("llava-v1.5-golden-task-lora", "llava-v1.5-golden"),
    "projector": ("golden-pretrained-projector", "llava-v1.5-golden"),
}


def load(goldens, kind="base", **options):
    path, base = DIRECTORIES[kind]
    options = {"device": "cpu", "dtype": "float32", **options}
    return load_pretrained_model(str(goldens / path), str(goldens / base) if base else None, path, **options)


@pytest.fixture(scope="module", params=list(DIRECTORIES))
def loaded(request, goldens, golden_model):
    """(tokenizer, model, image processor, pixels of the four images, golden arrays) of each kind of directory."""
    tokenizer, model, processor, _ = golden_model if request.param == "base" else load(goldens, request.param)
    images = [open_image(goldens / "images" / name) for name in IMAGES]
    with np.load(goldens / f"{request.param}_outputs.npz") as arrays:
        expected = {name: arrays[name] for name in arrays}
    return tokenizer, model, processor, process_images(images, processor, model.config), expected


def prompt_ids(tokenizer, text):
    dialogue = conv_templates["v1"].copy()
    dialogue.append_message(dialogue.roles[0], "<image>\n" + text)
    dialogue.append_message(dialogue.roles[1], None)
    return tokenizer_image_token(dialogue.get_prompt(), tokenizer, return_tensors="pt")[None]


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_image_features_equal_the_originals(loaded):
    _, model, _, pixels, expected = loaded
    close(model.encode_images(pixels), expected["image_features"])


@pytest.mark.parametrize("index", range(4))
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_the_originals(loaded, index):
    tokenizer, model, _, pixels, expected = loaded
    ids = prompt_ids(tokenizer, TEXTS[index])
    images = pixels[index : index + 1]
    logits = model(input_ids=ids, images=images).logits
    assert list(logits.shape) == expected[f"logits_shape_{index}"].tolist()
    close(logits[0, -1], expected[f"logits_last_{index}"])
    assert logits[0].argmax(-1).tolist() == expected[f"argmax_{index}"].tolist()
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(ids, images=images, **options)
    assert [1, *greedy[0].tolist()] == expected[f"greedy_{index}"].tolist()


@torch.no_grad()
def test_losses_equal_the_originals(loaded, golden_json):
    tokenizer, model, _, pixels, expected = loaded
    rows = [case for case in golden_json("supervision") if case["version"] == "v1" and not case["legacy"]]
    examples = [encode_example(rows[index]["conversations"], "v1", tokenizer) for index in (0, 4, 5)]
    images = torch.stack([pixels[0], pixels[1], torch.zeros_like(pixels[0])])
    for index, (ids, labels) in enumerate(examples):
        loss = model(
            input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), images=images[index : index + 1]
        ).loss
        assert loss.item() == pytest.approx(expected["single_losses"][index], abs=1e-4)
    ids, labels = torch.from_numpy(expected["batch_input_ids"]), torch.from_numpy(expected["batch_labels"])
    for index, (row, targets) in enumerate(examples):
        assert ids[index, : len(row)].tolist() == row
        assert labels[index, : len(row)].tolist() == targets
    lengths = torch.tensor([len(row) for row, _ in examples])[:, None]
    mask = torch.arange(ids.shape[1])[None] < lengths
    output = model(input_ids=ids, labels=labels, attention_mask=mask, images=images)
    assert output.loss.item() == pytest.approx(float(expected["batch_loss"]), abs=1e-4)
    assert list(output.logits.shape) == expected["batch_logits_shape"].tolist()


def test_what_is_returned(golden_model):
    tokenizer, model, processor, context_length = golden_model
    assert context_length == 256
    assert not model.training
    assert model.dtype is torch.float32
    assert model.get_vision_tower().image_processor is processor
    assert processor.crop_size == {"height": 56, "width": 56}
    assert model.config.conversation_template == "vicuna_v1"
    assert (tokenizer.legacy, tokenizer.pad_token) == (False, "<unk>")
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_every_parameter_is_the_files(goldens, golden_model):
    files, model = open_weights(goldens / "llava-v1.5-golden"), golden_model[1]
    for name, parameter in model.named_parameters():
        stored = (
            name
            if name in files
            else name.replace("vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model.")
        )
        assert torch.equal(parameter, files[stored]), name
    assert {name.split("encoder.")[1].split(".")[1] for name in model.get_vision_tower().unused_tensors} == {"2"}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)]
)
def test_dtypes(goldens, key, value, dtype):
    model = load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "golden", device="cpu", **{key: value})[1]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.get_vision_tower().dtype is dtype


def test_unknown_dtype(goldens):
    with pytest.raises(ValueError, match=r"^dtype 'int3' is unknown; choose bfloat16, float16, float32 or auto$"):
        load(goldens, dtype="int3")


def test_flash_attention_needs_a_gpu_that_runs_it(goldens):
    checkpoint = open_checkpoint(goldens / "llava-v1.5-golden")
    with pytest.raises(ValueError, match=r"^flash_attention_2: CPU does not run it; leave it out for SDPA$"):
        build_model(checkpoint, device="cpu", attention="flash_attention_2")


def test_device_map_over_one_device_is_obeyed(goldens, monkeypatch):
    monkeypatch.setattr(placement, "best_device", lambda: torch.device("meta"))
    model = load(goldens, device=None, device_map={"": "cpu"})[1]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_device_map_by_module(goldens, golden_model):
    parts = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {"model.vision_tower": "cpu", "model.mm_projector": "cpu", "model.rotary_emb": "cpu"}
    model = load(goldens, device=None, device_map=parts)[1]
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)


def test_a_device_map_that_leaves_modules_out(goldens):
    with pytest.raises(
        ValueError, match=r"^device_map has no place for model.embed_tokens.weight; add its module or ''"
    ):
        load(goldens, device=None, device_map={"lm_head": "cpu", "model.layers": "meta"})


def test_four_and_eight_bit_exclude_each_other(goldens):
    with pytest.raises(ValueError, match=r"^load_8bit, load_4bit, load_fp8 exclude each other; pass one$"):
        load(goldens, load_4bit=True, load_8bit=True)


def test_quantised_are_the_llms_blocks_alone(goldens, golden_model):
    """4 bit needs wider layers than the goldens have; see test_quantization."""
    bnb = pytest.importorskip("bitsandbytes")
    model = load(goldens, load_8bit=True)[1]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linears.items() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert quantised == {name for name in linears if name.startswith("model.layers.")}
    assert len(quantised) == 14
    reference = dict(golden_model[1].named_parameters())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in quantised:
            assert torch.equal(parameter, reference[name]), name
    for name in sorted(quantised):
        weight, stored = reference[f"{name}.weight"], linears[name].weight
        restored = stored.data.float() * stored.SCB[:, None] / 127
        assert torch.nn.functional.cosine_similarity(restored.flatten(), weight.flatten(), dim=0) > 0.95


def test_eight_bit_answers_like_sixteen(goldens, golden_model):
    pytest.importorskip("bitsandbytes")
    model = load(goldens, load_8bit=True)[1]
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = (each(input_ids=ids, images=images).logits for each in (model, golden_model[1]))
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.95


@pytest.fixture
def directory(goldens, tmp_path):
    """The golden checkpoint in one safetensors file, and its settings, for a test to damage."""
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(goldens / "llava-v1.5-golden" / name, tmp_path / name)
    shutil.copytree(
        goldens / "clip-vit-tiny-patch14-56", tmp_path.parent / "clip-vit-tiny-patch14-56", dirs_exist_ok=True
    )
    return tmp_path


def damage(goldens, directory, change):
    tensors = dict(open_weights(goldens / "llava-v1.5-golden"))
    change(tensors)
    write_weights(LazyTensors.of(tensors), directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: [tensors.pop(name) for name in ("lm_head.weight", "model.mm_projector.2.bias")],
            r"^the weights don't fit the config: 2 missing \(lm_head.weight, model.mm_projector.2.bias\); use",
        ),
        (
            lambda tensors: tensors.update({f"extra.{index}": torch.zeros(1) for index in range(7)}),
            r"7 unexpected \(extra.0, extra.1, extra.2, extra.3, extra.4, ...\); use the config.json that belongs",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(40, 16)}),
            r"1 unexpected \(model.layers.2.mlp.up_proj.weight\)",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 16)}),
            r"^lm_head.weight is \(5, 16\) in \S+/model.safetensors, but the config makes it \(32000, 16\); use the",
        ),
        (
            lambda tensors: tensors.pop("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
            r"1 missing \(model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(goldens, directory, change, message):
    damage(goldens, directory, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(directory), None, "x", device="cpu")


@pytest.mark.parametrize("bits", [16, 8])
def test_a_value_that_is_not_finite_is_named(goldens, directory, bits):
    if bits == 8:
        pytest.importorskip("bitsandbytes")
    name = "model.layers.1.mlp.up_proj.weight"
    damage(goldens, directory, lambda tensors: None)
    tensors = {key: tensor.clone() for key, tensor in open_weights(directory).items()}
    tensors[name][3, 4] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    message = rf"^{name} in {directory}/model.safetensors holds NaN or infinity; the file"
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(directory), None, "x", device="cpu", load_8bit=bits == 8)


def test_derived_tensors_of_older_files_are_ignored(goldens, directory, golden_model):
    tower = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), tower: torch.zeros(1, 17)}
    damage(goldens, directory, lambda tensors: tensors.update(extra))
    model = load_pretrained_model(str(directory), None, "x", device="cpu")[1]
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)


def test_names_are_compared_both_ways():
    check_names({"a"}, {"a"})
    with pytest.raises(
        ValueError, match=r"^the weights don't fit the config: 1 missing \(a\); 1 unexpected \(b\); use"
    ):
        check_names({"a"}, {"b"})


def test_context_length_defaults(goldens, directory):
    damage(goldens, directory, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    del config["tokenizer_model_max_length"]
    (directory / "config.json").write_text(json.dumps(config))
    assert load_pretrained_model(str(directory), None, "x", device="cpu")[3] == 2048


def test_a_recorded_template_is_kept(goldens, directory):
    damage(goldens, directory, lambda tensors: None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "conversation_template": "llava_llama_2"}))
    model = load_pretrained_model(str(directory), None, "llava-v0-lora-mpt", device="cpu")[1]
    assert model.config.conversation_template == "llava_llama_2"
