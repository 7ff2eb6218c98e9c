"""Tables of a run of the suite for the terminal, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava.eval.benchmark_suite.outcome import Outcome, Pair
from llava.eval.benchmarks.text import format_interval, format_value
from llava.eval.scoring.text import align, describe_difference, format_bounds, format_p_value

_ABSENT = "-"


def format_outcomes(model: str, outcomes: Sequence[Outcome]) -> str:
    """Return the table of one model: a line for each benchmark, then the notes and what has to be submitted."""
    head = ["benchmark", "questions", "scored", "", "figure", "95 % interval", "7B", "13B", "seconds"]
    lines = [head, *(_format_line(outcome) for outcome in outcomes)]
    notes = [f"{outcome.benchmark.title}: {note}" for outcome in outcomes for note in _notes(outcome)]
    legend = "7B, 13B: published figures of LLaVA-1.5; seconds: answering in this run, without loading the model"
    return "\n".join([model, align(lines), legend, *notes])


def format_pairs(pairs: Sequence[Pair]) -> str:
    """Return the table of a tuned model against its base."""
    head = ["benchmark", "questions", "", "base", "tuned", "difference", "95 % interval", "better", "worse", "p", ""]
    lines = [head]
    for base, tuned, part in pairs:
        figures = [format_value(outcome.result.figures[0]) for outcome in (base, tuned)]
        numbers = [f"{100 * part.mean:+.2f}", format_bounds(part), str(part.better), str(part.worse)]
        lines.append([
            base.benchmark.title, str(part.questions), base.result.figures[0].name, *figures, *numbers,
            format_p_value(part.p_value), describe_difference(part),
        ])  # fmt: skip
    names = f"{pairs[0].tuned.model} against {pairs[0].base.model}"
    return f"{names}, difference of the questions' mean score in points (p: McNemar's exact test)\n{align(lines)}"


def to_json(outcomes: Sequence[Outcome], pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return everything that the tables show, and the figures they leave out; figures in percent, differences 0..1."""
    return {
        "results": [_outcome_to_json(outcome) for outcome in outcomes],
        "comparisons": [
            {
                "benchmark": base.benchmark.name,
                "base": base.model,
                "tuned": tuned.model,
                **asdict(difference),
                "is_real": difference.is_real,
            }
            for base, tuned, difference in pairs
        ],
    }


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "benchmark": outcome.benchmark.name,
        "model": outcome.model,
        "questions": outcome.questions,
        "scored": len(outcome.result.questions),
        "figures": [figure._asdict() for figure in outcome.result.figures],
        "published": asdict(outcome.benchmark.published),
        "seconds": outcome.seconds,
        "answers": str(outcome.answers),
        "upload": None if outcome.upload is None else str(outcome.upload),
        "server": outcome.benchmark.server or None,
        "notes": list(outcome.result.notes),
    }


def _format_line(outcome: Outcome) -> list[str]:
    figure = next(iter(outcome.result.figures), None)
    published = outcome.benchmark.published
    return [
        outcome.benchmark.title,
        str(outcome.questions),
        str(len(outcome.result.questions) or _ABSENT),
        "not scored here" if figure is None else figure.name,
        _ABSENT if figure is None else format_value(figure),
        _ABSENT if figure is None else format_interval(figure) or _ABSENT,
        str(published.small),
        str(published.large),
        _ABSENT if outcome.seconds is None else f"{outcome.seconds:.1f}",
    ]


def _notes(outcome: Outcome) -> list[str]:
    notes = list(outcome.result.notes)
    if outcome.questions < outcome.benchmark.questions:
        whole = f"the benchmark's {outcome.benchmark.questions}"
        notes.append(f"{outcome.questions} of {whole} questions; published figures are of all")
    if outcome.upload is not None:
        where = f"; submit it to {outcome.benchmark.server}" if outcome.benchmark.server else ""
        notes.append(f"wrote {outcome.upload}{where}")
    elif outcome.benchmark.server:
        notes.append(f"{outcome.answers} is scored by {outcome.benchmark.server}")
    return notes
