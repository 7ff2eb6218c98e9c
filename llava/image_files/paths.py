"""Resolve image names to paths inside the image folder, and explain missing files."""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llava.files.home_directory import expand_home
from llava.files.regular_files import describe_non_file, is_file
from llava.files.terminal_text import show
from llava.image_files.errors import ImageError

_COCO = re.compile(r"coco_(?:train|val|test)\d{4}_")
_ENDING = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|heic)$")
_ADDRESSES = {
    **dict.fromkeys(("http:", "https:", "ftp:", "s3:", "gs:", "hf:"), ("a web address", "download")),
    "data:": ("a data URL", "decode"),
}
"""How parts of names begin that are no files, what they are, and what makes a file of them."""
_MOST_COMPARED = 200_000  # names of a folder
_MOST_SUBFOLDERS = 50


def resolve_image(folder: str | Path, name: str) -> Path:
    """Return the path of an image named in a data file, which must stay inside the image folder.

    An absolute name is accepted where its real path, or the path as written, lies in the folder. A leading `~` is the
    home directory, in both.

    Args:
        folder: image folder; "" = none, then every name is taken as it is, relative ones from the working directory.
        name: as in the data file.

    Raises:
        ImageError: if the name leads out of the folder, or is empty.
    """
    if not name:
        raise ImageError("image_missing", "the name of an image is empty; name a file, or null where there is no image")
    folder, name = expand_home(folder), expand_home(name)
    if not folder:
        return Path(os.path.normpath(name))
    inside = _absolute_inside(name, folder) if os.path.isabs(name) else os.path.normpath(name)  # noqa: PTH117
    if inside is None or os.pardir in Path(inside).parts:
        place = folder + _mention_inside(folder, name)
        raise ImageError(
            "path_outside_folder",
            f"image {show(name)} leads out of the image folder {place}; name a file inside, or give the folder that "
            "holds all images (/ allows every absolute name)",
        )
    return Path(folder, inside)


def _absolute_inside(name: str, folder: str) -> str | None:
    """Return the part of an absolute name after the folder, as written or by real paths; None if it is not inside."""
    inside = _part_inside(os.path.normpath(name), os.path.abspath(folder))  # noqa: PTH100
    if inside is not None:
        return inside
    try:
        return _part_inside(os.path.realpath(name), os.path.realpath(folder))
    except (OSError, ValueError):  # no path at all
        return None


def _part_inside(path: str, folder: str) -> str | None:
    """Return the part of an absolute path after a folder, None if it is not inside."""
    if path == folder:
        return "."
    start = folder if folder.endswith(os.sep) else folder + os.sep
    return path[len(start) :] if path.startswith(start) else None


def _mention_inside(folder: str, name: str) -> str:
    """Return a clause that names the file of the same name in the folder; "" if there is none."""
    inside = Path(folder, Path(name).name)
    return f", and {inside} is there" if is_file(inside) else ""


def explain_missing(path: Path) -> str:
    """Return what is there instead of a missing image, as a clause that follows "not found,".

    A near name differs in case, ending, separators, Unicode form, percent signs, COCO's prefix or leading zeros, or has
    a folder too many or too few.
    """
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114 - as in is_file
        return f"it is a link to {path.readlink()}, which leads nowhere"
    if os.path.exists(path):  # noqa: PTH110
        return f"it is {describe_non_file(path.stat().st_mode) or 'a file now'}"
    near = find_near_name(path)
    if near is not None:
        extra = _extra_folders(path, near)
        return f"but {near} is there" + (f": leave {extra}/ out of the name" if extra else "")
    for start, (kind, verb) in _ADDRESSES.items():
        if any(part.startswith(start) for part in path.parts):
            return f"it is {kind} and only files are read here: {verb} it first"
    if not _is_folder(path.parent):
        return f"there is no folder {path.parent}"
    listing = _listing(path.parent)
    if not listing.images:
        return "its folder has no images"
    return f"its folder has {listing.images:,} image{'s' * (listing.images > 1)}, such as {show(listing.first)}"


def describe_lost_folder(folder: str | Path) -> str | None:
    """Return what is wrong with an image folder that can't be listed or is empty, so that every image in it is missing.

    A network disk that is not mounted leaves an empty folder.
    """
    folder = expand_home(folder)
    try:
        with os.scandir(folder or ".") as entries:
            return None if next(entries, None) else "is empty"
    except (FileNotFoundError, NotADirectoryError):
        return "is not a directory"
    except OSError as error:
        return f"can't be read ({error.strerror})"


def _extra_folders(path: Path, near: Path) -> str:
    """Return the folders that a path has and a near one lacks, "" if that is not the only difference."""
    pairs = zip(path.parts, near.parts, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    after = len(near.parts) - same
    is_only = after > 0 and len(path.parts) > len(near.parts) and path.parts[-after:] == near.parts[same:]
    return "/".join(path.parts[same:-after]) if is_only else ""


def find_near_name(path: Path) -> Path | None:
    """Return an existing file that a missing path may have meant, None if there is none."""
    text = str(path).replace("\\", "/")
    for candidate in dict.fromkeys((text, urllib.parse.unquote(text))):
        folder, parts = _existing_part(Path(candidate))
        near = next((place for place in _candidates(folder, parts) if is_file(place)), None) if parts else None
        if near is not None:
            return near
    return None


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - as in is_file


def _existing_part(path: Path) -> tuple[Path, list[str]]:
    """Return the innermost folder on the way to a path that exists, and the names after it."""
    for folder in path.parents:
        if _is_folder(folder):
            return folder, list(path.relative_to(folder).parts)
    return path, []


def _candidates(folder: Path, parts: list[str]) -> Iterator[Path]:
    for start in range(len(parts)):
        yield folder.joinpath(*parts[start:])  # folders too many, such as the image folder itself
    place: Path | None = folder
    for part in parts:
        place = _match(place, part) if place is not None else None
    for near in (place, _match(folder, parts[-1])):
        if near is not None:
            yield near
    for name in _listing(folder).folders:
        yield folder / name / parts[-1]  # a folder too few


def _match(folder: Path, name: str) -> Path | None:
    """Return the entry of a folder whose name is nearly `name`."""
    ending = Path(name).suffix.lower()
    near = _listing(folder).by_key.get(_key(name), ())
    best = min(near, key=lambda entry: (Path(entry).suffix.lower() != ending, entry), default=None)
    return None if best is None else folder / best


def _key(name: str) -> str:
    """Return what is left of a name without its ending, prefix, separators, case and Unicode form."""
    plain = unicodedata.normalize("NFC", name).strip(" \t\r\n\"'").casefold()
    bare = _COCO.sub("", _ENDING.sub("", plain))
    return re.sub(r"[\s_-]+", "_", bare.lstrip("0") if bare.isdigit() else bare)


class _Listing(NamedTuple):
    """What a folder holds: its names by `_key`, how many images, the first of them, and its first subfolders."""

    by_key: dict[str, list[str]]
    images: int
    first: str
    folders: list[str]


def _listing(folder: Path) -> _Listing:
    try:
        return _read_listing(folder, folder.stat().st_mtime_ns)
    except OSError:
        return _Listing({}, 0, "", [])


@functools.lru_cache(maxsize=4)
def _read_listing(folder: Path, mtime: int) -> _Listing:
    """List a folder once until it changes, for many of its images may be missing."""
    with os.scandir(folder) as entries:
        is_folder = {entry.name: _is_folder(entry) for entry in entries if not entry.name.startswith(".")}
    by_key: dict[str, list[str]] = {}
    for name in itertools.islice(is_folder, _MOST_COMPARED):
        by_key.setdefault(_key(name), []).append(name)
    folders = sorted(name for name, is_one in is_folder.items() if is_one)
    images = [name for name in is_folder if _ENDING.search(name.lower())]
    return _Listing(by_key, len(images), min(images, default=""), folders[:_MOST_SUBFOLDERS])
