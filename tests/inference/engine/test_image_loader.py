"""Images are read ahead, in order, each group once, the same by processes and by threads."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from llava.clip_image_processor import CLIPPixels
from llava.image_files.decode import open_image
from llava.inference.engine import image_loader
from llava.inference.engine.image_loader import ImageLoader, default_workers, prefetch_images
from llava.inference.engine.sequence import RequestError
from llava.mm_utils import process_images

NAMES = ("landscape.jpg", "portrait.png", "square.png", "tiny.png")


@pytest.fixture(scope="module")
def loader(goldens):
    settings = SimpleNamespace(image_aspect_ratio="pad", image_grid_pinpoints=None)
    return ImageLoader(goldens / "images", CLIPPixels(28), settings, torch.bfloat16)


def test_pixels_are_those_of_the_library(loader, goldens):
    [pixels] = loader.load(["landscape.jpg"])
    image = open_image(goldens / "images" / "landscape.jpg")
    expected = process_images([image], loader.processor, loader.settings)[0]
    assert torch.equal(pixels, expected.to(torch.bfloat16))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_threads_give_the_same_in_order(loader, workers):
    rows = [(name,) for name in NAMES * 5] + [NAMES[:2], (), ("none.png", "tiny.png"), ("../images/tiny.png",)]
    found = list(prefetch_images(loader, rows, workers=workers, threaded_groups=10))
    assert len(found) == len(rows)
    for names, row in zip(rows[:22], found[:22], strict=True):
        assert len(row) == len(names)
        assert all(torch.equal(pixels, again) for pixels, again in zip(row, loader.load(names), strict=True))
    assert [row.code for row in found[22:]] == ["image_missing", "path_outside_folder"]
    assert (
        "none.png not found, its folder has 8 images, such as 'alpha.png'; check the image folder" in found[22].message
    )
    assert isinstance(found[23], RequestError)


def test_threads_stay_a_little_ahead(loader):
    opened = []
    watching = SimpleNamespace(load=lambda names: opened.append(names) or [])
    rows = prefetch_images(watching, [("a",)] * 100, workers=0, threads=2)
    list(itertools.islice(rows, 10))
    rows.close()
    assert 10 <= len(opened) <= 11 + 2 * image_loader.AHEAD


@pytest.mark.parametrize("workers", [0, 2])
def test_names_are_taken_names_for_a_little_ahead(loader, workers):
    """So that they may be planned as the run goes, by however many processes the images are read."""
    taken_names = []
    names = (taken_names.append(number) or ("tiny.png",) for number in range(1000))
    rows = prefetch_images(loader, names, workers=workers, threaded_groups=4)
    for taken in range(1, 31):
        assert len(next(rows)) == 1
        assert taken <= len(taken_names) <= taken + 1 + image_loader.AHEAD * image_loader.THREADS
    rows.close()


def test_threads_begin_and_processes_follow(loader, monkeypatch):
    """The first images wait for no process to start, and processes start before they are needed."""
    started = []

    class Loader(list):
        def __init__(self, images, sampler, **options):
            super().__init__(sampler)

        def __iter__(self):
            started.append(len(taken))
            return super().__iter__()

    monkeypatch.setattr(image_loader, "RestartingLoader", Loader)
    taken = []
    for row in prefetch_images(loader, [("tiny.png",)] * 4 + ["after"], workers=2, threaded_groups=4):
        taken.append(row)
    assert started == [2]
    assert torch.equal(taken[3][0], loader.load(["tiny.png"])[0])
    assert taken[4:] == ["after"]
    assert len([*prefetch_images(loader, [("tiny.png",)] * 3, workers=2, threaded_groups=4)]) == 3
    assert started == [2]


def test_processes_beside_a_gpu_alone():
    assert default_workers(torch.device("cpu")) == 0
    assert 1 <= default_workers(torch.device("cuda")) <= image_loader.MAX_WORKERS
