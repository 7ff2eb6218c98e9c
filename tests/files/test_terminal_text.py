"""What programs print: no control characters, nothing of a hundred megabytes, no sizes of 0.0."""

import logging
import re
import sys

import pytest

from llava.files.terminal_text import (
    LINE_SHOWN,
    SHOWN,
    TerminalFormatter,
    describe_error,
    escape_controls,
    format_line,
    format_message,
    format_size,
    print_text,
    report_error,
    shorten,
    show,
    show_list,
)

EVERYTHING = "".join(map(chr, range(sys.maxunicode + 1)))


def test_no_character_that_a_terminal_obeys_is_left():
    kept = set(escape_controls(EVERYTHING))
    controls = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n", "\t"}
    turning = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
    assert not kept & (controls | turning)
    assert escape_controls(EVERYTHING).encode()  # no half of a surrogate pair


@pytest.mark.parametrize("text", ["a b\n\tc", "größe 犬 \u3000\xa0", "👨\u200d👩\u200d👧", "\\x1b"])
def test_text_that_people_write_stays(text):
    assert escape_controls(text) == text


def test_escapes_are_those_of_python():
    text = "\x1b]0;title\x07 \x9b31m \r \u202e \ud83d"
    assert escape_controls(text) == r"\x1b]0;title\x07 \x9b31m \r \u202e \ud83d"
    assert format_line("a\nb\tc") == r"a\nb\tc"


@pytest.mark.parametrize(
    "value", ["x", 7, None, [1, "a"], {"a": [1]}, "it's", True, 1.5, "a" * 300, "\x1b[31m", ["\ud83d"]]
)
def test_short_values_are_shown_as_they_are(value):
    assert show(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**8, ["x" * 10**6] * 10**4, {str(key): "y" * 999 for key in range(10**4)}, "\x1b" * 10**6,
        [[[[["z" * 10**6] * 9] * 9] * 9] * 9], list(range(10**6)),
    ],
)  # fmt: skip
def test_long_values_are_shortened(value):
    assert len(show(value)) < 4 * SHOWN
    assert escape_controls(show(value)) == show(value)


def test_messages_are_shortened_line_by_line():
    text = f"first {'x' * 10**7} end; fix it\nsecond"
    first, second = format_message(text).split("\n")
    assert len(first) < LINE_SHOWN + 100
    assert first.startswith("first xxx")
    assert re.search(r"x\.\.\. \([\d,]+ characters left out\) \.\.\.x+ end; fix it$", first)
    assert second == "second"
    assert shorten("abc", 3) == "abc"


@pytest.mark.parametrize("size", [0, 1, 2, 999, 1_000, 12_345, 10**6, 49_999_999, 10**9, 12_600_000_000, 10**15])
def test_no_size_is_written_as_zero(size):
    text = format_size(size)
    assert size == 0 or not re.match(r"0(\.0)? ", text)
    assert text == {
        0: "0 bytes", 1: "1 byte", 2: "2 bytes", 999: "999 bytes", 1_000: "1 kB", 12_345: "12.3 kB", 10**6: "1 MB",
        49_999_999: "50.0 MB", 10**9: "1 GB", 12_600_000_000: "12.6 GB", 10**15: "1000000 GB",
    }[size]  # fmt: skip


def test_errors_of_the_system_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a").read_text()
    assert describe_error(caught.value) == (
        f"{tmp_path / 'a'}: No such file or directory; check the path, and that it may be read and written"
    )
    assert describe_error(ValueError("bad")) == "bad"


def test_what_is_printed(capsys):
    report_error("a\x1b[31m\nb")
    report_error(ValueError("c\x07"))
    print_text("d\x1b", end="")
    print_text("\ud83d")
    out, err = capsys.readouterr()
    assert (out, err) == ("d\\x1b\\ud83d\n", "error: a\\x1b[31m\nb\nerror: c\\x07\n")


def test_log_records_are_printed_the_same_way():
    record = logging.LogRecord("llava", logging.WARNING, "f", 1, "%s holds %r", ("a\x1b[2J", "b"), None)
    assert TerminalFormatter("%(message)s").format(record) == "a\\x1b[2J holds 'b'"


def test_lists_show_their_first_values():
    assert show_list(["a", 1]) == "'a', 1"
    assert show_list({"a": 0, "b": 1, "c": 2}, most=2) == "'a', 'b', ..."
    assert show_list([]) == ""
