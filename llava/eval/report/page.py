"""The report as one self-contained HTML page, rendered by Jinja with autoescape; reads nothing but its own assets.

No text from a model, a user or a file name can run: the environment escapes every value in the markup, the data is JSON
without `<`, and the content security policy admits the page's own script alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava.eval.report.gallery import Row, RowAnswer
from llava.eval.report.thumbnails import Thumbnail
from llava.eval.scoring.accuracy import OTHER_ANSWERS, RIGHT_FROM, order_answer_types
from llava.eval.scoring.evaluate import Evaluation, Score
from llava.eval.scoring.intervals import Difference
from llava.eval.scoring.text import describe_difference, format_bounds, format_p_value
from llava.files.terminal_text import shorten

TEXT_SHOWN = 2000  # characters of a question, an answer or a name in the page
_DIGITS = 4  # of a probability in the gallery
_PAGE_CANNOT_HOLD = re.compile("[\0\ud800-\udfff]")

_Part = tuple[str, Sequence[Score], Sequence[Difference]]
"""A line of a table: name, score of each file, difference of each file but the first to the first."""


@dataclass(frozen=True)
class Page:
    """Content of a report.

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
    kinds = sorted({row.kind for row in page.rows})
    types = order_answer_types([row.answer_type for row in page.rows if row.answer_type is not None])
    yield from (
        make_environment()
        .get_template("report.html.jinja")
        .generate(
            title=page.title,
            names=page.names,
            questions=page.questions,
            images=page.images,
            notes=page.notes,
            evaluation=page.evaluation,
            **({} if page.evaluation is None else _arrange_scores(page.evaluation)),
            has_confidence=any(answer and answer.confidence is not None for row in page.rows for answer in row.answers),
            kinds=kinds,
            types=types,
            policy=(
                f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
                "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
            ),
            style=Markup(style),
            script=Markup(script),
            thumbnails=map(Markup, _encode_thumbnails(page.thumbnails)),
            data=Markup(encode_json(_collect_data(page, kinds, types))),
        )
    )


def make_environment() -> Environment:
    """Return the environment of the templates: every value is escaped, and cut where it is long."""
    environment = Environment(
        loader=PackageLoader("llava.eval.report", "assets"),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bounds": format_bounds,
        "p_value": _p_value,
        "percent": lambda share: f"{100 * share:.1f}",
        "place": lambda share: f"{100 * share:.2f}%",
        "signed": lambda change: f"{100 * change:+.1f}".replace("-", "−"),
        "thousands": lambda count: f"{count:,}",
        "verdict": describe_difference,
    }
    environment.globals |= {
        "numbered": lambda texts: [(str(index), text) for index, text in enumerate(texts)],
        "other_answers": OTHER_ANSWERS,
    }
    return environment


def encode_json(value: object) -> str:
    """Return JSON that can stand inside a script element: without `<`, `>` and `&`, and every text is Unicode."""
    text = clean_text(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cut_text(text: str) -> str:
    """Return a text as the page shows it: of one with more than `TEXT_SHOWN` characters the start and the end."""
    return shorten(text, TEXT_SHOWN)


def clean_text(text: str) -> str:
    """Return text with a replacement mark for NUL and halves of surrogate pairs, which no page can hold."""
    return _PAGE_CANNOT_HOLD.sub("\ufffd", text)


def _clean(value: Any) -> Any:
    return clean_text(cut_text(value)) if type(value) is str else value  # markup and numbers stay as they are


def _p_value(p_value: float) -> str:
    text = format_p_value(p_value)
    return text.replace("<", "< ") if text.startswith("<") else f"= {text}"


def _read_asset(name: str) -> str:
    return resources.files("llava.eval.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _arrange_scores(evaluation: Evaluation) -> dict[str, Any]:
    """Scores and differences as lines of tables, and whether any file has probabilities."""
    tables = [file.table for file in evaluation.files.values()]
    changes = list(evaluation.comparisons.values())
    return {
        "overall": ("all", [table.overall for table in tables], [change.overall for change in changes]),
        "kind_scores": _order_parts([table.by_kind for table in tables], [change.by_kind for change in changes]),
        "type_scores": _order_parts(
            [table.by_answer_type for table in tables], [change.by_answer_type for change in changes]
        ),
        "calibrated": any(file.calibration for file in evaluation.files.values()),
    }


def _order_parts(scores: Sequence[Mapping[str, Score]], changes: Sequence[Mapping[str, Difference]]) -> list[_Part]:
    """Lines of a table, the part with the lowest accuracy in the last file first."""
    order = sorted(scores[0], key=lambda name: (scores[-1][name].accuracy, name))
    return [(name, [part[name] for part in scores], [part[name] for part in changes]) for name in order]


def _encode_thumbnails(thumbnails: Sequence[Thumbnail]) -> Iterator[str]:
    """JPEG files in base64, one line each; an empty one where there is no thumbnail."""
    for index, thumbnail in enumerate(thumbnails):
        encoded = "" if thumbnail.data is None else base64.b64encode(thumbnail.data).decode()
        yield f"\n{encoded}" if index else encoded


def _collect_data(page: Page, kinds: Sequence[str], types: Sequence[str]) -> dict[str, object]:
    """The gallery for the page's script; rows hold numbers of kinds, answer types and images."""
    kind_numbers, type_numbers, image_numbers = (
        {name: number for number, name in enumerate(names)} for names in (kinds, types, page.images)
    )
    return {
        "files": list(map(cut_text, page.names)),
        "rightFrom": RIGHT_FROM,
        "kinds": list(map(cut_text, kinds)),
        "types": list(map(cut_text, types)),
        "images": [
            [cut_text(name), thumbnail.width, thumbnail.height, thumbnail.problem]
            for name, thumbnail in zip(page.images, page.thumbnails, strict=True)
        ],
        "rows": [
            [
                cut_text(str(row.question_id)),
                cut_text(row.question),
                [image_numbers[name] for name in row.images if name in image_numbers],
                kind_numbers[row.kind],
                None if row.answer_type is None else type_numbers[row.answer_type],
                [(cut_text(text), count) for text, count in row.truth],
                [_list_answer(answer) for answer in row.answers],
            ]
            for row in page.rows
        ],
    }


def _list_answer(answer: RowAnswer | None) -> list[object] | None:
    """The fields in the order in which the page's script reads them."""
    if answer is None:
        return None
    second = answer.runner_up
    return [
        None if answer.text is None else cut_text(answer.text),
        answer.accuracy,
        _rounded(answer.confidence),
        None if answer.error is None else cut_text(answer.error),
        None if second is None else cut_text(second.text),
        None if second is None else _rounded(second.probability),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)
