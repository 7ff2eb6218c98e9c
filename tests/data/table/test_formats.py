"""Tables in every format are read as pandas and openpyxl read them; missing cells are refused, row by row."""

import csv
import datetime
import io
import re
from pathlib import Path

import openpyxl
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions
from llava.data.table.read import Table, read_header, read_table

COLUMNS = ["image", "question", "question_id", "answer", "note"]
LETTERS = "abcXYZ 0123456789.,;:'\"!?-()абвгдеёжзЯЮ№"
TEXT = st.text(LETTERS, min_size=1, max_size=12).filter(str.strip)
NAME = st.text("abcфото 12-_/", min_size=1, max_size=8).filter(
    lambda text: not re.match(r"/|\s*$", text) and ".." not in text
)
IMAGE = NAME.map(lambda text: f"{text.strip('/')}x.jpg")
ID = st.integers(0, 10**15 - 1)


@st.composite
def frames(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT, missing: bool = True) -> pandas.DataFrame:
    """A table whose columns are in any order and whose texts may be missing, as pandas has it: all are texts."""
    count = draw(st.integers(1, 8))
    cell = st.one_of(text, text, text, st.just("")) if missing else text
    return pandas.DataFrame(
        {
            "image": [draw(IMAGE) for _ in range(count)],
            "question": [draw(cell) for _ in range(count)],
            "question_id": [str(number) for number in draw(st.lists(ID, min_size=count, max_size=count, unique=True))],
            "answer": [draw(cell) for _ in range(count)],
            "note": [draw(st.one_of(text, st.just(""))) for _ in range(count)],
        }
    )[draw(st.permutations(COLUMNS))]


def check(path: Path, frame: pandas.DataFrame, options: TableOptions, lines: list[int]) -> Table | None:
    """Read a table and compare it with a frame of texts; the rows of `lines` that lack a text must be refused."""
    missing = [
        (line, [name for name in ("question", "answer") if not row[name].strip()])
        for line, (_, row) in zip(lines, frame.iterrows(), strict=True)
    ]
    if any(names for _, names in missing):
        with pytest.raises(TableError) as caught:
            read_table(path, options)
        unit = "line" if path.suffix == ".csv" else "row"
        expected = [
            f"  {unit} {line}: {'; '.join(f'{name} is empty' for name in names)}" for line, names in missing if names
        ]
        assert [text for text in str(caught.value).split("\n") if text.startswith("  ")] == expected
        return None
    table = read_table(path, options)
    assert [row.line for row in table.rows] == lines
    assert [row.image for row in table.rows] == list(frame["image"])
    assert [row.question for row in table.rows] == list(frame["question"])
    assert [row.question_id for row in table.rows] == [int(text) for text in frame["question_id"]]
    assert [(row.answer, row.answers) for row in table.rows] == [(text, (text,)) for text in frame["answer"]]
    assert [row.extras for row in table.rows] == [(text,) for text in frame["note"]]
    return table


@settings(max_examples=200, deadline=None)
@given(
    frame=frames(st.text(LETTERS + "\n", min_size=1, max_size=12).filter(str.strip)),
    delimiter=st.sampled_from([",", ";", "\t"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "cp1251", "utf-16", "koi8-r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    is_declared=st.booleans(),
)
def test_csv_as_pandas_reads_it(tmp_path_factory, frame, delimiter, encoding, quoting, end, is_declared):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    text = frame.replace("№", "N", regex=True).to_csv(sep=delimiter, quoting=quoting, lineterminator=end, index=False)
    start = "sep=;\n" if is_declared and delimiter == ";" else ""
    path.write_bytes((start + text).encode(encoding))
    read = {"sep": delimiter, "encoding": encoding, "dtype": str, "keep_default_na": False}
    expected = pandas.read_csv(path, skiprows=1 if start else 0, **read)
    given = None if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding
    lines = lines_of(text, delimiter, is_declared=bool(start))
    table = check(path, expected, TableOptions(keep=("note",), encoding=given), lines)
    if table is not None:
        said = {",": [], ";": ["columns are divided by semicolons"], "\t": ["columns are divided by tabs"]}
        assert [note for note in table.notes if note.startswith("columns are divided")] == said[delimiter]


def lines_of(text: str, delimiter: str, *, is_declared: bool) -> list[int]:
    """The line on which each record begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    next(reader)
    lines, line = [], reader.line_num + 1
    for _ in reader:
        lines.append(line + is_declared)
        line = reader.line_num + 1
    return lines


SHEET_TEXT = st.text(LETTERS.replace("=", ""), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    frame=frames(SHEET_TEXT),
    are_numbers=st.booleans(),
    blank_before=st.integers(0, 2),
    blank_after=st.integers(0, 30),
    gap=st.booleans(),
)
def test_xlsx_as_openpyxl_reads_it(tmp_path_factory, frame, are_numbers, blank_before, blank_after, gap):
    path = tmp_path_factory.mktemp("xlsx") / "t.xlsx"
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    for _ in range(blank_before):
        sheet.append([])
    sheet.append(list(frame.columns))
    for number, (_, row) in enumerate(frame.iterrows()):
        if gap and number == 1:
            sheet.append([])
        cells = {**row, "question_id": int(row["question_id"]) if are_numbers else row["question_id"]}
        sheet.append([None if cells[name] == "" else cells[name] for name in frame.columns])
    for number in range(blank_after):
        sheet.cell(sheet.max_row + 1 + number, 1).font = openpyxl.styles.Font(bold=True)
    workbook.save(path)
    rows = [
        (number, ["" if cell is None else str(cell) for cell in cells])
        for number, cells in enumerate(openpyxl.load_workbook(path).active.iter_rows(values_only=True), start=1)
        if any(cell is not None for cell in cells)
    ]
    expected = pandas.DataFrame([cells for _, cells in rows[1:]], columns=rows[0][1])
    check(path, expected, TableOptions(keep=("note",)), [number for number, _ in rows[1:]])


@settings(max_examples=100, deadline=None)
@given(frame=frames(), are_numbers=st.booleans(), kind=st.sampled_from(["plain", "category", "null"]))
def test_parquet_as_pandas_writes_it(tmp_path_factory, frame, are_numbers, kind):
    path = tmp_path_factory.mktemp("parquet") / "t.parquet"
    written = frame.astype({"question_id": "int64"}) if are_numbers else frame
    if kind == "category":
        written = written.astype({"answer": "category"})
    elif kind == "null":
        written = written.assign(question=written["question"].replace("", None), note=written["note"].replace("", None))
    written.to_parquet(path, index=False)
    expected = pandas.read_parquet(path).astype(object).where(lambda table: table.notna(), "").astype(str)
    check(path, expected, TableOptions(keep=("note",)), list(range(1, len(frame) + 1)))


def save_sheet(path: Path, rows: list[list[object]], title: str = "Sheet") -> Path:
    workbook = openpyxl.Workbook()
    workbook.active.title = title
    for row in rows:
        workbook.active.append(row)
    workbook.save(path)
    return path


HEADER = ["image", "question", "question_id", "answer"]


def test_cells_of_a_spreadsheet_are_written_as_people_see_them(tmp_path):
    cells = [7, 7.0, 0.5, True, datetime.date(2024, 5, 1), datetime.datetime(2024, 5, 1, 10, 3), "007", -2, 1e14]
    rows = [["1.jpg", "q", number, cell] for number, cell in enumerate(cells)]
    table = read_table(save_sheet(tmp_path / "t.xlsx", [HEADER, *rows]))
    texts = ["7", "7", "0.5", "TRUE", "2024-05-01", "2024-05-01 10:03:00", "007", "-2", "100000000000000"]
    assert [row.answer for row in table.rows] == texts
    assert table.notes[1:] == [
        "answer holds dates or times in 2 rows, written as '2024-05-01'; format the column as text for another form",
        "answer holds truth values in 1 rows, written as 'TRUE' and 'FALSE'",
    ]


def test_long_numbers_of_a_spreadsheet_are_refused_and_long_texts_are_kept(tmp_path):
    path = save_sheet(tmp_path / "t.xlsx", [HEADER, ["1.jpg", "q", 1234567890123456, "a"]])
    with pytest.raises(TableError, match=r"row 2: question_id 1234567890123456 is a number of more than 15 digits, of"):
        read_table(path)
    path = save_sheet(tmp_path / "t.xlsx", [HEADER, ["1.jpg", "q", "1234567890123456", "a"]])
    assert read_table(path).rows[0].question_id == 1234567890123456


def test_a_formula_without_value_and_an_error_count_as_empty(tmp_path):
    path = save_sheet(tmp_path / "t.xlsx", [HEADER, ["1.jpg", "=1+1", 1, "a"], ["1.jpg", "q", 2, "b"]])
    with pytest.raises(TableError) as caught:
        read_table(path)
    assert str(caught.value) == (
        f"{path}: 1 bad row\n  row 2: question is empty\nA formula without a calculated value, and an error value such "
        "as #N/A, count as empty: open the table in its program, and save it there.\n"
        "Correct or remove these rows in the table, then run again."
    )


def test_sheets(tmp_path):
    path = save_sheet(tmp_path / "t.xlsx", [["hidden"]], title="a")
    workbook = openpyxl.load_workbook(path)
    for title, answer in (("Вопросы", "x"), ("other", "y")):
        sheet = workbook.create_sheet(title)
        sheet.append(HEADER)
        sheet.append(["1.jpg", "q", 1, answer])
    workbook.create_sheet("empty")
    workbook["a"].sheet_state = "hidden"
    workbook.active = 1
    workbook.save(path)
    table = read_table(path)
    assert table.rows[0].answer == "x"
    assert table.notes[0] == "the first sheet, 'Вопросы', is read; --sheet chooses another ('a', 'other', 'empty')"
    table = read_table(path, TableOptions(sheet="other"))
    assert (table.rows[0].answer, table.notes[0][:5]) == ("y", "image")
    assert read_header(path, TableOptions(sheet="a")) == ["hidden"]
    with pytest.raises(TableError, match=r"no sheet 'x'; it has 'a', 'Вопросы', 'other', 'empty'; choose one"):
        read_table(path, TableOptions(sheet="x"))
    with pytest.raises(TableError, match=r"the sheet 'empty' is empty; a table needs a header and rows$"):
        read_table(path, TableOptions(sheet="empty"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", b"", r"not a readable .xlsx table \(.*\); it is empty; save it again$"),
        (
            "t.xlsx",
            b"PK\x03\x04rest",
            r"it is damaged, protected by a password, or of another kind; open it",
        ),
        ("t.xlsx", b"image,question", r"it is no spreadsheet: a text table is named .csv, and is read by that name$"),
        ("t.xls", b"<html><table>", r"it is a web page \(HTML\); the download went wrong, fetch the file itself$"),
        ("t.parquet", b"image,question", r"not a readable .parquet table \(.*\); export it again$"),
        ("t.arrow", b"image,question", r"not a readable .arrow table \(.*\); export it again$"),
        ("t.json", b"[]", r"not a table, but JSON; export the table as CSV, with the columns' names first$"),
        ("t.zip", b"PK\x03\x04rest", r"not a CSV table, but a zip archive or an .xlsx table; unpack or export it$"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message):
        read_table(tmp_path / name)


def test_a_spreadsheet_named_csv_is_named(tmp_path):
    save_sheet(tmp_path / "t.xlsx", [HEADER]).rename(tmp_path / "t.csv")
    with pytest.raises(TableError, match=r"not a CSV table, but a table of another kind; rename it so"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["t.csv", "t.xlsx", "t.parquet"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(TableError, match=rf"{name}: no such file; give the path of the table$"):
        read_table(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t.csv", {"sheet": "x"}, r"is a text table, on which --sheet has no effect; leave it out$"),
        ("t.xlsx", {"encoding": "cp1251"}, r"is an .xlsx table, on which --encoding has no effect; leave it out$"),
        ("t.parquet", {"delimiter": ";", "sheet": "x"},
         r"is a .parquet table, on which --delimiter and --sheet have no effect; leave it out$"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(tmp_path, name, options, message):
    with pytest.raises(TableError, match=message):
        read_table(tmp_path / name, TableOptions(**options))


@pytest.mark.parametrize(
    ("module", "name"), [("python_calamine", "t.xlsx"), ("pyarrow", "t.parquet"), ("pyarrow", "t.arrow")]
)
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / name).touch()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(TableError, match=r' tables need .*; run: pip install "llava\[tables\]", or save the table as'):
        read_table(tmp_path / name)
