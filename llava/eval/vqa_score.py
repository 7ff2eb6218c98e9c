"""Accuracy of answer files after VQAv2's answer normalisation, overall and per kind of question.

Example:
    python -m llava.eval.vqa_score --annotations playground/data_infer/Test_Qs.csv \\
        --answers-file base_answers.jsonl finetuned_answers.jsonl --json scores.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.data.table import Columns, TableError
from llava.eval.vqa_inputs import ANSWER_COUNTS, QuestionId, References, read_predictions, read_references
from llava.eval.vqa_normalize import normalize_answer, strip_answer
from llava.files import atomic_write

_IDS_SHOWN = 20
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


@dataclass(frozen=True)
class Score:
    """Mean accuracy, 0..1, over a number of questions."""

    questions: int
    accuracy: float


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one answer file: of all questions, and by kind in alphabetical order; `errors` have no answer."""

    overall: Score
    by_kind: dict[str, Score]
    errors: int


def score_answer(prediction: str | None, references: Sequence[str], *, unanimous: str = "normalize") -> float:
    """Score one answer.

    Against one true answer: 1 if both are equal after normalisation, else 0. Against VQAv2's ten: min(1, matches / 3)
    averaged over the ten ways to leave one of them out.

    Args:
        prediction: the answer; None (no answer) is wrong.
        references: one or ten true answers.
        unanimous: what happens where all ten agree. "normalize" compares as everywhere else; "verbatim" compares the
            texts apart from case, as VQAv2's own program does: there, "Yes." misses ten times "yes".

    Returns:
        The accuracy, 0..1.

    Raises:
        ValueError: if the number of references is neither 1 nor 10, or `unanimous` is unknown.
    """
    if len(references) not in ANSWER_COUNTS:
        raise ValueError(f"{len(references)} true answers; a question has one answer or ten")
    if unanimous not in ("normalize", "verbatim"):
        raise ValueError(f"unanimous={unanimous!r} is unknown; use 'normalize' or 'verbatim'")
    if prediction is None:
        return 0.0
    stripped = [strip_answer(text) for text in (prediction, *references)]
    is_verbatim = unanimous == "verbatim" and len(references) > 1 and len(set(stripped[1:])) == 1
    given, *true = (text.lower() if is_verbatim else normalize_answer(text) for text in stripped)
    matches = true.count(given)
    # Left out are in turn the ten answers: (m * min(1, (m - 1) / 3) + (10 - m) * min(1, m / 3)) / 10 = min(1, 0.3 m).
    return float(matches) if len(references) == 1 else min(3 * matches, 10) / 10


def score_answers(
    predictions: Mapping[QuestionId, str | None],
    references: Mapping[QuestionId, Sequence[str]],
    kinds: Mapping[QuestionId, str],
    *,
    unanimous: str = "normalize",
) -> ScoreTable:
    """Score a set of answers.

    Args:
        predictions: question_id -> answer, None where there is none.
        references: question_id -> one or ten true answers.
        kinds: question_id -> kind of question.
        unanimous: as in `score_answer`.

    Returns:
        The scores, overall and by kind.

    Raises:
        ValueError: if there are no questions, or the three mappings have different ids.
    """
    if not references:
        raise ValueError("no questions to score")
    for name, mapping in (("predictions", predictions), ("kinds", kinds)):
        if differing := mapping.keys() ^ references.keys():
            raise ValueError(f"{name} and references have different question_ids: {_list_ids(differing)}")
    by_kind: dict[str, list[float]] = {}
    for question_id, answers in references.items():
        accuracy = score_answer(predictions[question_id], answers, unanimous=unanimous)
        by_kind.setdefault(kinds[question_id], []).append(accuracy)
    everything = [accuracy for group in by_kind.values() for accuracy in group]
    errors = sum(prediction is None for prediction in predictions.values())
    return ScoreTable(_mean(everything), {kind: _mean(by_kind[kind]) for kind in sorted(by_kind)}, errors)


def format_table(tables: Mapping[str, ScoreTable]) -> str:
    """Lay out scores of the same questions side by side, one column for each answer file, in percent."""
    first = next(iter(tables.values()))
    lines = [["kind", "questions", *tables]]
    for kind, score in first.by_kind.items():
        lines.append([kind, str(score.questions), *(_percent(table.by_kind[kind]) for table in tables.values())])
    lines.append(["all", str(first.overall.questions), *(_percent(table.overall) for table in tables.values())])
    lines.append(["no answer (error)", "", *(str(table.errors) for table in tables.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
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
    add("--annotations", required=True, metavar="FILE", help=_ANNOTATIONS_HELP)
    add("--kind-key", metavar="NAME", help=_KIND_HELP)
    for field, name in Columns()._asdict().items():
        add(f"--{field}_column", metavar="NAME", help=f"column of a .csv with the {field} (default: {name})")
    add("--allow-missing", action="store_true", help=_MISSING_HELP)
    add("--unanimous", choices=("normalize", "verbatim"), default="normalize", help=_UNANIMOUS_HELP)
    add("--json", metavar="OUT", help="also write the numbers to this file, accuracies from 0 to 1 (default: no file)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: the command line without the program's name; None for the process's own.

    Returns:
        The exit code: 0 scored, 1 an input or the output cannot be used (argparse itself exits with 2).
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {field: name for field in Columns._fields if (name := getattr(args, f"{field}_column")) is not None}
    if given and Path(args.annotations).suffix.lower() != ".csv":
        flags = ", ".join(f"--{field}_column" for field in given)
        parser.error(f"{flags} has no meaning for --annotations {args.annotations}, which is no .csv; leave it out")
    try:
        references = read_references(args.annotations, Columns(**given), args.kind_key)
        predictions = {name: read_predictions(path) for name, path in _column_names(args.answers_file).items()}
        notes = _compare_ids(predictions, references)
        if notes and not args.allow_missing:
            raise TableError("\n".join([*notes, "Complete the answers, or score the rest with --allow-missing."]))
        tables = _score_common(predictions, references, args.unanimous)
        if args.json is not None:
            _write_json(args.json, tables, notes, args)
    except (TableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"left out: {note}")
    print(format_table(tables))
    return 0


def _column_names(paths: Sequence[str]) -> dict[str, str]:
    """Column name -> path: the files' stems, or their whole paths where stems repeat."""
    stems = [Path(path).stem for path in paths]
    if len(set(paths)) < len(paths):
        raise TableError(f"--answers-file names a file twice: {' '.join(paths)}; name each once")
    return dict(zip(stems if len(set(stems)) == len(stems) else paths, paths, strict=True))


def _compare_ids(predictions: Mapping[str, Mapping[QuestionId, str | None]], references: References) -> list[str]:
    """One sentence for each way in which an answer file and the annotations differ."""
    notes, total = [], len(references.answers)
    for name, answers in predictions.items():
        if missing := references.answers.keys() - answers.keys():
            notes.append(f"{name}: questions without an answer: {len(missing)} of {total} ({_list_ids(missing)})")
        if unknown := answers.keys() - references.answers.keys():
            notes.append(
                f"{name}: answers without a question in the annotations: {len(unknown)} ({_list_ids(unknown)})"
            )
    return notes


def _score_common(
    predictions: Mapping[str, Mapping[QuestionId, str | None]], references: References, unanimous: str
) -> dict[str, ScoreTable]:
    """Score every file on the questions that all of them answer."""
    ids = [key for key in references.answers if all(key in answers for answers in predictions.values())]
    if not ids:
        raise TableError("no annotated question is answered by every file; do the files belong together?")
    true, kinds = {key: references.answers[key] for key in ids}, {key: references.kinds[key] for key in ids}
    return {
        name: score_answers({key: answers[key] for key in ids}, true, kinds, unanimous=unanimous)
        for name, answers in predictions.items()
    }


def _write_json(path: str, tables: Mapping[str, ScoreTable], notes: Sequence[str], args: argparse.Namespace) -> None:
    files = [
        {"name": name, "path": source, **asdict(table)}
        for (name, table), source in zip(tables.items(), args.answers_file, strict=True)
    ]
    content = {"annotations": args.annotations, "unanimous": args.unanimous, "left_out": list(notes), "files": files}
    with atomic_write(path) as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _mean(accuracies: Sequence[float]) -> Score:
    return Score(len(accuracies), math.fsum(accuracies) / len(accuracies))


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.2f}"


def _list_ids(ids: set[QuestionId]) -> str:
    ordered = sorted(ids, key=lambda question_id: (isinstance(question_id, str), question_id))
    shown = ", ".join(map(str, ordered[:_IDS_SHOWN]))
    return f"{shown}, …" if len(ordered) > _IDS_SHOWN else shown


if __name__ == "__main__":
    raise SystemExit(main())
