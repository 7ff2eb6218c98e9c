"""Every image is decoded once, in one process or several, with the same result."""

from __future__ import annotations

import os
import sys

import pytest
from PIL import Image

from llava.data import image_check
from llava.data.image_check import find_broken_images
from llava.data.records import DataError
from llava.data.supervision import Fault


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(70)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    paths[3].write_bytes(b"no picture")
    paths[68].unlink()
    return paths


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_and_missing_ones_are_found(pictures, workers):
    broken = find_broken_images(pictures, workers=workers)
    assert [(path, fault.code) for path, fault in broken.items()] == [
        (pictures[3], "image_corrupt"),
        (pictures[68], "image_missing"),
    ]
    assert broken[pictures[68]].message == f"image {pictures[68]} not found; check the image folder and the file's name"


def test_an_image_of_many_rows_is_decoded_once(pictures, monkeypatch):
    decoded = []
    monkeypatch.setattr(image_check, "open_image", decoded.append)
    assert find_broken_images([*pictures[:2]] * 106, workers=1) == {}
    assert decoded == pictures[:2]


def test_few_images_need_no_further_process(pictures, monkeypatch):
    monkeypatch.setattr(image_check, "_decode", lambda path: Fault("code", str(os.getpid())))
    assert find_broken_images(pictures[:63], workers=8)[pictures[0]].message == str(os.getpid())


def test_progress_is_drawn_on_a_terminal_only(pictures, capsys, monkeypatch):
    find_broken_images(pictures[:2], show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    find_broken_images(pictures[:2], show_progress=True)
    assert "images: 100%" in capsys.readouterr().err
    find_broken_images(pictures[:2])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps the patch")
def test_a_killed_process_is_told(pictures, monkeypatch):
    monkeypatch.setattr(image_check, "open_image", lambda path: os._exit(9))
    with pytest.raises(DataError, match=r"was killed, perhaps for want of memory; use fewer with --workers, or leave"):
        find_broken_images(pictures, workers=2)
