"""Merging streams, says how far the result differs, and leaves nothing that looks whole when it is cut off."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from llava.inference import parity
from llava.model.checkpoint import open_checkpoint
from llava.model.weights import open_weights

FULL, LORA, PROJECTOR = "llava-v1.5-golden", "llava-v1.5-golden-task-lora", "golden-pretrained-projector"


@pytest.fixture(scope="session")
def merge(load_program):
    """`main` of the program."""
    return load_program("scripts/merge_lora_weights.py").main


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


def test_where_memory_is_short_the_weights_stay_in_their_files(goldens, merge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "free_memory", lambda device: 1000)
    assert merge(flags(goldens, tmp_path / "merged")) == 0
    _, streamed, header, beside, reloaded = capsys.readouterr().out.splitlines()
    assert streamed.startswith("comparing with the weights left in their files, since memory is short; --no-parity")
    assert header == "parity on 1 question(s), computed in torch.float32:"
    assert 0 < float(re.search(r"difference (\S+)", beside)[1]) < 1e-4
    assert "largest logit difference 0 " in reloaded


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


def test_values_that_are_no_numbers_are_named(goldens, merge, copy_damaged, tmp_path, capsys):
    base = copy_damaged("model.layers.1.mlp.up_proj.weight", float("nan"))
    paths = ["--model-path", str(goldens / LORA), "--model-base", str(base), "--vision-tower", str(goldens / TOWER)]
    assert merge([*paths, "--save-model-path", str(tmp_path / "merged"), "--no-parity"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: model.layers.1.mlp.up_proj.weight in {base}/model.safetensors + ")
    assert "holds values that are no numbers (NaN or infinity)" in message
    assert not (tmp_path / "merged").exists()


TOWER = "clip-vit-tiny-patch14-56"


@pytest.fixture
def copy_damaged(goldens, tmp_path):
    """Return the function (tensor name, value) -> a copy of the golden checkpoint with that value in that tensor."""
    import shutil

    from safetensors.torch import save_file

    def copy(name, value):
        target = tmp_path / "damaged"
        shutil.copytree(goldens / FULL, target, ignore=shutil.ignore_patterns("pytorch_model*"))
        tensors = {key: tensor.clone() for key, tensor in open_weights(goldens / FULL).items()}
        tensors[name].view(-1)[-1] = value
        save_file(tensors, target / "model.safetensors")
        return target

    return copy


def test_a_killed_merge_leaves_nothing_that_looks_whole(goldens, merge, kill_while_writing, tmp_path):
    words = flags(goldens, tmp_path / "merged", LORA, "--no-parity")
    kill_while_writing("scripts/merge_lora_weights.py", *words)
    (hidden,) = names(tmp_path)
    assert hidden.startswith(".merged.")
    with pytest.raises((FileNotFoundError, ValueError)):  # whoever names it all the same
        open_checkpoint(tmp_path / hidden)
    assert merge(words) == 0
    assert names(tmp_path) == ["merged"]
    expected = open_checkpoint(goldens / LORA, goldens / FULL).tensors
    found = open_weights(tmp_path / "merged")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
