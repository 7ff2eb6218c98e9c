"""Rows of questions from Python: which column holds the images, and what their cells mean."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.inference.question_rows import read_question_rows


def image_names(rows, **options):
    """Names of the images of each row."""
    return [question.images for question in read_question_rows(rows, **options).questions]


def test_an_image_of_several_rows_is_held_once(goldens):
    paths = [goldens / "images" / name for name in ("landscape.jpg", "portrait.png")]
    for convert in (Path.read_bytes, Image.open):
        rows = [{"question": text, "image": convert(path)} for path in paths for text in ("a", "b")]
        assert image_names(rows) == [("of row 0",)] * 2 + [("of row 2",)] * 2
    turned = Image.open(paths[0])
    turned.getexif()[0x0112] = 3
    assert image_names([{"question": "a", "image": [Image.open(paths[0]), turned]}]) == [("of row 0", "2 of row 0")]


def test_ids_of_images_are_named_as_in_a_table():
    def names(cells, **options):
        rows = [{"question": "why?", "image_id": cell} for cell in cells]
        return image_names(rows, **options)

    coco = [("COCO_val2014_000000000007.jpg",)]
    assert names([7, "7", 7.0, np.int64(7)]) == coco * 4
    assert names([7, "a", "b.png", None, float("nan")], image_name="{id}.jpg") == [
        ("7.jpg",), ("a.jpg",), ("b.png.jpg",), (), ()
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row 1: 'image_id' is 'a', not a number, which image_name asks for"):
        names([7, "a"], image_name="{id:04d}.jpg")
    with pytest.raises(ValueError, match="image_name"):
        names([7], image_name="same.jpg")


def test_the_column_of_the_images_is_found(caplog):
    def choose(row, **options):
        [names] = image_names([{"question": "why?", **row}], **options)
        return names

    assert choose({"image": "a.jpg", "file_name": "b.jpg"}) == ("a.jpg",)
    assert choose({"image_id": 7, "image": Image.new("RGB", (2, 2))}) == ("of row 0",)
    assert choose({"photo": "a.jpg", "image": "b.jpg"}, image_column="photo") == ("a.jpg",)
    assert not caplog.messages
    with pytest.raises(ValueError, match="no column 'foto'; the rows have 'question', 'photo'"):
        choose({"photo": "a.jpg"}, image_column="foto")
    assert choose({"photo": "a.jpg"}) == ()
    assert "no column image_id or image or file_name: their questions are asked without images" in caplog.text


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (None, ()),
        (float("nan"), ()),
        ([], ()),
        ({"bytes": None, "path": None}, ()),
        ({"bytes": None, "path": "a.jpg"}, ("a.jpg",)),
        ({"bytes": b"x", "path": "a.jpg"}, ("of row 0",)),
        (bytearray(b"x"), ("of row 0",)),
        (["a.jpg", b"x", Path("b.jpg")], ("a.jpg", "of row 0", "b.jpg")),
        (np.array(["a.jpg", "b.jpg"], dtype=object), ("a.jpg", "b.jpg")),
    ],
)
def test_cells_of_images(cell, names):
    assert image_names([{"question": "why?", "image": cell}]) == [names]


def test_missing_values_of_pandas_are_empty_cells():
    frame = importlib.import_module("pandas").DataFrame({"question": ["a", "b"], "image": ["a.jpg", None]})
    for changed in (frame, frame.convert_dtypes()):
        assert image_names(changed) == [("a.jpg",), ()]
