"""Images by name: from the folder, from another path, from memory."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.image_files.image_source import ImageSource


@pytest.mark.parametrize("hold", [lambda path: path, lambda path: path.read_bytes(), Image.open])
def test_a_held_image_is_that_of_the_file(goldens, tmp_path, hold):
    path = goldens / "images" / "portrait.png"
    found = ImageSource(tmp_path, {"portrait": hold(path)}).open("portrait")
    assert np.array_equal(found, open_image(path))


def test_other_names_are_looked_for_in_the_folder(goldens):
    source = ImageSource(goldens / "images", {"portrait.png": b"abc"})
    assert np.array_equal(source.open("square.png"), open_image(goldens / "images" / "square.png"))
    with pytest.raises(ImageError, match=r"image portrait.png can't be decoded .it holds text"):
        source.open("portrait.png")
    with pytest.raises(ImageError, match="leads out of the image folder"):
        source.open("../images/square.png")


def test_an_object_that_cannot_be_decoded_is_an_error_of_the_image(goldens, tmp_path):
    (tmp_path / "torn.png").write_bytes((goldens / "images" / "portrait.png").read_bytes()[:200])
    held = {"torn": Image.open(tmp_path / "torn.png"), "float": Image.new("F", (2, 2))}
    with pytest.raises(ImageError, match="image torn can't be decoded") as torn:
        ImageSource("", held).open("torn")
    with pytest.raises(ImageError) as depth:
        ImageSource("", held).open("float")
    assert (torn.value.code, depth.value.code) == ("image_corrupt", "image_depth")
