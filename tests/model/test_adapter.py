"""Merged = base + scale * B A, of peft's directories, the original's and ours."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.adapter import add_adapter, plain_name, read_adapter, read_projector
from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint import open_checkpoint
from llava.model.lazy_tensors import LazyTensors
from llava.model.streaming import stream_model
from llava.model.weights import open_weights

LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture
def adapter_directory(goldens, tmp_path):
    """A copy of the golden LoRA directory whose settings and tensors a test may change."""
    directory = tmp_path / "adapter"
    shutil.copytree(goldens / "llava-v1.5-golden-task-lora", directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


def change_settings(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


@pytest.fixture(scope="module")
def base(goldens):
    return open_weights(goldens / "llava-v1.5-golden")


def products(directory, scale):
    """By plain name, scale * B A in fp64."""
    tensors = load_file(directory / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert stems
    return {
        plain_name(stem) + ".weight": scale
        * (tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double())
        for stem in stems
    }


@pytest.mark.parametrize(("rank_stabilised", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_merged_is_base_plus_scaled_product(adapter_directory, base, rank_stabilised, scale):
    change_settings(adapter_directory, use_rslora=rank_stabilised)
    merged = add_adapter(base, read_adapter(adapter_directory))
    expected = products(adapter_directory, scale)
    replaced = torch.load(adapter_directory / "non_lora_trainables.bin", weights_only=True)
    replaced = {plain_name(name): tensor for name, tensor in replaced.items()}
    assert sorted(replaced) == [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    assert {name.split(".")[-2] for name in expected if name.startswith("model.layers")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert sorted(merged) == sorted(base)
    for name in base:
        if name in expected:
            torch.testing.assert_close(
                merged[name].double(), base[name].double() + expected[name], atol=1e-6, rtol=1e-6
            )
            assert not torch.equal(merged[name], base[name])
        else:
            assert torch.equal(merged[name], replaced.get(name, base[name]))


def test_the_sum_is_cast_once(adapter_directory, base):
    half = LazyTensors.of({name: base[name].to(torch.bfloat16) for name in base})
    name = plain_name(LAYER) + ".weight"
    product = products(adapter_directory, 2.0)[name]
    exact = (half[name].double() + product).float()
    assert torch.equal(add_adapter(half, read_adapter(adapter_directory))[name], exact.to(torch.bfloat16))
    merged = add_adapter(half, read_adapter(adapter_directory), dtype=torch.float32)[name]
    torch.testing.assert_close(merged, exact, atol=1e-7, rtol=1e-6)


def test_more_rows_than_are_added_at_a_time(adapter_directory, base):
    name = plain_name(LAYER) + ".weight"
    down, up, weight = torch.randn(4, 6), torch.randn(600, 4), torch.randn(600, 6)
    pair = LazyTensors.of({"down": down, "up": up}).entries
    adapter = dataclasses.replace(read_adapter(adapter_directory), pairs={name: (pair["down"], pair["up"])})
    merged = add_adapter(base.overlaid(LazyTensors.of({name: weight}).entries), adapter)[name]
    exact = weight.double() + 2 * up.double() @ down.double()
    torch.testing.assert_close(merged.double(), exact, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_equals_pefts_own_unmerged_forward(goldens, golden_model):
    directory, path = goldens / "llava-v1.5-golden-task-lora", goldens / "llava-v1.5-golden"
    bare = build_model(open_checkpoint(directory, path, with_adapter=False), dtype="float32", device="cpu")
    apart = attach_adapter(bare, directory)
    assert any("lora_A" in name for name, _ in apart.named_parameters())
    merged = build_model(open_checkpoint(directory, path), dtype="float32", device="cpu").eval()
    ids = torch.tensor([[1, -200, 1691, 736, 8314]])
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    logits = merged(input_ids=ids, images=images).logits
    torch.testing.assert_close(apart(input_ids=ids, images=images).logits, logits, atol=1e-5, rtol=1e-5)
    assert (golden_model[1](input_ids=ids, images=images).logits - logits).abs().max() > 1e-2


def test_names_lose_what_peft_puts_before_them():
    assert plain_name("base_model.model.model.mm_projector.0.bias") == "model.mm_projector.0.bias"
    assert plain_name("base_model.model.lm_head") == "lm_head"
    assert plain_name("model.mm_projector.0.bias") == "model.mm_projector.0.bias"
    assert plain_name("model.model.layers.0") == "model.layers.0"


def test_parts(goldens):
    adapter = read_adapter(goldens / "llava-v1.5-golden-task-lora")
    inside = {name for name in adapter.pairs if name.startswith("model.layers.")}
    assert len(inside) == 14
    assert set(adapter.outside_llm().pairs) == set(adapter.pairs) - inside
    assert adapter.outside_llm().replaced is adapter.replaced


def test_an_adapter_knows_itself_again(adapter_directory):
    expected = read_adapter(adapter_directory).fingerprint()
    assert read_adapter(adapter_directory).fingerprint() == expected
    change_tensors(adapter_directory, lambda tensors: tensors.update({f"{LAYER}.lora_B.weight": torch.ones(40, 4)}))
    assert read_adapter(adapter_directory).fingerprint() != expected


@pytest.mark.parametrize("place", ["llava-v1.5-golden", "golden-pretrained-projector", "", "non_lora_trainables.bin"])
def test_a_projector_from_elsewhere(goldens, adapter_directory, tmp_path, place):
    """Base, projector directory, LoRA directory or a file of it, for an adapter that comes without."""
    lora = goldens / "llava-v1.5-golden-task-lora"
    source = goldens / place if place.startswith(("llava", "golden")) else lora / place
    (adapter_directory / "non_lora_trainables.bin").unlink()
    found = read_adapter(adapter_directory, source).replaced
    assert sorted(found) == [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    if source.is_relative_to(lora):
        trained = read_adapter(lora).replaced
        assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_a_projector_from_elsewhere_is_not_needed_or_is_none(goldens, adapter_directory, tmp_path):
    with pytest.raises(ValueError, match=r"bin is the projector trained with the adapter; leave --mm-projector out$"):
        read_adapter(adapter_directory, goldens / "llava-v1.5-golden")
    (adapter_directory / "non_lora_trainables.bin").unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no projector; name a file or directory that does$"):
        read_adapter(adapter_directory, tmp_path / "other.safetensors")


@pytest.mark.parametrize("states", [{"module": {"lm_head.weight": torch.zeros(1)}}, {"x": 1}, torch.zeros(1)])
def test_deepspeed_states_without_a_projector(adapter_directory, states):
    (adapter_directory / "non_lora_trainables.bin").unlink()
    (adapter_directory / "global_step7").mkdir()
    torch.save(states, adapter_directory / "global_step7" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"states.pt holds no projector; pass --mm-projector with a directory or file"):
        read_adapter(adapter_directory)


def test_pickled_adapters_are_read_too(adapter_directory, base):
    tensors = load_file(adapter_directory / "adapter_model.safetensors")
    expected = dict(add_adapter(base, read_adapter(adapter_directory)))
    (adapter_directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter_directory / "adapter_model.bin")
    others = torch.load(adapter_directory / "non_lora_trainables.bin", weights_only=True)
    (adapter_directory / "non_lora_trainables.bin").unlink()
    save_file(others, adapter_directory / "non_lora_trainables.safetensors")
    merged = add_adapter(base, read_adapter(adapter_directory))
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("rank_pattern", {"up_proj": 8}),
        ("alpha_pattern", {"up_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [5]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
    ],
)
def test_settings_that_would_change_the_sum_are_refused(adapter_directory, key, value):
    change_settings(adapter_directory, **{key: value})
    message = rf"adapter_config.json: {key}( '\w+')? is not supported; merge this adapter with peft$"
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)


@pytest.mark.parametrize("start", [True, False, None, "gaussian"])
def test_starts_that_leave_the_base_as_it_is(adapter_directory, start):
    change_settings(adapter_directory, init_lora_weights=start)
    assert read_adapter(adapter_directory).pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight"),
            r"up_proj.lora_A.weight has no .*up_proj.lora_B.weight;",
        ),
        (lambda tensors: tensors.pop(f"{LAYER}.lora_A.weight"), r"up_proj.lora_B.weight is no part of a LoRA adapter$"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_B.bias": torch.zeros(40)}),
            r"up_proj.lora_B.bias is no part of a LoRA adapter$",
        ),
        (lambda tensors: tensors.update({"x": torch.zeros(1)}), r": x is no part of a LoRA adapter$"),
        (
            lambda tensors: (tensors.clear(), tensors.update({"x": torch.zeros(1)})),
            r": x is no part of a LoRA adapter$",
        ),
    ],
)
def test_tensors_that_make_no_adapter_are_refused(adapter_directory, change, message):
    change_tensors(adapter_directory, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "lacks adapter_model.safetensors or adapter_model.bin; use the directory that"),
        (
            "non_lora_trainables.bin",
            "lacks non_lora_trainables.safetensors or non_lora_trainables.bin, which holds",
        ),
    ],
)
def test_missing_files(adapter_directory, name, message):
    (adapter_directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        read_adapter(adapter_directory)


def test_broken_settings(adapter_directory):
    (adapter_directory / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is no valid JSON"):
        read_adapter(adapter_directory)


def test_a_base_without_the_layer(adapter_directory, base):
    name = plain_name(LAYER) + ".weight"
    smaller = type(base)({key: entry for key, entry in base.entries.items() if key != name})
    message = f"^the base has no {name}, which the adapter changes; name the base it was trained on$"
    with pytest.raises(ValueError, match=message):
        add_adapter(smaller, read_adapter(adapter_directory))


def test_a_base_without_projector_gets_the_trained_one(adapter_directory, base):
    bare = type(base)({name: entry for name, entry in base.entries.items() if "mm_projector" not in name})
    assert sorted(add_adapter(bare, read_adapter(adapter_directory))) == sorted(base)


def test_a_base_of_another_width(adapter_directory, base):
    name = plain_name(LAYER) + ".weight"
    wider = base.overlaid(LazyTensors.of({name: torch.zeros(40, 18)}).entries)
    with pytest.raises(ValueError, match=rf"^{name} is \(40, 18\) in the base, but \(40, 16\) in the adapter$"):
        add_adapter(wider, read_adapter(adapter_directory))


def test_projector_of_a_directory_or_file(goldens):
    directory = goldens / "golden-pretrained-projector"
    names = [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    assert sorted(read_projector(directory)) == names
    assert sorted(read_projector(directory / "mm_projector.bin")) == names
    with pytest.raises(FileNotFoundError, match=r"mm_projector.bin is missing; fetch it again$"):
        read_projector(goldens / "llava-v1.5-golden")


@pytest.fixture
def dora_directory(adapter_directory, base):
    """The golden adapter with lengths of rows, twice those of the base's."""

    def lengthen(tensors):
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            stem = name.removesuffix(".lora_A.weight")
            tensors[f"{stem}.lora_magnitude_vector"] = 2 * base[plain_name(stem) + ".weight"].norm(dim=1)

    change_settings(adapter_directory, use_dora=True)
    change_tensors(adapter_directory, lengthen)
    return adapter_directory


def test_dora_brings_each_row_of_the_sum_to_its_length(dora_directory, base):
    adapter = read_adapter(dora_directory)
    merged = add_adapter(base, adapter)
    for name, product in products(dora_directory, 2.0).items():
        total = base[name].double() + product
        expected = total / total.norm(dim=1, keepdim=True) * 2 * base[name].double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=1e-5)
    plain = dataclasses.replace(adapter, magnitudes={})
    assert adapter.fingerprint() != plain.fingerprint()


def test_dora_is_not_complete(dora_directory):
    change_tensors(dora_directory, lambda tensors: tensors.pop(f"{LAYER}.lora_magnitude_vector"))
    message = r"model.layers.0.mlp.up_proj.weight has not both a product and a length; fetch the adapter again$"
    with pytest.raises(ValueError, match=message):
        read_adapter(dora_directory)


def test_lengths_are_no_part_of_plain_lora(dora_directory):
    change_settings(dora_directory, use_dora=False)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector is no part of a LoRA adapter$"):
        read_adapter(dora_directory)


def test_dora_is_not_streamed(goldens, dora_directory):
    checkpoint = open_checkpoint(goldens / "llava-v1.5-golden")
    with pytest.raises(ValueError, match=r"is a DoRA adapter, which can't run with weights left in their files$"):
        stream_model(checkpoint, torch.device("cpu"), torch.float32, dora_directory)
