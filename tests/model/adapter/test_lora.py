"""Merged = base + scale * B A, of peft's directories, the original's and ours."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.adapter.lora import read_adapter
from llava.model.adapter.merge import add_adapter
from llava.model.adapter.non_lora import read_projector
from llava.model.adapter.tensor_names import plain_name
from llava.model.builder import attach_adapter, build_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_tensor_file, open_weights
from llava.train.lora import continue_lora

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
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    assert modules
    return {
        plain_name(module) + ".weight": scale
        * (tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double())
        for module in modules
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
    with pytest.raises(
        ValueError, match=r"states.pt holds no projector; merge with --mm-projector naming a directory or file"
    ):
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
        ("peft_type", "IA3"),
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
        (lambda tensors: tensors.pop(f"{LAYER}.lora_A.weight"), r"lora_B.weight is not part of a LoRA adapter$"),
        (
            lambda tensors: tensors.update({f"{LAYER}.lora_B.bias": torch.zeros(40)}),
            r"up_proj.lora_B.bias is not part of a LoRA adapter$",
        ),
        (lambda tensors: tensors.update({"x": torch.zeros(1)}), r": x is not part of a LoRA adapter$"),
        (
            lambda tensors: (tensors.clear(), tensors.update({"x": torch.zeros(1)})),
            r": x is not part of a LoRA adapter$",
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
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
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


def test_projector_of_a_directory_or_file(goldens, tmp_path):
    directory = goldens / "golden-pretrained-projector"
    names = [f"model.mm_projector.{leaf}" for leaf in ("0.bias", "0.weight", "2.bias", "2.weight")]
    assert sorted(read_projector(directory)) == names
    assert sorted(read_projector(directory / "mm_projector.bin")) == names
    expected = open_tensor_file(directory / "mm_projector.bin")
    for number, old in enumerate(("model.mm_projector.", "model.", "")):  # the original takes any prefix too
        new = "module.model." if old == "" else ""
        stored = {new + name.removeprefix(old): tensor.clone() for name, tensor in expected.items()}
        torch.save(stored, tmp_path / f"{number}.bin")
        found = read_projector(tmp_path / f"{number}.bin")
        assert sorted(found) == names
        assert all(torch.equal(found[name], expected[name]) for name in names)
    with pytest.raises(FileNotFoundError, match=r"mm_projector.bin is missing; fetch it again$"):
        read_projector(goldens / "llava-v1.5-golden")


@pytest.fixture
def dora_directory(adapter_directory, base):
    """The golden adapter with lengths of rows, twice those of the base's."""

    def lengthen(tensors):
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            tensors[f"{module}.lora_magnitude_vector"] = 2 * base[plain_name(module) + ".weight"].norm(dim=1)

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


def test_lengths_are_not_part_of_plain_lora(dora_directory):
    change_settings(dora_directory, use_dora=False)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector is not part of a LoRA adapter$"):
        read_adapter(dora_directory)


RENAMED = {  # as other programs and older versions write the same adapter
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "named": lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    "wrapped": lambda name: f"module.{name}",
    "twice": lambda name: f"base_model.model.{name}",
}


def rename_tensors(directory, rename):
    def change(tensors):
        before = dict(tensors)
        tensors.clear()
        tensors.update({rename(name): tensor for name, tensor in before.items()})

    change_tensors(directory, change)


@torch.no_grad()
@pytest.mark.parametrize("kind", RENAMED)
def test_one_reader_whatever_the_names(goldens, adapter_directory, kind):
    """Merged, attached and continued: never the base alone, which peft's loader would give with a warning."""
    golden, path = goldens / "llava-v1.5-golden-task-lora", goldens / "llava-v1.5-golden"
    expected = read_adapter(golden)
    rename_tensors(adapter_directory, RENAMED[kind])
    found = read_adapter(adapter_directory)
    assert found.fingerprint() == expected.fingerprint()
    assert found.pairs.keys() == expected.pairs.keys()
    bare = build_model(open_checkpoint(adapter_directory, path, with_adapter=False), dtype="float32", device="cpu")
    further = dict(continue_lora(bare, adapter_directory).named_parameters())
    stored = load_file(golden / "adapter_model.safetensors")
    inside = {name for name in stored if ".model.layers." in name}
    assert len(inside) == 28
    for name in inside:
        assert torch.equal(further[name.replace(".weight", ".default.weight")], stored[name])
    assert sum("lora_" in name for name in further) == len(inside)


def test_attached_to_the_plain_base_it_brings_everything(goldens):
    """Projector and adapters on the vision tower too, whether or not the checkpoint was opened with the projector."""
    directory, path = goldens / "llava-v1.5-golden-task-lora", goldens / "llava-v1.5-golden"
    opened = build_model(open_checkpoint(directory, path, with_adapter=False), dtype="float32", device="cpu")
    plain = build_model(open_checkpoint(path), dtype="float32", device="cpu")
    one, other = (attach_adapter(model, directory).state_dict() for model in (opened, plain))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    merged = build_model(open_checkpoint(directory, path), dtype="float32", device="cpu").state_dict()
    for name, tensor in merged.items():
        if not name.startswith("model.layers."):
            torch.testing.assert_close(one[f"base_model.model.{name}"], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("empty", [1, 46])
def test_empty_tensors_of_zero_3(adapter_directory, empty):
    def change(tensors):
        tensors.update({name: torch.empty(0) for name in sorted(tensors)[:empty]})

    change_tensors(adapter_directory, change)
    message = (
        rf"adapter_model.safetensors: {empty} of 46 tensors are empty, base_model.*lora_A.weight with shape \(0,\): "
        r"DeepSpeed ZeRO-3 .*zero_to_fp32.py .*stage3_gather_16bit_weights_on_model_save true or with ZeRO-2$"
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)


def test_an_empty_projector_of_zero_3(goldens, adapter_directory):
    path = adapter_directory / "non_lora_trainables.bin"
    torch.save({name: torch.empty(0) for name in torch.load(path, weights_only=True)}, path)
    with pytest.raises(ValueError, match=r"non_lora_trainables.bin: 4 of 4 tensors are empty, .*ZeRO-3"):
        read_adapter(adapter_directory)
    base = goldens / "llava-v1.5-golden"
    found = read_adapter(adapter_directory, base).replaced  # the way out that the message names
    assert torch.equal(found["model.mm_projector.0.bias"], open_weights(base)["model.mm_projector.0.bias"])


def test_an_empty_file_beside_the_adapter(goldens, adapter_directory):
    torch.save({}, adapter_directory / "non_lora_trainables.bin")
    message = r"non_lora_trainables.bin holds no tensor, so the projector .* is lost; merge with --mm-projector naming"
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)
    assert len(read_adapter(adapter_directory, goldens / "llava-v1.5-golden").replaced) == 4


def test_pefts_own_directory_keeps_the_bases_projector(adapter_directory):
    """Beside a `config.json` or a trainer's state the projector was trained and is lost; peft writes neither."""
    for name in ("non_lora_trainables.bin", "config.json"):
        (adapter_directory / name).unlink()
    assert not read_adapter(adapter_directory).trains_projector
    (adapter_directory / "trainer_state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks non_lora_trainables.safetensors or non_lora_trainables.bin"):
        read_adapter(adapter_directory)


def test_the_rank_of_the_tensors_is_that_of_the_settings(adapter_directory):
    """The scale is alpha / r, so another r is another adapter."""
    change_settings(adapter_directory, r=8)
    message = (
        r"A and B of .* are \(4, \d+\) and \(\d+, 4\), but the rank is 8 by adapter_config.json; use the adapter_c"
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)


def test_one_tensor_with_two_values(adapter_directory, base):
    name = "base_model.model.model.mm_projector.0.bias"
    stored = torch.load(adapter_directory / "non_lora_trainables.bin", weights_only=True)[name]
    change_tensors(adapter_directory, lambda tensors: tensors.update({name: stored}))
    assert torch.equal(read_adapter(adapter_directory).replaced["model.mm_projector.0.bias"], stored)
    change_tensors(adapter_directory, lambda tensors: tensors.update({name: stored + 1}))
    message = (
        r"^model.mm_projector.0.bias has one value in .*adapter_model.safetensors and another in .*trainables.bin;"
    )
    with pytest.raises(ValueError, match=message):
        read_adapter(adapter_directory)


def test_two_adapters_in_one_file(adapter_directory):
    other = f"{LAYER}.lora_A.other.weight"
    change_tensors(adapter_directory, lambda tensors: tensors.update({other: torch.zeros(4, 16)}))
    with pytest.raises(
        ValueError, match=r"holds model.layers.0.mlp.up_proj.weight twice, as .* and as .*; fetch it ag"
    ):
        read_adapter(adapter_directory)


def test_two_files_of_one_adapter(adapter_directory, caplog):
    expected = read_adapter(adapter_directory).fingerprint()
    torch.save({}, adapter_directory / "adapter_model.bin")
    assert read_adapter(adapter_directory).fingerprint() == expected
    assert "holds adapter_model.safetensors and adapter_model.bin; the first is read" in caplog.text


def test_a_value_that_is_no_number_is_not_trained_further(goldens, adapter_directory):
    change_tensors(adapter_directory, lambda tensors: tensors[f"{LAYER}.lora_B.weight"].fill_(torch.nan))
    bare = build_model(open_checkpoint(goldens / "llava-v1.5-golden"), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=r"up_proj.lora_B.weight in .* holds NaN or infinity"):
        continue_lora(bare, adapter_directory)


def test_the_whole_state_of_a_run_is_an_adapter_too(goldens, adapter_directory, tmp_path):
    """What zero_to_fp32.py makes of a LoRA run: every weight, those under adapters as `base_layer`."""
    path = goldens / "llava-v1.5-golden"
    expected = open_checkpoint(adapter_directory, path).tensors
    bare = build_model(open_checkpoint(path), dtype="float32", device="cpu")
    state = attach_adapter(bare, adapter_directory).state_dict()
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        (adapter_directory / name).unlink()
    torch.save(state, adapter_directory / "adapter_model.bin")
    found = open_checkpoint(adapter_directory, path).tensors
    assert found.keys() == expected.keys()
    for name in expected:
        if ".encoder.layers.2." not in name:  # no parameter of the model, as it never runs
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
