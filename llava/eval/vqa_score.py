"""VQAv2 accuracy of answer files: overall, by kind of question and by answer type, with 95 % intervals.

Several files are compared with the first: which questions got better and worse, and whether the difference is
significant. The output lists the most frequent mistakes and, where the answers carry log-probabilities, the
calibration. --json adds the confusion of the most frequent answers.

95 % intervals: Wilson's for accuracies, at the effective number of questions (questions about one image count as a
group); Bonett and Price's for differences. p is McNemar's exact test on questions that got better or worse. With
many kinds, one in twenty differs by chance alone.

The answer type is the annotations' `answer_type`; without it, it follows from the true answer after normalisation (of
ten, the most frequent): yes and no are "yes/no", digits and number words "number", all others "other".

Example:
    python -m llava.eval.vqa_score --annotations playground/data_infer/Test_Qs.csv \\
        --answers-file base_answers.jsonl finetuned_answers.jsonl --json scores.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from llava.data.data_files import find_unused_flags, list_files
from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions, add_table_flags, given_table_flags, table_options
from llava.eval.scoring.annotations import pair_answers, read_answers, read_references
from llava.eval.scoring.evaluate import Evaluation, compare_ids, evaluate
from llava.eval.scoring.text import format_evaluation
from llava.files.atomic_files import atomic_write
from llava.files.home_directory import expand_homes
from llava.files.overwrite_check import find_overwrite, output_file
from llava.files.program_parser import program_parser
from llava.files.terminal_text import log_to_terminal, print_text, report_error

_INTERVALS = (
    "95 %: Wilson's interval of accuracies (at the effective number of questions, images being groups), "
    "Bonett and Price's of paired differences, McNemar's exact test"
)
_ANNOTATIONS_HELP = (
    "true answers: a table (.csv, .xlsx, .parquet), lines {question_id, answer} or {question_id, answers} (.jsonl), "
    "or VQAv2's annotations (.json)"
)
_KIND_HELP = (
    "column or key with the kind of a question (default: kind, else question_type, else the question's first two words)"
)
_MISSING_HELP = (
    "score only the questions that every file answers, and list the others "
    "(default: a question without answer, or an answer without question, is an error)"
)
_UNIQUE_HELP = (
    "refuse a file in which a question_id repeats (default: questions with one id are told apart by their texts)"
)
_UNANIMOUS_HELP = (
    "where all ten true answers agree: compare normalized, as for all others, or verbatim (case and full stops count), "
    "as VQAv2's own program does (default: normalize)"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = program_parser(
        "python -m llava.eval.vqa_score",
        __doc__,
    )
    add = parser.add_argument
    add(
        "--answers-file",
        action="extend",
        nargs="+",
        required=True,
        metavar="JSONL",
        help="answer files to score, one column for each",
    )
    add_annotation_arguments(parser, required=True)
    add("--allow-missing", action="store_true", help=_MISSING_HELP)
    add("--json", metavar="OUT", help="also write the numbers to this file, accuracies from 0 to 1 (default: no file)")
    return parser


def add_annotation_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags for the true answers: file, columns, kinds, ids, comparison."""
    add = parser.add_argument
    add("--annotations", required=required, metavar="FILE", help=_ANNOTATIONS_HELP)
    add("--kind-key", metavar="NAME", help=_KIND_HELP)
    add("--unique-ids", action="store_true", help=_UNIQUE_HELP)
    add("--unanimous", choices=("normalize", "verbatim"), default="normalize", help=_UNANIMOUS_HELP)
    add_table_flags(parser)


def parse_table_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, files: Mapping[str, str | None]
) -> TableOptions:
    """Return the options given by the flags of tables; exit if a flag has no effect.

    Args:
        parser: prints the usage error.
        args: parsed flags.
        files: flag -> file that may be a table, None where the flag was not given.
    """
    given = given_table_flags(args)
    of_answers = [flag for flag in given if flag == "--answer_column"]
    message = find_unused_flags(of_answers, {"--annotations": args.annotations}) or find_unused_flags(given, files)
    if message:
        parser.error(message)
    return table_options(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 scored, 1 an input or the output cannot be used (argparse itself exits with 2).
    """
    log_to_terminal()
    parser = build_parser()
    args = expand_homes(parser.parse_args(argv), "answers_file", "annotations", "json")
    options = parse_table_options(parser, args, {"--annotations": args.annotations})
    inputs = {"--answers-file": args.answers_file, "--annotations": list_files(args.annotations)}
    if args.json is not None and (message := find_overwrite({"--json": output_file(args.json)}, inputs)):
        parser.error(message)
    try:
        unique = args.unique_ids
        references = read_references(args.annotations, options, args.kind_key, unique_ids=unique)
        texts = {key: references.questions.get(key, "") for key in references.answers}
        paths = name_files(args.answers_file)
        given = {name: read_answers(path, unique_ids=unique) for name, path in paths.items()}
        answers = {name: pair_answers(paths[name], lines, texts) for name, lines in given.items()}
        notes = compare_ids(answers, references)
        if notes and not args.allow_missing:
            raise TableError("\n".join([*notes, "Complete the answers, or score the rest with --allow-missing."]))
        evaluation = evaluate(answers, references, args.unanimous)
        if args.json is not None:
            _write_json(args.json, evaluation, notes, args)
    except (TableError, OSError) as error:
        report_error(error)
        return 1
    for note in notes:
        print_text(f"left out: {note}")
    print_text(format_evaluation(evaluation))
    return 0


def name_files(paths: Sequence[str]) -> dict[str, str]:
    """Return name -> path of answer files: file names without suffix, or whole paths where these repeat.

    Raises:
        TableError: if a file is named twice.
    """
    names = [Path(path).with_suffix("").name for path in paths]
    if len(set(paths)) < len(paths):
        raise TableError(f"--answers-file names a file twice: {' '.join(paths)}; name each once")
    return dict(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))


def _write_json(path: str, evaluation: Evaluation, notes: Sequence[str], args: argparse.Namespace) -> None:
    files = [
        {
            "name": name,
            "path": source,
            **asdict(file.table),
            "confusion": asdict(file.confusion),
            "calibration": file.calibration and asdict(file.calibration),
        }
        for (name, file), source in zip(evaluation.files.items(), args.answers_file, strict=True)
    ]
    base = files[0]["name"]
    comparisons = [
        {"name": name, "base": base, **asdict(comparison)} for name, comparison in evaluation.comparisons.items()
    ]
    content = {
        "annotations": args.annotations,
        "unanimous": args.unanimous,
        "left_out": list(notes),
        "intervals": _INTERVALS,
        "files": files,
        "comparisons": comparisons,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path, "wb") as stream:
        stream.write(text.encode(errors="backslashreplace"))  # half of a surrogate pair becomes JSON's escape


if __name__ == "__main__":
    raise SystemExit(main())
