"""Markdown: texts are shown letter by letter, and stay in their cells."""

from __future__ import annotations

import html

from hypothesis import given
from hypothesis import strategies as st

from llava.files.markdown_text import escape_markdown, format_markdown_table


@given(st.text())
def test_texts_of_users_are_shown_letter_by_letter(text):
    shown = escape_markdown(text, most=10**6)
    assert not set(shown) & set("\n\r\t|`*<>[]~$\\")
    if text.isprintable():
        assert html.unescape(shown) == " ".join(text.split())


def test_a_table_has_a_line_for_each_row():
    rows = [("kind", "accuracy"), (escape_markdown("a|b"), "1")]
    assert format_markdown_table(rows) == "| kind | accuracy |\n| --- | --- |\n| a&#124;b | 1 |"
