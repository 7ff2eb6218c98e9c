"""Batch inference: answer a file of questions about images; `--help` lists the flags and an example."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from llava.data.data_files import extract_table_images, find_unused_flags, list_files
from llava.data.table.options import add_table_flags, given_table_flags, table_options
from llava.eval.answer_program import (
    add_answer_arguments,
    answer_program,
    parse_answer_arguments,
    refuse_overwrite,
    run_on_rank,
)
from llava.files.home_directory import expand_home
from llava.files.program_parser import program_parser
from llava.files.regular_files import MAX_SETTINGS_BYTES, is_file, read_text
from llava.files.terminal_text import show
from llava.inference.batch.questions import read_question_file, split_chunk
from llava.inference.command_line import (
    parse_sampling,
    refuse_absent_device,
)
from llava.inference.distributed import DistributedRank
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)

logger = logging.getLogger(__name__)

_EXAMPLE = """example:
  python -m llava.eval.model_vqa_loader --model-path llava_merged_model --image-folder playground/data_infer/images \\
      --question-file playground/data_infer/questions.jsonl --answers-file answers.jsonl

Each line of the question file is {"question_id": ..., "image": name, list of names or null, "text": question}; further
keys are allowed. A table (.csv, .xlsx, .parquet) is taken as it is. The answers have the same order. They are kept in
FILE.journal until all are there: after an interruption the same command resumes from the journal. A question that
can't be answered gets an empty text and its reason under "error" and "metadata"; those whose images could not be read
(image_missing) are answered when the same command runs again. With a temperature above 0 a sampled answer depends on
--seed and the question only.

Several GPUs: torchrun --nproc_per_node 4 -m llava.eval.model_vqa_loader ... (or accelerate launch). All
processes must see the directory of the answers file.

exit code: 0 all questions answered, 1 some have errors, 2 stopped by an error, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.model_vqa_loader",
        "Batch inference: answer a file of questions about images.",
        _EXAMPLE,
    )
    add_answer_arguments(
        parser,
        questions="questions: JSON lines, or a table",
        images="directory of the images (default: the current one)",
        max_new_tokens=128,
    )
    add = parser.add_argument
    add("--unique-ids", action="store_true",
        help="refuse questions in which an id repeats (default: a question is its place in the file)")  # fmt: skip
    add("--with-scores", action="store_true", help="add log-probability and runner-up of each answer to its metadata")
    add("--choices", type=read_choices, metavar="A,B,...",
        help="score these answers instead of generating: separated by commas, or a file with one a line")  # fmt: skip
    add_table_flags(parser, with_answers=False)
    return parser


class Choices(list[str]):
    """The answers of `--choices`, and the file they were read from, if any."""

    file: str | None = None


def read_choices(value: str) -> Choices:
    """Return the answers of `--choices`.

    Raises:
        argparse.ArgumentTypeError: if some are empty or repeated.
    """
    path = expand_home(value)
    is_named = is_file(path)
    try:
        lines = read_text(path, most=MAX_SETTINGS_BYTES, encoding="utf-8-sig").splitlines() if is_named else None
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} can't be read ({error}); give a text file in UTF-8") from error
    choices = Choices(choice.strip() for choice in (value.split(",") if lines is None else lines))
    choices.file = path if is_named else None
    if not all(choices) or len(set(choices)) < len(choices):
        raise argparse.ArgumentTypeError(f"{show(value)} has empty or repeated answers; give each once")
    return choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, as in `--help`."""
    parser = build_parser()
    args = parse_answer_arguments(parser, argv)
    choices_file = args.choices.file if args.choices else None
    refuse_overwrite(parser, args, {"--question-file": list_files(args.question_file), "--choices": choices_file})
    if message := find_unused_flags(given_table_flags(args), {"--question-file": args.question_file}):
        parser.error(message)
    sampling = parse_sampling(parser, args)
    if (args.choices or args.with_scores) and sampling.num_beams > 1:
        parser.error("--num_beams does not go with --choices and --with-scores; leave it out")
    if args.choices and sampling.temperature > 0:
        parser.error("--temperature does not go with --choices, which are scored; leave it at 0")
    refuse_absent_device(parser, args.device)
    return run_on_rank(args, sampling, _run)


def _run(args: argparse.Namespace, sampling: Sampling, rank: DistributedRank) -> int:
    found = read_question_file(args.question_file, table_options(args), unique_ids=args.unique_ids)
    questions = split_chunk(found.questions, args.num_chunks, args.chunk_idx)[: args.limit]
    written = extract_table_images(args.question_file, found.table, args.image_folder, "--image-folder")
    for note in (*found.notes, *written) if rank.rank == 0 else ():
        logger.warning("%s", note)
    return answer_program(args, sampling, questions, rank)


if __name__ == "__main__":
    raise SystemExit(main())
