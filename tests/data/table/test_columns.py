"""What is found out about a table: its columns, image names, ids and answers; what is said, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.table.answers import most_frequent
from llava.data.table.bad_rows import TableError
from llava.data.table.image_names import build_image_namer, needs_number
from llava.data.table.options import TableOptions
from llava.data.table.read import Table, read_table
from llava.data.table.write import format_questions_jsonl, format_training_json, question, training_record

NO_IDS = "no column 'question_id': the ids of the questions are row numbers, from 0"
RULE = "the most frequent one of a question is trained on, the first of equals; all are kept"


@pytest.fixture
def read(tmp_path):
    """A function that reads a CSV file of these lines."""

    def read_lines(*lines: str, **options: object) -> Table:
        path = tmp_path / "t.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_table(path, TableOptions(**options))

    return read_lines


@pytest.fixture
def refusal(read, tmp_path):
    """A function that returns why a CSV file of these lines is refused, without its path."""

    def refuse(*lines: str, **options: object) -> str:
        with pytest.raises(TableError) as caught:
            read(*lines, **options)
        return str(caught.value).replace(str(tmp_path / "t.csv"), "t.csv")

    return refuse


def test_file_names_are_taken_as_they_are(read):
    table = read("image,question,answer", "фото 1.jpg,q,a", "sub/2.JPG,q,b")
    assert [row.image for row in table.rows] == ["фото 1.jpg", "sub/2.JPG"]
    assert [row.image_id for row in table.rows] == ["фото 1.jpg", "sub/2.JPG"]
    assert [row.question_id for row in table.rows] == [0, 1]
    assert table.notes == [NO_IDS, "image holds file names ('фото 1.jpg'), which are taken as they are"]


def test_numbers_are_ids_of_coco_images(read):
    table = read("image_id,question,question_id,answer", "7,q,1,a")
    assert (table.rows[0].image, table.rows[0].image_id) == ("COCO_val2014_000000000007.jpg", 7)
    assert table.notes == []


def test_a_template_takes_any_text(read):
    table = read("image,question,answer", "a 1,q,x", "007,q,x", "8,q,x", image_name="new/{id}.png")
    assert [row.image for row in table.rows] == ["new/a 1.png", "new/007.png", "new/8.png"]
    assert table.notes[1] == "image has leading zeros ('007'), which stay in the file names"


def test_a_template_of_numbers_takes_numbers_alone(refusal):
    assert refusal("image,question,answer", "a,q,x", "8,q,x", image_name="{id:04d}.png").split("\n")[1:2] == [
        "  line 2: image 'a' is not a whole number of at most 18 digits"
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/a/1.jpg", "'/a/1.jpg' leads out of the image folder; name the file inside the folder, such as '1.jpg'"),
        ("../1.jpg", "'../1.jpg' leads out of the image folder; name the file inside the folder, such as '1.jpg'"),
        ("C:\\x\\1.jpg", "'C:\\\\x\\\\1.jpg' leads out of the image folder; name the file inside the folder, such as "
         "'1.jpg'"),
        ("~/1.jpg", "'~/1.jpg' leads out of the image folder; name the file inside the folder, such as '1.jpg'"),
        ("https://x.org/1.jpg", "'https://x.org/1.jpg' is an address; download the image, and name its file"),
        ("data:image/png;base64", "'data:image/png;base64' is an address; download the image, and name its file"),
        ("sub/", "'sub/' is a folder; name a file"),
        ("  ", "is empty"),
        ("12", "'12' has no file ending, as other rows have; pass --image_name '{id}' if that is right"),
    ],
)  # fmt: skip
def test_a_name_that_is_no_file_in_the_folder(refusal, name, problem):
    message = refusal("image,question,answer", "1.jpg,q,a", "2.jpg,q,a", f"{name},q,a")
    assert message.split("\n")[:2] == ["t.csv: 1 bad row", f"  line 4: image {problem}"]


def test_names_without_ending_ask_for_a_template(refusal, read):
    lines = ("image,question,answer", "photo1,q,a", "photo2,q,a")
    assert refusal(*lines) == (
        "t.csv: image holds neither whole numbers nor file names with an ending (such as 'photo1'); pass --image_name "
        "'{id}.jpg' if that file is called 'photo1.jpg', --image_name '{id}' if it has no ending, or name another "
        "column with --image_column"
    )
    assert [row.image for row in read(*lines, image_name="{id}").rows] == ["photo1", "photo2"]


def test_folders_as_windows_writes_them(read):
    table = read("image,question,answer", "a\\1.jpg,q,a")
    assert table.rows[0].image == "a/1.jpg"
    assert table.notes[-1] == "folders in image are divided by \\, which is written as / into the file names"


def test_the_default_columns_and_their_order(read):
    table = read("answers,file_name,question,image", "a,x.jpg,q,1.jpg")
    assert (table.rows[0].image, table.rows[0].answer) == ("1.jpg", "a")
    table = read("answers,file_name,question", "a,x.jpg,q")
    assert table.rows[0].image == "x.jpg"


def test_a_named_id_column_must_be_there(refusal):
    assert refusal("image,question,answer", "1.jpg,q,a", question_id="id") == (
        "t.csv: no column 'id'; the header has 'image', 'question', 'answer'; name the right one with "
        "--question_id_column"
    )


def test_ids_as_texts(read, refusal):
    table = read("image,question,question_id,answer", "1.jpg,q,a1,x", "1.jpg,q,a2,x")
    assert [row.question_id for row in table.rows] == ["a1", "a2"]
    assert table.notes[-1] == "question_id holds texts ('a1'): ids are kept as texts"
    table = read("image,question,question_id,answer", "1.jpg,q,007,x", "1.jpg,q,8,x")
    assert [row.question_id for row in table.rows] == ["007", "8"]
    assert table.notes[-1] == "question_id has leading zeros: ids are kept as texts"
    message = refusal("image,question,question_id,answer", "1.jpg,q,a,x", "1.jpg,q,b,x", "1.jpg,q,a,x", "1.jpg,q,,x")
    assert message.split("\n")[1:3] == [
        "  line 4: question_id a is already on line 2",
        "  line 5: question_id is empty",
    ]


def test_several_columns_of_answers(read, refusal):
    columns = ("a1", "a2", "a3")
    table = read("image,question,a1,a2,a3", "1.jpg,q,no,yes,yes", "1.jpg,q,x,,", "1.jpg,q,b,a,", answer=columns)
    assert [row.answers for row in table.rows] == [("no", "yes", "yes"), ("x",), ("b", "a")]
    assert [row.answer for row in table.rows] == ["yes", "x", "b"]
    assert table.notes[-1] == f"3 columns hold answers: {RULE}"
    message = refusal("image,question,a1,a2,a3", "1.jpg,q,,,", answer=columns)
    assert message.split("\n")[1] == "  line 2: a1 and a2 and a3 are empty"


@pytest.mark.parametrize(
    "cell",
    [
        '["no", "yes", "yes"]',
        "['no', 'yes', 'yes']",  # as pandas writes a list
        "['no' 'yes'\n 'yes']",  # as pandas writes an array
        '[{"answer": "no", "answer_id": 1}, {"answer": "yes"}, {"answer": "yes"}]',
    ],
)
def test_lists_of_answers(read, cell):
    quoted = cell.replace('"', '""')
    table = read("image,question,answers", f'1.jpg,q,"{quoted}"', '1.jpg,q,"[""one""]"')
    assert [(row.answer, row.answers) for row in table.rows] == [("yes", ("no", "yes", "yes")), ("one", ("one",))]
    assert table.notes[-1] == f"answers holds lists of answers: {RULE}"


@pytest.mark.parametrize("answers", [["it's", "b' 'c"], ["x"], ['say "a" "b"', "y"]])
def test_lists_as_python_prints_them(read, answers):
    quoted = str(answers).replace('"', '""')
    assert read("image,question,answer", f'1.jpg,q,"{quoted}"').rows[0].answers == tuple(answers)


@pytest.mark.parametrize("text", ["[12, 40]", "[sic]", "[", "[]x", "[1.5]"])
def test_other_brackets_are_text(read, text):
    row = read("image,question,answer", f'1.jpg,q,"{text}"').rows[0]
    assert (row.answer, row.answers) == (text, (text,))


def test_a_text_among_lists_and_an_empty_list(refusal):
    lists = ['1.jpg,q,"[""a"", ""b""]"'] * 3
    message = refusal("image,question,answer", *lists, "1.jpg,q,yes", "1.jpg,q,[]")
    assert message.split("\n")[1:3] == [
        "  line 5: answer 'yes' is not a list of texts, as other rows have",
        "  line 6: answer is empty",
    ]


def test_a_list_with_the_image_mark_is_refused(refusal):
    message = refusal("image,question,answer", '1.jpg,q,"[""a"", ""<image>""]"')
    assert message.split("\n")[1] == "  line 2: answer contains '<image>', which would stand for a second image"


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1))
def test_the_most_frequent_answer_of_equals_the_first(answers):
    counts = Counter(answers)
    best = [text for text in answers if counts[text] == max(counts.values())]
    assert most_frequent(answers) == best[0]


def test_records_and_questions_are_the_text_of_the_files(read):
    lines = ("image,question,question_id,a1,a2,kind", 'é "1".jpg,q,id-1,x,y,why', "2.jpg,p,id-2,z,,what")
    table = read(*lines, answer=("a1", "a2"), keep=("kind",))
    text = "".join(format_training_json(table.rows, ["kind"]))
    assert json.loads(text) == [training_record(row, ["kind"]) for row in table.rows]
    assert [list(record) for record in json.loads(text)] == [
        ["id", "image", "conversations", "question_id", "answers", "kind"],
        ["id", "image", "conversations", "question_id", "kind"],
    ]
    assert json.loads(text)[0]["id"] == "0"
    lines = "".join(format_questions_jsonl(table.rows, ["kind"])).splitlines()
    assert [json.loads(line) for line in lines] == [question(row, ["kind"]) for row in table.rows]
    assert json.loads(lines[0]) == {"question_id": "id-1", "image": 'é "1".jpg', "text": "q", "kind": "why"}


@pytest.mark.parametrize(("template", "is_needed"), [("{id}.jpg", False), ("{id:d}", True), ("{id!r}", True)])
def test_which_templates_need_a_number(template, is_needed):
    assert needs_number(template) == is_needed


def test_a_template_names_different_ids_differently():
    assert build_image_namer("{id}.jpg")("0007") == "0007.jpg"
    assert build_image_namer("{id:05d}.jpg")("0007") == "00007.jpg"


def test_rows_without_any_text_are_no_rows(read):
    table = read("image,question,answer", "1.jpg,q,a", ",,", "2.jpg,q,a", ",,", ",")
    assert [(row.index, row.line) for row in table.rows] == [(0, 2), (1, 4)]


def test_the_delimiter_is_the_one_that_gives_the_named_columns(read, refusal):
    assert read("image;question;answer", "1.jpg;one, two;a").rows[0].question == "one, two"
    assert read("image,question,a;b", "1.jpg,q,x", answer="a;b").rows[0].answer == "x"
    assert read("image|question|answer", "1.jpg|q|x", delimiter="|").rows[0].answer == "x"
    assert read("sep=|", "image|question|answer", "1.jpg|q|x").rows[0].line == 3
    message = refusal("image;question;answer", "1.jpg;q;x;y")
    assert message.split("\n")[1] == (
        "  line 2: 4 fields where the header has 3; a semicolon inside a text needs quotes around the text"
    )


def test_path_objects(tmp_path: Path):
    (tmp_path / "t.tsv").write_text("image\tquestion\tanswer\n1.jpg\tq\ta\n")
    assert read_table(tmp_path / "t.tsv").notes[0] == "columns are divided by tabs"
