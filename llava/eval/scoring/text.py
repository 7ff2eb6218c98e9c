"""Evaluation as plain-text tables for the terminal, percentages with two decimals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llava.eval.scoring.accuracy import Confusion
from llava.eval.scoring.calibration import Calibration
from llava.eval.scoring.evaluate import Comparison, Evaluation, Score, ScoreTable
from llava.eval.scoring.intervals import Difference
from llava.files.terminal_text import shorten

_TEXT_SHOWN = 100  # characters of an answer or kind in a column


def format_evaluation(evaluation: Evaluation) -> str:
    """Return all sections: accuracies by kind and answer type, comparisons, frequent mistakes, calibration."""
    tables = {name: file.table for name, file in evaluation.files.items()}
    base = next(iter(tables))
    sections = [format_table(tables), _format_types(tables)]
    sections += [_format_comparison(base, name, comparison) for name, comparison in evaluation.comparisons.items()]
    for name, file in evaluation.files.items():
        sections += [_format_confusion(name, file.confusion), _format_calibration(name, file.calibration)]
    return "\n\n".join(section for section in sections if section)


def format_table(tables: Mapping[str, ScoreTable]) -> str:
    """Lay out scores of the same questions side by side, one column for each answer file, in percent."""
    first = next(iter(tables.values()))
    lines = [["kind", "questions", *tables]]
    for kind, score in first.by_kind.items():
        lines.append([_cut(kind), str(score.questions), *(_percent(table.by_kind[kind]) for table in tables.values())])
    lines.append(["all", str(first.overall.questions), *(_percent(table.overall) for table in tables.values())])
    lines.append(["95 % interval", "", *(format_bounds(table.overall) for table in tables.values())])
    lines.append(["no answer (error)", "", *(str(table.errors) for table in tables.values())])
    return align(lines)


def format_bounds(part: Score | Difference) -> str:
    """Return the bounds of an accuracy in percent, or of a difference in points with their signs."""
    sign = "+" if isinstance(part, Difference) else ""
    return f"{100 * part.low:{sign}.1f} to {100 * part.high:{sign}.1f}"


def format_p_value(p_value: float) -> str:
    """Return a p-value with four decimals; below that "<0.0001"."""
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def describe_difference(part: Difference) -> str:
    """Return "better" or "worse" where the difference is more than chance, else "not settled"."""
    if not part.is_real:
        return "not settled"
    return "better" if part.mean > 0 else "worse"


def _format_types(tables: Mapping[str, ScoreTable]) -> str:
    first = next(iter(tables.values()))
    lines = [["answer type", "questions", *tables]]
    for name, score in first.by_answer_type.items():
        cells = (_percent(table.by_answer_type[name]) for table in tables.values())
        lines.append([_cut(name), str(score.questions), *cells])
    return align(lines)


def _format_comparison(base: str, name: str, comparison: Comparison) -> str:
    parts = {**comparison.by_kind, "all": comparison.overall}
    lines = [["kind", "difference", "95 % interval", "better", "worse", "p", ""]]
    for kind, part in parts.items():
        numbers = [f"{100 * part.mean:+.2f}", format_bounds(part), str(part.better), str(part.worse)]
        lines.append([_cut(kind), *numbers, format_p_value(part.p_value), describe_difference(part)])
    return f"{name} against {base}, in points (p: McNemar's exact test)\n{align(lines)}"


def _format_confusion(name: str, confusion: Confusion) -> str:
    if not confusion.mistakes:
        return ""
    lines = [["true", "given", "questions"]]
    lines += [[_cut(true), _cut(given) or "(empty)", str(count)] for true, given, count in confusion.mistakes]
    return f"{name}: most frequent mistakes, answers normalised\n{align(lines, texts=2)}"


def _format_calibration(name: str, calibration: Calibration | None) -> str:
    if calibration is None:
        return ""
    lines = [["probability", "answers", "mean", "right"]]
    for part in calibration.bins:
        if part.confidence is not None and part.accuracy is not None:
            means = [f"{100 * part.confidence:.1f}", f"{100 * part.accuracy:.1f}"]
            lines.append([f"{100 * part.low:.0f} to {100 * part.high:.0f}", str(part.questions), *means])
    error = f"expected calibration error {100 * calibration.expected_error:.2f} points"
    return f"{name}: confidence in percent ({error})\n{align(lines)}"


def align(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Lay out columns side by side: the first `texts` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cut(text: str) -> str:
    return shorten(text, _TEXT_SHOWN)


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.2f}"
