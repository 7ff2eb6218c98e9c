"""A journal's complete lines are found whatever the content and wherever blocks end."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava.inference.batch import journal as journal_module
from llava.inference.batch.journal import Journal, read_lines


@given(st.text("ab\n", max_size=30), st.integers(1, 8))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_complete_lines_and_their_offsets(tmp_path, monkeypatch, text, block):
    content, path = text.encode(), tmp_path / "journal"
    path.write_bytes(content)
    monkeypatch.setattr(journal_module, "_BLOCK", block)
    lines = content.split(b"\n")[:-1]
    found = list(read_lines(path))
    assert [line for _, line in found] == lines
    assert all(content[offset:].startswith(line + b"\n") for offset, line in found)
    opened = Journal(path)
    assert opened.size == sum(len(line) + 1 for line in lines)
    opened.begin()
    opened.append(b"new")
    opened.close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in [*lines, b"new"])


def test_a_missing_file_has_no_lines(tmp_path):
    assert list(read_lines(tmp_path / "none")) == []


@pytest.mark.parametrize("end", [b"\r\n", b"\x0b\n", b"\xe2\x80\xa8\n"])
def test_lines_end_with_line_feeds_alone(tmp_path, end):
    (tmp_path / "journal").write_bytes(b"a" + end)
    assert list(read_lines(tmp_path / "journal")) == [(0, b"a" + end[:-1])]
