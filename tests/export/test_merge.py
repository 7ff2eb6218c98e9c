"""A merge is compared with base and adapter, and an interrupted one leaves nothing that looks complete."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.export import merge as program
from llava.inference import parity
from llava.model.checkpoint import convert
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights

FULL, LORA, PROJECTOR = "llava-v1.5-golden", "llava-v1.5-golden-task-lora", "golden-pretrained-projector"


@pytest.fixture(scope="session")
def merge():
    """`main` of the program."""
    return program.main


def flags(goldens, target, name=LORA, *more):
    paths = ["--model-path", str(goldens / name), "--model-base", str(goldens / FULL)]
    return [*paths, "--save-model-path", str(target), "--device", "cpu", *more]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", [LORA, PROJECTOR])
def test_the_result_is_what_loading_merges(goldens, merge, tmp_path, capsys, name):
    assert merge(flags(goldens, tmp_path / "merged", name)) == 0
    expected = open_checkpoint(goldens / name, goldens / FULL).tensors
    found = open_weights(tmp_path / "merged")
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    first, header, beside, reloaded = capsys.readouterr().out.splitlines()
    assert first == f"wrote {tmp_path / 'merged'} in float32"
    assert header == "parity on 4 question(s), computed in torch.float32:"
    assert float(re.search(r"difference (\S+)", beside)[1]) < 1e-4
    assert beside.endswith("equal greedy answers 100 %")
    assert re.search(r"merged - reloaded from .*merged   largest logit difference 0 .* answers 100 %$", reloaded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [LORA, PROJECTOR])
def test_where_memory_is_short_tensors_are_compared_one_by_one(
    goldens, merge, tmp_path, capsys, monkeypatch, name, dtype
):
    monkeypatch.setattr(parity, "free_memory", lambda device: 1000)
    assert merge(flags(goldens, tmp_path / "merged", name, "--dtype", dtype)) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "parity: too little memory for the model; each tensor compared with base + adapter: equal to rounding"
    )


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_chosen_and_recorded(goldens, merge, tmp_path, capsys, dtype, kind):
    assert merge(flags(goldens, tmp_path / "merged", LORA, "--dtype", dtype, "--no-parity")) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'merged'} in {dtype}\n"
    assert {tensor.dtype for tensor in open_weights(tmp_path / "merged").values()} == {kind}
    assert str(open_checkpoint(tmp_path / "merged").config.dtype).endswith(dtype)


def test_an_adapter_of_a_4_bit_base_comes_with_a_note(goldens, merge, tmp_path, capsys):
    qlora = tmp_path / "qlora"
    shutil.copytree(goldens / LORA, qlora)
    settings = json.loads((qlora / "config.json").read_text())
    (qlora / "config.json").unlink()
    (qlora / "config.json").write_text(json.dumps({**settings, "base_model_bits": 4}))
    words = ["--model-path", str(qlora), "--model-base", str(goldens / FULL), "--no-parity"]
    assert merge([*words, "--save-model-path", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].startswith("the adapter was trained on its base held in 4 bit and is added to")
    assert "merging: 100%" in printed.err


def test_full_weights_have_nothing_to_merge(goldens, merge, tmp_path, capsys):
    path = str(goldens / FULL)
    assert merge(["--model-path", path, "--save-model-path", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err == f"error: --model-path {path} holds full weights: there is nothing to merge\n"
    assert names(tmp_path) == []


def test_a_target_with_files_is_kept_unless_asked(goldens, merge, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert merge(flags(goldens, tmp_path, LORA, "--no-parity")) == 1
    assert f"{tmp_path} already holds files; choose another directory or empty this one" in capsys.readouterr().err
    assert names(tmp_path) == ["mine.txt"]
    assert merge(flags(goldens, tmp_path, LORA, "--no-parity", "--overwrite")) == 0
    assert "mine.txt" not in names(tmp_path)


def test_tensors_with_nan_are_named(goldens, merge, copy_damaged, tmp_path, capsys):
    base = copy_damaged("model.layers.1.mlp.up_proj.weight", float("nan"))
    paths = ["--model-path", str(goldens / LORA), "--model-base", str(base), "--vision-tower", str(goldens / TOWER)]
    assert merge([*paths, "--save-model-path", str(tmp_path / "merged"), "--no-parity"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: model.layers.1.mlp.up_proj.weight in {base}/model.safetensors + ")
    assert "holds NaN or infinity" in message
    assert not (tmp_path / "merged").exists()


TOWER = "clip-vit-tiny-patch14-56"


@pytest.fixture
def copy_damaged(goldens, tmp_path):
    """Return the function (tensor name, value) -> a copy of the golden checkpoint with that value in that tensor."""

    def copy(name, value):
        target = tmp_path / "damaged"
        shutil.copytree(goldens / FULL, target, ignore=shutil.ignore_patterns("pytorch_model*"))
        tensors = {key: tensor.clone() for key, tensor in open_weights(goldens / FULL).items()}
        tensors[name].view(-1)[-1] = value
        save_file(tensors, target / "model.safetensors")
        return target

    return copy


def test_a_killed_merge_leaves_nothing_that_looks_complete(goldens, merge, kill_while_writing, tmp_path):
    words = flags(goldens, tmp_path / "merged", LORA, "--no-parity")
    kill_while_writing(merge, words)
    (hidden,) = names(tmp_path)
    assert hidden.startswith(".merged.")
    with pytest.raises((FileNotFoundError, ValueError)):  # whoever names it all the same
        open_checkpoint(tmp_path / hidden)
    assert merge(words) == 0
    assert names(tmp_path) == ["merged"]
    expected = open_checkpoint(goldens / LORA, goldens / FULL).tensors
    found = open_weights(tmp_path / "merged")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def with_head(goldens, tmp_path):
    """The golden adapter with another on the head, and target_modules that name it."""
    directory = tmp_path / "with-head"
    shutil.copytree(goldens / LORA, directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    tensors = load_file(directory / "adapter_model.safetensors")
    rows, width = open_weights(goldens / FULL)["lm_head.weight"].shape
    draw = torch.Generator().manual_seed(0)
    module = "base_model.model.lm_head"
    tensors[f"{module}.lora_A.weight"] = torch.randn(4, width, generator=draw)
    tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=draw)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = json.loads((directory / "adapter_config.json").read_text())
    settings["target_modules"].append("lm_head")
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def test_an_adapter_on_the_head_is_counted_once(goldens, merge, with_head, tmp_path, capsys):
    words = ["--model-path", str(with_head), "--model-base", str(goldens / FULL), "--device", "cpu"]
    assert merge([*words, "--save-model-path", str(tmp_path / "merged")]) == 0
    beside = next(line for line in capsys.readouterr().out.splitlines() if "beside its base" in line)
    scale = float(re.search(r"largest logit (\S+)\)", beside)[1])
    assert scale > 10
    assert float(re.search(r"difference (\S+)", beside)[1]) < 1e-5 * scale


@pytest.fixture
def program_with_a_fault(monkeypatch):
    """The program, which writes one weight 1 % too large."""
    write, name = convert.write_original, "model.layers.1.mlp.up_proj.weight"

    def write_wrongly(checkpoint, *arguments):
        wrong = checkpoint.tensors.overlaid(LazyTensors.of({name: 1.01 * checkpoint.tensors[name]}).entries)
        write(dataclasses.replace(checkpoint, tensors=wrong), *arguments)

    monkeypatch.setattr(convert, "write_original", write_wrongly)
    return program


def test_a_merge_that_differs_fails(goldens, program_with_a_fault, tmp_path, capsys):
    assert program_with_a_fault.main(flags(goldens, tmp_path / "merged")) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: merged - reloaded from {tmp_path / 'merged'}: the logits differ by ")
    assert f"at most; don't use {tmp_path / 'merged'}: the merge went wrong" in message


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_that_differs_fails(goldens, program_with_a_fault, tmp_path, capsys, monkeypatch, dtype):
    monkeypatch.setattr(parity, "free_memory", lambda device: 1000)
    assert program_with_a_fault.main(flags(goldens, tmp_path / "merged", LORA, "--dtype", dtype)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: model.layers.1.mlp.up_proj.weight in {tmp_path}/merged/model.safetensors is not base + adapter: "
        "the merge went wrong; don't use it"
    )


def test_the_bound_of_rounding():
    """A unit of fp16 is 2^-10 and of bf16 2^-7, and the coarsest dtype decides."""
    assert parity.rounding_bound(20.0, torch.float16) == pytest.approx(20 * (16 * 2**-10 + 1e-4))
    assert parity.rounding_bound(20.0, torch.float16, torch.bfloat16) == pytest.approx(20 * (16 * 2**-7 + 1e-4))
    assert parity.rounding_bound(20.0, torch.float32) < 0.003


def test_logits_that_are_nan_fail(tmp_path):
    parity_of_nan = parity.Parity(float("nan"), 10.0, 1.0)
    with pytest.raises(ValueError, match=r"^x: the logits differ by nan, and rounding explains"):
        program.refuse_difference("x", parity_of_nan, {torch.float32}, tmp_path)


def test_a_projector_from_elsewhere_is_compared_too(goldens, merge, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(goldens / LORA, bare, ignore=shutil.ignore_patterns("non_lora*"))
    words = ["--model-path", bare, "--model-base", goldens / FULL, "--save-model-path", tmp_path / "merged"]
    words += ["--device", "cpu"]
    assert merge([str(word) for word in words]) == 1
    assert "which holds the projector trained with the adapter" in capsys.readouterr().err
    assert merge([str(word) for word in [*words, "--mm-projector", goldens / FULL]]) == 0
    assert "equal greedy answers 100 %" in capsys.readouterr().out


def test_embeddings_trained_whole_do_not_choose_the_dtype(goldens, merge, tmp_path, capsys):
    """They are often in fp32, on a base in half precision."""
    half, lora = tmp_path / "half", tmp_path / "lora"
    assert merge(flags(goldens, half, PROJECTOR, "--dtype", "float16", "--no-parity")) == 0
    shutil.copytree(goldens / LORA, lora)
    for path in lora.iterdir():
        path.chmod(0o644)
    tensors = load_file(lora / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = (
        open_weights(goldens / FULL)["model.embed_tokens.weight"] + 1
    )
    save_file(tensors, lora / "adapter_model.safetensors")
    capsys.readouterr()
    words = ["--model-path", lora, "--model-base", half, "--save-model-path", tmp_path / "merged", "--device", "cpu"]
    assert merge([str(word) for word in words]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'merged'} in float16\n")
    found = open_weights(tmp_path / "merged")["model.embed_tokens.weight"]
    assert torch.equal(found, tensors["base_model.model.model.embed_tokens.weight"].half())
