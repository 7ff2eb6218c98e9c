"""Names in data files lead into the image folder, and of a missing image it is said what is there instead."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from llava.image_files.paths import ImageError, explain_missing, find_near_name, resolve_image


def refusal(*arguments):
    with pytest.raises(ImageError) as caught:
        resolve_image(*arguments)
    return caught.value.code, str(caught.value)


class TestResolving:
    def test_names_inside_the_folder(self, tmp_path):
        assert resolve_image(tmp_path, "a.jpg") == tmp_path / "a.jpg"
        assert resolve_image(tmp_path, "./deep//../b.jpg") == tmp_path / "b.jpg"
        assert resolve_image(tmp_path, "..a.jpg") == tmp_path / "..a.jpg"

    @pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "deep/../../a.jpg", "..", "./../a", "/a\0b.jpg"])
    def test_names_that_leave_the_folder(self, tmp_path, name):
        assert refusal(tmp_path, name) == (
            "path_outside_folder",
            f"image {name!r} leads out of the image folder {tmp_path}; name a file inside, or give the folder that "
            "holds all images (/ allows every absolute name)",
        )

    def test_the_file_of_that_name_inside_is_named(self, tmp_path):
        (tmp_path / "a.jpg").touch()
        for name in ("/elsewhere/a.jpg", "../a.jpg"):
            start = f"image {name!r} leads out of the image folder {tmp_path}, and {tmp_path / 'a.jpg'} is there; "
            assert refusal(tmp_path, name)[1].startswith(start)

    def test_absolute_names_inside(self, tmp_path):
        assert resolve_image(tmp_path, f"{tmp_path}/deep/a.jpg") == tmp_path / "deep" / "a.jpg"
        assert resolve_image(f"{tmp_path}/", f"{tmp_path}/./a.jpg") == tmp_path / "a.jpg"
        assert refusal(tmp_path / "deep", f"{tmp_path}/deeper/a.jpg")[0] == "path_outside_folder"
        assert refusal(tmp_path / "deep", f"{tmp_path}/deep/../a.jpg")[0] == "path_outside_folder"

    def test_a_relative_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert resolve_image("images", f"{tmp_path}/images/a.jpg") == Path("images/a.jpg")
        assert str(resolve_image(".", f"{tmp_path}/a.jpg")) == "a.jpg"

    def test_by_real_paths(self, tmp_path):
        """Either side may be a link, and a link inside the folder may lead anywhere."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / "a.jpg").touch()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        assert resolve_image(tmp_path / "link", f"{tmp_path}/disk/a.jpg") == tmp_path / "link" / "a.jpg"
        assert resolve_image(tmp_path / "disk", f"{tmp_path}/link/a.jpg") == tmp_path / "disk" / "a.jpg"
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "b.jpg").symlink_to(tmp_path / "disk" / "a.jpg")
        assert resolve_image(tmp_path / "images", f"{tmp_path}/images/b.jpg") == tmp_path / "images" / "b.jpg"

    def test_without_a_folder_or_with_the_root(self, tmp_path):
        for folder in ("", "/"):
            assert resolve_image(folder, f"{tmp_path}/a.jpg") == tmp_path / "a.jpg"
        assert resolve_image("", "deep/a.jpg") == Path("deep/a.jpg")
        assert resolve_image("/", "deep/a.jpg") == resolve_image("/", "/deep/a.jpg")

    def test_the_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        assert resolve_image("~/images", "a.jpg") == tmp_path / "images" / "a.jpg"
        assert resolve_image("~/images", "~/images/a.jpg") == tmp_path / "images" / "a.jpg"
        assert resolve_image("", "~/a.jpg") == tmp_path / "a.jpg"
        assert resolve_image(tmp_path, "~a.jpg") == tmp_path / "~a.jpg"


NEAR = [
    ("photo.jpg", "photo.JPG"), ("photo.jpg", "Photo.jpg"), ("photo.jpg", "photo.jpeg"), ("photo.jpg", "photo.png"),
    ("photo", "photo.jpg"), ("photo.jpg", "photo"), ("my photo.jpg", "my_photo.jpg"), ("my-photo.jpg", "my_photo.jpg"),
    ("deep\\photo.jpg", "deep/photo.jpg"), ("C:\\data\\images\\photo.jpg", "photo.jpg"),
    (unicodedata.normalize("NFD", "öl.jpg"), unicodedata.normalize("NFC", "öl.jpg")),
    (unicodedata.normalize("NFC", "öl.jpg"), unicodedata.normalize("NFD", "öl.jpg")),
    ("COCO_val2014_000000000042.jpg", "000000000042.jpg"), ("000000000042.jpg", "COCO_train2014_000000000042.jpg"),
    ("42.jpg", "000000000042.jpg"), ("COCO_val2014_000000000042.jpg", "COCO_train2014_000000000042.jpg"),
    ("images/photo.jpg", "photo.jpg"), ("data/images/photo.jpg", "photo.jpg"), ("photo.jpg", "deep/photo.jpg"),
    ("Deep/photo.jpg", "deep/photo.jpg"), ("Deep/photo.jpg", "deep/Photo.PNG"), ("my%20photo.jpg", "my photo.jpg"),
    (" photo.jpg", "photo.jpg"), ("photo.jpg\n", "photo.jpg"), ('"photo.jpg"', "photo.jpg"),
    ("deep/photo.jpg/", "deep/photo.JPG"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "there"), NEAR)
def test_near_names(tmp_path, name, there):
    folder = tmp_path / "images"
    (folder / there).parent.mkdir(parents=True)
    (folder / "other.jpg").touch()
    (folder / there).touch()
    path = folder / name
    if path.exists():
        pytest.skip("this file system takes both names for one")
    assert find_near_name(path) == folder / there
    assert explain_missing(path).partition(":")[0] == f"but {folder / there} is there"


@pytest.mark.parametrize("extra", ["images", "data/images", "val2014"])
def test_folders_too_many_are_named(tmp_path, extra):
    """The name may be the very path that is there, as seen from outside the folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "photo.jpg").touch()
    expected = f"but {folder / 'photo.jpg'} is there: leave {extra}/ out of the name"
    assert explain_missing(folder / extra / "photo.jpg") == expected
    assert explain_missing(folder / "photo.JPEG") == f"but {folder / 'photo.jpg'} is there"


def test_a_link_that_leads_back_to_itself_hides_no_other_name(tmp_path):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "photo.jpg").touch()
    assert explain_missing(tmp_path / "Photo.jpg") == f"but {tmp_path / 'photo.jpg'} is there"
    assert explain_missing(tmp_path / "other.jpg") == "its folder has 2 images, such as 'loop.jpg'"


def test_a_message_about_a_very_long_name_is_short():
    message = str(ImageError("image_missing", f"image data:image/png;base64,{'iVBOR' * 9999} not found; decode it"))
    assert len(message) < 1100
    assert message.startswith("image data:image/png") and message.endswith("not found; decode it")


def test_an_empty_name(tmp_path):
    for folder in (tmp_path, ""):
        assert refusal(folder, "") == (
            "image_missing",
            "the name of an image is empty; name a file, or null where there is no image",
        )


@pytest.mark.parametrize("name", ["photo2.jpg", "43.jpg", "420.jpg", "1042.jpg", "hoto.jpg"])
def test_names_of_other_images_are_not_near(tmp_path, name):
    for there in ("photo.jpg", "42.jpg"):
        (tmp_path / there).touch()
    assert find_near_name(tmp_path / name) is None
    assert explain_missing(tmp_path / name) == "its folder has 2 images, such as '42.jpg'"


def test_the_same_ending_is_nearest(tmp_path):
    for there in ("Photo.png", "Photo.JPG", "Photo.webp"):
        (tmp_path / there).touch()
    assert find_near_name(tmp_path / "photo.jpg") == tmp_path / "Photo.JPG"


def test_a_folder_that_changes_is_listed_again(tmp_path):
    assert explain_missing(tmp_path / "a.jpg") == "its folder has no images"
    (tmp_path / "a.png").touch()
    os.utime(tmp_path, (1, 1))  # a clock may be too coarse to tell
    assert explain_missing(tmp_path / "a.jpg") == f"but {tmp_path / 'a.png'} is there"


def test_what_else_is_there(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    assert explain_missing(tmp_path / "a.jpg") == "it is a folder"
    assert explain_missing(tmp_path / "b.jpg") == "it is a link to gone.jpg, which leads nowhere"
    missing = tmp_path / "none" / "x.jpg"
    assert explain_missing(missing) == f"there is no folder {tmp_path / 'none'}"
    web = resolve_image(tmp_path, "https://example.org/x.jpg")
    assert explain_missing(web) == "it is a web address and only files are read here: download it first"
    stored = resolve_image(tmp_path, "s3://bucket/x.jpg")
    assert explain_missing(stored) == "it is a web address and only files are read here: download it first"
    data = resolve_image(tmp_path, "data:image/png;base64,iVBOR/w0K")
    assert explain_missing(data) == "it is a data URL and only files are read here: decode it first"
