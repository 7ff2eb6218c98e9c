"""Adapters that peft, LLaMA-Factory and ms-swift train on the llava-hf layout give the same logits here.

The oracle is transformers' LlavaForConditionalGeneration under peft; names of older versions are made of its own.
"""

from __future__ import annotations

import json
import logging
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava.model.adapter.lora import read_adapter
from llava.model.builder import attach_adapter, build_model, load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint, read_config
from llava.train.train import main as train_main

# peft asks transformers' own model under a name that newer versions of transformers have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FULL = "llava-v1.5-golden"
PATCHES = 16
LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
LLM = r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:" + LINEARS + ").*"  # as LLaMA-Factory writes it
CASES = {
    "names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision_tower.*"},
    "expression": {"target_modules": LLM},
    "swift": {"target_modules": rf"^(model\.language_model(?=\.).*\.({LINEARS}))$"},
    "everywhere": {"target_modules": "all-linear"},
    "projector whole": {
        "target_modules": ["q_proj"],
        "exclude_modules": ".*vision_tower.*",
        "modules_to_save": ["multi_modal_projector"],
    },
    "vocabulary whole": {
        "target_modules": ".*language_model.*q_proj",
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "head": {"target_modules": ".*language_model.*q_proj|lm_head"},
    "embedding": {"target_modules": ".*language_model.*q_proj|.*embed_tokens"},
    "dora": {"target_modules": ".*language_model.*(q_proj|up_proj)", "use_dora": True},
    "patterns": {
        "target_modules": ".*language_model.*(q_proj|up_proj)",
        "rank_pattern": {"up_proj": 4},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
        "use_rslora": True,
    },
    "one layer": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ".*vision_tower.*",
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
}
IDS = torch.tensor([[1, -200, 1691, 736, 8314]])
IMAGES = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hf_base(goldens, load_program, tmp_path_factory):
    """The golden checkpoint in the llava-hf layout."""
    directory = tmp_path_factory.mktemp("hf") / "llava-golden-hf"
    words = ["--from", str(goldens / FULL), "--to", str(directory), "--layout", "hf"]
    assert load_program("scripts/convert_checkpoint.py").main(words) == 0
    return directory


@pytest.fixture(scope="module")
def trained(hf_base, tmp_path_factory):
    """Return the function case -> (adapter directory, logits of transformers' model under peft)."""
    made = {}

    def make(case):
        if case not in made:
            torch.manual_seed(len(made))
            model = LlavaForConditionalGeneration.from_pretrained(hf_base, dtype=torch.float32)
            model.name_or_path = str(hf_base)
            settings = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **CASES[case])
            wrapped = peft.get_peft_model(model, settings).eval()
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            directory = tmp_path_factory.mktemp("adapters") / case.replace(" ", "-")
            wrapped.save_pretrained(directory)
            image = torch.full((1, PATCHES), model.config.image_token_id)
            ids = torch.cat([IDS[:, :1], image, IDS[:, 2:]], 1)
            made[case] = directory, wrapped(input_ids=ids, pixel_values=IMAGES).logits.detach()
        return made[case]

    return make


def old_name(name):
    """The name in transformers before 4.52, where the LLM was a `LlamaForCausalLM` of its own."""
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    name = name.replace("language_model.", "language_model.model.", 1)
    name = f"language_model.{name}" if name.startswith("lm_head") else name
    if name.startswith("vision_tower.") and "vision_model" not in name:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return f"base_model.model.{name}"


def renamed(directory, target, rename=old_name):
    shutil.copytree(directory, target)
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, images=IMAGES).logits


def merged(directory, base):
    return load_pretrained_model(str(directory), str(base), "x", device="cpu", dtype="float32")[1]


def assert_computes(model, expected):
    found = logits(model)
    torch.testing.assert_close(found, expected[..., : found.shape[-1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_merged_and_attached_equal_peft_in_transformers(trained, goldens, hf_base, golden_model, case):
    directory, expected = trained(case)
    assert (expected[..., : golden_model[1].vocab_size] - logits(golden_model[1])).abs().max() > 0.01
    for base in (hf_base, goldens / FULL):
        assert_computes(merged(directory, base), expected)
    opened = build_model(open_checkpoint(directory, hf_base, with_adapter=False), dtype="float32", device="cpu")
    assert_computes(attach_adapter(opened, directory), expected)
    plain = load_pretrained_model(str(hf_base), None, "x", device="cpu", dtype="float32")[1]
    assert_computes(attach_adapter(plain, directory), expected)


@pytest.mark.parametrize("case", ["names", "everywhere", "projector whole", "vocabulary whole", "head", "patterns"])
def test_names_of_older_versions(trained, hf_base, tmp_path, case):
    directory, expected = trained(case)
    old = renamed(directory, tmp_path / "old")
    assert read_adapter(old).pairs.keys() == read_adapter(directory).pairs.keys()
    if case != "patterns":  # whose keys fit both ages
        assert any("language_model.model.layers" in name for name in load_file(old / "adapter_model.safetensors"))
    assert_computes(merged(old, hf_base), expected)


def test_the_recorded_base_is_enough(trained, caplog):
    """No `config.json` beside the adapter, and no flag: the base that peft recorded is read."""
    directory, expected = trained("names")
    assert_computes(load_pretrained_model(str(directory), None, "x", device="cpu", dtype="float32")[1], expected)
    assert f"{directory} holds no projector, so the one of" in caplog.text


def test_an_adapter_that_trained_the_projector_says_nothing_of_the_bases(trained, hf_base, caplog):
    for case in ("projector whole", "everywhere"):
        open_checkpoint(trained(case)[0], hf_base)
    assert "holds no projector" not in caplog.text


def test_other_files_beside_an_adapter(trained, hf_base, goldens, tmp_path):
    """Tokenizer with `<image>`, hf `config.json` and logs, as LLaMA-Factory and ms-swift leave them."""
    directory, expected = trained("expression")
    target = tmp_path / "checkpoint-9"
    shutil.copytree(directory, target)
    for path in hf_base.iterdir():
        if not path.name.endswith(".safetensors"):
            shutil.copy(path, target)
    (target / "additional_config.json").write_text('{"lora_dtype": null, "lorap_lr_ratio": null}')
    (target / "trainer_state.json").write_text('{"global_step": 9}')
    for base in (hf_base, goldens / FULL):
        tokenizer, model, _, _ = load_pretrained_model(str(target), str(base), "x", device="cpu", dtype="float32")
        assert_computes(model, expected)
        assert len(tokenizer) <= model.config.vocab_size


def test_the_vision_tower_and_projector_that_swift_trains_whole(trained, hf_base, goldens, tmp_path):
    directory, _ = trained("expression")
    target = renamed(directory, tmp_path / "swift", lambda name: name)
    theirs = LlavaForConditionalGeneration.from_pretrained(hf_base, dtype=torch.float32)
    parts = {name: tensor for name, tensor in theirs.named_parameters() if "vision" in name or "projector" in name}
    assert len(parts) > 8
    save_file(
        {f"base_model.model.{name}": 2 * part.detach() for name, part in parts.items()}, target / "vit.safetensors"
    )
    found, before = open_checkpoint(target, hf_base).tensors, open_checkpoint(directory, hf_base).tensors
    for name in before:
        is_part = "mm_projector" in name or "vision_tower" in name
        assert torch.equal(found[name], (2 if is_part else 1) * before[name]), name


@pytest.fixture
def continued(goldens, tmp_path):
    """Return the function (adapter directory, base) -> output directory of a training step that changes nothing."""

    def run(directory, base):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
        (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "image": "tiny.png", "conversations": turns}]))
        words = ["--model_name_or_path", base, "--data_path", tmp_path / "data.json", "--image_folder"]
        words += [goldens / "images", "--output_dir", tmp_path / "out", "--lora_weight_path", directory]
        words += ["--lora_enable", "True", "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]
        words += ["--learning_rate", "0", "--max_steps", "1", "--save_strategy", "no"]
        assert train_main([str(word) for word in words]) == 0
        return tmp_path / "out"

    return run


@pytest.mark.parametrize(
    "case", ["expression", "everywhere", "vocabulary whole", "head", "dora", "patterns", "one layer"]
)
def test_training_goes_on_from_it(trained, hf_base, continued, caplog, case):
    """What is written after a step of rate 0 computes the same, also where adapters lie outside the LLM's blocks."""
    directory, expected = trained(case)
    output = continued(directory, hf_base)
    assert_computes(merged(output, hf_base), expected)
    outside = case in ("everywhere", "head")
    assert ("are outside the LLM's blocks" in caplog.text) == outside
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(hf_base)


def test_a_layer_that_is_lacking(trained, hf_base, tmp_path):
    """peft would warn and keep the base's weights there."""
    directory, _ = trained("swift")
    gone = renamed(
        directory, tmp_path / "gone", lambda name: name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    )
    tensors = load_file(gone / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "layers.7" not in name}, gone / "adapter_model.safetensors"
    )
    message = r"^the adapter has nothing for model.language_model.layers.1.mlp.up_proj, which target_modules in its"
    for with_adapter in (True, False):
        with pytest.raises(ValueError, match=message):
            open_checkpoint(gone, hf_base, with_adapter=with_adapter)
    plain = load_pretrained_model(str(hf_base), None, "x", device="cpu", dtype="float32")[1]
    with pytest.raises(ValueError, match=message):
        attach_adapter(plain, gone)


def test_a_whole_module_that_is_lacking(trained, hf_base, tmp_path):
    directory, _ = trained("projector whole")
    gone = renamed(directory, tmp_path / "gone", lambda name: name)
    tensors = load_file(gone / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "linear_2.bias" not in name},
        gone / "adapter_model.safetensors",
    )
    message = r"^the adapter has no model.mm_projector.2.bias, which modules_to_save in its adapter_config.json names;"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(gone, hf_base)


def test_another_name_of_the_base_is_logged(trained, goldens, hf_base, tmp_path, caplog):
    directory, _ = trained("names")
    open_checkpoint(directory, hf_base)
    assert "as its base" not in caplog.text
    with caplog.at_level(logging.WARNING):
        open_checkpoint(directory, goldens / FULL)
    assert f"{directory} records {hf_base} as its base, but is put on {goldens / FULL}; without a rec" in caplog.text


def test_the_config_of_an_adapter_without_one(trained, hf_base):
    directory = trained("names")[0]
    with pytest.raises(
        FileNotFoundError, match=rf"^{directory} is an adapter without config.json; .* instead, {hf_base}$"
    ):
        read_config(directory)


def test_no_base_at_all(trained, tmp_path):
    directory = renamed(trained("names")[0], tmp_path / "x", lambda name: name)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=rf"^{directory} needs the weights it was trained on; pass --model-base$"):
        open_checkpoint(directory)
