"""Decoding every image once, in worker processes, to know before training which of them are broken."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from llava.data.records import DataError
from llava.data.supervision import Fault
from llava.image_processing import ImageError, open_image

IMAGES_PER_WORKER = 32
"""Below that many images a further process costs more than it saves."""

_IMAGES_PER_TASK = 16


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_broken_images(
    paths: Iterable[Path], *, workers: int | None = None, show_progress: bool = False
) -> dict[Path, Fault]:
    """Decode images completely and return what is wrong with those that can't be.

    Args:
        paths: each is decoded once, however often it occurs.
        workers: processes; None = one for each core that may be used.
        show_progress: draw a bar, where the error stream is a terminal.

    Raises:
        DataError: if a worker process dies.
    """
    distinct = list(dict.fromkeys(paths))
    workers = min(workers or usable_cores(), max(1, len(distinct) // IMAGES_PER_WORKER))
    bar = tqdm(total=len(distinct), desc="images", unit="image", disable=None if show_progress else True)
    broken = {}
    with bar:
        for path, fault in zip(distinct, _decode_all(distinct, workers), strict=True):
            bar.update()
            if fault is not None:
                broken[path] = fault
    return broken


def _decode_all(paths: Sequence[Path], workers: int) -> Iterator[Fault | None]:
    if workers == 1:
        yield from map(_decode, paths)
        return
    # A forked process starts at once; the others import torch first, but macOS and Windows have no choice.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield from pool.map(_decode, paths, chunksize=_IMAGES_PER_TASK)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images was killed, perhaps for want of memory; use fewer with --workers, or leave "
            "the images out with --skip_decoding (in training: --skip_data_check True)"
        ) from error


def _decode(path: Path) -> Fault | None:
    try:
        open_image(path)
    except ImageError as error:
        return Fault(error.code, str(error))
    return None
