"""Weights that don't fit their config: the message names the likely cause, not only the difference."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.read_tensors import open_weights, wrapper_prefix
from llava.model.checkpoint.strict_load import check_names, projector_kind

FULL, TOWER = "llava-v1.5-golden", "clip-vit-tiny-patch14-56"
PROJECTOR, ATTENTION = "model.mm_projector.", "model.layers.0.self_attn."
ENCODER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def change(goldens, copy_golden, tmp_path):
    """Return the function (change of the tensors, save) -> a golden directory with other weights."""

    def write(edit, save=lambda tensors, place: save_file(tensors, place / "model.safetensors")):
        directory = copy_golden(FULL, tmp_path / FULL)
        copy_golden(TOWER, tmp_path / TOWER)
        tensors = {name: tensor.clone() for name, tensor in open_weights(directory).items()}
        for path in directory.glob("pytorch_model*"):
            path.unlink()
        save(edit(tensors) or tensors, directory)
        return directory

    return write


def pickled(tensors, place):
    torch.save(tensors, place / "pytorch_model.bin")


def with_names(*names, shape=(2, 2), dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype) for name in names})


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(*parts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


def linear_projector(tensors):
    kept = without("mm_projector")(tensors)
    return {**kept, f"{PROJECTOR}weight": torch.zeros(16, 32), f"{PROJECTOR}bias": torch.zeros(16)}


def resized(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_names("model.image_newline"), "model.image_newline is LLaVA-1.6's (LLaVA-NeXT)"),
        (
            with_names(f"{ATTENTION}q_proj.lora_A.default.weight"),
            "is part of a LoRA adapter: the file was saved from a",
        ),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), "base_layer.weight is part of a LoRA adapter"),
        (
            with_names(f"{ATTENTION}q_proj.weight.absmax"),
            "absmax belongs to weights quantised by bitsandbytes, and conf",
        ),
        (with_names(f"{ATTENTION}q_proj.SCB"), "SCB belongs to weights quantised by bitsandbytes"),
        (renamed("q_proj.weight", "q_proj.qweight"), "qweight belongs to weights quantised by GPTQ or AWQ"),
        (with_names(f"{ATTENTION}q_proj.weight_scale"), "weight_scale belongs to weights quantised by FP8"),
        (linear_projector, "model.safetensors holds a projector of type linear: set mm_projector_type to linear in"),
        (with_names(f"{PROJECTOR}4.weight", f"{PROJECTOR}4.bias"), "holds a projector of type mlp3x_gelu: set mm_proj"),
        (
            renamed("mm_projector.0", "mm_projector.net.0"),
            "holds a projector of a type that is not supported (model.mm",
        ),
        (without("mm_projector"), "there is no projector: a language model alone, such as Vicuna"),
        (with_names(f"{ENCODER}head.probe"), "head.probe is not CLIP's (SigLIP's, perhaps)"),
        (
            with_names(f"{ATTENTION}k_proj.bias"),
            "k_proj.bias is not Llama's: these weights have another language model",
        ),
        (
            with_names("model.layers.2.mlp.up_proj.weight"),
            "the weights have 3 layers, num_hidden_layers in config.json",
        ),
        (without("model.layers.0."), "layer 0 is in no file that was read; fetch the weights again"),
        (without("model.layers.1."), "the weights have 1 layers, num_hidden_layers in config.json says 2; use the"),
        (without("mm_projector.2"), "model.safetensors holds a projector of type mlp1x_gelu: set mm_projector_type"),
        (without("lm_head"), "set tie_word_embeddings to true in config.json if the embedding is the head too"),
        (
            resized("model.embed_tokens.weight", 32001, 16),
            "whose vocabulary was resized, or set vocab_size to 32001 there",
        ),
        (
            resized("lm_head.weight", 0),
            "ZeRO-3 saved its own part instead of the whole tensor; run the zero_to_fp32.py",
        ),
        (resized(f"{PROJECTOR}0.weight", 16, 64), "the projector was trained for a vision tower of width 64"),
        (resized(f"{PROJECTOR}0.weight", 64, 32), "the projector was trained for a language model of width 64"),
        (
            resized(f"{ATTENTION}q_proj.weight", 16, 16, dtype=torch.int8),
            "the weights are quantised, and config.json ha",
        ),
        (
            resized(f"{ATTENTION}q_proj.weight", 128, 1, dtype=torch.uint8),
            "the weights are quantised, and config.json ",
        ),
        (
            resized(f"{ENCODER}embeddings.position_embedding.weight", 26, 32),
            "the vision tower has other sizes than mm_vision_config says",
        ),
    ],
)
def test_causes(change, edit, message):
    with pytest.raises(ValueError, match=r"^the weights don't fit the config: |but the config makes it ") as caught:
        load_pretrained_model(str(change(edit)), None, "x", device="cpu")
    assert message in str(caught.value)


def test_an_unknown_cause_gets_the_general_advice():
    with pytest.raises(ValueError, match=r": 1 missing \(a\); use the config.json that belongs to them$"):
        check_names({"a", "b"}, {"b"})


@pytest.mark.parametrize("save", [pickled, lambda tensors, place: save_file(tensors, place / "model.safetensors")])
@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "module._orig_mod.base_model.model."])
def test_the_prefix_of_a_wrapper_is_removed(change, golden_model, caplog, prefix, save):
    caplog.set_level("INFO")
    directory = change(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}, save)
    model = load_pretrained_model(str(directory), None, "x", device="cpu")[1]
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)
    assert f"{directory}: names are read without the prefix {prefix!r} of a wrapper of the model" in caplog.text


def test_a_prefix_that_some_names_lack_stays():
    assert wrapper_prefix(["module.a", "b"]) == ""
    assert wrapper_prefix([]) == ""


def test_the_prefix_of_an_unknown_wrapper_is_named(change):
    directory = change(lambda tensors: {f"llava.{name}": tensor for name, tensor in tensors.items()})
    (directory / "config.json").write_text(
        json.dumps({**json.loads((directory / "config.json").read_text()), "mm_vision_tower": TOWER})
    )
    with pytest.raises(
        ValueError, match=r"; the names begin with 'llava.', which a wrapper put there; save them witho"
    ):
        load_pretrained_model(str(directory), None, "x", device="cpu")


def test_names_of_the_inner_model_alone():
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    with pytest.raises(
        ValueError, match=r"; the names lack 'model.' in front: only the inner model was saved; save the"
    ):
        check_names(names, {"embed_tokens.weight", "norm.weight"})


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_weights_beside_an_optimizer(change, golden_model, caplog, key):
    caplog.set_level("INFO")

    def wrapped(tensors, place):
        torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: tensors}, place / "pytorch_model.bin")

    directory = change(lambda tensors: None, wrapped)
    model = load_pretrained_model(str(directory), None, "x", device="cpu")[1]
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)
    assert f"pytorch_model.bin: the weights are those under {key!r}" in caplog.text


def test_pickles_of_other_content(change):
    directory = change(lambda tensors: {**tensors, "epoch": 3}, pickled)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is not a dictionary of tensors \('epoch' is not a tensor\); use a f"
    ):
        open_checkpoint(directory)
    torch.save({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, directory / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"holds tensors of dtype torch.float8_e4m3fn, which is not supported; use 16-b"
    ):
        open_checkpoint(directory)


def test_a_tied_head(change, change_config, caplog, tmp_path):
    caplog.set_level("INFO")
    directory = change(without("lm_head"))
    change_config(directory, tie_word_embeddings=True)
    checkpoint = open_checkpoint(directory)
    assert torch.equal(checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"])
    assert "the head is the embedding (tie_word_embeddings)" in caplog.text
    model = load_pretrained_model(str(directory), None, "x", device="cpu")[1]
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert checkpoint.config.tie_word_embeddings is False


def test_a_shard_that_the_index_does_not_name(goldens, change):
    """An index that names only one of its shards."""
    directory = change(lambda tensors: None, lambda tensors, place: None)
    layer = "model.layers.1."
    whole = {name: tensor.clone() for name, tensor in open_weights(goldens / FULL).items()}
    for number, keep in ((1, lambda name: not name.startswith(layer)), (2, lambda name: name.startswith(layer))):
        part = {name: tensor for name, tensor in whole.items() if keep(name)}
        save_file(part, directory / f"model-0000{number}-of-00002.safetensors")
    places = dict.fromkeys((name for name in whole if not name.startswith(layer)), "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    message = r"; layer 1 is in no file that was read \(model-00002-of-00002.safetensors is not named in the index\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(directory), None, "x", device="cpu")


@pytest.mark.parametrize(
    ("leaves", "kind"),
    [
        ({"weight", "bias"}, "linear"),
        ({"0.weight", "0.bias"}, "mlp1x_gelu"),
        ({"0.weight", "0.bias", "2.weight", "2.bias"}, "mlp2x_gelu"),
        ({"0.weight", "0.bias", "1.weight", "1.bias"}, None),
        ({"0.weight"}, None),
        (set(), None),
    ],
)
def test_kinds_of_projectors(leaves, kind):
    assert projector_kind(leaves) == kind
