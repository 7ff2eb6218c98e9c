"""Whatever arrives broken is named, whichever file it is; then nothing is written, and nothing in it is ever run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.files import atomic_files as files
from llava.model.checkpoint import write_tensors
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import write_weights

FULL, LORA, PROJECTOR = "llava-v1.5-golden", "llava-v1.5-golden-task-lora", "golden-pretrained-projector"
TOWER = "clip-vit-tiny-patch14-56"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def merge(load_program):
    return load_program("scripts/merge_lora_weights.py").main


@pytest.fixture(scope="module")
def convert(load_program):
    return load_program("scripts/convert_checkpoint.py").main


@pytest.fixture
def models(copy_golden, tmp_path):
    """Base, adapter, projector and vision tower side by side, to be damaged."""
    for name in (FULL, LORA, PROJECTOR, TOWER):
        copy_golden(name, tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def merged(models, merge, tmp_path, capsys):
    """Return the function (directory's name, flags) -> last line of stderr of a merge that fails and leaves nothing."""

    def run(name, *words):
        paths = ["--model-path", models / name, "--model-base", models / FULL, "--save-model-path", tmp_path / "merged"]
        assert merge([str(word) for word in (*paths, "--no-parity", *words)]) == 1
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "it-ran") == ["models"]
        return capsys.readouterr().err.splitlines()[-1]

    return run


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def without_tower(models):
    weights = open_weights(models / FULL)
    kept = {name: weights.entries[name] for name in weights if "vision_tower" not in name}
    write_weights(LazyTensors(kept), models / FULL)
    for path in (models / TOWER).glob("*.safetensors"):
        path.unlink()


def without_projector(models):
    (models / LORA / "non_lora_trainables.bin").unlink()


def with_pickled_adapter(models):
    (models / LORA / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("place", "prepare", "words"),
    [
        (f"{FULL}/pytorch_model-00002-of-00003.bin", None, [LORA]),
        (f"{LORA}/non_lora_trainables.bin", None, [LORA]),
        (f"{LORA}/adapter_model.bin", with_pickled_adapter, [LORA]),
        (f"{LORA}/global_step7/mp_rank_00_model_states.pt", without_projector, [LORA]),
        ("elsewhere.bin", without_projector, [LORA, "--mm-projector", "elsewhere.bin"]),
        (f"{PROJECTOR}/mm_projector.bin", None, [PROJECTOR]),
        (f"{TOWER}/pytorch_model.bin", without_tower, [LORA]),
    ],
)
def test_code_in_a_pickle_never_runs(models, merged, monkeypatch, tmp_path, place, prepare, words):
    if prepare:
        prepare(models)
    (models / place).parent.mkdir(exist_ok=True)
    torch.save({"model.mm_projector.0.weight": torch.zeros(1), "x": Payload(tmp_path / "it-ran")}, models / place)
    monkeypatch.chdir(models)
    message = merged(*words)
    assert f"{Path(place).name} holds more than tensors and was not loaded (" in message
    assert message.endswith("; don't trust its source")
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(FileExistsError):  # it would have run
        (tmp_path / "it-ran").mkdir()
        torch.load(models / place, weights_only=False)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def lie(path):
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "pytorch_model-00001-of-00003.bin"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("pytorch_model-00002-of-00003.bin", truncate, "pytorch_model-00002-of-00003.bin is damaged ("),
        (
            "pytorch_model-00002-of-00003.bin",
            Path.unlink,
            f"{FULL} lacks pytorch_model-00002-of-00003.bin, named in pytorch_model.bin.index.json; fetch the missing",
        ),
        ("pytorch_model.bin.index.json", lie, f"places {NORM} in pytorch_model-00001-of-00003.bin, which lacks it"),
        ("pytorch_model.bin.index.json", truncate, "pytorch_model.bin.index.json is not an index of weights ("),
        ("config.json", truncate, "config.json is not valid JSON ("),
        ("tokenizer_config.json", truncate, "tokenizer_config.json is not valid JSON ("),
    ],
)
def test_files_of_a_base(models, merged, name, damage, message):
    damage(models / FULL / name)
    assert message in merged(LORA)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 499723\n"


@pytest.mark.parametrize(
    "place",
    [
        f"{FULL}/pytorch_model-00002-of-00003.bin",
        f"{FULL}/pytorch_model.bin.index.json",
        f"{FULL}/config.json",
        f"{FULL}/tokenizer.model",
        f"{FULL}/tokenizer_config.json",
        f"{TOWER}/model.safetensors",
        f"{TOWER}/preprocessor_config.json",
        f"{LORA}/adapter_config.json",
        f"{LORA}/adapter_model.safetensors",
        f"{LORA}/non_lora_trainables.bin",
        f"{PROJECTOR}/mm_projector.bin",
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "{} is a Git LFS pointer, not the file itself; run git lfs pull in {}, or download the file again"),
        ("", "{} is damaged (empty, 0 bytes); fetch it again"),
        (
            "<!DOCTYPE html><html>Sign in</html>",
            "{} is a web page, not the file itself; download it again, logged in if its repository asks for that",
        ),
    ],
)
def test_what_a_download_leaves_in_the_place_of_a_file(models, merged, place, content, message):
    if place.startswith(TOWER):
        without_tower(models)
    path = models / place
    path.write_text(content)
    printed = merged(PROJECTOR if place.startswith(PROJECTOR) else LORA)
    assert printed == "error: " + message.format(path, path.parent)


@pytest.mark.parametrize("length", [1, 1000, 490_000])
def test_a_truncated_vocabulary(models, merged, length):
    path = models / FULL / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:length])
    printed = merged(LORA)
    assert printed.startswith(f"error: {path} is damaged (")
    assert printed.endswith("); fetch it again, or copy it from the base model")


def test_a_truncated_adapter(models, merged):
    truncate(models / LORA / "adapter_model.safetensors")
    assert "adapter_model.safetensors is damaged (" in merged(LORA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(NORM),
            f"error: the weights don't fit the config: 1 missing ({NORM}); use the config.json that belongs to them",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(5)}),
            "model.safetensors, but the config makes it (16,); use the config.json that belongs to the weights",
        ),
        (lambda tensors: tensors[NORM].fill_(torch.inf), "holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("layout", ["merged", "original", "hf"])
def test_weights_that_make_no_model(models, merged, convert, tmp_path, capsys, layout, change, message):
    tensors = {name: tensor.clone() for name, tensor in open_weights(models / FULL).items()}
    change(tensors)
    (models / FULL / "pytorch_model.bin.index.json").unlink()
    torch.save(tensors, models / FULL / "model.pt")
    write_tensors.save_tensors(tensors, models / FULL / "model.safetensors")
    if layout == "merged":
        printed = merged(LORA)
    else:
        words = ["--from", str(models / FULL), "--to", str(tmp_path / "out"), "--layout", layout]
        assert convert(words) == 1
        printed = capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
    assert message in printed
    assert NORM in printed


def test_another_base_is_refused_unless_allowed(models, merge, change_config, tmp_path, capsys):
    change_config(models / LORA, base_model_name_or_path="the/right-one", base_model_fingerprint="0" * 32)
    paths = ["--model-path", models / LORA, "--model-base", models / FULL, "--save-model-path", tmp_path / "merged"]
    words = [str(word) for word in (*paths, "--no-parity")]
    assert merge(words) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert f"was trained on the/right-one, fingerprint {'0' * 32}, but {models / FULL} has fingerprint " in printed
    assert printed.endswith("; give that base, or --allow-other-base to use this one")
    assert merge([*words, "--allow-other-base"]) == 0
    capsys.readouterr()
    again = [word if word != str(models / FULL) else str(tmp_path / "merged") for word in words]
    again[again.index("--save-model-path") + 1] = str(tmp_path / "twice")
    assert merge([*again, "--allow-other-base"]) == 1
    assert f"{LORA} is merged into {tmp_path / 'merged'} already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_links_to_directories(models, convert, tmp_path):
    """The vision tower beside the directory that a link leads to is found; a link to write to is followed."""
    (tmp_path / "source").symlink_to(models / FULL)
    (tmp_path / "real").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "real")
    assert convert(["--from", str(tmp_path / "source"), "--to", str(tmp_path / "target"), "--layout", "original"]) == 0
    assert (tmp_path / "target").is_symlink()
    found, expected = load_file(tmp_path / "real" / "model.safetensors"), open_weights(models / FULL)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_hub_id_without_network(models, hub_cache, no_network, convert, tmp_path):
    revision = "4481d270cc22fd5c4d1bb5df129622006ccd9234"
    hub_cache("liuhaotian/llava-v1.5-7b", models / FULL, revision)
    words = ["--from", "liuhaotian/llava-v1.5-7b", "--vision-tower", str(models / TOWER)]
    assert convert([*words, "--to", str(tmp_path / "hf"), "--layout", "hf"]) == 0
    config = open_checkpoint(tmp_path / "hf").config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("liuhaotian/llava-v1.5-7b", revision)


def test_adapter_and_base_by_hub_id_without_network(models, hub_cache, no_network, merge, tmp_path, capsys):
    lora, base = hub_cache("me/lora", models / LORA, "a" * 40), hub_cache("me/base", models / FULL, "b" * 40)
    words = ["--model-path", "me/lora", "--model-base", "me/base", "--save-model-path", str(tmp_path / "merged")]
    assert merge([*words, "--vision-tower", str(models / TOWER), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("equal greedy answers 100 %") == 2
    config = open_checkpoint(tmp_path / "merged").config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("me/base", "b" * 40)
    expected = open_checkpoint(lora, base, vision_tower=models / TOWER).tensors
    found = open_weights(tmp_path / "merged")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_target_that_may_not_be_written(models, merged, monkeypatch, tmp_path, code):
    """The system's refusal, since a test may run as root, whom permissions don't stop."""
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name.endswith(files._PARTIAL):
            raise OSError(code, os.strerror(code))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    expected = f"error: {tmp_path / 'merged'} can't be written ({os.strerror(code)}); choose another directory, or let"
    assert merged(LORA).startswith(expected)


def test_no_room_is_noticed_before_any_work(models, merged, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    assert merged(LORA).startswith(f"error: {tmp_path / 'merged'} needs 4.3 MB, but {tmp_path} has 1 byte; free some")


def test_a_disk_that_fills_up(models, merged, monkeypatch):
    """At the weights, and at the small files after them."""

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "No space left on device" in merged(LORA)
    monkeypatch.setattr(write_tensors, "write_all", refuse)
    assert merged(LORA).endswith("No space left on device); free some space or choose another directory")


def test_a_disk_that_takes_no_more_in_the_middle_of_a_file(models, merged):
    """The system itself stops the writing, at a limit on the size of files."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        printed = merged(LORA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "model.safetensors could not be written ([Errno 27] File too large); free some space or choose" in printed
