"""An examination in words for a terminal, and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llava.data.examination import Examination
from llava.data.findings import Finding, list_findings

SHOWN_PER_CODE = 3
_BAR = 40


def as_json(examination: Examination) -> dict[str, Any]:
    """Return an examination as JSON values; `from_json` reads them back."""
    return {
        "files": examination.files,
        "checked": {"tokens": examination.has_tokens, "pixels": examination.has_pixels},
        "counts": dict(sorted(Counter(finding.code for finding in examination.findings).items())),
        "findings": [
            {**finding._asdict(), "severity": "unusable" if finding.is_unusable else "warning"}
            for finding in examination.findings
        ],
        "statistics": examination.statistics,
    }


def from_json(values: Mapping[str, Any]) -> Examination:
    """Return the examination that `as_json` wrote.

    Raises:
        KeyError: if a part is missing.
    """
    findings = [Finding(**{key: entry[key] for key in Finding._fields}) for entry in values["findings"]]
    checked = values["checked"]
    return Examination(values["files"], findings, values["statistics"], checked["tokens"], checked["pixels"])


def describe_examination(examination: Examination, *, shown: int = SHOWN_PER_CODE) -> str:
    """Return the whole report.

    Args:
        examination: to be told.
        shown: rows listed for each code.
    """
    lines = [f"{path}: {rows:,} rows" for path, rows in examination.files.items()]
    lines += _describe_figures(examination.statistics)
    if not examination.has_tokens:
        lines.append("tokens were not counted: that needs a tokenizer, pass --model_name_or_path")
    if not examination.has_pixels:
        lines.append("images were not decoded, so broken ones are not known")
    lines += describe_findings(examination, shown=shown)
    return "\n".join(lines)


def describe_findings(examination: Examination, *, shown: int = SHOWN_PER_CODE) -> list[str]:
    """Return the lines about findings: unusable rows first, then warnings, by code."""
    total = examination.statistics["rows"]
    lines = []
    for title, findings in (
        ("can't be trained on", examination.unusable),
        ("should be looked at", examination.warnings),
    ):
        rows = len({(finding.file, finding.row) for finding in findings})
        lines.append(f"{rows:,} of {total:,} rows {title}{':' if rows else ''}")
        for code, count in Counter(finding.code for finding in findings).most_common():
            lines.append(f"{code}: {count:,}")
            same = [finding for finding in findings if finding.code == code]
            lines += list_findings(same, shown=shown, name_file=len(examination.files) > 1)
    return lines


def _describe_figures(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{figures['usable_rows']:,} usable rows, {figures['rows_without_image']:,} of them without image",
        f"{figures['images']:,} images, {figures['questions']:,} questions",
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
