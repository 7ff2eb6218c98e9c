"""Small JPEG copies of many images, made in worker processes within a budget of bytes."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava.image_processing import ImageError, open_image

SMALLEST_SIZE = 48
"""Longest side in pixels below which nothing is to be seen."""
_STEPS = ((1.0, 82), (1.0, 70), (1.0, 55), (0.75, 60), (0.75, 45), (0.5, 55), (0.5, 40), (0.35, 40))
"""Share of the wanted size and JPEG quality, tried in this order until the budget is kept."""
_FEWEST_FOR_WORKERS = 32
_CHUNK = 8


class Thumbnail(NamedTuple):
    """A small copy of an image.

    `data` are the bytes of a JPEG file, None where the image can't be used; `width` and `height` are those of the image
    itself in pixels; `problem` is the code of what is wrong with it, else None.
    """

    data: bytes | None
    width: int
    height: int
    problem: str | None


def make_thumbnails(paths: Sequence[Path], size: int, budget: int, workers: int) -> Iterator[Thumbnail]:
    """Yield a thumbnail of every image file, in order.

    Args:
        paths: of the images; one that is missing or damaged yields a thumbnail that says so.
        size: longest side in pixels; smaller images are not enlarged.
        budget: bytes for all of them. Each gets the same share; where JPEG's quality alone can't keep it, the picture
            becomes smaller, down to about a third of `size`.
        workers: processes beside this one; 0 for none.

    Raises:
        ValueError: if `size` is too small or `budget` or `workers` negative.
        ChildProcessError: if a worker process dies.
    """
    if size < SMALLEST_SIZE or budget < 0 or workers < 0:
        raise ValueError(
            f"thumbnails of {size} pixels, {budget} bytes, {workers} workers; "
            f"the size is at least {SMALLEST_SIZE}, the others not negative"
        )
    shrink = functools.partial(shrink_file, size=size, budget=budget // max(1, len(paths)))
    if workers == 0 or len(paths) < _FEWEST_FOR_WORKERS:
        yield from map(shrink, paths)
        return
    # Linux copies this process, with what it has imported; elsewhere that is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    try:
        yield from executor.map(shrink, paths, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that makes thumbnails died, perhaps for want of memory; run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def shrink_file(path: Path, size: int, budget: int) -> Thumbnail:
    """Return the thumbnail of one image file, as `make_thumbnails` describes it; `budget` is for this one alone."""
    try:
        picture = open_image(path)
    except ImageError as error:
        return Thumbnail(None, 0, 0, error.code)
    width, height = picture.size
    picture.thumbnail((size, size))
    data = b""
    for share, quality in _STEPS:
        data = _encode(picture, max(SMALLEST_SIZE, round(size * share)), quality)
        if len(data) <= budget:
            break
    return Thumbnail(data, width, height, None)


def count_workers() -> int:
    """Return the number of processors this process may use."""
    with contextlib.suppress(AttributeError):  # Linux alone knows which ones
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode(picture: Image.Image, size: int, quality: int) -> bytes:
    if max(picture.size) > size:
        picture = picture.copy()
        picture.thumbnail((size, size))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=quality, optimize=True)
    return stream.getvalue()


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
