"""Every image is decoded once, in one process or several, with the same result."""

from __future__ import annotations

import os
import sys

import pytest
from PIL import Image

from llava.data.doctor import images as image_check
from llava.data.doctor.images import check_images
from llava.data.records import DataError
from llava.data.row_errors import RowError


@pytest.fixture
def paths(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(70)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    paths[3].write_bytes(b"no image")
    paths[68].unlink()
    return paths


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_and_missing_ones_are_found(paths, workers):
    broken = check_images(paths, workers=workers).broken
    assert [(path, error.code) for path, error in broken.items()] == [
        (paths[3], "image_corrupt"),
        (paths[68], "image_missing"),
    ]
    there = "its folder has 69 images, such as '0.png'"
    assert broken[paths[68]].message == (
        f"image {paths[68]} not found, {there}; check the image folder and the file's name"
    )


def test_an_image_of_many_rows_is_decoded_once(paths, monkeypatch):
    decoded = []
    monkeypatch.setattr(image_check, "find_traits", lambda path: decoded.append(path) or [])
    assert check_images([*paths[:2]] * 106, workers=1) == ({}, {})
    assert decoded == paths[:2]


def test_few_images_need_no_further_process(paths, monkeypatch):
    monkeypatch.setattr(image_check, "_decode", lambda path: RowError("code", str(os.getpid())))
    assert check_images(paths[:63], workers=8).broken[paths[0]].message == str(os.getpid())


def test_progress_is_drawn_on_a_terminal_only(paths, capsys, monkeypatch):
    check_images(paths[:2], show_progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    check_images(paths[:2], show_progress=True)
    assert "images: 100%" in capsys.readouterr().err
    check_images(paths[:2])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a forked process keeps the patch")
def test_killed_processes_are_reported(paths, monkeypatch):
    monkeypatch.setattr(image_check, "find_traits", lambda path: os._exit(9))
    with pytest.raises(DataError, match=r"were killed twice, perhaps for want of memory; use fewer with --workers, or"):
        check_images(paths, workers=2)
