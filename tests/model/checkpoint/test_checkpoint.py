"""The files decide the layout of a checkpoint; a checkpoint written here is complete and loads without network."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants

from llava.model.adapter.lora import read_adapter
from llava.model.adapter.merge import add_adapter
from llava.model.builder import attach_adapter, build_model, load_pretrained_model
from llava.model.checkpoint.checkpoint import (
    Layout,
    detect_layout,
    open_checkpoint,
    save_checkpoint,
    state_for_file,
)
from llava.model.checkpoint.hub import resolve_directory
from llava.model.checkpoint.lazy_tensors import LazyTensors, fingerprint
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import write_weights
from llava.model.configuration import load_config
from llava.model.quantization import is_quantized

FULL, LORA, PROJECTOR = "llava-v1.5-golden", "llava-v1.5-golden-task-lora", "golden-pretrained-projector"
TOWER = "clip-vit-tiny-patch14-56"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("name", "layout"), [(FULL, Layout.FULL), (LORA, Layout.LORA), (PROJECTOR, Layout.PROJECTOR)])
def test_files_decide(goldens, copy_golden, change_config, tmp_path, name, layout):
    assert detect_layout(goldens / name) is layout
    shutil.copytree(goldens / name, tmp_path / "anything-lora-mpt")
    assert detect_layout(tmp_path / "anything-lora-mpt") is layout


def test_a_projector_beside_weights_is_part_of_them(goldens, copy_golden, change_config, tmp_path):
    directory = copy_golden(FULL, tmp_path / "x")
    shutil.copyfile(goldens / PROJECTOR / "mm_projector.bin", directory / "mm_projector.bin")
    assert detect_layout(directory) is Layout.FULL


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no model: no weights, no adapter, no projector \(found nothing\)$"
    ):
        detect_layout(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"\(found readme.txt\)$"):
        detect_layout(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {}}')
    assert detect_layout(tmp_path) is Layout.HF
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        detect_layout(tmp_path)


@pytest.mark.parametrize(
    ("found", "way_out"),
    [
        ("adapter_model.safetensors", "adapter_config.json is missing; fetch it from where the adapter is from"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json is missing, which says which shard holds"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json is missing, which says which shard holds"),
        (
            "checkpoint-500/x",
            "checkpoints of an unfinished run are inside; give one of them, such as {}/checkpoint-500",
        ),
        ("global_step500/x", "DeepSpeed's states alone; make weights of them with the zero_to_fp32.py beside them"),
        ("pytorch_model.safetensors", "weights are read from model.safetensors; rename pytorch_model.safetensors to"),
        ("consolidated.00.pth", "weights are read from pytorch_model.bin; rename consolidated.00.pth to that if"),
        ("llava.q4.gguf", "GGUF is llama.cpp's; give the 16-bit weights it was made from"),
    ],
)
def test_what_a_directory_lacks(tmp_path, found, way_out):
    path = tmp_path / found
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(FileNotFoundError) as caught:
        detect_layout(tmp_path)
    shown = found.partition("/")[0]
    start = f"{tmp_path} holds no model: no weights, no adapter, no projector (found {shown}); "
    assert str(caught.value).startswith(start + way_out.format(tmp_path))


def test_opens_full_weights(goldens):
    checkpoint = open_checkpoint(goldens / FULL)
    assert (checkpoint.layout, checkpoint.base) == (Layout.FULL, None)
    assert checkpoint.config.mm_vision_config["num_hidden_layers"] == 3
    assert checkpoint.config.mm_vision_config["image_size"] == 56
    assert checkpoint.image_processor.crop_size["height"] == 56
    assert checkpoint.tokenizer.legacy is False
    assert sorted(checkpoint.tensors) == sorted(open_weights(goldens / FULL))


@pytest.mark.parametrize("name", [LORA, PROJECTOR])
def test_opens_on_its_base(goldens, name):
    checkpoint = open_checkpoint(goldens / name, goldens / FULL)
    base = open_weights(goldens / FULL)
    assert checkpoint.base == goldens / FULL
    assert sorted(checkpoint.tensors) == sorted(base)
    changed = {key for key in base if not torch.equal(base[key], checkpoint.tensors[key])}
    assert "model.mm_projector.0.weight" in changed
    assert any("layers" in key for key in changed) is (name == LORA)


def test_the_recorded_base_is_found_without_a_flag(goldens, monkeypatch):
    monkeypatch.chdir(goldens)  # the golden adapter records a relative path
    assert open_checkpoint(LORA).base == Path(FULL)


def test_a_base_is_needed(goldens):
    with pytest.raises(
        ValueError, match=r"golden-pretrained-projector needs the weights it was trained on; pass --model"
    ):
        open_checkpoint(goldens / PROJECTOR)


def test_a_superfluous_base_is_refused(goldens):
    with pytest.raises(ValueError, match=r"golden holds full weights, so model base .*-lora has no use; leave it out$"):
        open_checkpoint(goldens / FULL, goldens / LORA)
    assert open_checkpoint(goldens / FULL, f"{goldens / FULL}").base is None


def test_a_base_must_be_full_weights(goldens):
    message = r"model base .*projector holds a projector; give the directory of full weights$"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(goldens / LORA, goldens / PROJECTOR)


def test_another_base_than_the_recorded_one(goldens, copy_golden, change_config, tmp_path):
    adapter = copy_golden(LORA, tmp_path / "adapter")
    base = open_weights(goldens / FULL)
    change_config(adapter, base_model_name_or_path=str(goldens / FULL), base_model_fingerprint=fingerprint(base))
    assert open_checkpoint(adapter).base == goldens / FULL
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    other = copy_golden(FULL, tmp_path / "other")
    for path in other.glob("pytorch_model*"):
        path.unlink()
    write_weights(base.overlaid(LazyTensors.of({"lm_head.weight": base["lm_head.weight"] * 1.01}).entries), other)
    message = (
        rf"adapter was trained on {goldens / FULL}, fingerprint [\w-]{{66}}, but {other} has fingerprint [\w-]{{66}};"
    )
    with pytest.raises(ValueError, match=message):
        open_checkpoint(adapter, other)
    assert open_checkpoint(adapter, other, allow_other_base=True).base == other
    model = load_pretrained_model(str(adapter), str(other), "x", device="cpu", allow_other_base=True)[1]
    assert model.lm_head.weight.shape == (32000, 16)


def test_another_vision_tower_than_the_recorded_one(goldens, copy_golden, change_config, tmp_path):
    """The base comes without one; the tower that it was trained with lies beside it."""
    base = copy_golden(FULL, tmp_path / "base")
    weights = open_weights(goldens / FULL)
    for path in base.glob("pytorch_model*"):
        path.unlink()
    kept = LazyTensors({name: entry for name, entry in weights.entries.items() if "vision_tower" not in name})
    write_weights(kept, base)
    tower = copy_golden(TOWER, tmp_path / TOWER)
    adapter = copy_golden(LORA, tmp_path / "adapter")
    change_config(adapter, base_model_name_or_path=str(base))
    recorded = open_checkpoint(adapter).config.base_model_fingerprint
    assert len(recorded.split("-")) == 3
    change_config(adapter, base_model_fingerprint=recorded)
    assert open_checkpoint(adapter).config.base_model_fingerprint == recorded
    state = torch.load(tower / "pytorch_model.bin", weights_only=True)
    name = next(name for name in state if name.endswith("layers.0.mlp.fc1.bias"))
    torch.save({**state, name: state[name] + 1}, tower / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"adapter was trained on {base}, fingerprint .*, but {base} has fingerprint"):
        open_checkpoint(adapter)
    assert open_checkpoint(adapter, allow_other_base=True).base == base


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_fingerprints_with_fewer_parts_are_accepted(goldens, copy_golden, change_config, tmp_path, parts):
    """As earlier versions recorded them."""
    adapter = copy_golden(LORA, tmp_path / "adapter")
    found = fingerprint(open_weights(goldens / FULL))
    change_config(adapter, base_model_fingerprint="-".join(found.split("-")[:parts]))
    assert open_checkpoint(adapter, goldens / FULL).config.base_model_fingerprint == found
    change_config(adapter, base_model_fingerprint="0" + found[1:])
    with pytest.raises(ValueError, match=rf"fingerprint 0.*has fingerprint {found};"):
        open_checkpoint(adapter, goldens / FULL)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_qlora_run_of_the_original_is_put_on_the_16_bit_base(goldens, copy_golden, change_config, tmp_path, bits):
    """Its config.json says how the base was held in training, not how the base's files are."""
    adapter = copy_golden(LORA, tmp_path / "adapter")
    change_config(adapter, quantization_config={"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})
    checkpoint = open_checkpoint(adapter, goldens / FULL)
    assert not is_quantized(checkpoint.config)
    assert checkpoint.config.base_model_bits == bits
    build_model(checkpoint, device="cpu")


def test_a_merged_adapter_is_not_merged_again(goldens, copy_golden, change_config, tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    checkpoint = open_checkpoint(goldens / LORA, goldens / FULL)
    save_checkpoint(checkpoint.tensors, checkpoint.config, checkpoint.tokenizer, checkpoint.image_processor, merged)
    assert load_config(merged).merged_adapter_fingerprint is not None
    with pytest.raises(ValueError, match=rf"task-lora is merged into {merged} already; use that as it is, or give the"):
        open_checkpoint(goldens / LORA, merged)
    beside = open_checkpoint(goldens / LORA, goldens / FULL, with_adapter=False)
    assert beside.config.merged_adapter_fingerprint is None


def test_an_adapter_without_config_uses_the_bases(goldens, copy_golden, change_config, tmp_path, caplog):
    """As the original leaves `checkpoint-N`; the finished run's config, one level up, goes before the base's."""
    caplog.set_level("INFO")
    bare = copy_golden(LORA, tmp_path / "run" / "checkpoint-5")
    (bare / "config.json").unlink()
    expected = open_checkpoint(goldens / LORA, goldens / FULL)
    checkpoint = open_checkpoint(bare, goldens / FULL)
    assert f"{bare} has no config.json; that of {goldens / FULL} is used" in caplog.messages
    assert all(torch.equal(checkpoint.tensors[name], expected.tensors[name]) for name in expected.tensors)
    shutil.copyfile(goldens / LORA / "config.json", bare.parent / "config.json")
    change_config(bare.parent, conversation_template="llava_llama_2")
    assert open_checkpoint(bare, goldens / FULL).config.conversation_template == "llava_llama_2"


def test_the_base_is_recorded_as_it_was_found(goldens):
    config = open_checkpoint(goldens / LORA, goldens / FULL).config
    assert config.base_model_name_or_path == str(goldens / FULL)
    assert config.base_model_fingerprint == fingerprint(open_weights(goldens / FULL))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llava"},
        {"torch_dtype": ..., "dtype": "float32"},
        {"rope_theta": ..., "rope_scaling": ..., "attention_bias": ..., "attention_dropout": ..., "use_cache": ...},
        {
            "mm_patch_merge_type": ...,
            "mm_vision_select_feature": ...,
            "tokenizer_padding_side": ...,
            "mm_projector_lr": ...,
        },
        {"_name_or_path": "./checkpoints/vicuna-7b", "transformers_version": "4.31.0", "mm_resampler_type": None},
    ],
)
def test_configs_as_found_in_the_wild(goldens, copy_golden, change_config, golden_model, tmp_path, changes):
    """With the sampling settings of the releases, which newer libraries refuse to save."""
    directory = copy_golden(FULL, tmp_path / FULL)
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    change_config(directory, **changes)
    refused = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    (directory / "generation_config.json").write_text(json.dumps(refused))
    model = load_pretrained_model(str(directory), None, "x", device="cpu")[1]
    expected = dict(golden_model[1].named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert model.config.rope_parameters == golden_model[1].config.rope_parameters
    model.generation_config.validate(strict=True)


@pytest.mark.parametrize("tower", ["inside", "beside"])
def test_vicuna_with_a_projector(goldens, copy_golden, change_config, tmp_path, tower):
    """The base is an LLM alone; the vision tower is the one that the projector's config names."""
    vicuna = copy_golden(FULL, tmp_path / "vicuna")
    golden = open_weights(goldens / FULL)
    for path in vicuna.glob("pytorch_model*"):
        path.unlink()
    kept = {name: golden.entries[name] for name in golden if "mm_projector" not in name}
    if tower == "beside":
        kept = {name: entry for name, entry in kept.items() if "vision_tower" not in name}
    write_weights(LazyTensors(kept), vicuna)
    settings = json.loads((vicuna / "config.json").read_text())
    unknown = dict.fromkeys((key for key in settings if key.startswith("mm_")), ...)
    change_config(vicuna, model_type="llama", architectures=["LlamaForCausalLM"], use_mm_proj=..., **unknown)
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    found = open_checkpoint(goldens / PROJECTOR, vicuna)
    expected = open_checkpoint(goldens / PROJECTOR, goldens / FULL).tensors
    assert found.tensors.keys() == expected.keys()
    same = [name for name in expected if "vision_tower" not in name or tower == "inside"]
    assert all(torch.equal(found.tensors[name], expected[name]) for name in same)
    assert found.config.mm_vision_config["image_size"] == 56


def test_an_adapter_on_a_vision_tower_outside_the_base(goldens, copy_golden, tmp_path):
    """The original puts adapters on the vision tower's projections too, whose names are the LLM's."""
    shutil.copytree(goldens / TOWER, tmp_path / TOWER)
    base = copy_golden(FULL, tmp_path / "base")
    golden = open_weights(goldens / FULL)
    for path in base.glob("pytorch_model*"):
        path.unlink()
    write_weights(LazyTensors({name: golden.entries[name] for name in golden if "vision_tower" not in name}), base)
    adapter = read_adapter(goldens / LORA)
    changed = {name for name in adapter.pairs if "vision_tower" in name}
    expected = add_adapter(open_checkpoint(base).tensors, adapter)
    found = open_checkpoint(goldens / LORA, base).tensors
    assert changed <= found.keys() == expected.keys()
    assert changed
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_old_adapters_config(goldens, copy_golden, change_config, golden_model, tmp_path):
    """As peft 0.4 wrote it, when LLaVA-1.5 came out."""
    directory = copy_golden(LORA, tmp_path / LORA)
    old = {"auto_mapping": None, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "bias": "none"}
    old |= {"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None}
    old |= {"layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.05, "modules_to_save": None}
    settings = json.loads((directory / "adapter_config.json").read_text())
    old |= {"peft_type": "LORA", "r": 4, "revision": None, "task_type": "CAUSAL_LM"}
    old["target_modules"] = settings["target_modules"]
    (directory / "adapter_config.json").write_text(json.dumps(old))
    expected = open_checkpoint(goldens / LORA, goldens / FULL).tensors
    found = open_checkpoint(directory, goldens / FULL).tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    bare = build_model(open_checkpoint(directory, goldens / FULL, with_adapter=False), device="cpu")
    beside = attach_adapter(bare, directory)
    ids = torch.tensor([[1, 1691, 736, 8314]])
    with torch.no_grad():
        logits = beside(input_ids=ids).logits
        merged = build_model(open_checkpoint(directory, goldens / FULL), device="cpu")(input_ids=ids).logits
    torch.testing.assert_close(logits, merged, atol=1e-5, rtol=1e-5)


def test_other_tensors_in_a_projector_file(goldens, copy_golden, change_config, tmp_path):
    directory = copy_golden(PROJECTOR, tmp_path / "x")
    tensors = torch.load(directory / "mm_projector.bin", weights_only=True)
    torch.save({**tensors, "model.embed_tokens.weight": torch.zeros(1)}, directory / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector.bin holds model.embed_tokens.weight; only a projector is supp"):
        open_checkpoint(directory, goldens / FULL)


def test_a_projector_of_another_type_replaces_the_bases(goldens, copy_golden, change_config, tmp_path):
    directory = copy_golden(PROJECTOR, tmp_path / "linear")
    linear = {"weight": torch.randn(16, 32), "bias": torch.randn(16)}
    torch.save(
        {f"model.mm_projector.{name}": tensor for name, tensor in linear.items()}, directory / "mm_projector.bin"
    )
    change_config(directory, mm_projector_type="linear")
    model = build_model(open_checkpoint(directory, goldens / FULL), device="cpu", dtype="float32")
    found = model.get_model().mm_projector.state_dict()
    assert found.keys() == linear.keys()
    assert all(torch.equal(found[name], linear[name]) for name in linear)


def test_the_hubs_cache_is_enough(goldens, copy_golden, change_config, tmp_path, monkeypatch, no_network, golden_model):
    """`liuhaotian/llava-v1.5-7b` as huggingface_hub lays it out, found without asking the hub."""
    revision = "4481d270cc22fd5c4d1bb5df129622006ccd9234"
    for name, source in (("models--liuhaotian--llava-v1.5-7b", FULL), (f"models--tiny--{TOWER}", TOWER)):
        shutil.copytree(goldens / source, tmp_path / name / "snapshots" / revision)
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text(revision)
    snapshot = tmp_path / "models--liuhaotian--llava-v1.5-7b" / "snapshots" / revision
    (snapshot / "config.json").chmod(0o644)
    settings = json.loads((tmp_path / f"models--tiny--{TOWER}" / "snapshots" / revision / "config.json").read_text())
    change_config(snapshot, mm_vision_config=settings.get("vision_config", settings))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_directory("liuhaotian/llava-v1.5-7b") == snapshot
    model = load_pretrained_model("liuhaotian/llava-v1.5-7b", None, "llava-v1.5-7b", device="cpu")[1]
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)


COMPLETE = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture
def written(golden_model, tmp_path):
    """A directory that `save_checkpoint` wrote."""
    tokenizer, model, processor, _ = golden_model
    directory = tmp_path / "alone" / "written"
    directory.mkdir(parents=True)
    save_checkpoint(state_for_file(model), copy.deepcopy(model.config), tokenizer, processor, directory)
    return directory


def test_a_written_checkpoint_is_complete(written):
    assert names(written) == COMPLETE
    assert json.loads((written / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def test_its_tensors_have_the_released_names_and_values(goldens, written):
    golden, found = open_weights(goldens / FULL), open_weights(written)
    assert sorted(found) == sorted(golden)
    for name in golden:
        assert torch.equal(found[name], golden[name]), name


def test_it_loads_without_network_or_anything_beside_it(written, golden_model, no_network):
    tokenizer, model, processor, context_length = load_pretrained_model(str(written), None, "x", device="cpu")
    ours = golden_model[1]
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, images=images).logits, ours(input_ids=ids, images=images).logits)
    assert model.config.conversation_template == "vicuna_v1"
    assert tokenizer("a</s>b").input_ids == golden_model[0]("a</s>b").input_ids
    assert processor.to_dict() == golden_model[2].to_dict()
    assert context_length == 256


def test_written_in_half_precision(golden_model, tmp_path):
    tokenizer, model, processor, _ = golden_model
    config = copy.deepcopy(model.config)
    save_checkpoint(state_for_file(model), config, tokenizer, processor, tmp_path, dtype=torch.float16)
    assert load_config(tmp_path).dtype in ("float16", torch.float16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    assert {tensor.dtype for tensor in open_weights(tmp_path).values()} == {torch.float16}
    assert str(config.dtype) in ("float32", "torch.float32")


def test_no_sampling_settings_that_libraries_refuse(written):
    from transformers import GenerationConfig

    GenerationConfig.from_pretrained(written).validate()
