"""Tables and plots of a report as HTML and SVG; pure functions from numbers to text.

They carry classes and no style attributes, which the page's content security policy forbids.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from llava.eval.accuracy import OTHER_ANSWERS, Confusion
from llava.eval.calibration import Calibration
from llava.eval.evaluation import Score
from llava.eval.intervals import Difference
from llava.eval.score_text import describe_difference, format_bounds, format_p_value

_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
_COLOURS = 6
_TICKS = (0, 25, 50, 75, 100)
_TRACK_ROW = 16
_HEATS = 5
_VERDICTS = {
    "better": "better, more than chance",
    "worse": "worse, more than chance",
    "not settled": "not settled: may be chance",
}
_PLOT, _PLOT_LEFT, _PLOT_TOP, _COUNTS_TOP, _COUNTS_HEIGHT = 220, 34, 8, 274, 44


def escape(text: str) -> str:
    """Return text as HTML that shows it, whatever it contains."""
    return html.escape(clean_text(text), quote=True)


def clean_text(text: str) -> str:
    """Return text with a replacement mark for what no page can hold: half a surrogate pair, and NUL."""
    return _NO_CHARACTER.sub("\ufffd", text)


def colour_class(index: int) -> str:
    """Return the class with the colour of an answer file."""
    return f"file{index % _COLOURS}"


def draw_key(index: int) -> str:
    """Return the dot that marks an answer file."""
    return f'<span class="key {colour_class(index)}"></span>'


def draw_track(scores: Sequence[Score], names: Sequence[str], first: int = 0) -> str:
    """Draw accuracies with their intervals on one scale from 0 to 100 %, one line for each answer file.

    Args:
        scores: of the files.
        names: of the files.
        first: place of the first of them among all answer files, which decides its colour.
    """
    label = "; ".join(
        f"{name} {_percent(score.accuracy)}, interval {format_bounds(score)}"
        for name, score in zip(names, scores, strict=True)
    )
    height = _TRACK_ROW * len(scores)
    parts = [f'<line class="grid" x1="{tick}%" x2="{tick}%" y1="0" y2="{height}"/>' for tick in _TICKS]
    for index, score in enumerate(scores):
        y = _TRACK_ROW * index + _TRACK_ROW // 2
        x, low, high = (f"{100 * value:.2f}%" for value in (score.accuracy, score.low, score.high))
        parts.append(
            f'<g class="{colour_class(first + index)}"><line x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x}" cy="{y}" r="5.5"/></g>'
        )
    return (
        f'<svg class="track" width="100%" height="{height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def draw_score_card(index: int, name: str, score: Score, errors: int) -> str:
    """Return the card with an answer file's accuracy."""
    missing = f" {errors:,} without an answer, counted as wrong." if errors else ""
    return (
        f'<div class="card"><h3>{draw_key(index)}<span class="name">{escape(name)}</span></h3>'
        f'<p class="big">{100 * score.accuracy:.1f}<small> %</small></p>{draw_track([score], [name], index)}'
        f'<p class="quiet">95 % interval {format_bounds(score)} %. {score.questions:,} questions.{missing}</p></div>'
    )


def draw_difference_card(name: str, base: str, part: Difference) -> str:
    """Return the card that says what an answer file changed against the base."""
    verdict = describe_difference(part)
    kind = verdict if verdict in ("better", "worse") else "open"
    return (
        f'<div class="card"><h3><span class="name">{escape(name)}</span> <span class="quiet">against</span> '
        f'<span class="name">{escape(base)}</span></h3>'
        f'<p class="big">{_signed(part.mean)}<small> points</small></p>'
        f'<p><span class="verdict {kind}">{_VERDICTS[verdict]}</span></p>'
        f'<p class="quiet">95 % interval {format_bounds(part)}. '
        f"{part.better:,} questions better, {part.worse:,} worse; McNemar p {_p_value(part.p_value)}.</p></div>"
    )


def draw_parts(
    heading: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Score], Sequence[Difference]]],
    overall: tuple[str, Sequence[Score], Sequence[Difference]],
) -> str:
    """Return the table of parts (kinds or answer types).

    Args:
        heading: of the first column.
        names: of the answer files.
        parts: name, score of each file, difference of each file but the first to the first.
        overall: the same of all questions.
    """
    ticks = "".join(f"<span>{tick}</span>" for tick in _TICKS)
    head = "".join(
        f'<th scope="col">{draw_key(index)} <span class="name">{escape(name)}</span></th>'
        for index, name in enumerate(names)
    )
    changes = "".join(
        f'<th scope="col"><span class="name">{"difference" if len(names) == 2 else "Δ " + escape(name)}</span></th>'
        for name in names[1:]
    )
    body = "".join(_draw_part(names, *part) for part in parts)
    return (
        f'<div class="panel"><table class="parts"><thead><tr><th scope="col" class="label">{escape(heading)}</th>'
        f'<th scope="col">questions</th><th class="where" scope="col"><div class="ticks">{ticks}</div></th>{head}'
        f"{changes}</tr></thead><tbody>{body}</tbody>"
        f'<tbody class="all">{_draw_part(names, *overall)}</tbody></table></div>'
    )


def draw_confusion(index: int, name: str, confusion: Confusion) -> str:
    """Return the table of true answers (rows) against given ones (columns), shaded by the share of the row."""
    head = "".join(_draw_head("col", given) for given in confusion.given)
    body = []
    for true, counts in zip(confusion.true, confusion.counts, strict=True):
        pairs = zip(confusion.given, counts, strict=True)
        cells = "".join(_draw_cell(count, sum(counts), _cell_class(true, given)) for given, count in pairs)
        body.append(f"<tr>{_draw_head('row', true)}{cells}</tr>")
    return (
        f'<figure class="panel"><figcaption>{draw_key(index)}<span class="name">{escape(name)}</span></figcaption>'
        f'<table class="confusion"><thead><tr><th>true ↓ given →</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{_draw_mistakes(confusion)}</figure>"
    )


def draw_reliability(index: int, name: str, calibration: Calibration) -> str:
    """Return the plot of accuracy over confidence, with the number of answers in each bin below, and its summary."""
    gap = calibration.confidence - calibration.accuracy
    direction = "too sure" if gap > 0 else "too modest"
    facts = (
        ("answers with a probability", f"{calibration.questions:,}"),
        ("expected calibration error", f"{100 * calibration.expected_error:.1f} points"),
        (f"on average {direction} by", f"{100 * abs(gap):.1f} points"),
    )
    listed = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in facts)
    return (
        f'<figure class="panel"><figcaption>{draw_key(index)}<span class="name">{escape(name)}</span></figcaption>'
        f'<div class="reliability">{_draw_reliability(index, calibration)}<dl>{listed}</dl></div></figure>'
    )


def _draw_part(names: Sequence[str], label: str, scores: Sequence[Score], differences: Sequence[Difference]) -> str:
    cells = "".join(
        f'<td class="score">{draw_key(index)}{100 * score.accuracy:.1f}</td>' for index, score in enumerate(scores)
    )
    changes = "".join(f'<td class="change">{_draw_change(part)}</td>' for part in differences)
    return (
        f'<tr><th scope="row"><span class="name">{escape(label)}</span></th>'
        f'<td class="quiet">{scores[0].questions:,}</td>'
        f'<td class="where">{draw_track(scores, names)}</td>{cells}{changes}</tr>'
    )


def _draw_change(part: Difference) -> str:
    title = f"95 % interval {format_bounds(part)}; p {_p_value(part.p_value)}; {describe_difference(part)}"
    kind = {"better": "gain", "worse": "loss", "not settled": "quiet"}[describe_difference(part)]
    return f'<span class="{kind}" title="{escape(title)}">{_signed(part.mean)}</span>'


def _draw_mistakes(confusion: Confusion) -> str:
    listed = "".join(
        f'<li><b class="number">{count:,}×</b> {_draw_answer(true)} <span class="quiet">→</span> '
        f"{_draw_answer(given)}</li>"
        for true, given, count in confusion.mistakes
    )
    return f'<h3 class="under">Most frequent mistakes</h3><ol class="mistakes">{listed}</ol>' if listed else ""


def _draw_answer(answer: str) -> str:
    return f'<span class="name" title="{escape(answer)}">{escape(answer or "(empty)")}</span>'


def _draw_head(scope: str, answer: str) -> str:
    return f'<th scope="{scope}" title="{escape(answer)}">{escape(answer)}</th>'


def _cell_class(true: str, given: str) -> str:
    if true == OTHER_ANSWERS and given == OTHER_ANSWERS:
        return "open"  # right and wrong ones together
    return "match" if true == given else "miss"


def _draw_cell(count: int, total: int, kind: str) -> str:
    heat = f"heat{math.ceil(_HEATS * count / total)}" if count else "zero"
    return f'<td class="{kind} {heat}">{count:,}</td>'


def _draw_reliability(index: int, calibration: Calibration) -> str:
    most = max(part.questions for part in calibration.bins)
    bottom, right = _PLOT_TOP + _PLOT, _PLOT_LEFT + _PLOT
    parts = [f'<line class="ideal" x1="{_PLOT_LEFT}" y1="{bottom}" x2="{right}" y2="{_PLOT_TOP}"/>']
    for tick in _TICKS:
        x, y = _PLOT_LEFT + _PLOT * tick / 100, bottom - _PLOT * tick / 100
        parts.append(f'<line class="axis" x1="{_PLOT_LEFT}" x2="{right}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text x="{_PLOT_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{tick}</text>')
        parts.append(f'<text x="{x:g}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    for part in calibration.bins:
        if part.confidence is None or part.accuracy is None:
            continue
        x, y, ideal = (
            _PLOT_LEFT + _PLOT * part.confidence,
            bottom - _PLOT * part.accuracy,
            bottom - _PLOT * part.confidence,
        )
        height = _COUNTS_HEIGHT * part.questions / most
        left = _PLOT_LEFT + _PLOT * part.low
        title = f"{part.questions:,} answers: confidence {_percent(part.confidence)}, right {_percent(part.accuracy)}"
        parts.append(
            f"<g><title>{title}</title>"
            f'<line class="gap" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{ideal:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 + 5 * math.sqrt(part.questions / most):.1f}"/>'
            f'<rect class="count" x="{left + 2:.1f}" y="{_COUNTS_TOP + _COUNTS_HEIGHT - height:.1f}" '
            f'width="{_PLOT / len(calibration.bins) - 4:.1f}" height="{height:.1f}" rx="2"/></g>'
        )
    parts.append(f'<text x="{right}" y="{bottom + 33}" text-anchor="end">confidence, %</text>')
    parts.append(f'<text x="{_PLOT_LEFT + 6}" y="{_PLOT_TOP + 12}">right, %</text>')
    parts.append(f'<text x="{_PLOT_LEFT + 6}" y="{_COUNTS_TOP + 10}">answers</text>')
    size = f"0 0 {right + 12} {_COUNTS_TOP + _COUNTS_HEIGHT + 4}"
    label = f"accuracy over confidence of {calibration.questions:,} answers"
    return (
        f'<svg class="plot {colour_class(index)}" viewBox="{size}" width="100%" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(change: float) -> str:
    return f"{100 * change:+.1f}".replace("-", "−")


def _p_value(p_value: float) -> str:
    text = format_p_value(p_value)
    return escape(text.replace("<", "< ")) if text.startswith("<") else f"= {text}"


def take_parts(
    tables: Sequence[Mapping[str, Score]], differences: Sequence[Mapping[str, Difference]]
) -> list[tuple[str, Sequence[Score], Sequence[Difference]]]:
    """Turn tables by part into rows for `draw_parts`, the part with the lowest accuracy in the last file first."""
    order = sorted(tables[0], key=lambda name: (tables[-1][name].accuracy, name))
    return [(name, [table[name] for table in tables], [table[name] for table in differences]) for name in order]
