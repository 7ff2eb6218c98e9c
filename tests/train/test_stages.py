"""Each stage overfits a few rows, changes exactly the parameters it says, and is read back by us and by peft."""

from __future__ import annotations

import functools
import json

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from llava.export import merge
from llava.inference import parity
from llava.model.adapter.lora import read_adapter
from llava.model.builder import attach_adapter, build_model, load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights

pytestmark = pytest.mark.slow

ROWS = [
    {
        "id": answer,
        "image": image,
        "conversations": [
            {"from": "human", "value": "<image>\nWhat color is it?"},
            {"from": "gpt", "value": answer},
        ],
    }
    for image, answer in (("landscape.jpg", "yellow"), ("portrait.png", "green"))
]

LORA = ["--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0"]
TOWER = ["--unfreeze_mm_vision_tower", "True", "--mm_vision_tower_lr", "1e-4"]
STAGES = {  # name -> flags, learning rate, what it says it trains
    "projector": (["--tune_mm_mlp_adapter", "True"], 1e-2, "projector"),
    "full": ([], 1e-3, "llm projector"),
    "full with tower": (TOWER, 1e-3, "llm projector tower"),
    "lora": (LORA, 5e-3, "linears projector"),
    "lora of two": ([*LORA, "--lora_target_modules", "q_proj,v_proj"], 5e-3, "q_proj v_proj projector"),
    "rslora": ([*LORA, "--use_rslora", "True"], 3e-3, "linears projector"),
    "dora": ([*LORA, "--use_dora", "True"], 5e-3, "linears projector"),
    "qlora": ([*LORA, "--bits", "4"], 5e-3, "linears projector"),
    "lora on fp8": ([*LORA, "--base_dtype", "fp8"], 5e-3, "linears projector"),
    "lora with tower": ([*LORA, *TOWER], 5e-3, "linears projector tower"),
    "lora, bias all": ([*LORA, "--lora_bias", "all"], 5e-3, "linears projector"),
    "lora, bias lora_only": ([*LORA, "--lora_bias", "lora_only"], 5e-3, "linears projector"),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = [name for name, (flags, _, _) in STAGES.items() if "--lora_enable" in flags]


@pytest.fixture(scope="module")
def stage(train_tiny, tmp_path_factory):
    """Return the function name -> output directory of that stage, each run once."""

    @functools.cache
    def run(name):
        output = tmp_path_factory.mktemp("stage") / "out"
        flags, rate, _ = STAGES[name]
        words = ["--per_device_train_batch_size", "2", "--num_train_epochs", "30", "--learning_rate", str(rate)]
        with torch.enable_grad():  # whichever test comes first
            assert train_tiny(output, ROWS, *words, *flags) == 0
        return output

    return run


@pytest.fixture(scope="module")
def base(tiny_base):
    return open_weights(tiny_base)


def trained_names(base, said):
    """Names of the weights that a stage says it trains, among the base's own names."""
    is_trained = {
        "projector": lambda name: "mm_projector" in name,
        "llm": lambda name: "mm_projector" not in name and "vision_tower" not in name,
        "linears": lambda name: name.startswith("model.layers.") and name.split(".")[-2] in LINEARS,
        # of six layers LLaVA reads the fifth: the last one and the last norm are never used
        "tower": lambda name: "vision_tower" in name and "layers.5." not in name and "post_layernorm" not in name,
    }
    words = said.split()
    return {
        name
        for name in base
        if any(is_trained[word](name) if word in is_trained else f".{word}." in name for word in words)
        and not (name.startswith("model.vision_tower") and "tower" not in words)
    }


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_overfits_and_changes_exactly_its_parameters(stage, base, tiny_base, read_log, name):
    output = stage(name)
    losses = read_log(output, "loss")
    assert losses[0] > 1
    assert max(losses[-3:]) < 0.02
    is_alone = (output / "model.safetensors").exists()
    tensors = open_weights(output) if is_alone else open_checkpoint(output, tiny_base).tensors
    assert tensors.keys() == base.keys()
    changed = {key for key in base if not torch.equal(tensors[key], base[key])}
    assert changed == trained_names(base, STAGES[name][2])


@pytest.mark.parametrize("name", ["lora", "lora of two", "dora", "lora with tower"])
def test_names_in_the_files(stage, base, name):
    output = stage(name)
    said = STAGES[name][2]
    layers = {
        key.removesuffix(".weight")
        for key in trained_names(base, said)
        if "vision_tower" not in key and "mm_projector" not in key
    }
    parts = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if name == "dora" else [])]
    assert set(open_tensor_file(output / "adapter_model.safetensors")) == {
        f"base_model.model.{layer}.{part}" for layer in layers for part in parts
    }
    assert set(open_tensor_file(output / "non_lora_trainables.bin")) == {
        f"base_model.model.{key}" for key in trained_names(base, said) if "mm_projector" in key or "vision_tower" in key
    }


def probe(seed=0):
    ids = torch.tensor([[1, -200, 20, 21, 22, 23]])
    return ids, torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    ids, images = probe()
    return model(input_ids=ids, images=images).logits


def attached(output, tiny_base):
    """The base with the adapter's projector (and tower), and the adapter attached through peft."""
    checkpoint = open_checkpoint(output, tiny_base, with_adapter=False)
    return attach_adapter(build_model(checkpoint, dtype="float32", device="cpu"), output)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_the_adapter_attached(stage, tiny_base, name):
    output = stage(name)
    merged = load_pretrained_model(str(output), str(tiny_base), "x", device="cpu", dtype="float32")[1]
    torch.testing.assert_close(logits(merged), logits(attached(output, tiny_base)), atol=1e-4, rtol=1e-4)
    plain = load_pretrained_model(str(tiny_base), None, "x", device="cpu", dtype="float32")[1]
    assert (logits(merged) - logits(plain)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_alone_reads_it_on_the_plain_llm(stage, base, tiny_base, name):
    """Neither our model class nor our settings: transformers' Llama, peft, and the directory as it is."""
    output = stage(name)
    checkpoint = open_checkpoint(tiny_base)
    settings = {key: value for key, value in checkpoint.config.to_dict().items() if "mm_" not in key}
    llama = LlamaForCausalLM(LlamaForCausalLM.config_class(**{**settings, "model_type": "llama", "dtype": "float32"}))
    llm = {key: base[key] for key in base if "vision_tower" not in key and "mm_projector" not in key}
    assert llama.load_state_dict(llm, strict=True)
    alone = peft.PeftModel.from_pretrained(llama, str(output)).eval()
    ids = torch.tensor([[1, 20, 21, 22, 23]])
    ours = load_pretrained_model(str(output), str(tiny_base), "x", device="cpu", dtype="float32")[1]
    torch.testing.assert_close(alone(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["rslora", "dora", "lora with tower"])
def test_the_merge_program(stage, tiny_base, tmp_path, name):
    output = stage(name)
    words = ["--model-path", output, "--model-base", tiny_base, "--save-model-path", tmp_path / "m"]
    assert merge.main([str(word) for word in [*words, "--no-parity"]]) == 0
    merged = load_pretrained_model(str(tmp_path / "m"), None, "x", device="cpu", dtype="float32")[1]
    torch.testing.assert_close(logits(merged), logits(attached(output, tiny_base)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["rslora", "dora", "lora with tower"])
def test_a_merge_is_compared_where_memory_is_short(stage, tiny_base, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(parity, "free_memory", lambda device: 1000)
    words = ["--model-path", stage(name), "--model-base", tiny_base, "--save-model-path", tmp_path / "m"]
    assert merge.main([str(word) for word in [*words, "--device", "cpu", "--dtype", "bfloat16"]]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("parity: too little memory for the model; each tensor")


def test_dora_magnitudes_are_the_lengths_of_the_merged_rows(stage, tiny_base):
    """DoRA's definition: each row of the merged weight is as long as its entry of the magnitude."""
    adapter = read_adapter(stage("dora"))
    merged = open_checkpoint(stage("dora"), tiny_base).tensors
    assert len(adapter.magnitudes) == len(adapter.pairs) == 35
    for name, magnitude in adapter.magnitudes.items():
        torch.testing.assert_close(merged[name].norm(dim=1), magnitude.read(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", ["dora", "rslora", "lora with tower", "lora of two"])
def test_adapters_are_trained_further(stage, train_tiny, read_log, tmp_path, name):
    tower = TOWER if name == "lora with tower" else []
    flags = ["--lora_enable", "True", "--lora_weight_path", stage(name), "--lora_dropout", "0", "--max_steps", "2"]
    assert train_tiny(tmp_path / "out", ROWS, "--per_device_train_batch_size", "2", *flags, *tower) == 0
    assert max(read_log(tmp_path / "out", "loss")) < 0.05  # it starts where the other ended
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (stage(name), tmp_path / "out"))
    for key in ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules"):
        assert after[key] == before[key]


def test_a_finetuned_model_is_finetuned_again(stage, train_tiny, read_log, tmp_path):
    flags = ["--per_device_train_batch_size", "2", "--max_steps", "2", *LORA]
    assert train_tiny(tmp_path / "out", ROWS, *flags, base=stage("full with tower")) == 0
    assert max(read_log(tmp_path / "out", "loss")) < 0.05
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(stage("full with tower"))


@pytest.mark.parametrize("name", ["dora", "full with tower", "lora with tower", "lora, bias all"])
def test_a_resumed_run_equals_an_uninterrupted_one(train_tiny, read_log, tmp_path, name):
    flags, rate, _ = STAGES[name]
    words = ["--per_device_train_batch_size", "1", "--learning_rate", str(rate), "--max_steps", "3", *flags]
    words += ["--save_strategy", "steps", "--save_steps", "2"]
    assert train_tiny(tmp_path / "out", ROWS, *words) == 0
    uninterrupted, last = read_log(tmp_path / "out", "loss"), tmp_path / "out" / "checkpoint-3"
    (last / "trainer_state.json").unlink()
    first = {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".safetensors")
    }
    assert train_tiny(tmp_path / "out", ROWS, *words) == 0
    assert read_log(tmp_path / "out", "loss") == uninterrupted  # the last step again, in its old line
    assert all((tmp_path / "out" / file).read_bytes() == content for file, content in first.items())


def test_the_towers_own_rate_is_logged_nowhere_but_used(stage, base):
    """With a rate a hundredth of the LLM's the tower moves a hundredth as far in one run of Adam."""
    tensors = open_weights(stage("full with tower"))
    moved = {
        part: max((tensors[key] - base[key]).abs().max().item() for key in base if part in key)
        for part in ("vision_tower", "model.layers")
    }
    assert 0 < moved["vision_tower"] <= 30 * 1e-4 * 1.01  # Adam's step is at most the rate
    assert moved["model.layers"] > 30 * 1e-4


def test_unknown_layers_are_named(train_tiny, tmp_path, capsys):
    assert train_tiny(tmp_path / "out", ROWS, *LORA, "--lora_target_modules", "q_proj,query") == 1
    assert "--lora_target_modules query: choose among down_proj,gate_proj,k_proj," in capsys.readouterr().err
