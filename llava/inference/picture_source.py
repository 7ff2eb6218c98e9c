"""Pictures of a run, read, decoded and made into pixels ahead of the GPU, by processes or threads, each once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llava.image_processing import CLIPPixels, ImageError, open_image, resolve_image
from llava.mm_utils import process_images

AHEAD = 4
"""Groups of pictures that each worker may be ahead."""
FEW = 64
"""So many groups are read by threads: they begin at once, while to start the processes takes longer than to read."""
MAX_WORKERS = 10
THREADS = 4
"""That decode where no processes do; the computing threads of a CPU need the rest."""


class PictureError(NamedTuple):
    """Code and message of an `ImageError`, in a form that travels between processes."""

    code: str
    message: str


class PictureReader(NamedTuple):
    """Turns file names into pixels.

    Attributes:
        folder: holds the files; none is read from outside.
        processor: of the model.
        settings: with `image_aspect_ratio` and `image_grid_pinpoints` of the model's config.
        dtype: of the pixels.
    """

    folder: Path
    processor: CLIPPixels
    settings: SimpleNamespace
    dtype: torch.dtype

    def read(self, names: Sequence[str]) -> list[Tensor] | PictureError:
        """Return one (3, H, W) or (tiles, 3, H, W) tensor per picture, or what is wrong with the first bad one."""
        try:
            pictures = [open_image(resolve_image(self.folder, name)) for name in names]
        except ImageError as error:
            return PictureError(error.code, str(error))
        return [process_images([picture], self.processor, self.settings)[0].to(self.dtype) for picture in pictures]


class _Pictures(Dataset):
    def __init__(self, reader: PictureReader, rows: Sequence[Sequence[str]]) -> None:
        self.reader = reader
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Tensor] | PictureError:
        return self.reader.read(self.rows[index])


def default_workers(device: torch.device) -> int:
    """Return the processes that decode beside a GPU; 0 = threads, beside a CPU that computes."""
    if device.type != "cuda":
        return 0
    return min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) - 2 if hasattr(os, "sched_getaffinity") else 2))


def read_pictures(
    reader: PictureReader, rows: Sequence[Sequence[str]], *, workers: int, threads: int = THREADS
) -> Iterator[list[Tensor] | PictureError]:
    """Begin to read, and return an iterator over the pixels of each row of names, in order.

    Args:
        reader: turns names into pixels.
        rows: file names; a row may be empty.
        workers: processes; 0 = threads of this one.
        threads: how many.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures", initializer=_compute_alone)
    n_ahead = FEW if workers else AHEAD * threads
    ahead = deque(pool.submit(_read_pinned, reader, names) for names in rows[:n_ahead])
    if not workers:
        return _results_of_threads(pool, reader, ahead, rows[n_ahead:])
    rest = DataLoader(
        _Pictures(reader, rows[n_ahead:]),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=torch.cuda.is_available(),
    )
    return _results_of_both(pool, ahead, rest)


def _compute_alone() -> None:
    """Keep a thread beside a GPU from starting threads of its own, which takes longer than a picture."""
    if torch.cuda.is_available():
        torch.set_num_threads(1)


def _end(pool: ThreadPoolExecutor) -> None:
    pool.shutdown(cancel_futures=True)
    torch.set_num_threads(torch.get_num_threads())  # threads that start later compute as this one does


def _read_pinned(reader: PictureReader, names: Sequence[str]) -> list[Tensor] | PictureError:
    pixels = reader.read(names)
    if isinstance(pixels, PictureError) or not torch.cuda.is_available():
        return pixels
    return [picture.pin_memory() for picture in pixels]


def _results_of_both(
    pool: ThreadPoolExecutor, ahead: deque[Any], rest: DataLoader
) -> Iterator[list[Tensor] | PictureError]:
    """Return what threads have read, and behind it what processes read, which start on the way."""
    processes: Iterator[list[Tensor] | PictureError] = iter(())
    try:
        start = len(ahead) // 2  # the device has enough to do meanwhile
        for number in range(len(ahead)):
            if number == start and len(rest):
                processes = iter(rest)
            yield ahead.popleft().result()
    finally:
        _end(pool)
    yield from processes


def _results_of_threads(
    pool: ThreadPoolExecutor, reader: PictureReader, ahead: deque[Any], rest: Sequence[Sequence[str]]
) -> Iterator[list[Tensor] | PictureError]:
    try:
        for names in rest:
            ahead.append(pool.submit(_read_pinned, reader, names))
            yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        _end(pool)
