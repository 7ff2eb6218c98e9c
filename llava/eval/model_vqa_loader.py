"""Answer a file of questions about images; `--help` shows the options and an example."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.inference.answers import AnswersFile
from llava.inference.batch import answer_questions, default_batch_size
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
from llava.inference.identity import directory_identity
from llava.inference.questions import Question, digest_questions, read_questions, split_chunk
from llava.inference.session import Sampling
from llava.mm_utils import get_model_name_from_path
from llava.model.devices import best_device
from llava.model.quantization import saved_bits

_SEED = 0
_EXAMPLE = """example:
  python -m llava.eval.model_vqa_loader --model-path llava_merged_model --image-folder playground/data_infer/images \\
      --question-file playground/data_infer/questions.jsonl --answers-file answers.jsonl

Each line of the question file is {"question_id": ..., "image": name, list of names or null, "text": question}; further
keys are allowed. The answers come in the same order. An interrupted run goes on where it stopped when the same command
is run again. A row that can't be answered gets an empty text and its reason under "error" and "metadata". With a
temperature above 0, chance is the same in every run.

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
    add("--answers-file", required=True, metavar="FILE", help="answers, JSON lines; grows while the program runs")
    add("--num-chunks", type=int, default=1, help="split the questions for several processes (default: %(default)s)")
    add("--chunk-idx", type=int, default=0, help="which part this process answers, from 0 (default: %(default)s)")
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=128)
    add("--batch-size", type=int, metavar="N", help="questions at a time (default: what fits the device)")
    add("--limit", type=int, metavar="N", help="answer the first N questions only, of the chunk (default: all)")
    add("--overwrite", action="store_true", help="start anew although there are answers already")
    return parser


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
    sampling = parse_sampling(parser, args, seed=_SEED)
    return run_program(lambda: _run(args, sampling))


def _run(args: argparse.Namespace, sampling: Sampling) -> int:
    questions = split_chunk(read_questions(args.question_file), args.num_chunks, args.chunk_idx)[: args.limit]
    if any(question.images for question in questions) and not Path(args.image_folder).is_dir():
        raise ValueError(f"--image-folder {args.image_folder} is no directory; give the one that holds the images")
    run = _describe_run(args, sampling, questions)
    with AnswersFile(args.answers_file, questions, run, overwrite=args.overwrite) as answers:
        if answers.done:
            print(f"{answers.path}: {answers.done} of {len(questions)} answers are there already", file=sys.stderr)
        if answers.done < len(questions):
            stopped = _answer(args, sampling, questions, answers)
            if stopped:
                return stopped
        else:
            answers.begin()  # nothing to ask, but what does not belong into the file still has to go
        return _report(answers, len(questions))


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
    }


def _answer(args: argparse.Namespace, sampling: Sampling, questions: Sequence[Question], answers: AnswersFile) -> int:
    """Write the missing answers; return the exit code if something stopped that, else 0."""
    way_on = f"run the same command {'without --overwrite' if args.overwrite else 'again'} to go on from there"
    session = load_session(args)
    try:
        answers.begin()
        device = torch.device(args.device or best_device())
        bits = saved_bits(session.model.config, args.model_path) or selected_bits(args)
        batch_size = args.batch_size or default_batch_size(device, bits)
        model_id = get_model_name_from_path(args.model_path)
        rows = answer_questions(
            session, questions, args.image_folder, sampling, batch_size=batch_size, start=answers.done
        )
        bar = tqdm(total=len(questions), initial=answers.done, unit="question", file=sys.stderr)
        with bar, contextlib.closing(rows):
            for answer in rows:
                answers.write(answer, model_id)
                bar.update()
    except KeyboardInterrupt:
        print(f"\nstopped: {answers.path} holds {answers.done} of {len(questions)} answers; {way_on}", file=sys.stderr)
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
