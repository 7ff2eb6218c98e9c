"""Answer and score several benchmarks of LLaVA-1.5 with one load of the model; `--help` lists them and an example."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval.answer_questions import add_engine_arguments, check_engine_arguments
from llava.eval.benchmark_suite.files import Prepared, describe_missing, prepare
from llava.eval.benchmark_suite.outcome import pair_outcomes
from llava.eval.benchmark_suite.run import name_model, run_model
from llava.eval.benchmark_suite.summary import format_outcomes, format_pairs, to_json
from llava.eval.benchmarks.catalog import BENCHMARKS, DATA, NAMES, Benchmark, find_benchmark
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import format_message, print_text
from llava.inference.command_line import (
    add_model_arguments,
    refuse_absent_device,
    run_program,
)
from llava.inference.distributed import DistributedRank, process_group, read_rank
from llava.model_names import get_model_name_from_path

_EXAMPLE = f"""examples:
  python -m llava.eval.suite --suite pope,textvqa --model-path liuhaotian/llava-v1.5-7b
  python -m llava.eval.suite --suite all --skip-missing --model-path llava_merged_model \\
      --compare-with liuhaotian/llava-v1.5-7b --json suite.json
  python -m llava.eval.suite --suite pope --model-path llava-v1.5-13b --score-only

benchmarks:
  {", ".join(NAMES)}

Folders are the original's: {DATA}/pope/llava_pope_test.jsonl and so on; what is missing is listed with where it comes
from, before a model is loaded. Answers are written where the original's scripts write them; an interrupted run resumes
when the same command runs again, and answers that exist are only scored. With --limit N they go beside, as
MODEL.first-N. Decoding is greedy; the prompt template is the one saved with the weights, else vicuna_v1.

Several GPUs: torchrun --nproc_per_node 4 -m llava.eval.suite ...

exit code: 0 all questions answered and scored, 1 some have errors, 2 stopped by an error, or a benchmark could not be
scored, 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.suite",
        "Answer and score several benchmarks of LLaVA-1.5 with one load of the model.",
        _EXAMPLE,
    )
    add = parser.add_argument
    add("--suite", required=True, type=parse_suite, metavar="A,B,...", help="names of benchmarks, or all")
    add_model_arguments(parser)
    add("--compare-with", metavar="DIR", help="base model: it is answered too, and each question is compared")
    add("--data", default=str(DATA), metavar="DIR", help="folder of the benchmarks (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each benchmark (default: all)")
    add("--skip-missing", action="store_true",
        help="leave out benchmarks that lack files, or answers to score (default: list them and end)")  # fmt: skip
    add("--check", action="store_true", help="only look whether all files are there, and end")
    add("--score-only", action="store_true", help="score the answers that are there, whoever wrote them; load no model")
    add("--json", metavar="OUT", help="also write all figures to this file (default: no file)")
    add_engine_arguments(parser)
    return parser


def parse_suite(value: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks of `--suite`, in the order given.

    Raises:
        argparse.ArgumentTypeError: if a name is unknown or repeated.
    """
    if value == "all":
        return BENCHMARKS
    try:
        found = tuple(find_benchmark(name.strip()) for name in value.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None
    if len({benchmark.name for benchmark in found}) < len(found):
        raise argparse.ArgumentTypeError(f"{value!r} names a benchmark twice; give each once")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code, as in `--help`."""
    parser = build_parser()
    args = expand_homes(
        parser.parse_args(argv), "model_path", "model_base", "vision_tower", "compare_with", "data", "json"
    )
    check_engine_arguments(parser, args)
    if args.score_only and args.overwrite:
        parser.error("--overwrite discards the answers that --score-only scores; leave one out")
    names = [get_model_name_from_path(path) for path in (args.model_path, args.compare_with) if path]
    if len(set(names)) < len(names):
        parser.error(
            f"--model-path and --compare-with are both named {names[0]}, as their answers would be; rename one"
        )
    read = [
        Path(args.data, part.folder, name) for part in args.suite for name in (part.question_file, *part.annotations)
    ]
    inputs = {"--model-path": args.model_path, "--compare-with": args.compare_with, "--data": read}
    if args.json is not None and (message := find_overwrite({"--json": output_file(args.json)}, inputs)):
        parser.error(message)
    refuse_absent_device(parser, args.device)
    return run_program(lambda: _run(args, read_rank()))


def _run(args: argparse.Namespace, rank: DistributedRank) -> int:
    data = Path(args.data)
    models = _models(args)
    parts = _select(args, [prepare(part, data, args.limit, needs_images=not args.score_only) for part in args.suite])
    if args.score_only:
        parts = _select_answered(args, parts, data, models)
    else:
        _refuse_missing_models(models)
    if args.check:
        print(f"all files of {', '.join(part.benchmark.name for part in parts)} are there")
        return 0
    worst, by_model = 0, []
    with process_group(rank) as wait:
        for model in models:
            model.device = rank.device(args.device)
            code, outcomes = run_model(model, parts, rank, wait)
            if outcomes is None:
                return code
            worst = max(worst, code)
            by_model.append(outcomes)
    if rank.rank:
        return 0
    for model, outcomes in zip(models, by_model, strict=True):
        print_text("\n" + format_outcomes(name_model(model), outcomes))
    pairs = pair_outcomes(*by_model) if args.compare_with else []
    if args.compare_with:
        print_text("\n" + (format_pairs(pairs) if pairs else "nothing is compared: no benchmark has scores of both"))
    if args.json is not None:
        content = to_json([outcome for outcomes in by_model for outcome in outcomes], pairs)
        with atomic_write(args.json) as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return worst


def _models(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the flags for each model, the base first."""
    model = argparse.Namespace(**vars(args), with_scores=False, choices=None)
    base = argparse.Namespace(**{**vars(model), "model_path": args.compare_with, "model_base": None})
    return [base, model] if args.compare_with else [model]


def _select(args: argparse.Namespace, parts: Sequence[Prepared]) -> list[Prepared]:
    """Return the benchmarks that can run; list the others.

    Raises:
        ValueError: if something is missing and `--skip-missing` is not given, or all benchmarks lack something.
    """
    message, complete = describe_missing(parts), [part for part in parts if not part.missing]
    if not message:
        return complete
    if not args.skip_missing or not complete:
        way_out = f"; or pass --skip-missing for the other {len(complete)}" if complete else ""
        raise ValueError(f"{message}\nPut these files there (docs/benchmarks.md){way_out}.")
    if read_rank().rank == 0:
        print(format_message(f"{message}\nleft out"), file=sys.stderr)
    return complete


def _refuse_missing_models(models: Sequence[argparse.Namespace]) -> None:
    """Look for the checkpoints of every model before the first one answers; errors as of `ModelSources.find`."""
    from llava.inference.batch.fingerprint import ModelSources  # imports torch

    for model in models:
        ModelSources.find(model.model_path, model.model_base, model.vision_tower)


def _select_answered(
    args: argparse.Namespace, parts: Sequence[Prepared], data: Path, models: Sequence[argparse.Namespace]
) -> list[Prepared]:
    """Return the benchmarks that every model has answered; list the answers that are missing.

    Raises:
        ValueError: if answers are missing and `--skip-missing` is not given, or no benchmark has them all.
    """
    missing = [_find_missing_answers(part, data, models) for part in parts]
    listed = [f"  {path}" for paths in missing for path in paths]
    complete = [part for part, paths in zip(parts, missing, strict=True) if not paths]
    if not listed:
        return complete
    message = "\n".join(["--score-only scores answers that exist; these do not:", *listed])
    if not args.skip_missing or not complete:
        way_out = f", or pass --skip-missing for the other {len(complete)}" if complete else ""
        raise ValueError(f"{message}\nanswer first, without the flag{way_out}")
    if read_rank().rank == 0:
        print(format_message(f"{message}\nleft out"), file=sys.stderr)
    return complete


def _find_missing_answers(part: Prepared, data: Path, models: Sequence[argparse.Namespace]) -> list[Path]:
    paths = [part.benchmark.answers_path(data, name_model(model)) for model in models]
    return [path for path in paths if not path.is_file()]


if __name__ == "__main__":
    raise SystemExit(main())
