"""Small JPEG copies of many images, made in worker processes within a budget of bytes."""

from __future__ import annotations

import functools
import io
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from llava.data.worker_processes import map_in_processes
from llava.eval.report.gallery import SMALLEST_SIZE
from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError

_STEPS = ((1.0, 82), (1.0, 70), (1.0, 55), (0.75, 60), (0.75, 45), (0.5, 55), (0.5, 40), (0.35, 40))
"""Fraction of the requested size and JPEG quality, tried in this order until a thumbnail fits the budget."""
_FEWEST_FOR_WORKERS = 32
_CHUNK = 8


class Thumbnail(NamedTuple):
    """A small copy of an image.

    Attributes:
        data: JPEG file; None where the image can't be used.
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        problem: error code of the image, else None.
    """

    data: bytes | None
    width: int
    height: int
    problem: str | None


def make_thumbnails(paths: Sequence[Path], size: int, budget: int, workers: int) -> Iterator[Thumbnail]:
    """Yield a thumbnail of every image file, in order.

    Args:
        paths: of the images; a missing or corrupt one yields a thumbnail with its error code.
        size: longest side in pixels; smaller images are not enlarged.
        budget: bytes for all of them, the same for each; where JPEG's quality is not enough, the thumbnail is
            scaled down, to about a third of `size` at least.
        workers: worker processes; 0 for none.

    Raises:
        ValueError: if `size` is too small or `budget` or `workers` negative.
        WorkerKilled: if worker processes are killed twice.
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
    way_out = "run again with fewer --workers"
    yield from map_in_processes(shrink, paths, workers, chunk=_CHUNK, way_out=way_out, initializer=_ignore_interrupts)


def shrink_file(path: Path, size: int, budget: int) -> Thumbnail:
    """Return the thumbnail of one image file, as `make_thumbnails` describes it; `budget` is for this one alone."""
    try:
        image = open_image(path)
    except ImageError as error:
        return Thumbnail(None, 0, 0, error.code)
    width, height = image.size
    image.thumbnail((size, size))
    data = b""
    for share, quality in _STEPS:
        data = _encode(image, max(SMALLEST_SIZE, round(size * share)), quality)
        if len(data) <= budget:
            break
    return Thumbnail(data, width, height, None)


def _encode(image: Image.Image, size: int, quality: int) -> bytes:
    if max(image.size) > size:
        image = image.copy()
        image.thumbnail((size, size))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=quality, optimize=True)
    return stream.getvalue()


def _ignore_interrupts() -> None:
    """Let only the main process handle Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
