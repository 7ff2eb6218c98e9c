"""Write table rows as LLaVA training data (JSON) and as inference questions (JSON Lines)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.split import held_out
from llava.data.table.read import BadRows, TableError, TableRow
from llava.files.regular_files import is_file
from llava.files.terminal_text import show
from llava.image_files.paths import explain_missing

COCO_IMAGE_NAME = "COCO_val2014_{id:012d}.jpg"
"""File name of a COCO val2014 image, the original's images."""

RECORD_FIELDS = frozenset({"id", "image", "conversations", "question_id"})
QUESTION_FIELDS = frozenset({"question_id", "image", "text"})
_RECORDS_PER_PIECE = 1000


def build_image_namer(template: str) -> Callable[[int], str]:
    """Return the function image id -> file name of a template such as `COCO_val2014_{id:012d}.jpg`.

    Raises:
        ValueError: if the template cannot be filled in, or gives two ids the same name.
    """

    def name_image(image_id: int) -> str:
        return template.format(id=image_id)

    try:
        names = {name_image(1), name_image(2)}
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{template!r} cannot be filled in ({error}); write it like {COCO_IMAGE_NAME!r}") from error
    if len(names) < 2:
        raise ValueError(f"{template!r} gives every image one name; write it like {COCO_IMAGE_NAME!r}")
    return name_image


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


def check_images(rows: Sequence[TableRow], name_image: Callable[[int], str], directory: str, source: str) -> None:
    """Check that the image of every row is a file under `directory`.

    Args:
        rows: the table.
        name_image: image id -> file name.
        directory: the image folder.
        source: names the table in the message.

    Raises:
        TableError: if images are missing (each is counted once, the first 20 listed).
    """
    bad = BadRows(source)
    first_line: dict[int, int] = {}
    for row in rows:
        first_line.setdefault(row.image_id, row.line)
    for image_id, line in first_line.items():
        name = name_image(image_id)
        path = Path(directory, name)
        if not is_file(path):
            bad.add(line, f"image {show(name)} not found under {directory}, {explain_missing(path)}")
    bad.raise_if_any("Put the images there, or correct --check_images or --image_name.")


def format_training_json(
    rows: Iterable[TableRow], name_image: Callable[[int], str], keep: Sequence[str] = ()
) -> Iterator[str]:
    """Write rows as LLaVA's training data: a JSON list with one record per line.

    A record holds `id` (the row's number in the table, from 0, as text: so the original writes it), `image`,
    `conversations` and `question_id`.

    Args:
        rows: the table.
        name_image: image id -> file name.
        keep: names of the rows' extras, which become further keys with text values.

    Yields:
        The file's text in pieces.
    """
    prefix = DEFAULT_IMAGE_TOKEN + "\n"
    encode_image = _build_image_encoder(name_image)
    # Put together by hand: a tenth of the time that json.dumps takes for each record.
    records = (
        f'{{"id": "{index}", "image": {encode_image(image_id)}, "conversations": [{{"from": "human", "value": '
        f'{encode_basestring(prefix + question)}}}, {{"from": "gpt", "value": {encode_basestring(answer)}}}], '
        f'"question_id": {question_id}{_format_extras(keep, extras) if extras else ""}}}'
        for index, _, image_id, question, question_id, answer, extras in rows
    )
    separator = "[\n"
    while piece := ",\n".join(islice(records, _RECORDS_PER_PIECE)):
        yield separator + piece
        separator = ",\n"
    yield "\n]\n"


def format_questions_jsonl(
    rows: Iterable[TableRow], name_image: Callable[[int], str], keep: Sequence[str] = ()
) -> Iterator[str]:
    """Write rows as inference's questions: one JSON object `{question_id, image, text}` per line.

    Args:
        rows: the table.
        name_image: image id -> file name.
        keep: names of the rows' extras, which become further keys with text values.

    Yields:
        The file's text in pieces.
    """
    encode_image = _build_image_encoder(name_image)
    for row in rows:
        yield (
            f'{{"question_id": {row.question_id}, "image": {encode_image(row.image_id)}, '
            f'"text": {encode_basestring(row.question)}{_format_extras(keep, row.extras)}}}\n'
        )


def _build_image_encoder(name_image: Callable[[int], str]) -> Callable[[int], str]:
    """Return the function image id -> file name as a JSON string, computed once for each image."""
    return lru_cache(maxsize=None)(lambda image_id: encode_basestring(name_image(image_id)))


def _format_extras(keep: Sequence[str], extras: Sequence[str]) -> str:
    pairs = zip(keep, extras, strict=True)
    return "".join(f", {encode_basestring(key)}: {encode_basestring(text)}" for key, text in pairs)
