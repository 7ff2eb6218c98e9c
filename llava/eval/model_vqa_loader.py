"""Batch inference: answer a file of questions about images; `--help` lists the flags and an example."""

from __future__ import annotations

import argparse
import contextlib
import glob
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.constants import SWITCH
from llava.data.data_files import extract_table_images, find_unused_flags, list_files
from llava.data.table.options import add_table_flags, given_table_flags, table_options
from llava.files.home_directory import expand_home, expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.regular_files import MAX_SETTINGS_BYTES, is_file, read_text
from llava.files.terminal_text import print_text, report_error, show
from llava.image_files.errors import NOT_READ
from llava.image_files.paths import describe_lost_folder
from llava.inference.batch.answers_file import JOURNAL_SUFFIX, RUN_SUFFIX, AnswersFile
from llava.inference.batch.questions import Question, digest_questions, read_question_file, split_chunk
from llava.inference.command_line import (
    INTERRUPTED,
    REFUSED,
    add_model_arguments,
    add_sampling_arguments,
    load_session,
    parse_sampling,
    refuse_absent_device,
    run_program,
    selected_bits,
)
from llava.inference.distributed import DistributedRank, process_group, read_rank
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.inference.session import Session

__getattr__ = lazy_names(__name__)

logger = logging.getLogger(__name__)

_SEED = 0
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
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image-folder", default="", metavar="DIR", help="directory of the images (default: the current one)")
    add("--question-file", required=True, metavar="FILE", help="questions: JSON lines, or a table")
    add("--answers-file", required=True, metavar="FILE", help="answers, JSON lines; written when all are complete")
    add("--unique-ids", action="store_true",
        help="refuse questions in which an id repeats (default: a question is its place in the file)")  # fmt: skip
    add("--num-chunks", type=int, default=1, help="chunks the questions are split into (default: %(default)s)")
    add("--chunk-idx", type=int, default=0, help="chunk to answer, counted from 0 (default: %(default)s)")
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=128, seed=_SEED)
    add("--batch-size", type=int, metavar="N", help="most sequences decoded at once (default: what fits in memory)")
    add("--limit", type=int, metavar="N", help="answer only the first N questions of the chunk (default: all)")
    add("--with-scores", action="store_true", help="add log-probability and runner-up of each answer to its metadata")
    add("--choices", type=read_choices, metavar="A,B,...",
        help="score these answers instead of generating: separated by commas, or a file with one a line")  # fmt: skip
    add("--compile", choices=SWITCH, default="auto",
        help="compile the model first (default: auto, in long runs on CUDA)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="worker processes that read images, 0: threads (default: by device)")  # fmt: skip
    add("--overwrite", action="store_true", help="discard existing answers and start from the first question")
    add_table_flags(parser, with_answers=False)
    return parser


class LostFolder(Exception):
    """The whole image folder disappeared during the run, so that every further image would be missing."""


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
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code, as in `--help`.
    """
    parser = build_parser()
    args = expand_homes(
        parser.parse_args(argv),
        "model_path",
        "model_base",
        "vision_tower",
        "image_folder",
        "question_file",
        "answers_file",
    )
    if args.num_chunks < 1 or not 0 <= args.chunk_idx < args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx} of --num-chunks {args.num_chunks}: chunks are counted from 0")
    for flag in ("batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; choose 1 or more")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers is {args.workers}; choose 0 or more")
    if message := _find_overwrite(args):
        parser.error(message)
    if message := find_unused_flags(given_table_flags(args), {"--question-file": args.question_file}):
        parser.error(message)
    sampling = parse_sampling(parser, args)
    if (args.choices or args.with_scores) and sampling.num_beams > 1:
        parser.error("--num_beams does not go with --choices and --with-scores; leave it out")
    if args.choices and sampling.temperature > 0:
        parser.error("--temperature does not go with --choices, which are scored; leave it at 0")
    refuse_absent_device(parser, args.device)
    return run_program(lambda: _run(args, sampling, read_rank()))


def _find_overwrite(args: argparse.Namespace) -> str | None:
    inputs = {
        "--question-file": list_files(args.question_file),
        "--choices": args.choices and args.choices.file,
        "--model-path": args.model_path,
        "--model-base": args.model_base,
        "--vision-tower": args.vision_tower,
    }
    name = glob.escape(Path(args.answers_file).name)
    output = output_file(args.answers_file, beside=(name + RUN_SUFFIX, name + JOURNAL_SUFFIX + "*"))
    return find_overwrite({"--answers-file": output}, inputs)


def _run(args: argparse.Namespace, sampling: Sampling, rank: DistributedRank) -> int:
    if rank.rank == 0:
        print(f"reading questions from {args.question_file}", file=sys.stderr, flush=True)
    found = read_question_file(args.question_file, table_options(args), unique_ids=args.unique_ids)
    questions = split_chunk(found.questions, args.num_chunks, args.chunk_idx)[: args.limit]
    written = extract_table_images(args.question_file, found.table, args.image_folder, "--image-folder")
    for note in (*found.notes, *written) if rank.rank == 0 else ():
        logger.warning("%s", note)
    if any(question.images for question in questions) and (reason := describe_lost_folder(args.image_folder)):
        raise ValueError(f"--image-folder {args.image_folder} {reason}; give the one that holds the images")
    args.device = rank.device(args.device)
    run = _describe_run(args, sampling, questions)
    options = {"overwrite": args.overwrite, "rank": rank.rank, "world_size": rank.world_size}
    with process_group(rank) as wait, AnswersFile(args.answers_file, questions, run, **options) as answers:
        wait()  # every rank has read the journal before any rank appends to it
        is_first = rank.rank == 0
        if answers.done and is_first:
            print(f"{answers.path}: {answers.done} of {len(questions)} answers exist already", file=sys.stderr)
        if answers.unread and is_first:
            print(f"{answers.unread} questions whose images could not be read are answered again", file=sys.stderr)
        stopped = _answer(args, sampling, questions, answers, rank, wait)
        if stopped:
            return stopped
        return _report(answers, len(questions)) if is_first else 0


def _describe_run(args: argparse.Namespace, sampling: Sampling, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the settings that determine the answers; a run with other settings can't resume this one."""
    from llava.image_files.decode import IMAGE_RULES
    from llava.inference.batch.fingerprint import ModelSources
    from llava.mm_utils import get_model_name_from_path

    return {
        "model_id": get_model_name_from_path(args.model_path),
        **ModelSources.find(args.model_path, args.model_base, args.vision_tower).fingerprints(),
        "conv_mode": args.conv_mode,
        "bits": selected_bits(args),
        "dtype": args.dtype,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "num_beams": sampling.num_beams,
        "max_new_tokens": sampling.max_new_tokens,
        "image_folder": os.path.realpath(args.image_folder),
        "image_rules": IMAGE_RULES,
        "questions": digest_questions(questions),
        **({"seed": sampling.seed} if sampling.temperature else {}),
        **({"with_scores": True} if args.with_scores else {}),
        **({"choices": args.choices} if args.choices else {}),
    }


def _answer(
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Sequence[Question],
    answers: AnswersFile,
    rank: DistributedRank,
    wait: Callable[[], None],
) -> int:
    """Write the missing answers; return the exit code if something stopped that, else 0."""
    from torch import OutOfMemoryError

    from llava.data.worker_processes import WorkerKilled

    way_on = f"run the same command {'without --overwrite' if args.overwrite else 'again'} to resume"
    session = load_session(args, compiles=args.compile) if answers.done < len(questions) else None
    try:
        for is_turn in (rank.rank > 0, rank.rank == 0):  # new settings after the last old answer
            if is_turn:
                answers.begin()
            wait()
        if session is not None:
            _write_answers(session, args, sampling, questions, answers, rank)
        wait()  # until every rank has written its answers
        if rank.rank == 0:
            answers.finish()
    except LostFolder as error:
        report_error(f"{error}; {answers.done} of {len(questions)} answers are kept: restore it, then {way_on}")
        return REFUSED
    except KeyboardInterrupt:
        held = f"{answers.journal_path} holds {answers.done} of {len(questions)} answers"
        print(f"\nstopped: {held}; {way_on}", file=sys.stderr)
        return INTERRUPTED
    except OutOfMemoryError as error:
        report_error(f"out of memory ({str(error).splitlines()[0]}); pass a smaller --batch-size; {way_on}")
        return REFUSED
    except WorkerKilled as error:
        report_error(f"{error}; {answers.journal_path} holds {answers.done} of {len(questions)} answers; {way_on}")
        return REFUSED
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        kept = f"its {answers.done} answers are intact"
        report_error(f"{answers.path} can't be written ({error.strerror}); {kept}: free disk space, then {way_on}")
        return REFUSED
    return 0


def _write_answers(
    session: Session,
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Sequence[Question],
    answers: AnswersFile,
    rank: DistributedRank,
) -> None:
    from tqdm import tqdm

    from llava.inference.batch.answer_batch import answer_batch
    from llava.mm_utils import get_model_name_from_path

    rows = answer_batch(
        session,
        questions,
        args.image_folder,
        sampling,
        batch_size=args.batch_size,
        with_scores=args.with_scores,
        choices=args.choices or (),
        compile_mode=args.compile,
        workers=args.workers,
        done=answers.done_questions,
        rank=rank.rank,
        world_size=rank.world_size,
    )
    model_id = get_model_name_from_path(args.model_path)
    bar = tqdm(total=len(questions), initial=answers.done, unit="question", file=sys.stderr, disable=rank.rank > 0)
    with bar, contextlib.closing(rows):
        for answer in rows:
            if answer.error == NOT_READ and (reason := describe_lost_folder(args.image_folder)):
                raise LostFolder(f"--image-folder {args.image_folder or '.'} {reason}")
            answers.write(answer, model_id)
            bar.update()


def _report(answers: AnswersFile, count: int) -> int:
    bad = sum(answers.errors.values())
    print_text(f"wrote {answers.path}: {count - bad} of {count} questions answered")
    if not bad:
        return 0
    counts = ", ".join(f"{code} {number}" for code, number in sorted(answers.errors.items()))
    report_error(f'{bad} questions have no answer ({counts}); their reasons are under "metadata" in {answers.path}')
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
