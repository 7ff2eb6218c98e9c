"""Answer MMBench's table with the batch engine; `--help` lists the flags and an example."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answer_program import (
    add_answer_arguments,
    answer_program,
    parse_answer_arguments,
    run_benchmark_program,
)
from llava.eval.benchmarks.mmbench.table import (
    INSTRUCTIONS,
    build_mmbench_requests,
    default_image_folder,
    extract_mmbench_images,
    read_mmbench_table,
)
from llava.files.program_parser import program_parser
from llava.inference.batch.questions import split_chunk
from llava.inference.distributed import DistributedRank
from llava.inference.sampling import Sampling
from llava.original_names import lazy_names

__getattr__ = lazy_names(__name__)

_EXAMPLE = """example:
  python -m llava.eval.model_vqa_mmbench --model-path liuhaotian/llava-v1.5-7b --single-pred-prompt \\
      --question-file playground/data/eval/mmbench/mmbench_dev_20230712.tsv \\
      --answers-file playground/data/eval/mmbench/answers/mmbench_dev_20230712/llava-v1.5-7b.jsonl

The images that the table holds are written into --image-folder once. An interrupted run resumes when the same command
runs again. Several GPUs: torchrun --nproc_per_node 4 -m llava.eval.model_vqa_mmbench ...

exit code: 0 all questions answered, 1 some have errors, 2 stopped by an error, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser("python -m llava.eval.model_vqa_mmbench", "Answer MMBench's table.", _EXAMPLE)
    add_answer_arguments(
        parser,
        questions="MMBench's table (.tsv), with images in base64",
        images="directory into which the table's images are written (default: TABLE_images beside the table)",
        max_new_tokens=1024,
    )
    add = parser.add_argument
    add("--single-pred-prompt", action="store_true", help="ask for the option's letter alone")
    add("--all-rounds", action="store_true", help="ask each question once for every rotation of its options")
    add("--lang", choices=sorted(INSTRUCTIONS), default="en",
        help="language in which the letter is asked for (default: %(default)s)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, as in `--help`."""
    parser = build_parser()
    args = parse_answer_arguments(parser, argv)
    args.image_folder = args.image_folder or str(default_image_folder(args.question_file))
    return run_benchmark_program(parser, args, _run)


def _run(args: argparse.Namespace, sampling: Sampling, rank: DistributedRank) -> int:
    rows = read_mmbench_table(args.question_file)
    images, notes = extract_mmbench_images(args.question_file, rows, Path(args.image_folder))
    for note in notes if rank.rank == 0 else ():
        print(note, file=sys.stderr)
    requests = build_mmbench_requests(
        split_chunk(rows, args.num_chunks, args.chunk_idx),
        images,
        single_pred_prompt=args.single_pred_prompt,
        all_rounds=args.all_rounds,
        lang=args.lang,
    )[: args.limit]
    questions = [request.question for request in requests]
    keys = {request.question: request.keys for request in requests}
    return answer_program(args, sampling, questions, rank, record_keys=keys)


if __name__ == "__main__":
    raise SystemExit(main())
