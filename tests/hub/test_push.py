"""Uploads to a stand-in of the hub: one commit with the right content, or one message and nothing changed."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants, snapshot_download

from llava.hub.model_card import build_card
from llava.hub.push import HubError, compare, push, refuse_name
from tests.hub.conftest import lead_to
from tests.hub.stand_in import Repository
from tests.hub.test_model_card import FACTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client, of its own calls
REPO = "me/llava-vqa"
CARD = build_card(FACTS, REPO).content.encode()


@pytest.fixture
def files(tmp_path):
    """A file of each kind: large and small, on disk and in memory."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "config.json").write_text("{}")
    on_disk = {name: tmp_path / name for name in ("model.safetensors", "config.json")}
    return {**on_disk, "README.md": CARD, "images/example_1.jpg": b"\xff\xd8 pixels"}


@pytest.fixture
def upload(files):
    """Return the function (**options) -> lines reported by an upload of `files`."""

    def run(repo=REPO, **options):
        lines = []
        push({**files, **options.pop("changes", {})}, repo,
             **{"private": False, "replaces_card": False, **options}, report=lines.append)  # fmt: skip
        return lines

    return run


def contents(files):
    return {name: each if isinstance(each, bytes) else each.read_bytes() for name, each in files.items()}


def test_one_commit_holds_all_files(hub, upload, files):
    assert upload() == [f"to {hub.address}/{REPO} (public, new), as me"]
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 1
    assert {name: repository.files[name] for name in files} == contents(files)
    assert set(repository.files) == {*files, ".gitattributes"}
    assert not repository.private


def test_what_was_uploaded_comes_back(hub, upload, files, tmp_path):
    upload(private=True)
    assert hub.repositories[REPO].private
    back = snapshot_download(REPO, local_dir=tmp_path / "back")
    for name, content in contents(files).items():
        assert (tmp_path / "back" / name).read_bytes() == content
    assert back == str(tmp_path / "back")


def test_files_of_another_model_are_removed_and_others_kept(hub, upload, files):
    former = {
        "adapter_config.json": b"{}",
        "images/example_2.jpg": b"",
        "config.json": b"[]",
        "my.txt": b"",
    }
    hub.repositories[REPO] = Repository(False, dict(former))
    assert upload()[1:] == [
        "replaces there: config.json",
        "removes there: adapter_config.json, images/example_2.jpg",
        "keeps there: my.txt",
    ]
    assert hub.repositories[REPO].files == {**contents(files), "my.txt": b""}
    assert len(hub.repositories[REPO].commits) == 1


def test_the_same_again_is_nothing_to_do(hub, upload):
    upload()
    assert upload()[-1] == "nothing to do: all files are there already"
    assert len(hub.repositories[REPO].commits) == 1


def test_a_card_that_was_changed_on_the_hub_stays(hub, upload):
    upload()
    mine = CARD + b"\nMine.\n"
    hub.repositories[REPO].files["README.md"] = mine
    with pytest.raises(HubError, match=r"^README.md of me/llava-vqa was changed on the hub; copy it into --path"):
        upload()
    assert hub.repositories[REPO].files["README.md"] == mine
    upload(changes={"README.md": mine, "config.json": b"[1]"})
    assert hub.repositories[REPO].files["config.json"] == b"[1]"
    upload(replaces_card=True)
    assert hub.repositories[REPO].files["README.md"] == CARD


def test_a_public_repository_is_not_taken_for_private(hub, upload):
    upload()
    with pytest.raises(HubError, match=r"^--private: .* is there already and public; make it private in its settings"):
        upload(private=True)
    assert len(hub.repositories[REPO].commits) == 1


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("whoami", 401, "refuses the token; run: hf auth login, or set HF_TOKEN to one that is valid"),
        ("whoami", 500, r"has trouble \(HTTP 500\)$"),
        ("GET /api/models", 500, r"has trouble \(HTTP 500\)"),
        ("repos/create", 403, "the token may not write to me/llava-vqa; make one with write access at"),
        (
            "preupload",
            403,
            "may not write to me/llava-vqa.* was made for it; the same command goes on from here",
        ),
        ("objects/batch", 500, "has trouble .* was made for it; the same command"),
        ("PUT /blobs", 500, "has trouble .* was made for it; the same command"),
        ("commit/main", 500, "has trouble .* was made for it; the same command"),
        ("commit/main", 413, r"refuses it \(HTTP 413\): .* was made for it; the same command"),
    ],
)
def test_a_refusal_is_one_message_and_nothing_is_committed(hub, upload, request_, status, message):
    hub.failures[request_] = status
    with pytest.raises(HubError, match=message) as refused:
        upload()
    assert "\n" not in str(refused.value)
    assert "hf_right" not in str(refused.value)
    assert all(not repository.commits for repository in hub.repositories.values())
    hub.failures.clear()
    upload()
    assert len(hub.repositories[REPO].commits) == 1


def test_another_commit_in_the_meantime(hub, upload):
    hub.repositories[REPO] = Repository(False, {"my.txt": b""})
    hub.failures["commit/main"] = 412
    with pytest.raises(
        HubError,
        match=r"refuses it \(HTTP 412\).*; the same command goes on from here, what arrived is not sent twice$",
    ):
        upload()
    assert hub.repositories[REPO].files == {"my.txt": b""}


def test_files_that_a_gitignore_keeps_out_are_missed(hub, upload):
    hub.ignored.add("config.json")
    with pytest.raises(HubError, match=r"lacks 'config.json': the repository's .gitignore keeps them out"):
        upload()


def test_a_stranger_to_the_owner(hub, upload):
    with pytest.raises(HubError, match=r"the token may not write to others/model"):
        upload(repo="others/model")
    assert hub.repositories == {}


def test_a_broken_token(hub, upload, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_broken")
    with pytest.raises(HubError, match=r"refuses the token") as refused:
        upload()
    assert "hf_broken" not in str(refused.value)


def test_no_token(hub, upload, monkeypatch):
    monkeypatch.setattr("llava.hub.push.get_token", lambda: None)
    with pytest.raises(HubError, match=r"^no token for the hub; run: hf auth login, or set HF_TOKEN$"):
        upload()
    assert hub.requests == []


def test_no_network(hub, upload, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"^HF_HUB_OFFLINE forbids to upload; unset it$"):
        upload()
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # taken, and nobody listens there
        lead_to(f"http://127.0.0.1:{deaf.getsockname()[1]}", monkeypatch)
        with pytest.raises(HubError, match=r"^http://\S+ can't be reached \(.*\); check the network, and HF_ENDPOINT"):
            upload()


@pytest.mark.parametrize(
    "name", ["llava", "me/", "me/a b", "me/a/b", "me/-a", "me/a--b", "me/" + "a" * 200, "me/a.git"]
)
def test_names_that_no_repository_has(name):
    with pytest.raises(ValueError, match=r"^--repo "):
        refuse_name(name)


def test_a_comparison_names_every_file_once():
    there = frozenset({"a.txt", "config.json", "model-00001-of-00002.safetensors", ".gitattributes"})
    changes = compare({"config.json": b"", "model.safetensors": b""}, there)
    assert changes == (
        ["model.safetensors"],
        ["config.json"],
        ["model-00001-of-00002.safetensors"],
        [".gitattributes", "a.txt"],
    )
