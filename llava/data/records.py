"""Read, check and encode LLaVA records; what can't be trained on is found before a GPU is held.

A record is `{"id": ..., "image": "name.jpg" or a list of names, "conversations": [{"from", "value"}, ...]}`; extra
keys are allowed, `image` is absent for text alone. `llava.data.foreign_records` says which other names are read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, SeparatorStyle, get_template
from llava.data.foreign_records import IMAGE_KEYS_NOT_READ, MARKS_NOT_READ, RECORD_KEYS, adopt_records
from llava.data.json_rows import RowsFileError, UnreadableLine, read_rows_file
from llava.data.row_errors import RowError, with_fix
from llava.data.supervision import ASSISTANT, NO_ANSWER, encode_example, find_turn_errors, without_opening
from llava.data.table.open_grid import is_table
from llava.files.home_directory import expand_home
from llava.files.regular_files import is_file
from llava.files.terminal_text import show, show_list
from llava.image_files.errors import ImageError
from llava.image_files.paths import explain_missing, resolve_image

if TYPE_CHECKING:  # for annotations: it imports transformers
    from llava.tokenization.llama_tokenizer import LlavaTokenizer

logger = logging.getLogger(__name__)

_REMEMBERED_TEXTS = 1 << 16


class DataError(ValueError):
    """Data that can't be trained on; the message lists the rows."""


class EncodedRecord(NamedTuple):
    """Input ids and labels of a record, of equal length, and the paths of its images."""

    input_ids: list[int]
    labels: list[int]
    images: list[Path]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSON list or a jsonl file of records.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is not valid JSON in UTF-8, or holds no record; the line is named.
    """
    rows = read_rows(path)
    bad = next((row for row in rows if isinstance(row, UnreadableLine)), None)
    if bad is not None:
        raise DataError(f"{path}: {with_fix('unreadable_line', bad.message)}")
    return rows


def read_rows(path: str | Path) -> list[Any]:
    """Read a data file as `read_records` does, but for bad lines of jsonl: an `UnreadableLine` stands for each."""
    path = Path(expand_home(path))
    if not path.exists():
        raise FileNotFoundError(
            f"data file {path} not found; make it with task_data_preprocessing.py or pass --data_path"
        )
    if is_table(path):
        way_out = f"make records of it: python task_data_preprocessing.py --input {path} --output data.json"
        raise DataError(f"{path} is a table, not JSON; {way_out}")
    try:
        found = read_rows_file(path, row_keys=RECORD_KEYS)
    except RowsFileError as error:
        raise DataError(str(error)) from error
    if not found.rows:
        raise DataError(f"{path} must hold a list of at least one record")
    rows, renamed = adopt_records(found.rows)
    notes = [*found.notes, *([f"{path}: read {', '.join(renamed)}"] if renamed else [])]
    for note in notes:
        logger.warning("%s", note)
    return rows


def check_records(
    records: Sequence[Any], template: str | Conversation, *, image_folder: str | Path | None
) -> Iterator[tuple[list[Path], list[RowError]]]:
    """Check each record without encoding it and without decoding its images.

    Yields:
        for each record, the paths of its images and what is wrong with it; one of the two lists is empty.
    """
    template = get_template(template) if isinstance(template, str) else template
    is_plain = template.sep_style is SeparatorStyle.PLAIN
    find_image = _build_image_finder(image_folder)
    for record in records:
        names, errors = _find_errors(record, is_plain)
        found = [find_image(name) for name in names]
        errors += [error for error in dict.fromkeys(found) if isinstance(error, RowError)]
        yield [] if errors else found, errors


def encode_records(
    records: Sequence[Any],
    template: str | Conversation,
    tokenizer: LlavaTokenizer,
    *,
    image_folder: str | Path | None,
    patches_per_image: int,
    max_length: int,
    use_im_start_end: bool = False,
) -> tuple[list[EncodedRecord], list[RowError]]:
    """Encode every record and look for its images, without decoding them.

    Args:
        records: from `read_records` or `read_rows`.
        template: prompt template.
        tokenizer: of the model.
        image_folder: where image names are looked up.
        patches_per_image: tokens an image becomes.
        max_length: of a record, in tokens, patches included.
        use_im_start_end: put `<im_start>` and `<im_end>` around each image.

    Returns:
        the usable records in order, and the errors of the others; a row may have several.
    """
    encode_text = lru_cache(maxsize=_REMEMBERED_TEXTS)(tokenizer.encode_text)
    how = {"use_im_start_end": use_im_start_end, "encode_text": encode_text}
    encoded, errors = [], []
    checked = check_records(records, template, image_folder=image_folder)
    for row, (record, (images, found)) in enumerate(zip(records, checked, strict=True)):
        if not found:
            ids, labels = encode_example(record["conversations"], template, tokenizer, **how)
            length = spliced_length(ids, patches_per_image)
            if length <= max_length:
                encoded.append(EncodedRecord(ids, labels, images))
                continue
            reason = f"{length} tokens are more than --model_max_length {max_length}; raise it or shorten the row"
            found = [RowError("too_long", reason)]
        errors += [error.at(row) for error in found]
    return encoded, errors


def spliced_length(input_ids: Sequence[int], patches_per_image: int) -> int:
    """Return the number of positions of token ids after each image placeholder has become its patches."""
    return len(input_ids) + input_ids.count(IMAGE_TOKEN_INDEX) * (patches_per_image - 1)


def _find_errors(record: Any, is_plain: bool) -> tuple[list[str], list[RowError]]:
    """Return the names of a record's images and what is wrong with the record itself."""
    if isinstance(record, UnreadableLine):
        return [], [RowError("unreadable_line", record.message)]
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return [], [RowError("not_a_record", _describe_non_record(record))]
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    errors = list(find_turn_errors(record["conversations"], is_plain=is_plain))
    if record.get("system"):
        errors.append(
            RowError("system_turn", "the record has 'system', and the template has a system prompt of its own")
        )
    has_good_turns = not errors
    if has_good_turns and len(without_opening(record["conversations"])) < 2:
        errors.append(RowError("unsupervised", NO_ANSWER))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [], [
            *errors,
            RowError("bad_image_field", f"'image' is {show(names)}; it is a file name or a list of them"),
        ]
    ignored = next((key for key in IMAGE_KEYS_NOT_READ if record.get(key)), None)
    if "image" not in record and ignored is not None:
        return [], [*errors, RowError("bad_image_field", f"the record has {ignored!r} and no 'image'")]
    if has_good_turns and record["conversations"]:  # else the marks can't be counted, or are missing for that reason
        errors += _find_mark_errors(record["conversations"], len(names))
    return names, errors


def _find_mark_errors(conversations: Sequence[Mapping[str, str]], n_images: int) -> Iterator[RowError]:
    turns = without_opening(conversations)
    marks = sum(turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if marks != n_images:
        message = f"{marks} <image> in the text, but {n_images} image files in the record"
        texts = [turn["value"] for turn in turns]
        other = next((mark for mark in MARKS_NOT_READ if any(mark in text for text in texts)), None)
        if other is not None and marks < n_images:
            message += f"; {other} is read as text"
        yield RowError("image_count", message)
    for number, turn in enumerate(turns, start=1 + len(conversations) - len(turns)):
        if turn["from"] == ASSISTANT and DEFAULT_IMAGE_TOKEN in turn["value"]:
            yield RowError("image_in_answer", f"turn {number}, from 'gpt', holds <image>: an answer has no image")


def _describe_non_record(record: Any) -> str:
    message = "not a record: it needs the key 'conversations' with a list of turns"
    if not isinstance(record, dict) or not record:
        return message
    return f"{message}, and has {show_list(record)}"


def _build_image_finder(folder: str | Path | None) -> Callable[[str], Path | RowError]:
    """Return the function image name -> its path or what is wrong with it, asked once for each name."""
    present = _list_files(folder)

    @cache
    def find(name: str) -> Path | RowError:
        if folder is None and not Path(expand_home(name)).is_absolute():
            return RowError("no_image_folder", f"image {show(name)} needs a folder; pass --image_folder")
        try:
            path = resolve_image(folder or "", name)
        except ImageError as error:
            return RowError(error.code, str(error))
        if name in present or is_file(path):
            return path
        place, there = folder or "the working directory", explain_missing(path)
        message = f"image {show(name)} not found under {place}, {there}; correct the name or pass --image_folder"
        return RowError("image_missing", str(ImageError("image_missing", message)))

    return find


def _list_files(folder: str | Path | None) -> set[str]:
    """Return the names of a folder's files: one listing is far faster than asking for each of thousands."""
    if not folder or not Path(expand_home(folder)).is_dir():
        return set()
    with os.scandir(expand_home(folder)) as entries:
        return {entry.name for entry in entries if _leads_to_file(entry)}


def _leads_to_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads back to itself
        return False
