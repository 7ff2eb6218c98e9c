"""Answer a list of questions with one model into a journaled answers file, on any number of ranks."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llava.constants import SWITCH
from llava.files.terminal_text import print_text, report_error
from llava.image_files.errors import NOT_READ
from llava.image_files.paths import describe_lost_folder
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.questions import Question, digest_questions
from llava.inference.command_line import INTERRUPTED, REFUSED, selected_bits
from llava.inference.distributed import DistributedRank
from llava.inference.sampling import Sampling
from llava.model_names import get_model_name_from_path

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.inference.session import Session


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the batch engine, and of what happens to existing answers."""
    add = parser.add_argument
    add("--batch-size", type=int, metavar="N", help="most sequences decoded at once (default: what fits in memory)")
    add("--compile", choices=SWITCH, default="auto",
        help="compile the model first (default: auto, in long runs on CUDA)")  # fmt: skip
    add("--workers", type=int, metavar="N",
        help="worker processes that read images, 0: threads (default: by device)")  # fmt: skip
    add("--overwrite", action="store_true", help="discard existing answers and start from the first question")


def check_engine_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage error if a value of `add_engine_arguments`, or `--limit`, is out of range."""
    for flag in ("batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; choose 1 or more")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers is {args.workers}; choose 0 or more")


class LostFolder(Exception):
    """The whole image folder disappeared during the run, so that every further image would be missing."""


def answer_questions(
    args: argparse.Namespace,
    sampling: Sampling,
    questions: Sequence[Question],
    rank: DistributedRank,
    wait: Callable[[], None],
    load: Callable[[], Session],
    **files: Any,
) -> int:
    """Write the answers file: resume it, or begin; all ranks call this.

    Args:
        args: flags of `model_vqa_loader`.
        sampling: of all answers.
        questions: in order; no two are equal.
        rank: of this process.
        wait: barrier of all ranks.
        load: loads the model of `args`; called unless all answers exist.
        files: further arguments of `AnswersFile`.

    Returns:
        The exit code: 0 all answered, 1 some have errors, 2 stopped by an error, 130 interrupted.

    Raises:
        ValueError: if the answers file belongs to another run; further errors as of `load`.
    """
    run = _describe_run(args, sampling, questions)
    options = {"overwrite": args.overwrite, "rank": rank.rank, "world_size": rank.world_size, **files}
    with AnswersFile(args.answers_file, questions, run, **options) as answers:
        wait()  # every rank has read the journal before any rank appends to it
        is_first = rank.rank == 0
        if answers.done and is_first:
            print(f"{answers.path}: {answers.done} of {len(questions)} answers exist already", file=sys.stderr)
        if answers.unread and is_first:
            print(f"{answers.unread} questions whose images could not be read are answered again", file=sys.stderr)
        stopped = _answer(args, sampling, questions, answers, rank, wait, load)
        if stopped:
            return stopped
        return _report(answers, len(questions)) if is_first else 0


def _describe_run(args: argparse.Namespace, sampling: Sampling, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the settings that determine the answers; a run with other settings can't resume this one."""
    from llava.image_files.decode import IMAGE_RULES
    from llava.inference.batch.fingerprint import ModelSources

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
    load: Callable[[], Session],
) -> int:
    """Write the missing answers; return the exit code if something stopped that, else 0."""
    from torch import OutOfMemoryError

    from llava.data.worker_processes import WorkerKilled

    way_on = f"run the same command {'without --overwrite' if args.overwrite else 'again'} to resume"
    session = load() if answers.done < len(questions) else None
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
