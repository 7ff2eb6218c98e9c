"""Answer ScienceQA's question file with the batch engine; `--help` lists the flags and an example."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from llava.eval.answer_program import (
    add_answer_arguments,
    answer_program,
    parse_answer_arguments,
    run_benchmark_program,
)
from llava.eval.benchmarks.scienceqa.questions import read_science_questions
from llava.files.program_parser import program_parser
from llava.inference.batch.questions import split_chunk
from llava.inference.distributed import DistributedRank
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)

_EXAMPLE = """example:
  python -m llava.eval.model_vqa_science --model-path liuhaotian/llava-v1.5-7b --single-pred-prompt \\
      --question-file playground/data/eval/scienceqa/llava_test_CQM-A.json \\
      --image-folder playground/data/eval/scienceqa/images/test \\
      --answers-file playground/data/eval/scienceqa/answers/llava-v1.5-7b.jsonl

An interrupted run resumes when the same command runs again. Several GPUs: torchrun --nproc_per_node 4 -m
llava.eval.model_vqa_science ...

exit code: 0 all questions answered, 1 some have errors, 2 stopped by an error, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.model_vqa_science", "Answer ScienceQA's question file.", _EXAMPLE)
    add_answer_arguments(
        parser,
        questions="questions: a JSON list of records {id, image, conversations}",
        images="directory of the images (default: the current one)",
        max_new_tokens=1024,
    )
    parser.add_argument("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, as in `--help`."""
    parser = build_parser()
    args = parse_answer_arguments(parser, argv)
    return run_benchmark_program(parser, args, _run)


def _run(args: argparse.Namespace, sampling: Sampling, rank: DistributedRank) -> int:
    questions = read_science_questions(args.question_file, single_pred_prompt=args.single_pred_prompt)
    return answer_program(args, sampling, split_chunk(questions, args.num_chunks, args.chunk_idx)[: args.limit], rank)


if __name__ == "__main__":
    raise SystemExit(main())
