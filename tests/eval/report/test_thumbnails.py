"""Thumbnails: sizes, the budget, damaged files, worker processes."""

import io
import os
import sys

import pytest
from PIL import Image

from llava.eval.report import thumbnails
from llava.eval.report.thumbnails import Thumbnail, make_thumbnails, shrink_file

PLENTY = 10**7


@pytest.fixture
def picture(tmp_path):
    """Return the function (name, size) -> path of a new picture full of detail."""

    def draw(name, size):
        noise = Image.effect_noise(size, 80).convert("RGB")
        noise.save(tmp_path / name, quality=95)
        return tmp_path / name

    return draw


def decode(thumbnail):
    image = Image.open(io.BytesIO(thumbnail.data))
    assert image.format == "JPEG"
    return image


def test_a_thumbnail_is_small_and_knows_the_images_size(picture):
    thumbnail = shrink_file(picture("a.png", (400, 300)), size=100, budget=PLENTY)
    assert decode(thumbnail).size == (100, 75)
    assert thumbnail[1:] == (400, 300, None)


def test_small_images_are_not_enlarged(picture):
    assert decode(shrink_file(picture("a.png", (60, 30)), size=100, budget=PLENTY)).size == (60, 30)


def test_the_budget_takes_quality_first_and_then_size(picture):
    path = picture("a.png", (400, 400))
    sizes, lengths = [], []
    for budget in (PLENTY, 30_000, 12_000, 4_000, 0):
        thumbnail = shrink_file(path, size=224, budget=budget)
        sizes.append(decode(thumbnail).width)
        lengths.append(len(thumbnail.data))
        assert len(thumbnail.data) <= budget or budget == 0
    assert sizes[:2] == [224, 224]
    assert sizes == sorted(sizes, reverse=True)
    assert lengths == sorted(lengths, reverse=True)
    assert sizes[-1] == 78  # 35 % of 224: something is always shown


def test_no_thumbnail_is_smaller_than_the_eye_needs(picture):
    assert decode(shrink_file(picture("a.png", (400, 200)), size=60, budget=0)).size == (48, 24)


def test_missing_and_damaged_images_say_so(tmp_path, picture):
    whole = picture("whole.jpg", (100, 100)).read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    names = ["none.jpg", "torn.jpg", "text.jpg", "whole.jpg"]
    made = list(make_thumbnails([tmp_path / name for name in names], 64, PLENTY, workers=0))
    assert made[:3] == [
        Thumbnail(None, 0, 0, "image_missing"),
        Thumbnail(None, 0, 0, "image_corrupt"),
        Thumbnail(None, 0, 0, "image_corrupt"),
    ]
    assert made[3].problem is None


def test_the_budget_is_shared_and_workers_give_the_same_in_the_same_order(tmp_path, picture):
    paths = [picture(f"{number}.png", (40 + number, 64)) for number in range(40)] + [tmp_path / "none.png"]
    alone = list(make_thumbnails(paths, 64, 41 * 1500, workers=0))
    assert [thumbnail.width for thumbnail in alone] == [*range(40, 80), 0]
    assert alone == [shrink_file(path, size=64, budget=1500) for path in paths]
    assert list(make_thumbnails(paths, 64, 41 * 1500, workers=2)) == alone


def test_a_worker_that_dies_is_reported(tmp_path, monkeypatch):
    if sys.platform != "linux":
        pytest.skip("elsewhere the workers don't inherit what the test replaces")
    monkeypatch.setattr(thumbnails, "open_image", lambda path: os._exit(9))
    message = r"^worker processes were killed twice, perhaps for want of memory; run again with fewer --workers$"
    with pytest.raises(ChildProcessError, match=message):
        list(make_thumbnails([tmp_path / f"{number}.png" for number in range(40)], 64, PLENTY, workers=2))


@pytest.mark.parametrize(("size", "budget", "workers"), [(47, 1, 0), (64, -1, 0), (64, 1, -1)])
def test_impossible_wishes_are_refused(size, budget, workers):
    message = r"^thumbnails of \d+ pixels, -?1 bytes, -?\d workers; the size is at least 48, the others not negative$"
    with pytest.raises(ValueError, match=message):
        list(make_thumbnails([], size, budget, workers))


def test_no_images_need_nothing():
    assert list(make_thumbnails([], 64, 0, workers=4)) == []
