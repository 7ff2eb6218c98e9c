"""What a program writes is none of its inputs, however the paths are spelt."""

from __future__ import annotations

import json
import os

import pytest

from llava.files import overwrite_check as output_check
from llava.files.overwrite_check import find_overwrite, is_model_file, output_directory, output_file, shared_directory


def write(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.json")


@pytest.fixture
def model(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        write(tmp_path / "model" / name, "{}")
    return tmp_path / "model"


def spelled(data, how):
    other = data.parent / "other"
    other.mkdir()
    if how == "relative":
        return os.path.relpath(data)
    if how == "dots":
        return f"{other}/../{data.name}"
    if how == "symbolic link":
        (other / "link").symlink_to(data)
        return other / "link"
    if how == "linked folder":
        (other / "folder").symlink_to(data.parent, target_is_directory=True)
        return other / "folder" / data.name
    (other / "hard").hardlink_to(data)
    return other / "hard"


@pytest.mark.parametrize("how", ["relative", "dots", "symbolic link", "linked folder", "hard link"])
@pytest.mark.parametrize("turned", [False, True])
def test_one_file_under_two_names(data, how, turned):
    one, other = (spelled(data, how), data) if not turned else (data, spelled(data, how))
    assert find_overwrite({"--json": output_file(one)}, {"--data_path": ["unrelated", other]}) == (
        f"--json {one} would write over --data_path {other} (the same on disk); choose another --json"
    )


def test_the_same_words_and_a_file_that_is_not_there(data):
    for path in (data, data.with_name("absent")):
        assert find_overwrite({"--out": output_file(path)}, {"--in": path}) == (
            f"--out {path} would write over --in {path}; choose another --out"
        )


def test_other_files_flags_not_given_and_files_within_folders_pass(data, tmp_path):
    outputs = {"--out": output_file(tmp_path / "other.json")}
    assert find_overwrite(outputs, {"--in": data, "--folder": tmp_path, "--none": None, "--empty": ""}) is None


def test_files_beside_the_output(tmp_path):
    for name in ("a.jsonl.journal", "a.jsonl.journal.3", "a.jsonl.run.json"):
        path = write(tmp_path / name)
        output = output_file(tmp_path / "a.jsonl", beside=("a.jsonl.run.json", "a.jsonl.journal*"))
        assert find_overwrite({"--answers": output}, {"--questions": path}) == (
            f"--answers {tmp_path}/a.jsonl would write over --questions {path} with its {name}; "
            "choose another --answers"
        )
    target = write(tmp_path / "q.jsonl")
    path.unlink()
    path.symlink_to(target)  # written through
    output = output_file(tmp_path / "a.jsonl", beside=("a.jsonl.run.json",))
    assert "with its a.jsonl.run.json" in find_overwrite({"--answers": output}, {"--questions": target})


def test_two_outputs_are_two_files(tmp_path, monkeypatch):
    outputs = {"--a": output_file(tmp_path / "x" / ".." / "out.json"), "--b": output_file(tmp_path / "out.json")}
    assert find_overwrite(outputs, {}) == (
        f"--b {tmp_path}/out.json and --a {tmp_path}/x/../out.json are the same file; change one"
    )
    outputs["--b"] = output_file(tmp_path / "Out.json")
    monkeypatch.setattr(output_check, "ignores_case", lambda folder: False)
    assert find_overwrite(outputs, {}) is None
    monkeypatch.setattr(output_check, "ignores_case", lambda folder: True)
    assert "are the same file" in find_overwrite(outputs, {})


def test_case_is_looked_up_where_the_file_system_decides(tmp_path):
    folder = tmp_path / "abc"
    folder.mkdir()
    assert output_check.ignores_case(folder) is (tmp_path / "ABC").exists()


def test_a_replaced_directory_is_and_holds_no_input(model, tmp_path):
    target = tmp_path / "link"
    target.symlink_to(model, target_is_directory=True)
    replaced = {"--save": output_directory(target)}
    assert "the same on disk" in find_overwrite(replaced, {"--model": model})
    around = {"--save": output_directory(tmp_path)}
    assert find_overwrite(around, {"--model": model}) == (
        f"--save {tmp_path} would write over --model {model}; choose another --save"
    )
    inside = {"--save": output_directory(model / "merged")}
    assert find_overwrite(inside, {"--model": model}) is None


def test_a_directory_of_links_stands_for_what_they_lead_to(model, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(model / "model.safetensors")
    assert find_overwrite({"--save": output_directory(model)}, {"--model": snapshot}) == (
        f"--save {model} would write over model.safetensors of --model {snapshot}; choose another --save"
    )


def test_a_file_of_a_model_is_an_input(model):
    output = {"--json": output_file(model / "config.json")}
    assert find_overwrite(output, {"--model": model}) == (
        f"--json {model}/config.json would write over config.json of --model {model}; choose another --json"
    )
    for name in ("answers.jsonl", "report.json"):
        write(model / name)
        assert find_overwrite({"--json": output_file(model / name)}, {"--model": model}) is None
    assert not is_model_file("answers.jsonl.run.json")


def test_the_base_and_the_tower_that_an_adapter_names_are_inputs(model, tmp_path):
    adapter, tower = tmp_path / "adapter", tmp_path / "tower"
    write(tower / "config.json", "{}")
    write(adapter / "adapter_config.json", json.dumps({"base_model_name_or_path": str(model)}))
    write(adapter / "config.json", json.dumps({"mm_vision_tower": str(tower), "base_model_name_or_path": None}))
    for place, kind in ((model, "base"), (tower, "vision tower")):
        assert find_overwrite({"--save": output_directory(place)}, {"--model": adapter}) == (
            f"--save {place} would write over {place}, the {kind} of --model {adapter}; choose another --save"
        )
    write(model / "config.json", json.dumps({"base_model_name_or_path": str(tower)}))  # of a merge: said, not read
    assert find_overwrite({"--save": output_directory(tower)}, {"--model": model}) is None
    write(adapter / "config.json", "{")
    assert find_overwrite({"--save": output_directory(tower)}, {"--model": adapter}) is None


def test_a_shared_directory_loses_only_what_is_named(model, data, tmp_path):
    write(tmp_path / "checkpoint-5" / "adapter_config.json", "{}")
    output = {"--output_dir": shared_directory(tmp_path, ("data.json", "checkpoint-*"))}
    assert find_overwrite(output, {"--model": model}) is None
    assert "with its data.json" in find_overwrite(output, {"--data": data})
    assert "with its checkpoint-5" in find_overwrite(output, {"--adapter": tmp_path / "checkpoint-5"})
    assert find_overwrite(output, {"--images": tmp_path}) == (
        f"--output_dir {tmp_path} would write over --images {tmp_path}; choose another --output_dir"
    )


@pytest.mark.parametrize(
    "start",
    [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM1234", b"II*\0", b"RIFF1234WEBP", b"\0\0\0\x20ftypavif"],
)
def test_an_image_is_never_written_over(tmp_path, start):
    path = tmp_path / "a"
    write(path).write_bytes(start)
    message = f"--json {path} is an image, which would be written over; choose another --json"
    assert find_overwrite({"--json": output_file(path)}, {}) == message
    assert find_overwrite({"--json": output_file(path, replaces_images=True)}, {}) is None


def test_a_folder_is_no_place_for_a_file(tmp_path):
    assert find_overwrite({"--out": output_file(tmp_path)}, {}) == f"--out {tmp_path} is a folder; name a file"
    assert find_overwrite({"--out": output_directory(tmp_path)}, {}) is None


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "pipe"
    assert find_overwrite({"--out": output_file(path)}, {"--in": path}) is None
