"""Answers of a table: one column, several, or lists of answers, of which the most frequent is trained on."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import repeat

from llava.data.table.grid import Problems
from llava.files.terminal_text import show

_RULE = "the most frequent one of a question is trained on, the first of equals; all are kept"
_ANSWER_KEY = "answer"
_NO_LIST = "is not a list of texts, as other rows have"
_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def join_answers(
    columns: Sequence[Sequence[str]], names: Sequence[str], problems: Problems, *, may_be_lists: bool = True
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the answers of each row, and what must be said of them; note in `problems` the rows without any.

    Empty cells beside filled ones are no answers.

    Args:
        columns: cells of the columns of answers: texts, or lists of texts or of `{"answer": text}`, as JSON or as
            Python prints them.
        names: of the columns.
        problems: collects what is wrong with rows.
        may_be_lists: whether any text may be a list.
    """
    lists, notes = [], []
    for cells, name in zip(columns, names, strict=True):
        has_lists = may_be_lists and any(map(str.startswith, cells, repeat("[")))
        found, is_listed = _split_lists(cells, name, problems) if has_lists else (list(zip(cells, strict=True)), False)
        lists.append(found)
        if is_listed:
            notes.append(f"{name} holds lists of answers: {_RULE}")
    if len(columns) > 1:
        notes.append(f"{len(columns)} columns hold answers: {_RULE}")
    if len(lists) == 1 and not notes:
        joined = lists[0]
        is_filled = all(map(str.strip, columns[0]))
    else:
        joined = [
            tuple(text for answers in row for text in answers if text.strip()) for row in zip(*lists, strict=True)
        ]
        is_filled = all(joined)
    refused = {row for row, texts in problems.items() if any(_NO_LIST in text for text in texts)}
    if not is_filled:
        verb = "is" if len(names) == 1 else "are"
        for row, answers in enumerate(joined):
            if not any(map(str.strip, answers)) and row not in refused:
                problems[row].append(f"{' and '.join(names)} {verb} empty")
    return joined, notes


def most_frequent(answers: Sequence[str]) -> str:
    """Return the most frequent of answers, of equally frequent ones the first; "" of none."""
    if len(answers) == 1:
        return answers[0]
    return Counter(answers).most_common(1)[0][0] if answers else ""


def _split_lists(cells: Sequence[str], name: str, problems: Problems) -> tuple[list[tuple[str, ...]], bool]:
    """Return the answers in each cell, and whether the column holds lists: if most of its filled cells are lists.

    A text such as "[12, 40]" is no list of answers, for they are texts.
    """
    parsed = [_parse_list(cell) for cell in cells]
    if 2 * sum(found is not None for found in parsed) < sum(map(bool, cells)):
        return list(zip(cells, strict=True)), False
    for row, (cell, found) in enumerate(zip(cells, parsed, strict=True)):
        if found is None and cell:
            problems[row].append(f"{name} {show(cell)} {_NO_LIST}")
    return [found or () for found in parsed], True


def _parse_list(cell: str) -> tuple[str, ...] | None:
    """Return the answers in a cell; None if it is not a list of texts."""
    if not cell.startswith("["):
        return None
    for parse, written in ((json.loads, cell), (ast.literal_eval, _add_commas(cell))):
        try:
            values = parse(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        texts = [value.get(_ANSWER_KEY) if isinstance(value, dict) else value for value in values]
        return tuple(texts) if all(isinstance(text, str) for text in texts) else None
    return None


def _add_commas(cell: str) -> str:
    """Return a list with commas between its texts; an array that numpy printed has none, and Python joins them."""
    between = _LITERAL.sub("", cell)
    return cell if "," in between or "{" in between else _LITERAL.sub(lambda text: f"{text[0]},", cell)
