"""Report of a data check: text for a terminal, JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llava.data.doctor.checks import Examination
from llava.data.row_errors import SHOWN_PER_CODE, RowError, list_errors
from llava.image_files.decode import TRAITS

_BAR = 40


def as_json(examination: Examination) -> dict[str, Any]:
    """Return an examination as JSON values; `from_json` reads them back."""
    return {
        "files": examination.files,
        "checked": {"tokens": examination.has_tokens, "pixels": examination.has_pixels},
        "counts": dict(sorted(Counter(error.code for error in examination.errors).items())),
        "findings": [
            {**error._asdict(), "severity": "unusable" if error.is_unusable else "warning"}
            for error in examination.errors
        ],
        "statistics": examination.statistics,
    }


def from_json(values: Mapping[str, Any]) -> Examination:
    """Return the examination that `as_json` wrote.

    Raises:
        KeyError: if a part is missing.
    """
    errors = [RowError(**{key: entry[key] for key in RowError._fields}) for entry in values["findings"]]
    checked = values["checked"]
    return Examination(values["files"], errors, values["statistics"], checked["tokens"], checked["pixels"])


def describe_examination(examination: Examination, *, shown: int = SHOWN_PER_CODE) -> str:
    """Return the whole report.

    Args:
        examination: from `examine`.
        shown: rows listed for each code.
    """
    lines = [f"{path}: {rows:,} rows" for path, rows in examination.files.items()]
    lines += _describe_figures(examination.statistics)
    if not examination.has_tokens:
        lines.append("tokens were not counted: that needs a tokenizer, pass --model_name_or_path")
    if not examination.has_pixels:
        lines.append("images were not decoded, so broken ones are not known")
    lines += describe_row_errors(examination, shown=shown)
    return "\n".join(lines)


def describe_row_errors(examination: Examination, *, shown: int = SHOWN_PER_CODE) -> list[str]:
    """Return the lines about errors: unusable rows first, then warnings, by code."""
    total = examination.statistics["rows"]
    lines = []
    for title, errors in (
        ("can't be trained on", examination.unusable),
        ("should be looked at", examination.warnings),
    ):
        rows = len({(error.file, error.row) for error in errors})
        lines.append(f"{rows:,} of {total:,} rows {title}{':' if rows else ''}")
        for code, count in Counter(error.code for error in errors).most_common():
            lines.append(f"{code}: {count:,}")
            same = [error for error in errors if error.code == code]
            lines += list_errors(same, shown=shown, name_file=len(examination.files) > 1)
    return lines


def describe_traits(traits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line for each trait that images have, such as being turned upright, with the first images' paths."""
    lines = []
    for trait, found in traits.items():
        rest = found["count"] - len(found["first"])
        names = ", ".join(found["first"]) + (f" and {rest:,} more" if rest else "")
        lines.append(f"{found['count']:,} images {TRAITS[trait]}: {names}")
    return lines


def _describe_figures(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{figures['usable_rows']:,} usable rows, {figures['rows_without_image']:,} of them without image",
        f"{figures['images']:,} images, {figures['questions']:,} questions",
        *describe_traits(figures["image_traits"]),
    ]
    for key, name in (
        ("questions_per_image", "questions an image"),
        ("tokens", "tokens a row, image patches included"),
        ("supervised_tokens", "supervised tokens a row"),
    ):
        if figures[key] is not None:
            lines += _describe_summary(name, figures[key])
    answers = figures["answers"]
    if answers is not None:
        shares = f"yes {100 * answers['yes_share']:.1f} %, no {100 * answers['no_share']:.1f} %"
        lines.append(f"{answers['total']:,} answers, {answers['distinct']:,} different; {shares}; the most frequent:")
        lines += [f"  {entry['count']:>9,}  {entry['answer'][:_BAR]}" for entry in answers["top"]]
    return lines


def _describe_summary(name: str, summary: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: mean {summary['mean']:,}, from {summary['min']:,} to {summary['max']:,}"]
    return lines + _draw_histogram(summary["histogram"])


def _draw_histogram(histogram: Sequence[Mapping[str, int]]) -> list[str]:
    most = max(entry["count"] for entry in histogram)
    lines = []
    for entry in histogram:
        low, high = entry["from"], entry["to"]
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines.append(f"  {label:>16}  {entry['count']:>9,}  {'#' * -(-_BAR * entry['count'] // most)}".rstrip())
    return lines
