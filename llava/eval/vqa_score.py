"""Accuracy of answer files after VQAv2's answer normalisation: overall, by kind of question and by answer type.

Several files stand side by side; each is compared with the first: what got better and worse, and whether the difference
is more than chance. It lists the most frequent mistakes, and where inference noted log-probabilities, how confidence
and accuracy agree. --json also has which of the most frequent answers are taken for which.

95 % intervals: Wilson's for accuracies, at the number of independent questions that is left when those about one image
count as a group; Bonett and Price's for differences. p is that of McNemar's exact test on questions that got better or
worse. With many kinds, one in twenty differs by chance alone.

The answer type is the annotations' `answer_type`. Without it the true answer decides, normalised, of ten the most
frequent: yes and no are "yes/no", digits (number words are digits) "number", the rest "other".

Example:
    python -m llava.eval.vqa_score --annotations playground/data_infer/Test_Qs.csv \\
        --answers-file base_answers.jsonl finetuned_answers.jsonl --json scores.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from llava.data.table import Columns, TableError
from llava.eval.evaluation import Evaluation, compare_ids, evaluate
from llava.eval.score_text import format_evaluation
from llava.eval.vqa_inputs import read_answers, read_references
from llava.files import atomic_write

_INTERVALS = (
    "95 %: Wilson's interval of accuracies (at the effective number of questions, images being groups), "
    "Bonett and Price's of paired differences, McNemar's exact test"
)
_ANNOTATIONS_HELP = (
    "true answers: a table (.csv), lines {question_id, answer} or {question_id, answers} (.jsonl), "
    "or VQAv2's annotations (.json)"
)
_KIND_HELP = (
    "column or key with the kind of a question (default: kind, else question_type, else the question's first two words)"
)
_MISSING_HELP = (
    "score the questions that every file answers and report the others "
    "(default: a question without answer, or an answer without question, is an error)"
)
_UNANIMOUS_HELP = (
    "where all ten true answers agree: normalize as everywhere, or compare verbatim as VQAv2's own program does "
    "(default: normalize)"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.vqa_score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--answers-file",
        action="extend",
        nargs="+",
        required=True,
        metavar="JSONL",
        help="answers to score, one column for each file",
    )
    add_annotation_arguments(parser, required=True)
    add("--allow-missing", action="store_true", help=_MISSING_HELP)
    add("--json", metavar="OUT", help="also write the numbers to this file, accuracies from 0 to 1 (default: no file)")
    return parser


def add_annotation_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the flags that say where the true answers are and how they are compared."""
    add = parser.add_argument
    add("--annotations", required=required, metavar="FILE", help=_ANNOTATIONS_HELP)
    add("--kind-key", metavar="NAME", help=_KIND_HELP)
    for field, name in Columns()._asdict().items():
        add(f"--{field}_column", metavar="NAME", help=f"column of a .csv with the {field} (default: {name})")
    add("--unanimous", choices=("normalize", "verbatim"), default="normalize", help=_UNANIMOUS_HELP)


def parse_columns(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Columns:
    """Return the columns that the flags of `add_annotation_arguments` name; exit if they have no meaning."""
    given = {field: name for field in Columns._fields if (name := getattr(args, f"{field}_column")) is not None}
    if given and Path(args.annotations or "").suffix.lower() != ".csv":
        flags = ", ".join(f"--{field}_column" for field in given)
        parser.error(f"{flags} has no meaning for --annotations {args.annotations}, which is no .csv; leave it out")
    return Columns(**given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 scored, 1 an input or the output cannot be used (argparse itself exits with 2).
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    columns = parse_columns(parser, args)
    try:
        references = read_references(args.annotations, columns, args.kind_key)
        answers = {name: read_answers(path) for name, path in name_files(args.answers_file).items()}
        notes = compare_ids(answers, references)
        if notes and not args.allow_missing:
            raise TableError("\n".join([*notes, "Complete the answers, or score the rest with --allow-missing."]))
        evaluation = evaluate(answers, references, args.unanimous)
        if args.json is not None:
            _write_json(args.json, evaluation, notes, args)
    except (TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"left out: {note}")
    print(format_evaluation(evaluation))
    return 0


def name_files(paths: Sequence[str]) -> dict[str, str]:
    """Return name -> path of answer files: their stems, or their whole paths where stems repeat.

    Raises:
        TableError: if a file is named twice.
    """
    stems = [Path(path).stem for path in paths]
    if len(set(paths)) < len(paths):
        raise TableError(f"--answers-file names a file twice: {' '.join(paths)}; name each once")
    return dict(zip(stems if len(set(stems)) == len(stems) else paths, paths, strict=True))


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
    with atomic_write(path) as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
