"""One self-contained page from scores, gallery rows and thumbnails; pure: nothing is read but the page's own assets.

Nothing from a model, a user or a file name can act: in the markup it is escaped, in the data it is JSON without `<`,
and the content security policy runs only the page's own script, known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from llava.eval.accuracy import RIGHT_FROM, order_answer_types
from llava.eval.evaluation import Evaluation
from llava.eval.gallery import Row, RowAnswer
from llava.eval.report_plots import (
    clean_text,
    draw_confusion,
    draw_difference_card,
    draw_key,
    draw_parts,
    draw_reliability,
    draw_score_card,
    escape,
    take_parts,
)
from llava.eval.thumbnails import Thumbnail

_PAGE_SIZES = (24, 48, 96)
_DIGITS = 4  # of the numbers in the gallery


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes:
        title: heading of the page.
        names: of the answer files.
        evaluation: scores; None without true answers.
        rows: of the gallery.
        images: names of the images, each once.
        thumbnails: one for each of `images`.
        questions: number of questions, also those that the gallery leaves out.
        notes: sentences about what is missing or left out.
    """

    title: str
    names: tuple[str, ...]
    evaluation: Evaluation | None
    rows: tuple[Row, ...]
    images: tuple[str, ...]
    thumbnails: tuple[Thumbnail, ...]
    questions: int
    notes: tuple[str, ...] = ()


def render_page(page: Page) -> Iterator[str]:
    """Yield the page piece by piece; together they are one HTML document without any reference to other files."""
    style, script = _read_asset("report.css"), _read_asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(page.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )
    yield _draw_top(page)
    yield "<main>\n"
    if page.evaluation is not None:
        yield _draw_scores(page.evaluation)
        yield _draw_mistakes(page.evaluation)
        yield _draw_confidence(page.evaluation)
    yield _draw_gallery(page)
    yield "</main>\n"
    yield from _write_data(page)
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def encode_json(value: object) -> str:
    """Return JSON that can stand inside a script element: without `<`, `>` and `&`, and every text is Unicode."""
    text = clean_text(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read_asset(name: str) -> str:
    return resources.files("llava.eval").joinpath("report_assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _draw_top(page: Page) -> str:
    files = "".join(
        f'<span>{draw_key(index)}<span class="name">{escape(name)}</span></span>'
        for index, name in enumerate(page.names)
    )
    sections = [("gallery", "Gallery")]
    if page.evaluation is not None:
        has_confidence = any(file.calibration for file in page.evaluation.files.values())
        confidence = [("confidence", "Confidence")] if has_confidence else []
        sections = [("scores", "Scores"), ("confusions", "Mistakes"), *confidence, *sections]
    links = "".join(f'<li><a href="#{anchor}">{label}</a></li>' for anchor, label in sections)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in page.notes)
    return (
        '<header class="top"><a class="skip" href="#gallery">Skip to the gallery</a>'
        f'<h1>{escape(page.title)}</h1><p class="quiet">{page.questions:,} questions, {len(page.images):,} images</p>'
        f'<p class="legend">{files}</p>'
        f'<nav aria-label="Sections"><ul class="contents">{links}</ul></nav>{notes}</header>\n'
    )


def _draw_scores(evaluation: Evaluation) -> str:
    names = list(evaluation.files)
    tables = [file.table for file in evaluation.files.values()]
    changes = list(evaluation.comparisons.values())
    cards = [
        draw_score_card(index, name, table.overall, table.errors)
        for index, (name, table) in enumerate(zip(names, tables, strict=True))
    ]
    cards += [draw_difference_card(name, names[0], part.overall) for name, part in evaluation.comparisons.items()]
    overall = ("all", [table.overall for table in tables], [change.overall for change in changes])
    kinds = take_parts([table.by_kind for table in tables], [change.by_kind for change in changes])
    types = take_parts([table.by_answer_type for table in tables], [change.by_answer_type for change in changes])
    compared = (
        " A coloured difference is more than chance, by its interval and by McNemar's exact test; of many kinds one in "
        "twenty looks so by chance alone."
        if changes
        else ""
    )
    return (
        '<section id="scores"><h2>Scores</h2><p class="note">VQAv2 accuracy after its answer normalisation. The line '
        "around a dot is the 95 % interval (Wilson's, questions about one image counted as a group).</p>"
        f'<div class="cards">{"".join(cards)}</div></section>\n'
        f'<section id="kinds"><h2>By kind of question</h2>'
        f'<p class="note">Lowest accuracy first, in percent.{compared}</p>'
        f"{draw_parts('kind', names, kinds, overall)}</section>\n"
        f'<section id="types"><h2>By answer type</h2>{draw_parts("answer type", names, types, overall)}</section>\n'
    )


def _draw_mistakes(evaluation: Evaluation) -> str:
    figures = "".join(
        draw_confusion(index, name, file.confusion) for index, (name, file) in enumerate(evaluation.files.items())
    )
    return (
        '<section id="confusions"><h2>Which answers are taken for which</h2><p class="note">The most frequent true '
        "answers, normalised, against the given ones; number of questions, shaded by the share of the row.</p>"
        f'<div class="pair">{figures}</div></section>\n'
    )


def _draw_confidence(evaluation: Evaluation) -> str:
    figures = [
        draw_reliability(index, name, file.calibration)
        for index, (name, file) in enumerate(evaluation.files.items())
        if file.calibration is not None
    ]
    if not figures:
        return ""
    return (
        '<section id="confidence"><h2>Confidence</h2><p class="note">How often answers are right, by the probability '
        "the model gave them. On the dashed line it is right as often as it thinks; below, it is too sure.</p>"
        f'<div class="pair">{"".join(figures)}</div></section>\n'
    )


def _draw_gallery(page: Page) -> str:
    return (
        '<section id="gallery"><h2>Gallery</h2><p class="note keys"><kbd>/</kbd> searches, '
        "<kbd>←</kbd> <kbd>→</kbd> turn pages, a click on an image shows all its questions. "
        "The address keeps the filters.</p>"
        f"<noscript><p>The gallery needs JavaScript, which is switched off here.</p></noscript>{_draw_controls(page)}"
        f'{_draw_pager("above")}<ul class="gallery" id="tiles"></ul>'
        '<p class="empty" id="nothing" hidden>No question fits. Take a filter away, or search for something else.</p>'
        f"{_draw_pager('below')}</section>\n"
        '<dialog id="detail" aria-labelledby="detail-title"><div class="detail-head"><h2 id="detail-title"></h2>'
        '<button class="button" type="button" id="detail-close">Close</button></div><div class="detail">'
        '<div class="detail-pictures" id="detail-pictures"></div><div class="detail-rows" id="detail-rows"></div></div>'
        "</dialog>\n"
    )


def _draw_controls(page: Page) -> str:
    has_confidence = any(answer and answer.confidence is not None for row in page.rows for answer in row.answers)
    is_scored = page.evaluation is not None
    shown = [("all", "All", False)]
    shown += [("wrong", "Wrong", False), ("right", "Right", False)] if is_scored else []
    shown += [("error", "No answer", False)]
    shown += [("fixed", "Fixed", True), ("broken", "Broken", True)] if is_scored and len(page.names) > 1 else []
    shown += [("differ", "Different", True)] if len(page.names) > 1 else []
    choices = "".join(
        f'<label class="choice"><input type="radio" name="show" value="{value}"{" data-pair=1" if is_pair else ""}'
        f"{' checked' if value == 'all' else ''}><span>{label} <b></b></span></label>"
        for value, label, is_pair in shown
    )
    sorts = [("wrong", "wrong first")] if is_scored else []
    sorts += [("order", "as in the file")]
    sorts += [("unsure", "least confident first"), ("sure", "most confident first")] if has_confidence else []
    files = [(str(index), name) for index, name in enumerate(page.names)]
    kinds = [("", "all kinds"), *((str(index), name) for index, name in enumerate(_kinds(page)))]
    types = [("", "all types"), *((str(index), name) for index, name in enumerate(_types(page)))]
    sizes = [(str(size), str(size)) for size in _PAGE_SIZES]
    return (
        '<form class="controls" id="controls" aria-label="Filters"><div>'
        '<label class="grow">search<input type="search" id="search" name="q" autocomplete="off" '
        'placeholder="question, answer, image or id"></label>'
        f"{_draw_select('kind', 'kind', kinds)}{_draw_select('type', 'answer type', types) if is_scored else ''}"
        f"{_draw_select('file', 'right and wrong in', files, len(files) - 1) if len(files) > 1 else ''}"
        f"{_draw_select('sort', 'order', sorts)}{_draw_select('size', 'per page', sizes)}</div>"
        f'<div><fieldset aria-label="Show">{choices}</fieldset>'
        '<button class="button" type="reset">Reset</button></div></form>'
    )


def _draw_select(name: str, label: str, options: Sequence[tuple[str, str]], chosen: int = 0) -> str:
    listed = "".join(
        f'<option value="{escape(value)}"{" selected" if index == chosen else ""}>{escape(text)}</option>'
        for index, (value, text) in enumerate(options)
    )
    return f'<label>{label}<select name="{name}">{listed}</select></label>'


def _draw_pager(place: str) -> str:
    return (
        f'<nav class="pager" aria-label="Pages, {place}">'
        f"<output{' aria-live=polite' if place == 'above' else ''}></output>"
        '<button class="button" type="button" data-step="-1">Previous</button><label>page <input class="page-number" '
        'type="number" min="1" value="1"></label><span class="pages"></span>'
        '<button class="button" type="button" data-step="1">Next</button></nav>'
    )


def _kinds(page: Page) -> list[str]:
    return sorted({row.kind for row in page.rows})


def _types(page: Page) -> list[str]:
    return order_answer_types([row.answer_type for row in page.rows if row.answer_type is not None])


def _write_data(page: Page) -> Iterator[str]:
    """The thumbnails, one line each, and the rows."""
    yield '<script type="text/plain" id="thumbnails">'
    for index, thumbnail in enumerate(page.thumbnails):
        encoded = "" if thumbnail.data is None else base64.b64encode(thumbnail.data).decode()
        yield f"\n{encoded}" if index else encoded
    kinds = {name: index for index, name in enumerate(_kinds(page))}
    types = {name: index for index, name in enumerate(_types(page))}
    positions = {name: index for index, name in enumerate(page.images)}
    content = {
        "files": page.names,
        "rightFrom": RIGHT_FROM,
        "kinds": list(kinds),
        "types": list(types),
        "images": [
            [name, thumbnail.width, thumbnail.height, thumbnail.problem]
            for name, thumbnail in zip(page.images, page.thumbnails, strict=True)
        ],
        "rows": [
            [
                str(row.question_id),
                row.question,
                [positions[name] for name in row.images if name in positions],
                kinds[row.kind],
                None if row.answer_type is None else types[row.answer_type],
                row.truth,
                [_list_answer(answer) for answer in row.answers],
            ]
            for row in page.rows
        ],
    }
    yield f'</script>\n<script type="application/json" id="data">{encode_json(content)}</script>\n'


def _list_answer(answer: RowAnswer | None) -> list[object] | None:
    """The fields in the order in which the page's script reads them."""
    if answer is None:
        return None
    second = answer.runner_up
    return [
        answer.text,
        answer.accuracy,
        _rounded(answer.confidence),
        answer.error,
        None if second is None else second.text,
        None if second is None else _rounded(second.probability),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
