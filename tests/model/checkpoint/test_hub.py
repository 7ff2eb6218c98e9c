"""Names are directories or hub ids; the cache is searched first, the network only where it may be."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import hub
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.hub import resolve_config, resolve_directory, snapshot_revision

FULL, TOWER = "llava-v1.5-golden", "clip-vit-tiny-patch14-56"
REVISION = "4481d270cc22fd5c4d1bb5df129622006ccd9234"


def test_a_directory_is_itself(tmp_path):
    assert resolve_directory(tmp_path) == tmp_path
    (tmp_path / "link").symlink_to(tmp_path)
    assert resolve_directory(tmp_path / "link") == tmp_path / "link"


def test_the_cache_is_enough(goldens, hub_cache, no_network):
    snapshot = hub_cache("liuhaotian/llava-v1.5-7b", goldens / FULL, REVISION)
    assert resolve_directory("liuhaotian/llava-v1.5-7b") == snapshot
    assert resolve_directory("liuhaotian/llava-v1.5-7b", revision=REVISION) == snapshot
    assert (snapshot_revision(snapshot), snapshot_revision(snapshot.parent)) == (REVISION, None)


def test_another_revision_than_the_cached_one(goldens, hub_cache, no_network):
    hub_cache("liuhaotian/llava-v1.5-7b", goldens / FULL, REVISION)
    message = (
        rf"^liuhaotian/llava-v1.5-7b at revision {'b' * 40} is neither a directory nor complete in the hub's cache"
    )
    with pytest.raises(FileNotFoundError, match=message):
        resolve_directory("liuhaotian/llava-v1.5-7b", revision="b" * 40)


def test_a_model_from_the_cache_is_loaded_and_its_revision_recorded(goldens, hub_cache, no_network, golden_model):
    hub_cache("liuhaotian/llava-v1.5-7b", goldens / FULL, REVISION)
    hub_cache(f"tiny/{TOWER}", goldens / TOWER, "c" * 40)
    base = "liuhaotian/llava-v1.5-7b"
    tower = str(goldens / TOWER)
    model = load_pretrained_model(base, None, "llava-v1.5-7b", device="cpu", vision_tower=tower)[1]
    assert model.lm_head.weight.equal(golden_model[1].lm_head.weight)
    config = open_checkpoint(base, vision_tower=tower).config
    assert (config.base_model_name_or_path, config.base_model_revision) == (base, REVISION)


def test_an_adapters_base_is_read_at_the_recorded_revision(goldens, copy_golden, change_config, hub_cache, tmp_path):
    adapter = copy_golden("llava-v1.5-golden-task-lora", tmp_path / "adapter")
    old = hub_cache("tiny/base", goldens / FULL, REVISION)
    change_config(adapter, base_model_name_or_path="tiny/base", base_model_revision=REVISION)
    (old.parents[1] / "refs" / "main").write_text("d" * 40)  # the hub's main branch has moved on
    checkpoint = open_checkpoint(adapter, vision_tower=goldens / TOWER)
    assert checkpoint.base == old
    assert checkpoint.config.base_model_revision == REVISION


def test_offline_an_incomplete_copy_is_named(goldens, hub_cache, no_network):
    snapshot = hub_cache("a/b", goldens / FULL, REVISION)
    (snapshot / "pytorch_model-00002-of-00003.bin").unlink()
    message = (
        r"^a/b is neither a directory nor complete in the hub's cache, and HF_HUB_OFFLINE forbids to download it; its "
        r"copy in the cache lacks pytorch_model-00002-of-00003.bin; give the path"
    )
    with pytest.raises(FileNotFoundError, match=message):
        resolve_directory("a/b")


def test_a_stale_index_beside_whole_weights_makes_no_copy_incomplete(goldens, hub_cache, no_network):
    snapshot = hub_cache("a/b", goldens / FULL, REVISION)
    for path in snapshot.glob("pytorch_model-*"):
        path.unlink()
    (snapshot / "model.safetensors").write_bytes(b"whole")
    assert resolve_directory("a/b") == snapshot


@pytest.mark.parametrize("lost", ["pytorch_model.bin", "adapter_model.safetensors"])
def test_a_copy_that_lost_all_its_weights_is_not_taken_for_a_model(goldens, hub_cache, no_network, lost):
    """Small files are downloaded first, so an interrupted download leaves these."""
    source = "llava-v1.5-golden-task-lora" if lost.startswith("adapter") else FULL
    snapshot = hub_cache("a/b", goldens / source, REVISION)
    for path in snapshot.iterdir():
        if path.suffix != ".json" or ".index" in path.name:
            path.unlink()
    with pytest.raises(FileNotFoundError, match=r"; its copy in the cache lacks weights; give the path"):
        resolve_directory("a/b")
    assert resolve_config("a/b") == snapshot
    (snapshot / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"; its copy in the cache lacks config.json; give the path"):
        resolve_config("a/b")


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """A hub that records each download and returns a directory."""
    requested = []

    def download(name, **options):
        if options.get("local_files_only"):
            raise hub.LocalEntryNotFoundError("not here")
        requested.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return requested


def model_info_of(files):
    siblings = [SimpleNamespace(rfilename=file) for file in files]
    return lambda self, name, revision=None: SimpleNamespace(siblings=siblings)


@pytest.mark.parametrize(
    ("files", "ignored"),
    [
        (["config.json", "pytorch_model.bin"], None),
        (["model-00001-of-00002.safetensors", "pytorch_model.bin"], ["pytorch_model*.bin"]),
        (["adapter_model.safetensors", "non_lora_trainables.bin"], None),
    ],
)
def test_weights_in_both_formats_are_downloaded_once(monkeypatch, downloads, tmp_path, files, ignored):
    monkeypatch.setattr(hub.HfApi, "model_info", model_info_of(files))
    assert resolve_directory("a/b", revision="v1") == tmp_path
    ((name, options),) = downloads
    assert (name, options["revision"], options["ignore_patterns"]) == ("a/b", "v1", ignored)


def test_for_a_config_no_weights_are_downloaded(monkeypatch, downloads, tmp_path):
    monkeypatch.setattr(hub.HfApi, "model_info", model_info_of(["model.safetensors"]))
    assert resolve_config("a/b") == tmp_path
    ((_, options),) = downloads
    assert options["allow_patterns"] == ["*.json"]
    assert resolve_config(tmp_path) == tmp_path


def test_without_a_network_there_is_one_message(monkeypatch, downloads, caplog):
    """The hub's client repeats some requests, with a warning for each."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # does not listen: connections are refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with caplog.at_level("WARNING"), pytest.raises(FileNotFoundError, match=r"could not be downloaded \(.*refused"):
            resolve_directory("no/such-model")
    assert not caplog.records


def test_a_name_that_is_nowhere(monkeypatch, downloads, tmp_path):
    def refuse(self, name, revision=None):
        raise OSError("no such repository")

    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    message = (
        r"^no/such-model is neither a directory nor in the hub's cache, and could not be downloaded \(no such "
        r"repository\); give the path"
    )
    with pytest.raises(FileNotFoundError, match=message):
        resolve_directory("no/such-model")


def test_a_path_that_does_not_exist(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match=r"neither a directory nor complete in the hub's cache"):
        resolve_directory(tmp_path / "no" / "such" / "path")
