"""Write table rows as LLaVA training data (JSON) and as inference questions (JSON Lines)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.split import held_out
from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.read import TableRow
from llava.files.regular_files import is_file
from llava.files.terminal_text import show
from llava.image_files.paths import explain_missing

RECORD_FIELDS = frozenset({"id", "image", "conversations", "question_id"})
QUESTION_FIELDS = frozenset({"question_id", "image", "text"})
_RECORDS_PER_PIECE = 1000


def split_by_image(rows: Sequence[TableRow], val_share: float, seed: int) -> tuple[list[TableRow], list[TableRow]]:
    """Split rows so that no image is on both sides.

    Images are ranked by a hash of seed and id, so the split depends neither on the order of the table nor on the Python
    version.

    Args:
        rows: the table.
        val_share: share of the images that go to the validation side, 0 < share < 1; at least one image on each side.
        seed: another seed, another split.

    Returns:
        (training rows, validation rows), each in the order of the table.

    Raises:
        ValueError: if the share is not between 0 and 1.
        TableError: if the table has fewer than two images.
    """
    images = {row.image_id for row in rows}
    if len(images) < 2:
        raise TableError(
            f"a validation share needs at least 2 images, the table has {len(images)}; leave the share out"
        )
    chosen = held_out(images, val_share, seed)
    return [row for row in rows if row.image_id not in chosen], [row for row in rows if row.image_id in chosen]


def check_images(rows: Sequence[TableRow], directory: str, source: str) -> None:
    """Check that the image of every row is a file under `directory`.

    Args:
        rows: the table.
        directory: the image folder.
        source: names the table in the message.

    Raises:
        TableError: if images are missing (each is counted once, the first 20 listed).
    """
    bad = BadRows(source)
    first_line: dict[str, int] = {}
    for row in rows:
        first_line.setdefault(row.image, row.line)
    for name, line in first_line.items():
        path = Path(directory, name)
        if not is_file(path):
            bad.add(line, f"image {show(name)} not found under {directory}, {explain_missing(path)}")
    bad.raise_if_any("Put the images there, or correct --check_images or --image_name.")


def training_record(row: TableRow, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the LLaVA record of a row with an answer.

    Its keys are `id` (the row's number in the table, from 0, as text: so the original writes it), `image`,
    `conversations`, `question_id`, with several answers also `answers`, and `keep`, the names of the row's extras.
    """
    turns = [
        {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{row.question}"},
        {"from": "gpt", "value": row.answer},
    ]
    record = {"id": str(row.index), "image": row.image, "conversations": turns, "question_id": row.question_id}
    answers = {"answers": list(row.answers)} if len(row.answers) > 1 else {}
    return {**record, **answers, **dict(zip(keep, row.extras, strict=True))}


def question(row: TableRow, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return the object of a question file for a row: `question_id`, `image`, `text`, and `keep`, its extras."""
    extras = dict(zip(keep, row.extras, strict=True))
    return {"question_id": row.question_id, "image": row.image, "text": row.question, **extras}


def format_training_json(rows: Iterable[TableRow], keep: Sequence[str] = ()) -> Iterator[str]:
    """Write `training_record` of each row: a JSON list with one record per line.

    Args:
        rows: the table.
        keep: names of the rows' extras, which become further keys with text values.

    Yields:
        The file's text in pieces.
    """
    prefix = DEFAULT_IMAGE_TOKEN + "\n"
    encode_image = lru_cache(maxsize=None)(encode_basestring)  # an image has several questions
    # Put together by hand: a tenth of the time that json.dumps takes for each record.
    records = (
        f'{{"id": "{index}", "image": {encode_image(image)}, "conversations": [{{"from": "human", "value": '
        f'{encode_basestring(prefix + question)}}}, {{"from": "gpt", "value": {encode_basestring(answer)}}}], '
        f'"question_id": {_format_id(question_id)}{_format_answers(answers) if len(answers) > 1 else ""}'
        f"{_format_extras(keep, extras) if extras else ''}}}"
        for index, _, _, image, question, question_id, answer, answers, extras in rows
    )
    separator = "[\n"
    while piece := ",\n".join(islice(records, _RECORDS_PER_PIECE)):
        yield separator + piece
        separator = ",\n"
    yield "\n]\n"


def format_questions_jsonl(rows: Iterable[TableRow], keep: Sequence[str] = ()) -> Iterator[str]:
    """Write `question` of each row: one JSON object per line.

    Args:
        rows: the table.
        keep: names of the rows' extras, which become further keys with text values.

    Yields:
        The file's text in pieces.
    """
    for row in rows:
        yield (
            f'{{"question_id": {_format_id(row.question_id)}, "image": {encode_basestring(row.image)}, '
            f'"text": {encode_basestring(row.question)}{_format_extras(keep, row.extras)}}}\n'
        )


def _format_id(question_id: int | str) -> str:
    return str(question_id) if isinstance(question_id, int) else encode_basestring(question_id)


def _format_answers(answers: Sequence[str]) -> str:
    return f', "answers": [{", ".join(map(encode_basestring, answers))}]'


def _format_extras(keep: Sequence[str], extras: Sequence[str]) -> str:
    pairs = zip(keep, extras, strict=True)
    return "".join(f", {encode_basestring(key)}: {encode_basestring(text)}" for key, text in pairs)
