"""Command line of the programs that answer a question file: files, chunks, sampling, engine; checks, and the run."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.answer_questions import add_engine_arguments, answer_questions, check_engine_arguments
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.image_files.paths import describe_lost_folder
from llava.inference.batch.answers_file import JOURNAL_SUFFIX, RUN_SUFFIX
from llava.inference.batch.questions import Question
from llava.inference.command_line import (
    add_model_arguments,
    add_sampling_arguments,
    load_session,
    parse_sampling,
    refuse_absent_device,
    run_program,
)
from llava.inference.distributed import DistributedRank, process_group, read_rank
from llava.inference.sampling import Sampling

_SEED = 0
_PATHS = ("model_path", "model_base", "vision_tower", "image_folder", "question_file", "answers_file")


def add_answer_arguments(parser: argparse.ArgumentParser, *, questions: str, images: str, max_new_tokens: int) -> None:
    """Add the flags that all these programs have.

    Args:
        parser: of the program.
        questions: help of `--question-file`.
        images: help of `--image-folder`.
        max_new_tokens: default, in tokens.
    """
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image-folder", default="", metavar="DIR", help=images)
    add("--question-file", required=True, metavar="FILE", help=questions)
    add("--answers-file", required=True, metavar="FILE", help="answers, JSON lines; written when all are complete")
    add("--num-chunks", type=int, default=1, help="chunks the questions are split into (default: %(default)s)")
    add("--chunk-idx", type=int, default=0, help="chunk to answer, counted from 0 (default: %(default)s)")
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=max_new_tokens, seed=_SEED)
    add("--limit", type=int, metavar="N", help="answer only the first N questions of the chunk (default: all)")
    add_engine_arguments(parser)
    parser.set_defaults(with_scores=False, choices=None)  # flags of batch inference, which `answer_questions` reads


def parse_answer_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed flags, `~` expanded; exit with a usage error if chunks or sizes are out of range."""
    args = expand_homes(parser.parse_args(argv), *_PATHS)
    if args.num_chunks < 1 or not 0 <= args.chunk_idx < args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx} of --num-chunks {args.num_chunks}: chunks are counted from 0")
    check_engine_arguments(parser, args)
    return args


def refuse_overwrite(
    parser: argparse.ArgumentParser, args: argparse.Namespace, inputs: Mapping[str, str | Iterable[str] | None]
) -> None:
    """Exit with a usage error if the answers file, or what lies beside it, would write over an input.

    Args:
        parser: prints the usage error.
        args: parsed flags.
        inputs: by flag, what is read besides the model.
    """
    model = {"--model-path": args.model_path, "--model-base": args.model_base, "--vision-tower": args.vision_tower}
    name = glob.escape(Path(args.answers_file).name)
    output = output_file(args.answers_file, beside=(name + RUN_SUFFIX, name + JOURNAL_SUFFIX + "*"))
    if message := find_overwrite({"--answers-file": output}, {**inputs, **model}):
        parser.error(message)


def run_benchmark_program(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Sampling, DistributedRank], int],
) -> int:
    """Check the flags of a program that reads a question file and the model alone, and run it.

    Args:
        parser: prints usage errors.
        args: parsed flags.
        run: answers the questions; returns the exit code.

    Returns:
        The exit code; 2 after an expected error, which is printed.
    """
    refuse_overwrite(parser, args, {"--question-file": args.question_file})
    sampling = parse_sampling(parser, args)
    refuse_absent_device(parser, args.device)
    return run_on_rank(args, sampling, run)


def run_on_rank(
    args: argparse.Namespace,
    sampling: Sampling,
    run: Callable[[argparse.Namespace, Sampling, DistributedRank], int],
) -> int:
    """Announce on rank 0 that questions are read, and run a program; arguments as of `run_benchmark_program`."""

    def start() -> int:
        rank = read_rank()
        if rank.rank == 0:
            print(f"reading questions from {args.question_file}", file=sys.stderr, flush=True)
        return run(args, sampling, rank)

    return run_program(start)


def answer_program(
    args: argparse.Namespace, sampling: Sampling, questions: Sequence[Question], rank: DistributedRank, **files: Any
) -> int:
    """Answer the questions with the model that the flags name; return the exit code of `answer_questions`.

    Args:
        args: parsed flags.
        sampling: of all answers.
        questions: in order; no two are equal.
        rank: of this process.
        files: further arguments of `AnswersFile`.

    Raises:
        ValueError: if the image folder is lost, or the answers file belongs to another run.
    """
    if any(question.images for question in questions) and (reason := describe_lost_folder(args.image_folder)):
        raise ValueError(f"--image-folder {args.image_folder} {reason}; give the one that holds the images")
    args.device = rank.device(args.device)
    with process_group(rank) as wait:
        return answer_questions(
            args, sampling, questions, rank, wait, lambda: load_session(args, compiles=args.compile), **files
        )
