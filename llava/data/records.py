"""LLaVA records: reading them, and finding out before a GPU is held which of them can't be used.

A record is `{"id": ..., "image": "name.jpg" or a list of names, "conversations": [{"from", "value"}, ...]}`; extra
keys are allowed, `image` is absent for text alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.supervision import encode_example
from llava.image_processing import ImageError, resolve_image
from llava.tokenization import LlavaTokenizer

SHOWN_PROBLEMS = 20


class DataError(ValueError):
    """Data that can't be trained on; the message lists the rows."""


class EncodedRecord(NamedTuple):
    """A record ready for training, but for the pixels: ids and labels of equal length, paths of its images."""

    input_ids: list[int]
    labels: list[int]
    images: list[Path]


class Problem(NamedTuple):
    """Why row `row` (counting from 0) of the data can't be used."""

    row: int
    message: str


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list or a jsonl file of records.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is no valid JSON in UTF-8, or holds no record; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data file {path} not found; make it with task_data_preprocessing.py or pass --data_path"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}); save it in UTF-8") from error
    try:
        if path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), start=1)  # not splitlines(): texts may hold other line separators
            records = [_parse_line(line, f"{path}: line {number}") for number, line in lines if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} must hold a list of at least one record")
    return records


def encode_records(
    records: Sequence[Mapping[str, Any]],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    *,
    image_folder: str | Path | None,
    patches_per_image: int,
    max_length: int,
) -> tuple[list[EncodedRecord], list[Problem]]:
    """Encode every record and look for its images, without decoding them.

    Args:
        records: from `read_records`.
        template: prompt template.
        tokenizer: of the model.
        image_folder: where image names are looked up.
        patches_per_image: tokens an image becomes.
        max_length: of a row, in tokens, patches included.

    Returns:
        the usable records in order, and a problem for each of the others.
    """
    present = _list_files(image_folder)
    encoded, problems = [], []
    for row, record in enumerate(records):
        try:
            example = _encode_record(record, template, tokenizer, image_folder, present)
            length = spliced_length(example.input_ids, patches_per_image)
            if length > max_length:
                raise ValueError(
                    f"{length} tokens are more than --model_max_length {max_length}; raise it or shorten the row"
                )
            encoded.append(example)
        except ValueError as error:
            problems.append(Problem(row, str(error)))
    return encoded, problems


def spliced_length(input_ids: Sequence[int], patches_per_image: int) -> int:
    """Return the number of positions of a row once each image's placeholder has become its patches."""
    return len(input_ids) + input_ids.count(IMAGE_TOKEN_INDEX) * (patches_per_image - 1)


def describe_problems(path: str | Path, problems: Sequence[Problem], total: int) -> str:
    """Return a message that names the rows, the first 20 with their reasons."""
    lines = [f"  row {problem.row}: {problem.message}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    return f"{path}: {len(problems)} of {total} rows can't be used\n" + "\n".join(lines)


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is no valid JSON ({error.msg}, column {error.colno}); mend or remove it") from error


def _list_files(folder: str | Path | None) -> set[str] | None:
    """Return the names of a folder's files: one listing is far faster than asking for each of thousands."""
    if not folder or not Path(folder).is_dir():
        return None
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _encode_record(
    record: Mapping[str, Any],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    folder: str | Path | None,
    present: set[str] | None,
) -> EncodedRecord:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ValueError("not a record: it needs the key 'conversations' with a list of turns")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'image' is {names!r}; it is a file name or a list of them")
    input_ids, labels = encode_example(record["conversations"], template, tokenizer)
    placeholders = input_ids.count(IMAGE_TOKEN_INDEX)
    if placeholders != len(names):
        raise ValueError(f"{placeholders} <image> in the text, but {len(names)} image files in the record")
    if names and folder is None:
        raise ValueError(f"image {names[0]!r} needs a folder; pass --image_folder")
    return EncodedRecord(input_ids, labels, [_find_image(folder, name, present) for name in names])


def _find_image(folder: str | Path, name: str, present: set[str] | None) -> Path:
    path = resolve_image(folder, name)
    if (present is None or name not in present) and not path.is_file():
        raise ImageError("image_missing", f"image {name!r} not found under {folder}; pass --image_folder")
    return path
