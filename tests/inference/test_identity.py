"""A directory's identity is its content, wherever it is."""

import os
import shutil

from llava.inference.identity import directory_identity


def test_a_copy_is_the_same_and_any_change_is_not(goldens, tmp_path):
    source = goldens / "llava-v1.5-golden"
    identity = directory_identity(source)
    copy = shutil.copytree(source, tmp_path / "copy")
    os.utime(copy / "config.json", (0, 0))
    assert directory_identity(copy) == identity
    (copy / "notes.txt").write_text("not part of the model")
    assert directory_identity(copy) == identity
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert directory_identity(copy) != identity


def test_large_files_are_sampled_up_to_their_end(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1_000_000))
    before = directory_identity(tmp_path)
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert directory_identity(tmp_path) != before
