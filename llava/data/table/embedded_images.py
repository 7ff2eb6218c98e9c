"""Images inside a table: each gets a file name, and is written into the image folder once.

The name is the one that the table notes beside the content; without one, the beginning of the content's hash, so that
rows about one image share its file, and tables in one folder don't collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llava.data.table.bad_rows import BadRows
from llava.data.table.grid import ImageCell, Problems
from llava.data.table.image_names import find_name_problem, has_ending
from llava.files.atomic_files import atomic_write
from llava.files.terminal_text import show
from llava.image_files.file_kinds import describe_content, find_suffix

_HASH_SHOWN = 16  # hexadecimal digits


class EmbeddedImages(NamedTuple):
    """The images of a table.

    Attributes:
        names: file name of each row's image.
        notes: what must be said of them.
        digests: file name -> hash of the content, of those that the table holds.
        first_lines: file name -> line of the first row with it.
        read: reads the images row by row, whenever it is called.
    """

    names: list[str]
    notes: list[str]
    digests: dict[str, bytes]
    first_lines: dict[str, int]
    read: Callable[[], Iterator[ImageCell]]

    def write(self, folder: Path) -> list[str]:
        """Write the images that the folder does not have yet; return what must be said.

        Raises:
            TableError: if the folder has another file of the same name; nothing is written then.
            OSError: if an image can't be written; those written before are complete.
        """
        bad = BadRows(str(folder), unit="row")
        missing = set()
        for name, digest in self.digests.items():
            path = folder / name
            if not path.exists():
                missing.add(name)
            elif not path.is_file() or hashlib.sha256(path.read_bytes()).digest() != digest:
                bad.add(self.first_lines[name], f"image {show(name)} of the table is another file than the one there")
        bad.raise_if_any("Give another image folder, or move these files away.")
        left = set(missing)
        for name, cell in zip(self.names, self.read() if left else (), strict=False):
            if name in left:
                with atomic_write(folder / name, "wb") as stream:
                    stream.write(cell.content)
                left.remove(name)
        there = len(self.digests) - len(missing)
        return [f"wrote {len(missing):,} images into {folder}" + (f", which had {there:,} of them" if there else "")]


def name_embedded_images(
    read: Callable[[], Iterator[ImageCell]], column: str, lines: Sequence[int], problems: Problems
) -> EmbeddedImages:
    """Name the images of a table, and note in `problems` the rows without a usable one."""
    names: list[str] = []
    digests: dict[str, bytes] = {}
    first_lines: dict[str, int] = {}
    for row, (line, cell) in enumerate(zip(lines, read(), strict=True)):
        name, problem = "", None
        if cell.content is None:
            name = cell.path.replace("\\", "/")
            if (problem := find_name_problem(cell.path, name, is_as_it_is=True)) is not None:
                problem = f"{column} {problem}"
        elif (suffix := find_suffix(cell.content)) is None:
            kind, way_out = describe_content(cell.content)
            problem = f"{column} holds {kind}; {way_out}"
        else:
            digest = hashlib.sha256(cell.content).digest()
            name = _choose_name(cell.path, suffix) or f"{digest.hex()[:_HASH_SHOWN]}{suffix}"
            if digests.setdefault(name, digest) != digest:
                problem = f"{column} {show(name)} has another content than on row {first_lines[name]}"
            first_lines.setdefault(name, line)
        if problem is not None:
            problems[row].append(problem)
        names.append(name)
    notes = [f"{column} holds {len(digests):,} images"] if digests else []
    if n_named := len({name for name in names if name not in digests}):
        notes.append(f"{column} names {n_named:,} files that the table does not hold")
    return EmbeddedImages(names, notes, digests, first_lines, read)


def _choose_name(path: str, suffix: str) -> str:
    """Return the file name that a table notes beside an image, or its last part if it leads out of the folder."""
    name = path.replace("\\", "/")
    if name and find_name_problem(path, name, is_as_it_is=False) is not None:
        name = name.rstrip("/").rpartition("/")[2].lstrip("~")
    return name if not name or has_ending(name) else f"{name}{suffix}"
