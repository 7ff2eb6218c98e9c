"""MMBench's table: questions with options A to D, images in base64, and the prompts and requests made of it.

MMBench asks each question once for every rotation of its options. Rotations are rows of their own, whose index is that
of the question plus a million for each; `all_rounds` rotates the options of every row instead, as the original does.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.embedded_images import name_embedded_images
from llava.data.table.grid import ImageCell, Problems
from llava.eval.benchmarks.lines import BenchmarkError, raise_bad_rows
from llava.files.home_directory import expand_home
from llava.files.regular_files import read_text
from llava.inference.batch.questions import Question, number_repeats

LETTERS = ("A", "B", "C", "D")
ROTATION = 1_000_000  # added to a question's index for each rotation of its options that is a row
INSTRUCTIONS = {"en": "Answer with the option's letter from the given choices directly.", "cn": "请直接回答选项字母。"}
"""By language, the last line of a prompt that asks for a letter alone."""
_REQUIRED = ("index", "question", "A", "B", "image")
_MISSING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Texts that pandas reads as missing by default, as the original does."""
_LONGEST_REFERENCE = 64  # characters of an image cell that is the index of the row with the image


class MmbenchRow(NamedTuple):
    """A row of the table.

    Attributes:
        index: identifies the row.
        cells: text by column, all columns.
        options: those there are, at most four: the first missing one ends them.
    """

    index: int
    cells: Mapping[str, str]
    options: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The true letter; "" in a test split."""
        return self.cells.get("answer", "").strip()

    @property
    def group(self) -> int:
        """The index of the question of which the row may be a rotation."""
        return self.index % ROTATION


class MmbenchRequest(NamedTuple):
    """A question for the model, and the keys that its answer's line has besides."""

    question: Question
    keys: dict[str, Any]


def read_mmbench_table(path: str | os.PathLike[str]) -> list[MmbenchRow]:
    """Read a table of MMBench (.tsv).

    Raises:
        BenchmarkError: if it can't be read, lacks columns, or has bad rows; the first 20 are listed.
    """
    try:
        text = read_text(Path(expand_home(path)), encoding="utf-8-sig")
    except OSError as error:
        raise BenchmarkError(f"{path} can't be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 at byte {error.start}; download it again") from error
    bad = BadRows(os.fspath(path))
    lines = _parse_lines(text, bad)
    header = next(lines, (1, []))[1]
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise BenchmarkError(f"{path} has no column {', '.join(missing)}; give MMBench's table (.tsv)")
    rows, seen = [], set()
    for line, cells in lines:
        row = _read_row(dict(zip(header, cells, strict=False))) if len(cells) == len(header) else None
        if len(cells) != len(header):
            bad.add(line, f"{len(cells)} cells where the header has {len(header)}")
        elif row is None:
            bad.add(line, "index is not a number, or there are fewer than two options")
        elif row.index in seen:
            bad.add(line, f"index {row.index} is there twice")
        else:
            seen.add(row.index)
            rows.append(row)
    raise_bad_rows(bad)
    if not rows:
        raise BenchmarkError(f"{path} has no questions; download it again")
    return rows


def default_image_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder beside a table into which its images are written."""
    path = Path(path)
    return path.with_name(f"{path.stem}_images")


def extract_mmbench_images(
    path: str | os.PathLike[str], rows: Sequence[MmbenchRow], folder: Path
) -> tuple[dict[int, str], list[str]]:
    """Write the images that the table holds in base64 into a folder, each once.

    Args:
        path: of the table, for messages.
        rows: all of the table; the image of one may be the index of another.
        folder: is made if it is missing; images that it has already are left.

    Returns:
        Index of each row -> file name, the same for rows with the same image; and notes.

    Raises:
        BenchmarkError: if rows hold no image (the first 20 are listed), or an image can't be written.
    """
    by_index = {row.index: row.cells["image"] for row in rows}
    problems: Problems = defaultdict(list)

    def read() -> Iterator[ImageCell]:
        for row in rows:
            cell = row.cells["image"]
            if len(cell) <= _LONGEST_REFERENCE and cell.isascii() and cell.strip().isdigit():
                cell = by_index.get(int(cell), "")
            yield ImageCell(_decode_base64(cell), "")

    images = name_embedded_images(read, "image", range(len(rows)), problems)
    bad = BadRows(os.fspath(path), unit="index")
    for row, texts in problems.items():
        bad.add(rows[row].index, "; ".join(texts))
    raise_bad_rows(bad)
    try:
        notes = images.write(folder)
    except TableError as error:
        raise BenchmarkError(str(error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise BenchmarkError(
            f"the images of {path} can't be written into {folder} ({reason}); pass --image-folder"
        ) from error
    return {row.index: name for row, name in zip(rows, images.names, strict=True)}, notes


def build_mmbench_requests(
    rows: Sequence[MmbenchRow],
    images: Mapping[int, str],
    *,
    single_pred_prompt: bool = False,
    all_rounds: bool = False,
    lang: str = "en",
) -> list[MmbenchRequest]:
    """Return the requests of rows, in order; no two questions are equal.

    Args:
        rows: of the table.
        images: index of a row -> name of its image, from `extract_mmbench_images`.
        single_pred_prompt: ask for the letter alone.
        all_rounds: ask each row once for every rotation of its options.
        lang: language of that instruction, a key of `INSTRUCTIONS`.
    """
    requests = []
    for row in rows:
        for round_id in range(len(row.options) if all_rounds else 1):
            options = _rotate(row.options, round_id)
            prompt = format_prompt(row, options)
            text = f"{prompt}\n{INSTRUCTIONS[lang]}" if single_pred_prompt else prompt
            keys = {
                "round_id": round_id,
                "prompt": prompt,
                "options": list(options),
                "option_char": list(rotated_letters(row, round_id)),
            }
            requests.append(MmbenchRequest(Question(row.index, text, (images[row.index],)), keys))
    questions = number_repeats(request.question for request in requests)
    return [MmbenchRequest(question, request.keys) for question, request in zip(questions, requests, strict=True)]


def format_prompt(row: MmbenchRow, options: Sequence[str]) -> str:
    """Return the hint, if there is one, the question, and the options after their letters, one a line."""
    hint = row.cells.get("hint", "")
    choices = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([] if is_missing(hint) else [hint]), row.cells["question"], *choices])


def rotated_letters(row: MmbenchRow, round_id: int) -> tuple[str, ...]:
    """Return the letters that the options of a round have in the table, in the order in which the round shows them."""
    return _rotate(LETTERS[: len(row.options)], round_id)


def is_missing(text: str) -> bool:
    """Return whether a cell is empty for the original: what pandas reads as missing, and `none` in any letter case."""
    return text in _MISSING or text.lower() in ("nan", "none")


def _rotate(values: tuple[str, ...], count: int) -> tuple[str, ...]:
    return values[count:] + values[:count]


def _read_row(cells: Mapping[str, str]) -> MmbenchRow | None:
    options = []
    for letter in LETTERS:
        if is_missing(cells.get(letter, "")):
            break
        options.append(cells[letter])
    index = cells["index"].strip()
    if len(options) < 2 or not (index.isascii() and index.isdigit()):
        return None
    return MmbenchRow(int(index), cells, tuple(options))


def _decode_base64(text: str) -> bytes:
    """Decode a cell; b"", which no image is, if it is not base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _parse_lines(text: str, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row begins, and its cells, divided by tabs; quoted cells may hold line ends.

    Python's csv module takes no cell as long as an image unless its limit is raised for the whole process.
    """
    position, line = 0, 1
    while position < len(text):
        cells, start = [], line
        while True:
            cell, end = _read_cell(text, position)
            if cell is None:
                bad.add(line, 'a quoted cell is not closed before a tab or a line end; a quote inside is written ""')
                return
            cells.append(cell)
            line += cell.count("\n")
            position = end + 1
            if end >= len(text) or text[end] == "\n":
                break
        line += 1
        if cells != [""]:
            yield start, cells


def _read_cell(text: str, start: int) -> tuple[str | None, int]:
    """Return the cell that begins at a position, None if it is quoted and not closed, and where its delimiter is."""
    if not text.startswith('"', start):
        tab = text.find("\t", start)
        stop = tab if tab >= 0 else len(text)
        line_end = text.find("\n", start, stop)
        end = line_end if line_end >= 0 else stop
        return text[start:end], end
    close = start
    while (close := text.find('"', close + 1)) >= 0 and text.startswith('"', close + 1):
        close += 1
    end = close + 1
    if close < 0 or (end < len(text) and text[end] not in "\t\n"):
        return None, end
    return text[start + 1 : close].replace('""', '"'), end
