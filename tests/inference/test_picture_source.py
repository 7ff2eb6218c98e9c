"""Pictures are read ahead, in order, each row once, the same by processes and by threads."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from llava.image_processing import CLIPPixels, open_image
from llava.inference import picture_source
from llava.inference.picture_source import PictureError, PictureReader, default_workers, read_pictures
from llava.mm_utils import process_images

NAMES = ("landscape.jpg", "portrait.png", "square.png", "tiny.png")


@pytest.fixture(scope="module")
def reader(goldens):
    settings = SimpleNamespace(image_aspect_ratio="pad", image_grid_pinpoints=None)
    return PictureReader(goldens / "images", CLIPPixels(28), settings, torch.bfloat16)


def test_pixels_are_those_of_the_library(reader, goldens):
    [pixels] = reader.read(["landscape.jpg"])
    picture = open_image(goldens / "images" / "landscape.jpg")
    expected = process_images([picture], reader.processor, reader.settings)[0]
    assert torch.equal(pixels, expected.to(torch.bfloat16))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_threads_give_the_same_in_order(reader, monkeypatch, workers):
    monkeypatch.setattr(picture_source, "FEW", 10)
    rows = [(name,) for name in NAMES * 5] + [NAMES[:2], (), ("none.png", "tiny.png"), ("../images/tiny.png",)]
    found = list(read_pictures(reader, rows, workers=workers))
    assert len(found) == len(rows)
    for names, row in zip(rows[:22], found[:22], strict=True):
        assert len(row) == len(names)
        assert all(torch.equal(pixels, again) for pixels, again in zip(row, reader.read(names), strict=True))
    assert [row.code for row in found[22:]] == ["image_missing", "path_outside_folder"]
    assert "none.png not found; check the image folder" in found[22].message
    assert isinstance(found[23], PictureError)


def test_threads_stay_a_little_ahead(reader):
    opened = []
    watching = SimpleNamespace(read=lambda names: opened.append(names) or [])
    rows = read_pictures(watching, [("a",)] * 100, workers=0, threads=2)
    list(itertools.islice(rows, 10))
    rows.close()
    assert 10 <= len(opened) <= 11 + 2 * picture_source.AHEAD


def test_threads_begin_and_processes_follow(reader, monkeypatch):
    """The first pictures wait for no process to start, and processes start before they are needed."""
    started = []

    class Loader(list):
        def __init__(self, pictures, **options):
            super().__init__(pictures.rows)

        def __iter__(self):
            started.append(len(taken))
            return super().__iter__()

    monkeypatch.setattr(picture_source, "DataLoader", Loader)
    monkeypatch.setattr(picture_source, "FEW", 4)
    taken = []
    for row in read_pictures(reader, [("tiny.png",)] * 4 + ["behind"], workers=2):
        taken.append(row)
    assert started == [2]
    assert torch.equal(taken[3][0], reader.read(["tiny.png"])[0])
    assert taken[4:] == ["behind"]
    assert len([*read_pictures(reader, [("tiny.png",)] * 3, workers=2)]) == 3
    assert started == [2]


def test_processes_beside_a_gpu_alone():
    assert default_workers(torch.device("cpu")) == 0
    assert 1 <= default_workers(torch.device("cuda")) <= picture_source.MAX_WORKERS
