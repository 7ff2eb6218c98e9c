"""HTML report: scores, plots, and a gallery of images with questions, true and given answers, wrong ones first.

The page is self-contained: no network, no other file. With several answer files each is compared with the first, and
the gallery shows which answers became right ("fixed") and wrong ("broken"). Images are thumbnails inside the page.

Example:
    python -m llava.eval.report --answers base.jsonl finetuned.jsonl --questions questions.jsonl --images images \\
        --annotations Test_Qs.csv -o report.html
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from llava.data.data_files import extract_table_images, fit_options, list_files
from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions
from llava.eval.report.gallery import (
    SMALLEST_SIZE,
    Row,
    build_rows,
    choose_images,
    complete_references,
    key_questions,
)
from llava.eval.scoring.annotations import (
    GivenAnswer,
    References,
    pair_answers,
    pair_references,
    read_answers,
    read_references,
)
from llava.eval.scoring.evaluate import Evaluation, compare_ids, evaluate
from llava.eval.scoring.question_keys import QuestionKey
from llava.eval.vqa_score import add_annotation_arguments, name_files, parse_table_options
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import format_size, log_to_terminal, print_text, report_error
from llava.image_files.errors import ImageError
from llava.image_files.paths import resolve_image
from llava.inference.batch.questions import Question, read_question_file

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # for annotations: they import Jinja and Pillow
    from llava.eval.report.page import Page
    from llava.eval.report.thumbnails import Thumbnail

_MEGABYTE = 1_000_000
_BASE64_SHARE = 3 / 4  # three bytes become four characters
_SCORED_TITLE, _PLAIN_TITLE = "What the model gets right and wrong", "What the model answers"
_SECONDS_UNTIL_BAR = 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.report",
        __doc__,
    )
    add = parser.add_argument
    add("--answers", "--answers-file", action="extend", nargs="+", required=True, metavar="JSONL",
        help="answers of batch inference; further files are compared with the first")  # fmt: skip
    add("--questions", "--question-file", required=True, metavar="FILE",
        help="question file or table that was answered")  # fmt: skip
    add("--images", "--image-folder", required=True, metavar="DIR", help="directory of the images")
    add("-o", "--output", required=True, metavar="HTML", help="page to write")
    add_annotation_arguments(parser, required=False)
    add("--title", help=f'heading of the page (default: "{_SCORED_TITLE}", without annotations "{_PLAIN_TITLE}")')
    add("--max-images", type=int, metavar="N", help="show N images, those with wrong answers first (default: all)")
    add("--thumbnail-size", type=int, default=224, metavar="PIXELS",
        help="longest side of an image in the page (default: %(default)s)")  # fmt: skip
    add("--max-megabytes", type=float, default=40, metavar="MB",
        help="budget for all thumbnails; many images get smaller ones (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="worker processes that read images; 0 for none (default: one for each core)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 written, 1 an input or the output cannot be used (argparse itself exits with 2), 130 stopped.
    """
    log_to_terminal()
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "answers", "questions", "images", "output", "annotations")
    _check_flags(parser, args)
    options = parse_table_options(parser, args, {"--questions": args.questions, "--annotations": args.annotations})

    from llava.eval.report.page import render_page  # takes a second: flags are parsed first

    try:
        page = _collect(args, options)
        with atomic_write(args.output) as stream:
            for piece in render_page(page):
                stream.write(piece)
    except (ValueError, OSError) as error:
        report_error(error)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped: {args.output} is unchanged; run the same command again", file=sys.stderr)
        return 130
    size = format_size(Path(args.output).stat().st_size)
    print_text(f"wrote {args.output}: {len(page.rows)} questions, {len(page.images)} images, {size}")
    taken = sum(len(thumbnail.data) for thumbnail in page.thumbnails if thumbnail.data) / _BASE64_SHARE
    if taken > args.max_megabytes * _MEGABYTE:
        limit = f"--max-megabytes {args.max_megabytes:g}"
        print(f"the images take {format_size(taken)}, more than {limit}; --max-images N shows fewer of them")
    return 0


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag, is_given in (("--kind-key", args.kind_key), ("--unanimous", args.unanimous != "normalize")):
        if is_given and args.annotations is None:
            parser.error(f"{flag} has no effect without --annotations; add --annotations, or leave it out")
    for flag, least in (("max_images", 0), ("thumbnail_size", SMALLEST_SIZE), ("max_megabytes", 0), ("workers", 0)):
        value = getattr(args, flag)
        if value is not None and not value >= least:
            parser.error(f"--{flag.replace('_', '-')} is {value}; choose {least} or more")
    inputs = {
        "--answers": args.answers,
        "--questions": list_files(args.questions),
        "--annotations": args.annotations and list_files(args.annotations),
    }
    if message := find_overwrite({"--output": output_file(args.output)}, inputs):
        parser.error(message)


def _collect(args: argparse.Namespace, options: TableOptions) -> Page:
    """Read everything and return the page."""
    from llava.eval.report.page import Page

    questions = key_questions(_read_questions(args, options))
    texts = {key: question.text for key, question in questions.items()}
    paths = name_files(args.answers)
    unique = args.unique_ids
    files = {name: pair_answers(path, read_answers(path, unique_ids=unique), texts) for name, path in paths.items()}
    if any(question.images for question in questions.values()) and not Path(args.images).is_dir():
        raise ValueError(f"--images {args.images} is not a directory; give the directory of the images")
    references = None
    if args.annotations is not None:
        fitted = fit_options(args.annotations, options)
        found = read_references(args.annotations, fitted, args.kind_key, unique_ids=unique)
        references = complete_references(pair_references(found, texts), questions)
    evaluation = None if references is None else evaluate(files, references, args.unanimous)
    rows = _build_rows(questions, files, references, evaluation)
    names = choose_images(rows, args.max_images)
    shown = _rows_with_images(rows, names)
    thumbnails = _load_thumbnails(names, args)
    notes = [
        *_describe_gaps(files, references, questions.keys()),
        *([] if len(shown) == len(rows) else [_describe_limit(shown, rows, names)]),
        *_describe_problems(thumbnails),
    ]
    title = args.title or (_PLAIN_TITLE if references is None else _SCORED_TITLE)
    return Page(title, tuple(files), evaluation, tuple(shown), tuple(names), tuple(thumbnails), len(rows), tuple(notes))


def _read_questions(args: argparse.Namespace, options: TableOptions) -> list[Question]:
    """Read the questions, write the images that a table of them holds into the folder, and log what must be said."""
    fitted = fit_options(args.questions, options)
    found = read_question_file(args.questions, fitted, unique_ids=args.unique_ids)
    is_read_again = found.table is not None and args.annotations == args.questions
    said_later = {f"{args.questions}: {note}" for note in found.table.notes} if is_read_again else set()
    for note in (*found.notes, *extract_table_images(args.questions, found.table, args.images, "--images")):
        if note not in said_later:  # by `read_references`
            logger.warning("%s", note)
    return found.questions


def _build_rows(
    questions: Mapping[QuestionKey, Question],
    files: Mapping[str, Mapping[QuestionKey, GivenAnswer]],
    references: References | None,
    evaluation: Evaluation | None,
) -> list[Row]:
    accuracies = [{} if evaluation is None else evaluation.files[name].accuracies for name in files]
    rows = build_rows(questions, list(files.values()), references, accuracies)
    if not rows:
        raise TableError("no question of the question file is answered; check that the files belong together")
    return rows


def _rows_with_images(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows whose images are all in the page."""
    known = set(names)
    return [row for row in rows if known.issuperset(row.images)]


def _load_thumbnails(names: Sequence[str], args: argparse.Namespace) -> list[Thumbnail]:
    """One thumbnail for each name; a path outside the folder gets only its error code."""
    from tqdm import tqdm

    from llava.data.worker_processes import usable_cores
    from llava.eval.report.thumbnails import Thumbnail, make_thumbnails

    thumbnails: dict[str, Thumbnail] = {}
    paths = {}
    for name in names:
        try:
            paths[name] = resolve_image(args.images, name)
        except ImageError as error:
            thumbnails[name] = Thumbnail(None, 0, 0, error.code)
    budget = int(args.max_megabytes * _MEGABYTE * _BASE64_SHARE)
    workers = usable_cores() if args.workers is None else args.workers
    made = make_thumbnails(list(paths.values()), args.thumbnail_size, budget, workers)
    bar = tqdm(made, total=len(paths), unit="image", desc="thumbnails", delay=_SECONDS_UNTIL_BAR, file=sys.stderr)
    thumbnails.update(zip(paths, bar, strict=True))
    return [thumbnails[name] for name in names]


def _describe_gaps(
    files: Mapping[str, Mapping[QuestionKey, GivenAnswer]], references: References | None, known: Set[QuestionKey]
) -> list[str]:
    notes = [] if references is None else [f"Not scored: {note}." for note in compare_ids(files, references)]
    for name, answers in files.items():
        if unknown := len(answers.keys() - known):
            notes.append(f"{name}: {unknown} answers belong to no question of the question file and are not shown.")
        if missing := len(known - answers.keys()):
            notes.append(f"{name}: {missing} of {len(known)} questions have no answer in this file.")
    return notes


def _describe_limit(shown: Sequence[Row], rows: Sequence[Row], names: Sequence[str]) -> str:
    total = len({name for row in rows for name in row.images})
    return (
        f"The gallery shows {len(shown)} of {len(rows)} questions, those about {len(names)} of {total} images "
        "(--max-images); images with wrong answers come first. The scores count all questions."
    )


def _describe_problems(thumbnails: Sequence[Thumbnail]) -> list[str]:
    problems = Counter(thumbnail.problem for thumbnail in thumbnails if thumbnail.problem is not None)
    if not problems:
        return []
    listed = ", ".join(f"{code} {count}" for code, count in sorted(problems.items()))
    return [f"Images that can't be shown: {listed}."]


if __name__ == "__main__":
    raise SystemExit(main())
