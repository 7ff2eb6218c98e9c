"""Image loader of the batch engine: decodes and preprocesses images ahead of the GPU, in processes or threads."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava.clip_image_processor import CLIPPixels
from llava.data.worker_processes import RestartingLoader, usable_cores
from llava.image_files.errors import ImageError
from llava.image_files.image_source import ImageSource
from llava.inference.engine.sequence import RequestError
from llava.inference.session import Session
from llava.mm_utils import process_images
from llava.model.devices import best_device

AHEAD = 4  # groups of images that each worker may be ahead
MAX_WORKERS = 10
THREADS = 4  # where no processes decode; the computing threads of a CPU need the rest
_WAY_OUT = "pass fewer --workers (0: threads)"


class ImageLoader(NamedTuple):
    """Turns file names into pixels.

    Attributes:
        folder: of the files; none is read from outside. "" = no folder, see `resolve_image`. An `ImageSource` has
            further images.
        processor: image processor of the model.
        settings: with `image_aspect_ratio` and `image_grid_pinpoints` of the model's config.
        dtype: of the pixels.
    """

    folder: str | Path | ImageSource
    processor: CLIPPixels
    settings: SimpleNamespace
    dtype: torch.dtype

    @classmethod
    def of_session(cls, session: Session, folder: str | Path | ImageSource) -> ImageLoader:
        """Return the loader of a model's images, without the model, so that it can be sent to processes."""
        model, config = session.model, session.model.config
        settings = SimpleNamespace(
            image_aspect_ratio=config.image_aspect_ratio, image_grid_pinpoints=config.image_grid_pinpoints
        )
        dtype = model.get_vision_tower().dtype if session.image_processor else model.dtype
        return cls(folder, session.image_processor, settings, dtype)

    def load(self, names: Sequence[str]) -> list[Tensor] | RequestError:
        """Return (3, height, width) or (tiles, 3, height, width) per image, or the error of the first bad one."""
        source = self.folder if isinstance(self.folder, ImageSource) else ImageSource(self.folder)
        try:
            images = [source.open(name) for name in names]
        except ImageError as error:
            return RequestError(error.code, str(error))
        return [process_images([image], self.processor, self.settings)[0].to(self.dtype) for image in images]


class _Images(Dataset):
    """Pixels by file names, which a DataLoader's sampler gives instead of indices."""

    def __init__(self, loader: ImageLoader) -> None:
        self.loader = loader

    def __getitem__(self, names: Sequence[str]) -> list[Tensor] | RequestError:
        return self.loader.load(names)


def default_workers(device: torch.device) -> int:
    """Return the number of processes that decode beside a GPU; 0 = threads, beside a CPU that computes."""
    if device.type != "cuda":
        return 0
    return min(MAX_WORKERS, max(1, usable_cores() - 2))


def prefetch_session_images(
    session: Session,
    folder: str | Path | ImageSource,
    groups: Iterable[Sequence[str]],
    *,
    workers: int | None,
    threaded_groups: int,
) -> Iterator[list[Tensor] | RequestError]:
    """Return `prefetch_images` of a model's images; as many workers as suit its device where they are None."""
    suiting = default_workers(session.model.device)
    return prefetch_images(
        ImageLoader.of_session(session, folder),
        groups,
        workers=suiting if workers is None else workers,
        threads=max(THREADS, suiting),
        threaded_groups=threaded_groups,
    )


def prefetch_images(
    loader: ImageLoader,
    groups: Iterable[Sequence[str]],
    *,
    workers: int,
    threads: int = THREADS,
    threaded_groups: int = 0,
) -> Iterator[list[Tensor] | RequestError]:
    """Start reading, and return an iterator over the pixels of each group of images, in order.

    Args:
        loader: turns names into pixels.
        groups: file names, taken a little ahead of their pixels; a group may be empty.
        workers: processes; 0 = threads of this one.
        threads: number of threads.
        threaded_groups: first groups, which threads read while processes start; without processes threads read all.

    Raises:
        WorkerKilled: while it is iterated, if processes are killed twice.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images", initializer=_use_one_thread)
    groups = iter(groups)
    first = itertools.islice(groups, threaded_groups if workers else AHEAD * threads)
    ahead = deque(pool.submit(_load_pinned, loader, names) for names in first)
    if not workers:
        return _load_by_threads(pool, loader, ahead, groups)
    return _load_by_both(pool, loader, ahead, groups, workers)


def _has_gpu() -> bool:
    return best_device().type == "cuda"


def _use_one_thread() -> None:
    """Limit PyTorch to one thread beside a GPU: starting more takes longer than an image."""
    if _has_gpu():
        torch.set_num_threads(1)


def _shut_down(pool: ThreadPoolExecutor) -> None:
    pool.shutdown(cancel_futures=True)
    torch.set_num_threads(torch.get_num_threads())  # threads that start later compute as this one does


def _load_pinned(loader: ImageLoader, names: Sequence[str]) -> list[Tensor] | RequestError:
    pixels = loader.load(names)
    if isinstance(pixels, RequestError) or not _has_gpu():
        return pixels
    return [image.pin_memory() for image in pixels]


def _load_by_both(
    pool: ThreadPoolExecutor, loader: ImageLoader, ahead: deque[Any], rest: Iterator[Sequence[str]], workers: int
) -> Iterator[list[Tensor] | RequestError]:
    """Yield what threads have read, then what processes read, which start in the meantime."""
    processes: Iterator[list[Tensor] | RequestError] = iter(())
    try:
        start = len(ahead) // 2  # the device has enough to do meanwhile
        for number in range(len(ahead)):
            if number == start and (names := next(rest, None)) is not None:
                restarting = RestartingLoader(
                    _Images(loader),
                    itertools.chain([names], rest),
                    way_out=_WAY_OUT,
                    is_batched=False,
                    num_workers=workers,
                    prefetch_factor=AHEAD,
                    pin_memory=_has_gpu(),
                )
                processes = iter(restarting)
            yield ahead.popleft().result()
    finally:
        _shut_down(pool)
    yield from processes


def _load_by_threads(
    pool: ThreadPoolExecutor, loader: ImageLoader, ahead: deque[Any], rest: Iterator[Sequence[str]]
) -> Iterator[list[Tensor] | RequestError]:
    try:
        for names in rest:
            ahead.append(pool.submit(_load_pinned, loader, names))
            yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        _shut_down(pool)
