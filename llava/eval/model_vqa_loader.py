"""Answer a file of questions about images; `--help` shows the options and an example."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.inference.answers import AnswersFile
from llava.inference.command_line import (
    INTERRUPTED,
    REFUSED,
    add_model_arguments,
    add_sampling_arguments,
    load_session,
    parse_sampling,
    report_error,
    run_program,
    selected_bits,
)
from llava.inference.grouped import COMPILE_MODES, answer_batch
from llava.inference.identity import directory_identity
from llava.inference.questions import Question, digest_questions, read_questions, split_chunk
from llava.inference.ranks import Ranks, joined, read_ranks
from llava.inference.session import Sampling, Session
from llava.mm_utils import get_model_name_from_path

_SEED = 0
_EXAMPLE = """example:
  python -m llava.eval.model_vqa_loader --model-path llava_merged_model --image-folder playground/data_infer/images \\
      --question-file playground/data_infer/questions.jsonl --answers-file answers.jsonl

Each line of the question file is {"question_id": ..., "image": name, list of names or null, "text": question}; further
keys are allowed. The answers come in the same order. They are kept in FILE.journal until they are complete: an
interrupted run goes on where it stopped when the same command is run again. A row that can't be answered gets an empty
text and its reason under "error" and "metadata". With a temperature above 0, chance is the same in every run.

Several GPUs share the work: torchrun --nproc_per_node 4 -m llava.eval.model_vqa_loader ... (or accelerate launch). All
processes have to see the answers' directory.

exit code: 0 all questions answered, 1 some rows have errors, 2 nothing done or stopped by an error, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Answer a file of questions about images.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image-folder", default="", metavar="DIR", help="where the images are (default: here)")
    add("--question-file", required=True, metavar="FILE", help="questions, JSON lines")
    add("--answers-file", required=True, metavar="FILE", help="answers, JSON lines; there when they are complete")
    add("--num-chunks", type=int, default=1, help="split the questions for several processes (default: %(default)s)")
    add("--chunk-idx", type=int, default=0, help="which part this process answers, from 0 (default: %(default)s)")
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=128)
    add("--batch-size", type=int, metavar="N", help="most questions at a time (default: what fits the device)")
    add("--limit", type=int, metavar="N", help="answer the first N questions only, of the chunk (default: all)")
    add("--with-scores", action="store_true", help="note log-probability and runner-up of each answer in its metadata")
    add("--choices", type=read_choices, metavar="A,B,...",
        help="score these answers instead of generating: separated by commas, or a file with one per line")  # fmt: skip
    add("--compile", choices=COMPILE_MODES, default="auto",
        help="compile the model first (default: in long runs on CUDA)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="processes that read images, 0 = threads (default: what suits the device)")  # fmt: skip
    add("--overwrite", action="store_true", help="start anew although there are answers already")
    return parser


def read_choices(value: str) -> list[str]:
    """Return the answers that `--choices` names.

    Raises:
        argparse.ArgumentTypeError: if some are empty or repeated.
    """
    is_file = os.path.isfile(value)  # noqa: PTH113 - Path.is_file raises for what is too long to be a name
    choices = Path(value).read_text(encoding="utf-8-sig").splitlines() if is_file else value.split(",")
    choices = [choice.strip() for choice in choices]
    if not all(choices) or len(set(choices)) < len(choices):
        raise argparse.ArgumentTypeError(f"{value!r} has empty or repeated answers; give each once")
    return choices


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code, as in `--help`.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_chunks < 1 or not 0 <= args.chunk_idx < args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx} of --num-chunks {args.num_chunks}: chunks are counted from 0")
    for flag in ("batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; choose 1 or more")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers is {args.workers}; choose 0 or more")
    sampling = parse_sampling(parser, args, seed=_SEED)
    if (args.choices or args.with_scores) and sampling.num_beams > 1:
        parser.error("--num_beams does not go with --choices and --with-scores; leave it out")
    if args.choices and sampling.temperature > 0:
        parser.error("--temperature does not go with --choices, which are scored; leave it at 0")
    return run_program(lambda: _run(args, sampling, read_ranks()))


def _run(args: argparse.Namespace, sampling: Sampling, ranks: Ranks) -> int:
    questions = split_chunk(read_questions(args.question_file), args.num_chunks, args.chunk_idx)[: args.limit]
    if any(question.images for question in questions) and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder {args.image_folder} is no directory; give the one that holds the images")
    args.device = ranks.device(args.device)
    run = _describe_run(args, sampling, questions)
    options = {"overwrite": args.overwrite, "rank": ranks.rank, "n_ranks": ranks.n_ranks}
    with joined(ranks) as wait, AnswersFile(args.answers_file, questions, run, **options) as answers:
        wait()  # all know what is done before anybody adds to it
        is_first = ranks.rank == 0
        if answers.done and is_first:
            print(f"{answers.path}: {answers.done} of {len(questions)} answers are there already", file=sys.stderr)
        stopped = _answer(args, sampling, questions, answers, ranks, wait)
        if stopped:
            return stopped
        return _report(answers, len(questions)) if is_first else 0


def _describe_run(args: argparse.Namespace, sampling: Sampling, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what decides the answers; a run with other values is another run."""
    return {
        "model_id": get_model_name_from_path(args.model_path),
        "model": directory_identity(args.model_path),
        "model_base": args.model_base and directory_identity(args.model_base),
        "vision_tower": args.vision_tower and directory_identity(args.vision_tower),
        "conv_mode": args.conv_mode,
        "bits": selected_bits(args),
        "dtype": args.dtype,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "num_beams": sampling.num_beams,
        "max_new_tokens": sampling.max_new_tokens,
        "image_folder": str(Path(args.image_folder).resolve()),
        "questions": digest_questions(questions),
        **({"with_scores": True} if args.with_scores else {}),
        **({"choices": args.choices} if args.choices else {}),
    }


def _answer(
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Sequence[Question],
    answers: AnswersFile,
    ranks: Ranks,
    wait: Callable[[], None],
) -> int:
    """Write the missing answers; return the exit code if something stopped that, else 0."""
    way_on = f"run the same command {'without --overwrite' if args.overwrite else 'again'} to go on from there"
    session = load_session(args) if answers.done < len(questions) else None
    try:
        for is_turn in (ranks.rank > 0, ranks.rank == 0):  # new settings come behind the last old answer
            if is_turn:
                answers.begin()
            wait()
        if session is not None:
            _ask(session, args, sampling, questions, answers, ranks)
        wait()  # until all answers are there
        if ranks.rank == 0:
            answers.finish()
    except KeyboardInterrupt:
        held = f"{answers.journal_path} holds {answers.done} of {len(questions)} answers"
        print(f"\nstopped: {held}; {way_on}", file=sys.stderr)
        return INTERRUPTED
    except torch.OutOfMemoryError as error:
        report_error(f"out of memory ({str(error).splitlines()[0]}); pass a smaller --batch-size; {way_on}")
        return REFUSED
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        kept = f"its {answers.done} answers are intact"
        report_error(f"{answers.path} can't be written ({error.strerror}); {kept}: make room, then {way_on}")
        return REFUSED
    return 0


def _ask(
    session: Session,
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Sequence[Question],
    answers: AnswersFile,
    ranks: Ranks,
) -> None:
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
        done=frozenset(answers.done_ids),
        part=ranks.rank,
        parts=ranks.n_ranks,
    )
    model_id = get_model_name_from_path(args.model_path)
    bar = tqdm(total=len(questions), initial=answers.done, unit="question", file=sys.stderr, disable=ranks.rank > 0)
    with bar, contextlib.closing(rows):
        for answer in rows:
            answers.write(answer, model_id)
            bar.update()


def _report(answers: AnswersFile, count: int) -> int:
    bad = sum(answers.errors.values())
    print(f"wrote {answers.path}: {count - bad} of {count} questions answered")
    if not bad:
        return 0
    counts = ", ".join(f"{code} {number}" for code, number in sorted(answers.errors.items()))
    report_error(f'{bad} rows have no answer ({counts}); each says why under "metadata" in {answers.path}')
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
