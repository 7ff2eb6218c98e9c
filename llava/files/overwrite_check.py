"""Check that what a program writes overwrites none of its inputs, and goes to files, before any work.

Files and directories are compared by what they are on disk (device and inode), so that symbolic links, hard links, `..`
and, where the file system ignores it, letter case make no difference.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from llava.files.json_files import read_settings
from llava.files.regular_files import describe_non_file

MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.model",
    "*config.json",
    "*.index.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "training.json",
)
"""Names of the files that a model directory consists of; what else lies in it is somebody else's."""

_ADAPTER_FILES = ("adapter_config.json", "mm_projector.bin", "mm_projector.safetensors")
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_Path = str | os.PathLike[str]


class Output(NamedTuple):
    """What a flag makes a program write.

    Attributes:
        path: as the flag names it.
        places: all that is written, replaced or removed: files, and directories with everything inside.
        replaces_images: whether an image may be replaced, as by a program that writes one.
        is_file: whether a file is written, in whose place no folder may be.
    """

    path: Path
    places: tuple[Path, ...]
    replaces_images: bool = False
    is_file: bool = False


class _Source(NamedTuple):
    """One file or directory that is read, and the flag that leads to it, in words."""

    place: Path
    words: str


def output_file(path: _Path, *, beside: Iterable[str] = (), replaces_images: bool = False) -> Output:
    """Return a file to be written, with the files beside it whose names match the patterns `beside`."""
    path = Path(path)
    return Output(path, (path, *_matches(path.parent, beside)), replaces_images, is_file=True)


def output_directory(path: _Path) -> Output:
    """Return a directory that is replaced as a whole."""
    return Output(Path(path), (Path(path),))


def shared_directory(path: _Path, names: Iterable[str]) -> Output:
    """Return a directory in which only the entries whose names match the patterns `names` are written or removed."""
    return Output(Path(path), _matches(Path(path), names))


def find_overwrite(outputs: Mapping[str, Output], inputs: Mapping[str, _Path | Iterable[_Path] | None]) -> str | None:
    """Return what is wrong where an output would write over an input, an image or another output; None if nothing is.

    So is a pipe or a device in the place of a file of a directory, which would be waited for without end.

    Args:
        outputs: by flag.
        inputs: path or paths by flag; None = the flag was not given. A model directory stands for its files too, and
            for the base and the vision tower that it names.
    """
    given = [(flag, path) for flag, paths in inputs.items() for path in _listed(paths)]
    sources = [source for read in (_given, _recorded) for flag, path in given for source in read(flag, path)]
    for flag, output in outputs.items():
        if output.is_file and os.path.isdir(output.path):  # noqa: PTH112 - Path.is_dir raises for impossible names
            return f"{flag} {output.path} is a folder; name a file"
        for place in output.places:
            if not output.is_file and (kind := _describe_pipe(place)):
                return f"{place} of {flag} is {kind}, not a file; remove it, or choose another {flag}"
        if not output.replaces_images and _is_image(output.path):
            return f"{flag} {output.path} is an image, which would be written over; choose another {flag}"
        for source in sources:
            if message := _compare(flag, output, source):
                return message
    flags = list(outputs)
    for number, flag in enumerate(flags):
        for other in flags[:number]:
            if _is_same_file(outputs[flag].path, outputs[other].path):
                return f"{flag} {outputs[flag].path} and {other} {outputs[other].path} are the same file; change one"
    return None


def is_model_file(name: str) -> bool:
    """Return whether a file of this name belongs to the model in whose directory it lies."""
    return any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def is_inside(path: _Path, place: _Path) -> bool:
    """Return whether a path is `place` or lies somewhere in it."""
    real, identity = Path(os.path.realpath(path)), _identity(Path(place))
    return identity is not None and any(_identity(around) == identity for around in (real, *real.parents))


def _compare(flag: str, output: Output, source: _Source) -> str | None:
    what = f"{flag} {output.path} would write over {source.words}"
    if _identity(output.path) == _identity(source.place) is not None:
        same = "" if str(output.path) == str(source.place) else " (the same on disk)"
        return f"{what}{same}; choose another {flag}"
    for place in output.places:
        if is_inside(source.place, place):
            through = "" if place == output.path else f" with its {place.name}"
            return f"{what}{through}; choose another {flag}"
    return None


def _given(flag: str, path: Path) -> Iterator[_Source]:
    """Yield what a flag names: a file, or a directory with the files of its model."""
    yield _Source(path, f"{flag} {path}")
    yield from (_Source(file, f"{file.name} of {flag} {path}") for file in _matches(path, MODEL_FILES))


def _recorded(flag: str, path: Path) -> Iterator[_Source]:
    """Yield the vision tower, and an adapter's base, that a directory names, with their files."""
    names = {file.name for file in _matches(path, MODEL_FILES)}
    kinds = {"mm_vision_tower": "vision tower"}
    if names.intersection(_ADAPTER_FILES):
        kinds["base_model_name_or_path"] = "base"
    for file in (path / name for name in ("config.json", "adapter_config.json") if name in names):
        settings = _read(file)
        for key, kind in kinds.items():
            named = settings.get(key)
            if isinstance(named, str) and named and Path(named).is_dir():
                words = f"{named}, the {kind} of {flag} {path}"
                yield _Source(Path(named), words)
                yield from (_Source(part, f"{part.name} of {words}") for part in _matches(Path(named), MODEL_FILES))


def _read(path: Path) -> dict:
    try:
        return read_settings(path, is_finite=False)
    except (OSError, ValueError):  # whoever loads the model says so
        return {}


def _listed(paths: _Path | Iterable[_Path] | None) -> list[Path]:
    if paths is None or paths == "":
        return []
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]


def _matches(folder: Path, patterns: Iterable[str]) -> tuple[Path, ...]:
    patterns = tuple(patterns)
    try:
        paths = sorted(folder.iterdir()) if patterns else []
    except OSError:  # not there yet
        return ()
    return tuple(path for path in paths if any(fnmatchcase(path.name, pattern) for pattern in patterns))


def _identity(path: Path) -> tuple[int, int] | str | None:
    """Return device and inode of a file or directory, its path if it doesn't exist, None for devices and pipes."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return os.path.normcase(os.path.realpath(path))
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.normcase(os.path.realpath(path))


def _is_same_file(one: Path, other: Path) -> bool:
    """Return whether two paths, at which nothing need be yet, are one file."""
    if _identity(one) == _identity(other) is not None:
        return True
    one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))
    is_near = one.name.casefold() == other.name.casefold() and _identity(one.parent) == _identity(other.parent)
    return is_near and ignores_case(one.parent)


def ignores_case(folder: Path) -> bool:
    """Return whether the file system of a folder, which need not exist yet, ignores letter case in names."""
    for place in (folder, *folder.parents):
        swapped = place.with_name(place.name.swapcase()) if place.name else place
        if swapped.name != place.name and place.exists():
            return swapped.exists() and swapped.samefile(place)
    return False


def _describe_pipe(path: Path) -> str | None:
    """Return what a path leads to if it is a pipe, a device or a socket; None for files, folders and nothing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISDIR(mode) else describe_non_file(mode)


def _is_image(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            start = stream.read(8)
    except (OSError, ValueError):
        return False
    return start.startswith(_IMAGE_STARTS) or start[4:] == b"ftyp"  # AVIF and HEIC
