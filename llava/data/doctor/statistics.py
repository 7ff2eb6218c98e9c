"""Statistics of training data: tokens per record, questions per image, answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.doctor.warnings import answers_of, questions_of

TOP_ANSWERS = 20
IMAGES_NAMED = 5  # of each trait
_BINS = 12
_QUESTIONS_BINS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (10, 19), (20, 49), (50, 99))


class UsableRow(NamedTuple):
    """A row that can be trained on.

    Attributes:
        index: among the rows of all files.
        images: their paths.
        tokens: positions, image patches included; None without tokenizer.
        supervised: supervised tokens; None without tokenizer.
    """

    index: int
    images: list[Path]
    tokens: int | None = None
    supervised: int | None = None


def compute_statistics(records: Sequence[Any], rows: Sequence[UsableRow]) -> dict[str, Any]:
    """Compute statistics of records as JSON values.

    Args:
        records: of all files.
        rows: the usable ones, over which all statistics but the total are taken.

    Returns:
        `rows`, `usable_rows`, `rows_without_image`, `images`, `questions`, `questions_per_image`, `answers`, and
        `tokens` and `supervised_tokens` of a row, which are None where no row was encoded.
    """
    per_image: Counter[Path] = Counter()
    answers: Counter[str] = Counter()
    questions = 0
    for row in rows:
        record = records[row.index]
        count = len(questions_of(record))
        questions += count
        answers.update(answers_of(record))
        for path in row.images:
            per_image[path] += count
    lengths = [row.tokens for row in rows if row.tokens is not None]
    supervised = [row.supervised for row in rows if row.supervised is not None]
    return {
        "rows": len(records),
        "usable_rows": len(rows),
        "rows_without_image": sum(not row.images for row in rows),
        "images": len(per_image),
        "questions": questions,
        "questions_per_image": _summary(list(per_image.values()), _QUESTIONS_BINS),
        "answers": _describe_answers(answers),
        "tokens": _summary(lengths, even_bins(lengths)),
        "supervised_tokens": _summary(supervised, even_bins(supervised)),
    }


def summarise_traits(traits: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """Return how many images have each trait, and the paths of the first of them, as JSON values."""
    return {
        trait: {"count": len(paths), "first": [str(path) for path in paths[:IMAGES_NAMED]]}
        for trait, paths in sorted(traits.items())
    }


def even_bins(values: Sequence[int]) -> list[tuple[int, int]]:
    """Return at most 12 equally wide bins, bounds included, that begin at a multiple of their width."""
    if not values:
        return []
    low, high = min(values), max(values)
    widths = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < _BINS)
    return [(start, start + width - 1) for start in range(low // width * width, high + 1, width)]


def _summary(values: Sequence[int], bins: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    if not values:
        return None
    counts = Counter(values)
    histogram = [
        {"from": low, "to": high, "count": sum(counts[value] for value in counts if low <= value <= high)}
        for low, high in bins
        if low <= max(values)
    ]
    above = len(values) - sum(entry["count"] for entry in histogram)
    if above:
        histogram.append({"from": bins[-1][1] + 1, "to": max(values), "count": above})
    mean = round(sum(values) / len(values), 2)
    return {"mean": mean, "min": min(values), "max": max(values), "total": sum(values), "histogram": histogram}


def _describe_answers(answers: Mapping[str, int]) -> dict[str, Any] | None:
    total = sum(answers.values())
    if not total:
        return None
    plain: Counter[str] = Counter()
    for text, count in answers.items():
        plain[text.rstrip(".!").lower()] += count
    ranked = sorted(answers.items(), key=lambda entry: (-entry[1], entry[0]))[:TOP_ANSWERS]
    return {
        "total": total,
        "distinct": len(answers),
        "yes_share": round(plain["yes"] / total, 4),
        "no_share": round(plain["no"] / total, 4),
        "top": [{"answer": text, "count": count, "share": round(count / total, 4)} for text, count in ranked],
    }
