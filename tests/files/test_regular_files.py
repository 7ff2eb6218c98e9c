"""Whole files are read when they are regular and not too large; nothing waits for a pipe or reads a device."""

import errno
import os
import re
import socket
from pathlib import Path

import pytest

from llava.data.data_files import read_files
from llava.data.doctor.__main__ import main as doctor
from llava.data.doctor.check_cache import load_result, store_result
from llava.data.table.bad_rows import TableError
from llava.data.table.read import read_header, read_table
from llava.eval import model_vqa_loader, vqa_score
from llava.eval.report import __main__ as report
from llava.eval.scoring.annotations import read_answers, read_references
from llava.files.json_files import read_settings
from llava.files.overwrite_check import find_overwrite, output_directory
from llava.files.regular_files import MAX_DATA_BYTES, MAX_SETTINGS_BYTES, check_content, is_file, read_bytes, read_text
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.questions import read_questions
from llava.model.checkpoint.read_tensors import read_index
from llava.tokenization.sentencepiece_model import read_vocabulary
from llava.train.flags.json_flags import read_json_flag
from llava.train.train import main as train
from task_data_preprocessing import main as preprocess

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_socket(path):
    os.chdir(path.parent)  # its name may be too long for a socket
    socket.socket(socket.AF_UNIX).bind(path.name)


MAKERS = {"a named pipe": make_pipe, "a device": make_device, "a socket": make_socket}


@pytest.fixture(params=sorted(MAKERS))
def odd(request, tmp_path, monkeypatch):
    """Return the function name -> path of something that is no file, and what it is."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        MAKERS[request.param](tmp_path / name)
        return tmp_path / name, f"it is {request.param}, not a file"

    return make


READERS = {
    "bytes": (read_bytes, "a", OSError),
    "settings": (read_settings, "config.json", OSError),
    "content": (check_content, "model.safetensors", OSError),
    "index of weights": (read_index, "model.safetensors.index.json", OSError),
    "vocabulary": (read_vocabulary, "tokenizer.model", OSError),
    "table": (read_table, "a.csv", TableError),
    "header of a table": (read_header, "a.csv", TableError),
    "records": (lambda path: read_files([str(path)]), "a.json", OSError),
    "lines of records": (lambda path: read_files([str(path)]), "a.jsonl", OSError),
    "questions": (read_questions, "a.jsonl", TableError),
    "answers": (read_answers, "a.jsonl", TableError),
    "lines of annotations": (read_references, "a.jsonl", TableError),
    "annotations": (read_references, "a.json", TableError),
    "table of annotations": (read_references, "a.csv", TableError),
    "flag": (lambda path: read_json_flag("deepspeed", str(path)), "zero.json", ValueError),
}


@pytest.mark.parametrize("what", READERS)
def test_what_is_no_file_is_refused_at_once(odd, what):
    read, name, kind = READERS[what]
    path, reason = odd(name)
    with pytest.raises(kind) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("what", READERS)
def test_what_is_too_large_is_refused_at_once(tmp_path, what):
    read, name, kind = READERS[what]
    with (tmp_path / name).open("wb") as stream:
        stream.write(b"{")
        stream.truncate(MAX_DATA_BYTES + 1)  # takes no room
    if what == "content":
        return
    limits = (
        r"it has 4\.0 GB, and at most (4 GB|100 MB) are read; divide it|has more than 100 MB, which no such file needs"
    )
    with pytest.raises((kind, ValueError), match=limits):
        read(tmp_path / name)


def test_other_errors_are_those_of_the_system(tmp_path):
    for path, code in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.EISDIR), (Path("a\0b"), errno.EINVAL)):
        with pytest.raises(OSError) as caught:
            read_bytes(path)
        assert caught.value.errno == code
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as caught:
        read_bytes(tmp_path / "loop")
    assert caught.value.errno == errno.ELOOP
    assert not is_file(tmp_path / "loop")


def test_text_is_what_path_read_text_gives(tmp_path):
    for content in (b"a\r\nb\rc\n", b"\xef\xbb\xbfa", b""):
        (tmp_path / "a").write_bytes(content)
        assert read_text(tmp_path / "a") == (tmp_path / "a").read_text(encoding="utf-8")
        assert read_text(tmp_path / "a", encoding="utf-8-sig") == (tmp_path / "a").read_text(encoding="utf-8-sig")
    assert MAX_SETTINGS_BYTES < MAX_DATA_BYTES


def test_a_checked_file_of_another_kind_is_left_alone(odd):
    path, _ = odd("data.json.checked")
    assert load_result([path], "") is None
    assert store_result([path], "", None) is None
    assert not is_file(path)


def test_a_config_of_another_kind_in_a_directory_that_is_compared(odd, tmp_path):
    odd("config.json")
    assert find_overwrite({"--out": output_directory(tmp_path / "out")}, {"--model-path": str(tmp_path)}) is None


def test_the_log_of_training_is_a_file(odd, capsys):
    """Opened for appending, a pipe would wait for a reader, after the model was loaded."""
    path, reason = odd("train_log.jsonl")
    words = ["--model_name_or_path", "base", "--data_path", "data.json", "--output_dir", ".", "--use_cpu", "True"]
    assert train([*words, "--lora_enable", "True"]) == 2
    kind = reason.removeprefix("it is ")
    assert f"error: {path.name} of --output_dir is {kind}; remove it, or choose another --output_dir" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["answers.jsonl.journal", "answers.jsonl.journal.1"])
def test_a_journal_of_another_kind(odd, tmp_path, name):
    path, reason = odd(name)
    if name.endswith("1"):
        (tmp_path / "answers.jsonl.journal").write_bytes(b"{}\n")
        (tmp_path / "answers.jsonl.run.json").write_text("{}")
        reason = "is not an answer"  # the first line of the other journal
    with pytest.raises((OSError, ValueError), match=re.escape(reason)):
        AnswersFile(tmp_path / "answers.jsonl", [], {})
    assert not is_file(path)


PROGRAMS = {
    "doctor": (doctor, 2, lambda path: ["--data_path", path]),
    "preprocess": (preprocess, 1, lambda path: ["--input", path, "--output", "out.json"]),
    "scores": (vqa_score.main, 1, lambda path: ["--annotations", path, "--answers-file", "a.jsonl"]),
    "report": (
        report.main, 1, lambda path: ["--answers", "a.jsonl", "--questions", path, "--images", ".", "-o", "out.html"],
    ),
    "batch": (
        model_vqa_loader.main, 2,
        lambda path: ["--model-path", ".", "--question-file", path, "--answers-file", "out.jsonl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_say_so_in_one_message(odd, capsys, name):
    main, code, arguments = PROGRAMS[name]
    path, reason = odd("a.csv" if name in ("preprocess", "scores") else "a.json")
    assert main(arguments(str(path))) == code
    out, err = capsys.readouterr()
    assert reason in err
    assert err.count("error: ") == 1
    assert out == ""
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x.bin is damaged \(empty, 0 bytes\); fetch it again$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"x.bin is a Git LFS pointer, not"),
        (b"\n<!DOCTYPE html>\n<html>", r"x.bin is a web page, not the file itself; download it again, logged in if "),
        (b"<HTML>", r"x.bin is a web page"),
    ],
)
def test_what_a_broken_download_leaves(tmp_path, content, message):
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_content(path)


def test_any_other_content_is_left_to_its_reader(tmp_path):
    for content in (b"{}", b"version 1", b"\x00" * 8, b"<s>"):
        (tmp_path / "x").write_bytes(content)
        check_content(tmp_path / "x")
