"""Scores of POPE: yes-or-no questions on objects that are in COCO's images or are not, in three splits.

Source: Y. Li et al., Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023; the way in which the
original LLaVA reads answers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.table.bad_rows import BadRows
from llava.eval.benchmarks.lines import (
    AnswerLine,
    BenchmarkError,
    QuestionLine,
    count_errors,
    describe_ids,
    pair_lines,
    plain_text,
    raise_bad_rows,
    read_json_lines,
)
from llava.eval.benchmarks.result import BenchmarkResult, Figure, QuestionScore, ratio_figure
from llava.eval.scoring.intervals import Ratio
from llava.files.home_directory import expand_home
from llava.files.terminal_text import show

YES, NO = "yes", "no"
SPLITS = ("random", "popular", "adversarial")
_NO_WORDS = frozenset({"No", "no", "not"})
_PREFIX = "coco_pope_"
_LEAST_ANNOTATED = 0.9  # share of a split's questions; of another split's annotations about half would be found
_FIGURES = ("F1 score", "accuracy", "precision", "recall", "yes ratio")

Labels = Mapping[tuple[str, str], str]
"""(image, question) -> "yes" or "no"."""


class Judged(NamedTuple):
    """A question with its true answer and what was read from the given one; `said` is None after an error."""

    question: QuestionLine
    label: str
    said: str | None

    @property
    def is_right(self) -> bool:
        """Whether they are the same."""
        return self.said == self.label

    @property
    def counts_as(self) -> str:
        """The answer in the confusion table, in which an error is the wrong one."""
        return self.said or (NO if self.label == YES else YES)


class Confusion(NamedTuple):
    """How many of a split's questions were answered rightly and wrongly with yes and with no."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int


def read_pope_labels(folder: str | os.PathLike[str]) -> dict[str, Labels]:
    """Read the annotations `coco_pope_<split>.json` of a folder: JSON lines `{image, text, label}`.

    Returns:
        split -> labels.

    Raises:
        BenchmarkError: if there are none, one can't be read or asks a question twice.
    """
    place = Path(expand_home(folder))
    paths = sorted(place.glob(f"{_PREFIX}*.json"))
    if not paths:
        raise BenchmarkError(f"{folder} holds no {_PREFIX}<split>.json; name the folder output/coco of RUCAIBox/POPE")
    return {path.stem.removeprefix(_PREFIX): _read_split(path) for path in paths}


def read_label_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read one file of annotations, in order.

    Raises:
        BenchmarkError: if it can't be read.
    """
    return read_json_lines(path, _find_label_problem)


def read_yes_no(text: str) -> str:
    """Return "no" if the answer's first sentence has the word No, no or not, else "yes".

    Words are what stands between spaces once the commas are gone, as in the original.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return NO if _NO_WORDS.intersection(words) else YES


def judge(
    questions: Sequence[QuestionLine], answers: Sequence[AnswerLine], labels: Mapping[str, Labels], name: str
) -> tuple[dict[str, list[Judged]], tuple[str, ...]]:
    """Join questions with their answers, and by image and question with the annotations.

    Args:
        questions: of the question file; `category` is the split.
        answers: in any order.
        labels: from `read_pope_labels`.
        name: of the answer file, for messages.

    Returns:
        Judged questions by split, and notes with the counts of what has no counterpart.

    Raises:
        BenchmarkError: if files don't belong together.
    """
    by_split: dict[str, list[Judged]] = {}
    scored: list[AnswerLine] = []
    asked: Counter[tuple[str, str, str]] = Counter()
    missing: dict[str, list[str]] = {}
    for question, answer in pair_lines(questions, answers, name):
        split, image, text = str(question.record.get("category")), question.image or "", _first_line(question.text)
        asked[split, image, text] += 1
        label = labels.get(split, {}).get((image, text))
        if label is None:
            missing.setdefault(split, []).append(str(question.question_id))
        else:
            scored.append(answer)
            said = None if answer.error else read_yes_no(answer.text)
            by_split.setdefault(split, []).append(Judged(question, label, said))
    if twice := sum(count > 1 for count in asked.values()):
        raise BenchmarkError(
            f"{twice} of {len(questions)} questions stand in the question file more than once; make it again"
        )
    _refuse_other_files(by_split, missing, labels)
    notes = [*_note_missing(by_split, missing), *_note_unasked(by_split, labels), *count_errors(scored)]
    return {split: by_split[split] for split in sorted(by_split, key=_order)}, tuple(notes)


def score_pope(
    questions: Sequence[QuestionLine], answers: Sequence[AnswerLine], labels: Mapping[str, Labels], name: str
) -> BenchmarkResult:
    """Return F1, accuracy, precision, recall and yes ratio: the means over the splits, then of each split.

    Arguments and errors are those of `judge`. An answer that is an error counts as the wrong one, and not as a yes in
    the yes ratio.
    """
    return build_result(*judge(questions, answers, labels, name))


def build_result(by_split: Mapping[str, Sequence[Judged]], notes: Sequence[str] = ()) -> BenchmarkResult:
    """Return the figures of judged questions by split; see `score_pope`."""
    ratios = {split: _split_ratios(judged) for split, judged in by_split.items()}
    figures: list[Figure] = []
    if len(ratios) > 1:
        means = zip(_FIGURES, zip(*ratios.values(), strict=True), strict=True)
        figures += [ratio_figure(f"{figure}, mean of {len(ratios)} splits", *parts) for figure, parts in means]
    for split, parts in ratios.items():
        figures += [ratio_figure(f"{figure}, {split}", part) for figure, part in zip(_FIGURES, parts, strict=True)]
    scores = [_score_question(split, one) for split, judged in by_split.items() for one in judged]
    return BenchmarkResult(tuple(figures), tuple(scores), tuple(notes))


def count_confusion(judged: Sequence[Judged]) -> Confusion:
    """Count the answers of one split."""
    counts = Counter((one.label, one.counts_as) for one in judged)
    return Confusion(counts[YES, YES], counts[NO, YES], counts[NO, NO], counts[YES, NO])


def format_split(judged: Sequence[Judged]) -> str:
    """Return the lines that the original prints for a split: counts, and figures from 0 to 1."""
    counts = count_confusion(judged)
    f1, accuracy, precision, recall, yes_ratio = (
        ratio.value if any(ratio.denominators) else 0.0 for ratio in _split_ratios(judged)
    )
    return "\n".join(
        (
            "TP\tFP\tTN\tFN\t",
            "\t".join(map(str, counts)),
            f"Accuracy: {accuracy}",
            f"Precision: {precision}",
            f"Recall: {recall}",
            f"F1 score: {f1}",
            f"Yes ratio: {yes_ratio}",
            ", ".join(f"{value:.3f}" for value in (f1, accuracy, precision, recall, yes_ratio)),
        )
    )


def _split_ratios(judged: Sequence[Judged]) -> list[Ratio]:
    """Return F1, accuracy, precision, recall and yes ratio, in the order of `_FIGURES`."""
    images = [one.question.image for one in judged]
    label = [float(one.label == YES) for one in judged]
    said = [float(one.counts_as == YES) for one in judged]
    both = [first * second for first, second in zip(label, said, strict=True)]
    either = [first + second for first, second in zip(label, said, strict=True)]
    all_questions = [1.0] * len(judged)
    return [
        Ratio([2 * value for value in both], either, images),
        Ratio([float(one.is_right) for one in judged], all_questions, images),
        Ratio(both, said, images),
        Ratio(both, label, images),
        Ratio([float(one.said == YES) for one in judged], all_questions, images),
    ]


def _score_question(split: str, judged: Judged) -> QuestionScore:
    image = judged.question.image or ""
    return QuestionScore(f"{split}/{image}/{_first_line(judged.question.text)}", image, split, float(judged.is_right))


def _read_split(path: Path) -> Labels:
    labels, bad = {}, BadRows(str(path), "annotation")
    for number, record in enumerate(read_label_lines(path), start=1):
        key = (record["image"], plain_text(record["text"]))
        if key in labels:
            bad.add(number, f"{show(record['text'])} about {show(record['image'])} is there already")
        labels[key] = record["label"]
    raise_bad_rows(bad)
    return labels


def _find_label_problem(record: Mapping[str, Any]) -> str | None:
    for key in ("image", "text"):
        if not isinstance(record.get(key), str):
            return f"no {key!r}"
    return None if record.get("label") in (YES, NO) else f"label is {show(record.get('label'))}, not yes or no"


def _first_line(text: str) -> str:
    return plain_text(text.replace("<image>", " ").strip().partition("\n")[0])


def _order(split: str) -> tuple[int, str]:
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)


def _refuse_other_files(
    by_split: Mapping[str, Sequence[Judged]], missing: Mapping[str, Sequence[str]], labels: Mapping[str, Labels]
) -> None:
    for split, ids in missing.items():
        count = len(by_split.get(split, ())) + len(ids)
        if split not in labels:
            raise BenchmarkError(
                f"{count} questions are of category {show(split)}, and the annotations have no {_PREFIX}{split}.json; "
                "name POPE's question file, or download the annotations from RUCAIBox/POPE, folder output/coco"
            )
        if len(ids) > (1 - _LEAST_ANNOTATED) * count:
            raise BenchmarkError(
                f"{len(ids)} of {count} questions of category {split} are not in {_PREFIX}{split}.json, which is of "
                "another split or version; download it from RUCAIBox/POPE, folder output/coco"
            )


def _note_missing(by_split: Mapping[str, Sequence[Judged]], missing: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{split}: {describe_ids(ids)} of {len(ids) + len(by_split.get(split, ()))} questions have no annotation of "
        "their image and text, and are left out; RUCAIBox/POPE at commit e3e3926 has the annotations that LLaVA's "
        "questions were made from"
        for split, ids in missing.items()
    ]


def _note_unasked(by_split: Mapping[str, Sequence[Judged]], labels: Mapping[str, Labels]) -> list[str]:
    notes = []
    for split, known in labels.items():
        left = len(known) - len(by_split.get(split, ()))
        if split not in by_split:
            notes.append(f"{split}: none of its {left} annotations is asked in the question file")
        elif left:
            notes.append(f"{split}: {left} of {len(known)} annotations are not asked in the question file")
    return notes
