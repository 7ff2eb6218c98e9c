"""A picture of pictures: images with their question, the true and the given answer, wrong ones first.

Example:
    python -m llava.eval.contact_sheet --answers-file answers.jsonl --question-file questions.jsonl \\
        --annotations Test_Qs.csv --image-folder images --output contact_sheet.png
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from llava.eval.accuracy import score_answer
from llava.eval.vqa_inputs import QuestionId, read_predictions, read_references
from llava.files import atomic_write
from llava.image_processing import expand_to_square, open_image, resolve_image

TILE = 224
TEXT_HEIGHT = 92
MARGIN = 8
LINE_HEIGHT = 15
CHARACTERS_PER_LINE = 36
RIGHT, WRONG, INK, PAPER, FRAME = (22, 110, 46), (176, 28, 28), (32, 32, 32), (255, 255, 255), (235, 235, 235)


class Entry(NamedTuple):
    """One tile: the image's path, the question, true answers, the given one (None after an error), score 0..1."""

    image: Path
    question: str
    truth: Sequence[str]
    given: str | None
    score: float


def choose_entries(
    questions: Sequence[Mapping[str, object]],
    predictions: Mapping[QuestionId, str | None],
    truth: Mapping[QuestionId, Sequence[str]],
    image_folder: Path,
    count: int,
) -> list[Entry]:
    """Return up to `count` entries, half of them wrong answers if there are as many; the wrong ones first."""
    entries = []
    for question in questions:
        key = question["question_id"]
        if key in predictions and key in truth and question.get("image"):
            image = resolve_image(image_folder, str(question["image"]))
            score = score_answer(predictions[key], truth[key])
            entries.append(Entry(image, str(question["text"]), truth[key], predictions[key], score))
    wrong = [entry for entry in entries if entry.score < 0.5]
    right = [entry for entry in entries if entry.score >= 0.5]
    wrong_count = min(len(wrong), max(count // 2, count - len(right)))
    return _spread(wrong, wrong_count) + _spread(right, min(len(right), count - wrong_count))


def draw_sheet(entries: Sequence[Entry], columns: int) -> Image.Image:
    """Draw the entries row by row."""
    rows = -(-len(entries) // columns)
    width = columns * (TILE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, rows * (TILE + TEXT_HEIGHT + MARGIN) + MARGIN), FRAME)
    for index, entry in enumerate(entries):
        row, column = divmod(index, columns)
        corner = (MARGIN + column * (TILE + MARGIN), MARGIN + row * (TILE + TEXT_HEIGHT + MARGIN))
        sheet.paste(_draw_tile(entry), corner)
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sheet that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers-file", required=True, help="answers, as inference wrote them")
    parser.add_argument("--question-file", required=True, help="the questions they answer (jsonl)")
    parser.add_argument("--annotations", required=True, help="true answers: table, jsonl or VQAv2's JSON")
    parser.add_argument("--image-folder", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="PNG to write")
    parser.add_argument("--count", type=int, default=24, help="tiles (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=6, help="tiles in a row (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        lines = Path(options.question_file).read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines if line.strip()]
        truth = read_references(options.annotations).answers
        predictions = read_predictions(options.answers_file)
        entries = choose_entries(questions, predictions, truth, options.image_folder, options.count)
        if not entries:
            raise ValueError(
                "no question has an image, a true answer and a given one; check that the files belong together"
            )
        sheet = draw_sheet(entries, options.columns)
        with atomic_write(options.output, "wb") as stream:
            sheet.save(stream, format="PNG")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}: {len(entries)} questions")
    return 0


def _spread(entries: Sequence[Entry], count: int) -> list[Entry]:
    return [entries[index * len(entries) // count] for index in range(count)] if count else []


def _draw_tile(entry: Entry) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE + TEXT_HEIGHT), PAPER)
    tile.paste(expand_to_square(open_image(entry.image), FRAME).resize((TILE, TILE)), (0, 0))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=12)
    question = textwrap.wrap(entry.question, CHARACTERS_PER_LINE)[:3]
    given = "no answer" if entry.given is None else entry.given
    colour = RIGHT if entry.score >= 0.5 else WRONG
    lines = [(line, INK) for line in question] + [(f"true: {entry.truth[0]}", INK), (f"given: {given}", colour)]
    for index, (text, ink) in enumerate(lines):
        draw.text((6, TILE + 6 + index * LINE_HEIGHT), text[: CHARACTERS_PER_LINE + 6], fill=ink, font=font)
    return tile


if __name__ == "__main__":
    sys.exit(main())
