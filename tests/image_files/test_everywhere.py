"""Training, answers, chat, reports and Python functions see the same pixels of a file."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.clip_image_processor import CLIPPixels
from llava.data.dataset import ImageSettings, SupervisedDataset
from llava.eval.report.thumbnails import shrink_file
from llava.image_files.decode import open_image
from llava.inference.engine.image_loader import ImageLoader
from llava.inference.load_image import load_image
from llava.mm_utils import load_image_from_base64, process_images

PACKAGE = Path(__file__).resolve().parents[2] / "llava"
PLAIN = np.random.default_rng(0).integers(0, 256, (120, 160), dtype=np.uint8)
SETTINGS = ImageSettings("pad")


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(np.rot90(PLAIN)).save(path, exif=exif)


ODD_FILES = {
    "rotated.png": save_rotated,
    "deep.png": lambda path: Image.fromarray(PLAIN.astype(np.uint16) * 257).save(path),
    "int32.tif": lambda path: Image.fromarray(PLAIN.astype(np.int32) * 257).save(path),
    "clear.png": lambda path: Image.merge("LA", (Image.fromarray(PLAIN), Image.new("L", (160, 120)))).save(path),
}


@pytest.fixture(params=sorted(ODD_FILES))
def path(request, tmp_path):
    """An odd file whose pixels are to be seen as `PLAIN`."""
    ODD_FILES[request.param](tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture(scope="module")
def expected():
    return process_images([Image.fromarray(PLAIN).convert("RGB")], CLIPPixels(28), SETTINGS)[0]


def test_training(path, expected):
    assert torch.equal(SupervisedDataset([], CLIPPixels(28), SETTINGS, 4).read_image(path), expected)


def test_batch_answers(path, expected):
    loader = ImageLoader(path.parent, CLIPPixels(28), SimpleNamespace(**SETTINGS._asdict()), torch.float32)
    assert torch.equal(loader.load([path.name])[0], expected)


def test_single_questions_and_the_chat(path, expected):
    images = [load_image(str(path)), load_image_from_base64(base64.b64encode(path.read_bytes()))]
    for pixels in process_images(images, CLIPPixels(28), SETTINGS):
        assert torch.equal(pixels, expected)


def test_an_opened_file_given_as_an_object(path, expected):
    with Image.open(path) as image:
        assert torch.equal(process_images([image], CLIPPixels(28), SETTINGS)[0], expected)


def test_thumbnails(path, tmp_path):
    Image.fromarray(PLAIN).save(tmp_path / "plain.png")
    assert shrink_file(path, 80, 10**6) == shrink_file(tmp_path / "plain.png", 80, 10**6)


def test_no_other_module_opens_or_converts_images():
    found = [
        (path.name, line)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "image_files"
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"Image\.open\(|\.convert\(\"", line)
    ]
    assert found == []


def test_ordinary_files_are_pillows_pixels(goldens):
    for path in (goldens / "images").iterdir():
        assert open_image(path).tobytes() == Image.open(path).convert("RGB").tobytes()
