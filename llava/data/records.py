"""LLaVA records: reading them, and finding out before a GPU is held which of them can't be used.

A record is `{"id": ..., "image": "name.jpg" or a list of names, "conversations": [{"from", "value"}, ...]}`; extra
keys are allowed, `image` is absent for text alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.data.findings import with_way_out
from llava.data.supervision import NO_ANSWER, Fault, encode_example, find_turn_faults, without_opening
from llava.image_processing import ImageError, resolve_image
from llava.tokenization import LlavaTokenizer

_REMEMBERED_TEXTS = 1 << 16


class DataError(ValueError):
    """Data that can't be trained on; the message lists the rows."""


class EncodedRecord(NamedTuple):
    """A record ready for training, but for the pixels: ids and labels of equal length, paths of its images."""

    input_ids: list[int]
    labels: list[int]
    images: list[Path]


class Problem(NamedTuple):
    """Why row `row` (counting from 0) of the data can't be used; `code` is one of `llava.data.findings`."""

    row: int
    message: str
    code: str


class UnreadableLine(NamedTuple):
    """Stands for a line of a jsonl file that is no valid JSON."""

    message: str


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list or a jsonl file of records.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is no valid JSON in UTF-8, or holds no record; the line is named.
    """
    rows = read_rows(path)
    bad = next((row for row in rows if isinstance(row, UnreadableLine)), None)
    if bad is not None:
        raise DataError(f"{path}: {with_way_out('unreadable_line', bad.message)}")
    return rows


def read_rows(path: str | Path) -> list[Any]:
    """Read a data file as `read_records` does, but for bad lines of jsonl: an `UnreadableLine` stands for each."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"data file {path} not found; make it with task_data_preprocessing.py or pass --data_path"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}); save it in UTF-8") from error
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)  # not splitlines(): texts may hold other line separators
        rows = [_parse_line(line, number) for number, line in lines if line.strip()]
    else:
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise DataError(
                f"{path} is no valid JSON: {place}: {error.msg}; mend it, or call it .jsonl if each line is a record"
            ) from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} must hold a list of at least one record")
    return rows


def _parse_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return UnreadableLine(f"line {number} is no valid JSON ({error.msg}, column {error.colno})")


def check_records(
    records: Sequence[Any], template: str | Conversation, *, image_folder: str | Path | None
) -> Iterator[tuple[list[Path], list[Fault]]]:
    """Check each record without encoding it and without decoding its images.

    Yields:
        for each record, the paths of its images and what is wrong with it; one of the two lists is empty.
    """
    template = get_template(template) if isinstance(template, str) else template
    is_plain = template.sep_style is SeparatorStyle.PLAIN
    find_image = _build_image_finder(image_folder)
    for record in records:
        names, faults = _find_faults(record, is_plain)
        found = [find_image(name) for name in names]
        faults += [fault for fault in dict.fromkeys(found) if isinstance(fault, Fault)]
        yield [] if faults else found, faults


def encode_records(
    records: Sequence[Any],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    *,
    image_folder: str | Path | None,
    patches_per_image: int,
    max_length: int,
) -> tuple[list[EncodedRecord], list[Problem]]:
    """Encode every record and look for its images, without decoding them.

    Args:
        records: from `read_records` or `read_rows`.
        template: prompt template.
        tokenizer: of the model.
        image_folder: where image names are looked up.
        patches_per_image: tokens an image becomes.
        max_length: of a row, in tokens, patches included.

    Returns:
        the usable records in order, and the problems of the others; a row may have several.
    """
    encode_text = lru_cache(maxsize=_REMEMBERED_TEXTS)(tokenizer.encode_text)
    encoded, problems = [], []
    checked = check_records(records, template, image_folder=image_folder)
    for row, (record, (images, faults)) in enumerate(zip(records, checked, strict=True)):
        if not faults:
            ids, labels = encode_example(record["conversations"], template, tokenizer, encode_text=encode_text)
            length = spliced_length(ids, patches_per_image)
            if length <= max_length:
                encoded.append(EncodedRecord(ids, labels, images))
                continue
            reason = f"{length} tokens are more than --model_max_length {max_length}; raise it or shorten the row"
            faults = [Fault("too_long", reason)]
        problems += [problem_of(row, fault) for fault in faults]
    return encoded, problems


def problem_of(row: int, fault: Fault) -> Problem:
    """Return a row's fault with its way out."""
    return Problem(row, with_way_out(fault.code, fault.message), fault.code)


def spliced_length(input_ids: Sequence[int], patches_per_image: int) -> int:
    """Return the number of positions of a row once each image's placeholder has become its patches."""
    return len(input_ids) + input_ids.count(IMAGE_TOKEN_INDEX) * (patches_per_image - 1)


def _find_faults(record: Any, is_plain: bool) -> tuple[list[str], list[Fault]]:
    """Return the names of a record's images and what is wrong with the record itself."""
    if isinstance(record, UnreadableLine):
        return [], [Fault("unreadable_line", record.message)]
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return [], [Fault("not_a_record", "not a record: it needs the key 'conversations' with a list of turns")]
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    faults = list(find_turn_faults(record["conversations"], is_plain=is_plain))
    has_good_turns = not faults
    if has_good_turns and len(without_opening(record["conversations"])) < 2:
        faults.append(Fault("unsupervised", NO_ANSWER))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [], [*faults, Fault("bad_image_field", f"'image' is {names!r}; it is a file name or a list of them")]
    if has_good_turns:  # else the marks can't be counted, or are missing for that reason
        marks = _count_marks(record["conversations"])
        if marks != len(names):
            faults.append(
                Fault("image_count", f"{marks} <image> in the text, but {len(names)} image files in the record")
            )
    return names, faults


def _count_marks(conversations: Sequence[Mapping[str, str]]) -> int:
    return sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in without_opening(conversations))


def _build_image_finder(folder: str | Path | None) -> Callable[[str], Path | Fault]:
    """Return the function image name -> its path or what is wrong with it, asked once for each name."""
    present = _list_files(folder)

    @cache
    def find(name: str) -> Path | Fault:
        if folder is None:
            return Fault("no_image_folder", f"image {name!r} needs a folder; pass --image_folder")
        try:
            path = resolve_image(folder, name)
        except ImageError as error:
            return Fault(error.code, str(error))
        if name in present or _is_file(path):
            return path
        return Fault("image_missing", f"image {name!r} not found under {folder}; pass --image_folder")

    return find


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that the file system can't have
        return False


def _list_files(folder: str | Path | None) -> set[str]:
    """Return the names of a folder's files: one listing is far faster than asking for each of thousands."""
    if not folder or not Path(folder).is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}
