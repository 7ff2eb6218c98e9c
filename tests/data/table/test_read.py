"""A table becomes rows byte for byte, or is refused with every bad row counted."""

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.table.bad_rows import BadRows, TableError
from llava.data.table.image_names import COCO_IMAGE_NAME, build_image_namer
from llava.data.table.options import TableOptions
from llava.data.table.read import TableRow, read_header, read_table
from llava.data.table.write import (
    check_images,
    format_questions_jsonl,
    format_training_json,
    split_by_image,
)

HEADER = b"image_id,question,question_id,answer\n"
WAY_OUT = "\nCorrect or remove these rows in the table, then run again."


@pytest.fixture(scope="module", autouse=True)
def _working_directory(tmp_path_factory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("table"))
    yield
    os.chdir(before)


def read_content(content: bytes, **options: object) -> list[TableRow]:
    """The rows of a file t.csv with this content."""
    Path("t.csv").write_bytes(content)
    may_repeat_ids = options.pop("may_repeat_ids", False)
    return read_table("t.csv", TableOptions(**options), may_repeat_ids=may_repeat_ids).rows


def refusal(content: bytes, **options: object) -> str:
    """The message with which a table is refused."""
    with pytest.raises(TableError) as caught:
        read_content(content, **options)
    return str(caught.value)


def bad_rows(content: bytes, **options: object) -> str:
    """The listed rows of the message, without its first and last line."""
    message = refusal(HEADER + content, **options)
    assert message.endswith(WAY_OUT)
    return message.removesuffix(WAY_OUT)


def test_reads_the_columns_by_name_in_any_order():
    content = b",answer,question_id,kind,question,image_id\n7,yes,51,is there,Is there railing?,5\n"
    assert read_content(content, keep=["kind", ""]) == [
        TableRow(index=0, line=2, image_id=5, image="COCO_val2014_000000000005.jpg", question="Is there railing?",
                 question_id=51, answer="yes", answers=("yes",), extras=("is there", "7"))
    ]  # fmt: skip


def test_other_column_names_and_no_answers():
    columns = {"image": "img", "question": "q", "question_id": "id", "has_answers": False}
    rows = read_content(b"img,q,id\n007,What?,1\n", **columns)
    assert rows == [TableRow(0, 2, 7, "COCO_val2014_000000000007.jpg", "What?", 1, "", (), ())]


@pytest.mark.parametrize(
    "answer", ["n/a", "null", "NaN", "None", "yes ", " yes", "two  spaces", "1.0", "007", "é\u2028"]
)
def test_text_stays_text(answer):
    [row] = read_content(HEADER + f"1, What  is it? ,2,{answer}\n".encode())
    assert (row.question, row.answer) == (" What  is it? ", answer)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_byte_order_mark_line_ends_and_empty_lines(bom, end):
    lines = [HEADER.strip(), b'1,"multi\nline, ""x""",2,yes', b"", b"3,q,4,no", b""]
    rows = read_content(bom + end.join(lines))
    assert [(row.line, row.question, row.answer) for row in rows] == [(2, 'multi\nline, "x"', "yes"), (5, "q", "no")]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(
    lambda text: text.strip() and "<image>" not in text
)
NUMBER = st.integers(0, 10**18 - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBER, TEXT, NUMBER, TEXT), min_size=1, unique_by=lambda row: row[2]))
def test_whatever_csv_writes_comes_back(table):
    stream = io.StringIO()
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerows([["image_id", "question", "question_id", "answer"], *table])
    rows = read_content(stream.getvalue().encode())
    assert [(row.image_id, row.question, row.question_id, row.answer) for row in rows] == table
    lines = io.StringIO(stream.getvalue(), newline="").readlines()
    assert all(lines[row.line - 1].startswith(f'"{row.image_id}","') for row in rows)

    assert json.loads("".join(format_training_json(rows))) == [
        {
            "id": str(index),
            "image": f"COCO_val2014_{image_id:012d}.jpg",
            "conversations": [{"from": "human", "value": "<image>\n" + question}, {"from": "gpt", "value": answer}],
            "question_id": question_id,
        }
        for index, (image_id, question, question_id, answer) in enumerate(table)
    ]
    lines = "".join(format_questions_jsonl(rows)).split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"question_id": question_id, "image": f"COCO_val2014_{image_id:012d}.jpg", "text": question}
        for image_id, question, question_id, _ in table
    ]


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_read_or_refused(content):
    for table in (content, HEADER + content):
        try:
            assert read_content(table)
        except TableError as error:
            assert str(error).startswith("t.csv: ")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b"1,,2,yes", "question is empty"),
        (b"1, \t,2,yes", "question is empty"),
        (b"1,q,2,", "answer is empty"),
        (b"1,q,2,\xc2\xa0", "answer is empty"),
        (b"1.5,q,2,yes", "image_id '1.5' is not a whole number of at most 18 digits"),
        (b"1,q,-2,yes", "question_id '-2' is not a whole number of at most 18 digits"),
        (b"1,q,,yes", "question_id '' is not a whole number of at most 18 digits"),
        (b"\xd9\xa3,q,2,yes", "image_id '\u0663' is not a whole number of at most 18 digits"),
        (b"1,q,1234567890123456789,yes",
         "question_id '1234567890123456789' is not a whole number of at most 18 digits"),
        (b"1,<image> q,2,yes", "question contains '<image>', which would stand for a second image"),
        (b"1,q,2,<image>", "answer contains '<image>', which would stand for a second image"),
        (b"x, ,2,", "image_id 'x' is not a whole number of at most 18 digits; question is empty; answer is empty"),
        (b"1,q,2", "3 fields where the header has 4; fill the row up"),
        (b"1,q, really,2,yes", "5 fields where the header has 4; a comma inside a text needs quotes around the text"),
        (b"1,q,9,yes", "question_id 9 is already on line 2"),
        (b"1,q,009,yes", "question_id 9 is already on line 2"),
    ],
)  # fmt: skip
def test_bad_row(row, problem):
    assert bad_rows(b"1,good,9,yes\n" + row + b"\n1,good,8,yes\n") == f"t.csv: 1 bad row\n  line 3: {problem}"


def test_ignored_answers_may_be_bad():
    assert len(read_content(HEADER + b"1,q,1,\n1,q,2,<image>\n", has_answers=False)) == 2
    assert bad_rows(b"1,<image>,1,\n", has_answers=False).startswith("t.csv: 1 bad row\n  line 2: question contains")


def test_all_bad_rows_are_counted_and_twenty_listed():
    content = b"".join(b'%d,"two\nlines",%d,%s\n' % (n, n, b"" if n % 2 else b"yes") for n in range(50))
    lines = bad_rows(content).split("\n")
    assert lines[0] == "t.csv: 25 bad rows"
    assert lines[1:21] == [f"  line {2 + 2 * n}: answer is empty" for n in range(1, 40, 2)]
    assert lines[21:] == ["  and 5 more"]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'1,"good",1,yes\n2,"open,2,no\n3,q,3,no\n', 3, "unexpected end of data, line 4"),
        (b'1,"good",1,yes\n2,"open,2,no\n3,"q",3,no\n', 3, "',' expected after '\"', line 4"),
        (b'1,"good\nwith ""lines""",1,"yes\n2,q,2,no\n', 3, "unexpected end of data, line 4"),
        (b'1,"good",1,yes\r\n\r\n2,"a"b,2,no\r\n', 4, "',' expected after '\"', line 4"),
        (b'1,q,1,yes\n2,"' + b"long line\n" * 20_000 + b'",3,no\n', 3,
         "field larger than field limit (131072), line 13110"),
    ],
)  # fmt: skip
def test_unbalanced_quote_names_the_line_where_the_field_opened(content, line, reason):
    assert bad_rows(content) == (
        f"t.csv: 1 bad row\n  line {line}: unbalanced quote: the quoted field that begins here is not closed properly "
        f'({reason}); a quote inside a quoted field is written twice (""); later rows were not read'
    )


def test_quote_inside_an_unquoted_field_is_text():
    [row] = read_content(HEADER + b'1,Is it 5" long?,2,"5"" long"\n')
    assert (row.question, row.answer) == ('Is it 5" long?', '5" long')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: the file is empty; a table needs a header and rows"),
        (b"\n\n", "t.csv: the file is empty; a table needs a header and rows"),
        (HEADER, "t.csv: the table has a header but no rows; fill it or choose another file"),
        (b"image_id,q,question_id,answer\n1,q,2,yes\n",
         "t.csv: no column 'question'; the header has 'image_id', 'q', 'question_id', 'answer'; "
         "name the right one with --question_column"),
        ("фото,вопрос\n1,q\n".encode(), "t.csv: no columns 'image_id', 'question', 'answer'; the header has 'фото', "
         "'вопрос'; name the right ones with --image_column, --question_column and --answer_column"),
        (b"image_id,question,question_id,answer,answer\n",
         "t.csv: 2 columns are called 'answer'; rename one, or choose with --answer_column"),
        (b'image_id,"question\n',
         "t.csv: the header has an unbalanced quote (unexpected end of data); correct its quotes"),
        (b"a;b,c\n", "t.csv: the header may be divided by commas (columns 'a;b', 'c'), or by semicolons (columns 'a', "
         "'b,c'); pass --delimiter comma or --delimiter semicolon"),
        (HEADER + b"1,caf\xe9,2,yes\n", "t.csv: not UTF-8: byte 0xe9 at offset 42 (line 2); it looks like cp1252 "
         "('café'): pass --encoding cp1252"),
        (b"\xef\xbb\xbf" + HEADER + b"1,caf\xe9", "t.csv: not UTF-8: byte 0xe9 at offset 45 (line 2); it looks like "
         "cp1252 ('café'): pass --encoding cp1252"),
        (HEADER + "1,Какой цвет?,2,да\n".encode("cp1251"), "t.csv: not UTF-8: byte 0xca at offset 39 (line 2); it "
         "looks like cp1251 ('Какой цвет да'): pass --encoding cp1251"),
        (HEADER + "1,圖片中的車,2,yes\n".encode("big5"), "t.csv: not UTF-8: byte 0xb9 at offset 39 (line 2); save the "
         "table as 'CSV UTF-8', or pass --encoding if you know its encoding, for example: --encoding cp1252"),
        (HEADER + "1,Какой цвет?,2,да".encode() + b"\xff\n", "t.csv: not UTF-8: byte 0xff at offset 66 (line 2); the "
         "rest is UTF-8: correct this text in the table, and save it as 'CSV UTF-8'"),
        ("é,\n".encode("utf-16-le"), "t.csv: not UTF-8: byte 0xe9 at offset 0 (line 1); it looks like utf-16-le "
         "('é'): pass --encoding utf-16-le"),
        ("a,\n".encode("utf-16-le"), "t.csv: not UTF-8 text: zero byte at offset 1 (line 1); it looks like utf-16-le "
         "('a'): pass --encoding utf-16-le"),
    ],
)  # fmt: skip
def test_unusable_table(content, message):
    assert refusal(content) == message


def test_missing_kept_column_names_its_flag():
    assert refusal(HEADER + b"1,q,2,yes\n", keep=["kind"]).endswith("name the right one with --keep")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(TableError, match=r"none.csv: no such file; give the path of the table$"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(TableError, match=r" is a folder; give the path of the table; it holds no table$"):
        read_header(tmp_path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(TableError, match=r" is a folder; give the path of the table, such as a.csv in it$"):
        read_header(tmp_path)


def test_header(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfa,"b,c",\n')
    assert read_header(tmp_path / "t.csv") == ["a", "b,c", ""]


def test_bad_rows_in_another_unit():
    bad = BadRows("x.json", unit="record")
    bad.raise_if_any("never")
    bad.add(3, "wrong")
    with pytest.raises(TableError, match=re.escape("x.json: 1 bad row\n  record 3: wrong\nCorrect it.")):
        bad.raise_if_any("Correct it.")


def make_rows(image_ids: list[int]) -> list[TableRow]:
    return [TableRow(n, n + 2, i, f"{i}.jpg", "q", n, "a", ("a",), ()) for n, i in enumerate(image_ids)]


def test_training_json_text():
    image = build_image_namer(COCO_IMAGE_NAME)("104406")
    rows = [TableRow(0, 2, 104406, image, 'Is there "railing"?\n', 104406001, "é", ("é",), ("x",))]
    text = "".join(format_training_json(rows, keep=["kind"]))
    assert text == (
        '[\n{"id": "0", "image": "COCO_val2014_000000104406.jpg", "conversations": [{"from": "human", "value": '
        '"<image>\\nIs there \\"railing\\"?\\n"}, {"from": "gpt", "value": "é"}], "question_id": 104406001, '
        '"kind": "x"}\n]\n'
    )


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2000])
def test_training_json_is_whole_at_the_borders_of_its_pieces(count):
    text = "".join(format_training_json(make_rows(list(range(count)))))
    assert [record["id"] for record in json.loads(text)] == [str(row) for row in range(count)]
    assert text.count("\n") == count + 2


def test_image_names():
    assert build_image_namer(COCO_IMAGE_NAME)("7") == "COCO_val2014_000000000007.jpg"
    assert build_image_namer(COCO_IMAGE_NAME)("1234567890123") == "COCO_val2014_1234567890123.jpg"
    assert build_image_namer("train/{id}.png")("7") == "train/7.png"


@pytest.mark.parametrize("template", ["{name}.jpg", "{}.jpg", "{id", "{id:s}", "{id.x}", "{id[0]}"])
def test_image_name_that_cannot_be_filled_in(template):
    with pytest.raises(ValueError, match=r"cannot be filled in \(.*\); write it like 'COCO_val2014_\{id:012d\}.jpg'$"):
        build_image_namer(template)


def test_image_name_without_id():
    with pytest.raises(ValueError, match=r"^'a.jpg' gives every image one name; write it like 'COCO_val2014_"):
        build_image_namer("a.jpg")


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2).filter(lambda ids: len(set(ids)) > 1),
    st.floats(0.001, 0.999),
    st.integers(),
)
def test_split_keeps_images_together(image_ids, share, seed):
    rows = make_rows(image_ids)
    train, val = split_by_image(rows, share, seed)
    assert sorted(train + val) == rows
    assert train == sorted(train)
    assert val == sorted(val)
    train_images, val_images = ({row.image_id for row in side} for side in (train, val))
    assert not train_images & val_images
    assert len(val_images) == min(max(round(share * len(set(image_ids))), 1), len(set(image_ids)) - 1)
    assert split_by_image(rows[::-1], share, seed)[1][::-1] == val


def test_split_is_the_same_on_every_machine():
    rows = make_rows(list(range(10)))
    assert [row.image_id for row in split_by_image(rows, 0.3, 0)[1]] == [4, 7, 9]
    assert [row.image_id for row in split_by_image(rows, 0.3, 1)[1]] == [4, 7, 8]


def test_split_refusals():
    with pytest.raises(ValueError, match=r"^the validation share must lie between 0 and 1, not 1.0$"):
        split_by_image(make_rows([1, 2]), 1.0, 0)
    with pytest.raises(
        TableError, match=r"^a validation share needs at least 2 images, the table has 1; leave the share out$"
    ):
        split_by_image(make_rows([1, 1]), 0.5, 0)


def test_missing_images_are_listed_once_each(tmp_path):
    for name in ("1.jpg", "3.JPEG"):
        (tmp_path / name).touch()
    there = "its folder has 2 images, such as '1.jpg'"
    rows = make_rows([1, 2, 1, 2, 3])
    with pytest.raises(TableError) as caught:
        check_images(rows, str(tmp_path), "t.csv")
    assert str(caught.value) == (
        f"t.csv: 2 bad rows\n  line 3: image '2.jpg' not found under {tmp_path}, {there}\n"
        f"  line 6: image '3.jpg' not found under {tmp_path}, but {tmp_path / '3.JPEG'} is there\n"
        "Put the images there, or correct --check_images or --image_name."
    )
    check_images(make_rows([1]), str(tmp_path), "t.csv")


def test_real_table(shared_path):
    path = shared_path("data/Train_Qs.csv")
    rows = read_table(path).rows
    with path.open(encoding="utf-8", newline="") as stream:
        expected = list(csv.DictReader(stream))
    assert len(rows) == 66_668
    assert [(str(r.image_id), r.question, str(r.question_id), r.answer) for r in rows] == [
        (e["image_id"], e["question"], e["question_id"], e["answer"]) for e in expected
    ]
    assert rows[14364] == TableRow(
        14364, 14366, 361830, "COCO_val2014_000000361830.jpg", "Why does the stop sign look pixelated?", 361830000,
        "n/a", ("n/a",), (),
    )  # fmt: skip
    assert len({row.image_id for row in rows}) == 15_703


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x1f\x8b\x08\0", "a gzip archive; unpack it"),
        (b"PK\x03\x04\x14", "a zip archive or an .xlsx table; unpack or export it"),
        (b"PAR1\x15\x04", "a table of another kind; rename it so that it ends in .parquet"),
        (b"\xd0\xcf\x11\xe0", "a table of another kind; rename it so that it ends in .xls"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; fetch the file itself with git lfs pull"),
        (b"<!DOCTYPE html>", "a web page (HTML); the download went wrong, fetch the file itself"),
        (b'[{"image_id": 1}]', "JSON; export the table as CSV, with the columns' names first"),
    ],
)
def test_other_kinds_of_files_are_named(content, kind):
    with pytest.raises(TableError) as caught:
        read_content(content)
    assert str(caught.value) == f"t.csv: not a CSV table, but {kind}"


def test_ids_may_repeat_where_they_are_no_keys():
    rows = read_content(HEADER + b"1,a,9,yes\n1,b,9,no\n", may_repeat_ids=True)
    assert [(row.question_id, row.question, row.answer) for row in rows] == [(9, "a", "yes"), (9, "b", "no")]
