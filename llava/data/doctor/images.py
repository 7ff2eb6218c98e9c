"""Decode every image once, in worker processes, to find broken ones before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from llava.data.records import DataError
from llava.data.row_errors import RowError
from llava.data.worker_processes import WorkerKilled, map_in_processes, usable_cores
from llava.image_files.decode import find_traits
from llava.image_files.errors import NOT_READ, ImageError

IMAGES_PER_WORKER = 32
"""Below that many images a further process costs more than it saves."""

_IMAGES_PER_TASK = 16
_WAY_OUT = (
    "use fewer with --workers, or leave the images out with --skip_decoding (in training: --skip_data_check True)"
)


class CheckedImages(NamedTuple):
    """Result of decoding images.

    Attributes:
        broken: image -> what is wrong with it.
        traits: a key of `llava.image_files.decode.TRAITS` -> the images that have it.
    """

    broken: dict[Path, RowError]
    traits: dict[str, list[Path]]

    @property
    def is_complete(self) -> bool:
        """Whether every image could be read; a result that another try may change is not cached."""
        return all(error.code != NOT_READ for error in self.broken.values())


def check_images(paths: Iterable[Path], *, workers: int | None = None, show_progress: bool = False) -> CheckedImages:
    """Decode images completely; return errors of broken ones, and traits of the others that change how they are seen.

    Args:
        paths: each is decoded once, however often it occurs.
        workers: processes; None = one for each core that may be used.
        show_progress: draw a bar, where the error stream is a terminal.

    Raises:
        DataError: if worker processes are killed twice.
    """
    distinct = list(dict.fromkeys(paths))
    workers = min(workers or usable_cores(), max(1, len(distinct) // IMAGES_PER_WORKER))
    bar = tqdm(total=len(distinct), desc="images", unit="image", disable=None if show_progress else True)
    checked = CheckedImages({}, {})
    with bar:
        for path, result in zip(distinct, _decode_all(distinct, workers), strict=True):
            bar.update()
            if isinstance(result, RowError):
                checked.broken[path] = result
                continue
            for trait in result:
                checked.traits.setdefault(trait, []).append(path)
    return checked


def _decode_all(paths: Sequence[Path], workers: int) -> Iterator[list[str] | RowError]:
    if workers == 1:
        yield from map(_decode, paths)
        return
    try:
        yield from map_in_processes(_decode, paths, workers, chunk=_IMAGES_PER_TASK, way_out=_WAY_OUT)
    except WorkerKilled as error:
        raise DataError(f"images can't be decoded: {error}") from error


def _decode(path: Path) -> list[str] | RowError:
    try:
        return find_traits(path)
    except ImageError as error:
        return RowError(error.code, str(error))
