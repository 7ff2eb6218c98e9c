"""Question files are checked as a whole, and split exactly."""

import csv
import hashlib
import json
import re
import tracemalloc

import pytest

from llava.data.table.bad_rows import TableError
from llava.data.table.options import TableOptions
from llava.inference.batch.questions import (
    Question,
    digest_questions,
    read_question_file,
    read_questions,
    split_chunk,
)


def write(tmp_path, content):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_what_a_question_file_may_hold(tmp_path):
    lines = [
        '\ufeff{"question_id": 1, "image": "a.jpg", "text": "why?", "kind": "extra"}\r\n',
        "\n",
        '{"question_id": "1", "image": null, "text": "\u2028 no line end"}\n',
        '{"question_id": 2, "text": ""}\n',
        '{"question_id": 3, "image": ["a.jpg", "b.jpg"], "text": "<image> 🦙 <image>"}',
    ]
    assert read_questions(write(tmp_path, "".join(lines))) == [
        Question(1, "why?", ("a.jpg",)),
        Question("1", "\u2028 no line end"),
        Question(2, ""),
        Question(3, "<image> 🦙 <image>", ("a.jpg", "b.jpg")),
    ]


def test_an_empty_file_has_no_questions(tmp_path, caplog):
    assert read_questions(write(tmp_path, "")) == []
    assert caplog.messages == [f"{tmp_path / 'questions.jsonl'} has no questions"]


@pytest.mark.parametrize(
    "line, problem",
    [
        (
            '{"question_id": 1, "text": "a"',
            "line 2: not valid JSON (Expecting ',' delimiter, column 31)",
        ),
        ("[1]", "line 2: not a JSON object with question_id, image and text"),
        ('{"image": "a"}', "line 2: question_id and text missing"),
        ('{"id": 1, "question": "a"}', "line 2: question_id and text missing; it has 'id', 'question'"),
        (
            '{"question_id": 1, "text": "a", "image_path": "a.jpg"}',
            "line 2: it has 'image_path' and no 'image'; name the file under 'image', or null for text alone",
        ),
        (
            "{'question_id': 1}",
            "line 2: not valid JSON (single quotes, as Python prints them; JSON wants double quotes",
        ),
        ('{"question_id": true, "text": "a"}', "line 2: question_id is True, not a whole number or a text"),
        ('{"question_id": 1.5, "text": "a"}', "line 2: question_id is 1.5, not a whole number or a text"),
        ('{"question_id": 1, "text": 7}', "line 2: text is 7, not a text"),
        (
            '{"question_id": 1, "text": "\\ud800"}',
            "line 2: text holds half of a surrogate pair, which is not a character",
        ),
        (
            '{"question_id": 1, "text": "a", "image": [1]}',
            "line 2: image is [1], not a file name or a list of file names",
        ),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, b'{"question_id": 9, "text": "good"}\n' + line + b"\n")
    with pytest.raises(TableError, match=re.escape(f"{path}: 1 bad row\n  {problem}")):
        read_questions(path)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, b'{"question_id": 9, "text": "good"}\n{"question_id": 1, "text": "\xff"}\n')
    with pytest.raises(TableError, match=r"is not in UTF-8 \(byte 0xff at offset \d+, line 2\); save it in UTF-8"):
        read_questions(path)


ROWS = [{"question_id": 1, "image": "a.jpg", "text": "wörter?"}, {"question_id": "b", "images": ["a.jpg"], "text": "x"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_list", [False, True])
def test_lists_and_objects_over_lines_and_utf16_are_read_and_reported_once(tmp_path, caplog, encoding, indent, is_list):
    text = json.dumps(ROWS, indent=indent) if is_list else "\n".join(json.dumps(row, indent=indent) for row in ROWS)
    found = read_questions(write(tmp_path, text.encode(encoding)))
    assert found == [Question(1, "wörter?", ("a.jpg",)), Question("b", "x", ("a.jpg",))]
    notes = [entry.getMessage().rpartition(", and is read")[0] for entry in caplog.records]
    expected = ["UTF-16, not UTF-8"] if encoding != "utf-8" else []
    if is_list or indent:
        expected.append("not an object per line")
    assert [note.endswith(end) for note, end in zip(notes, expected, strict=True)] == [True] * len(expected)


def test_rows_of_a_list_are_named_by_their_number(tmp_path):
    path = write(tmp_path, json.dumps([*ROWS, {"question_id": 3}], indent=1))
    with pytest.raises(TableError, match=r"1 bad row\n  question 3: text missing"):
        read_questions(path)


def test_training_records_are_no_questions(tmp_path):
    """A line alone in its file is a line, not a list of rows in an object."""
    rows = [{"messages": [{"role": "user", "content": "What?"}], "images": ["a.jpg"]}, {"conversations": [{}]}]
    for row, keys in zip(rows, ("'messages', 'images'", "'conversations'"), strict=True):
        with pytest.raises(TableError) as caught:
            read_questions(write(tmp_path, json.dumps(row) + "\n"))
        expected = f"  line 1: question_id and text missing; it has {keys}, a training record; a question is "
        assert str(caught.value).split("\n")[1] == expected + "{question_id, image, text}"


def test_commas_between_lines(tmp_path):
    with pytest.raises(TableError, match=r"line 1: not valid JSON .a comma after the object; with an object per line"):
        read_questions(write(tmp_path, ",\n".join(json.dumps(row) for row in ROWS)))


def test_a_table_is_read_as_the_lines_that_are_written_of_it(tmp_path, load_program, caplog):
    rows = [("фото 1.jpg", "Что это?"), ("фото 1.jpg", "Где\tон?"), ("b/c.png", "Что это?"), ("b/c.png", "Что это?")]
    table, lines = tmp_path / "t.csv", tmp_path / "q.jsonl"
    with table.open("w", encoding="cp1251", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([("image", "вопрос"), *rows])
    words = ["--mode", "infer", "--input", table, "--output", lines, "--encoding", "cp1251"]
    assert load_program("task_data_preprocessing.py").main([*map(str, words), "--question_column", "вопрос"]) == 0
    questions = read_questions(table, TableOptions(question="вопрос", encoding="cp1251"))
    assert questions == read_questions(lines)
    assert questions == [Question(key, text, (image,)) for key, (image, text) in enumerate(rows)]
    assert [message for message in caplog.messages if "row numbers" in message and str(table) in message]


def test_a_bad_row_of_a_table_is_named_by_line_and_column(tmp_path):
    (tmp_path / "t.csv").write_text("image,question\na.jpg,What?\nb.jpg,\n")
    with pytest.raises(TableError, match=r"t.csv: 1 bad row\n  line 3: question is empty\n"):
        read_questions(tmp_path / "t.csv")


def test_a_text_file_holds_lines_or_a_table(tmp_path):
    lines, table = tmp_path / "lines.txt", tmp_path / "table.txt"
    lines.write_text('\ufeff{"question_id": 0, "image": "a.jpg", "text": "What?"}\n')
    table.write_text("image\tquestion\na.jpg\tWhat?\n")
    assert read_questions(lines) == read_questions(table) == [Question(0, "What?", ("a.jpg",))]


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"is a folder; name a file"):
        read_questions(tmp_path)


def test_texts_with_parts_of_prompts_are_reported_once_for_each_kind(tmp_path, caplog):
    texts = ["what?", "USER: <image>\nwhat? ASSISTANT:", "<ImageHere> so", "<ImageHere> no", "a</s>", "Is USER: here?"]
    rows = [{"question_id": key, "text": text} for key, text in enumerate(texts)]
    found = read_questions(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [question.text for question in found] == texts
    notes = [record.getMessage().partition("(")[2] for record in caplog.records]
    assert notes == [
        "prompt_in_text): question_id 1 holds 'USER:' and 'ASSISTANT:', as a whole prompt does",
        "unknown_image_mark): question_id 2 holds '<ImageHere>', which is read as text",
        "special_token): question_id 4 holds '</s>', which becomes the special token of that name",
    ]


def test_an_object_that_holds_the_questions_is_refused(tmp_path):
    with pytest.raises(TableError, match=r"holds an object with the key 'data', not a list of rows; write the list un"):
        read_questions(write(tmp_path, json.dumps({"data": ROWS})))


def test_ids_and_whole_lines_may_repeat(tmp_path):
    rows = [("a", "what?"), ("a", "who?"), ("a", "what?"), ("b", "what?"), ("a", "what?")]
    path = write(tmp_path, "".join(json.dumps({"question_id": key, "text": text}) + "\n" for key, text in rows))
    found = read_questions(path)
    assert [(question.question_id, question.text) for question in found] == rows
    assert [question.repeat for question in found] == [0, 0, 1, 0, 2]
    assert len(set(found)) == len(rows)


@pytest.mark.parametrize("name", ["textvqa/llava_textvqa_val_v051_ocr.jsonl", "MME/llava_mme.jsonl"])
def test_the_files_of_textvqa_and_mme_are_read(shared_path, name):
    path = shared_path(f"eval/{name}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = read_questions(path)
    assert [(question.question_id, question.text) for question in found] == [
        (row["question_id"], row["text"]) for row in rows
    ]
    assert len({question.question_id for question in found}) < len(set(found)) == len(rows)


def test_all_bad_lines_are_counted(tmp_path):
    with pytest.raises(TableError, match=r"25 bad rows[\s\S]*  line 20: [\s\S]*  and 5 more"):
        read_questions(write(tmp_path, "x\n" * 25))


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(
        TableError, match=re.escape(f"{path} can't be read (No such file or directory); check --question")
    ):
        read_questions(path)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 10])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 12])
def test_chunks_are_an_exact_split(count, num_chunks):
    questions = [Question(index, "a") for index in range(count)]
    chunks = [split_chunk(questions, num_chunks, index) for index in range(num_chunks)]
    assert [question for chunk in chunks for question in chunk] == questions
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


@pytest.mark.parametrize("num_chunks, index", [(0, 0), (2, 2), (2, -1)])
def test_a_chunk_that_does_not_exist(num_chunks, index):
    with pytest.raises(ValueError, match=f"chunk {index} of {num_chunks} does not exist; chunks are counted from 0"):
        split_chunk([], num_chunks, index)


@pytest.mark.parametrize("count", [0, 1, 1_023, 1_024, 1_025, 2_048, 5_000])
def test_the_digest_is_that_of_one_json_list(count):
    """So that runs that were begun by an earlier version go on."""
    questions = [
        Question(key if key % 2 else str(key), f"wörter {key}?", ("a.jpg",) * (key % 3)) for key in range(count)
    ]
    text = json.dumps([(question.question_id, question.images, question.text) for question in questions])
    assert digest_questions(questions) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_reading_takes_less_than_a_kilobyte_a_question(tmp_path):
    """At its peak, with the file itself; what is kept takes less than half of that."""
    count = 20_000
    images = [f"COCO_val2014_{key * 7919 % 4700:012d}.jpg" for key in range(count)]
    texts = [f"Is it {key} {'x' * 40}?" for key in range(count)]
    rows = ({"question_id": key, "image": images[key], "text": texts[key]} for key in range(count))
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        questions = read_questions(path)
        kept, peak = tracemalloc.get_traced_memory()
        assert len(questions) == count
        assert kept <= 450 * count
        assert peak <= 1_000 * count
        digest_questions(questions)
        assert tracemalloc.get_traced_memory()[1] - kept <= 1_000 * count
    finally:
        tracemalloc.stop()
    assert len({id(question.images) for question in questions}) == 4700  # names are shared


def test_the_digest_is_of_ids_images_texts_and_order():
    one, two = Question(1, "a"), Question(2, "a")
    digests = [
        [one, two],
        [two, one],
        [one],
        [Question("1", "a"), two],
        [Question(1, "b"), two],
        [Question(1, "a", ("x",)), two],
    ]
    assert len({digest_questions(questions) for questions in digests}) == len(digests)
    assert digest_questions([one, two]) == digest_questions([Question(1, "a"), two])


def test_ids_repeat_unless_they_must_not(tmp_path):
    lines = [{"question_id": key, "text": "a"} for key in (7, "x", "x", "007")]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [question.question_id for question in read_questions(path)] == [7, "x", "x", "007"]
    message = (
        f"{path}: 2 bad rows\n  line 3: question_id 'x' is already on line 2\n"
        "  line 4: question_id '007' is already on line 1, as 7\n"
        "Give each question an id of its own, or leave --unique-ids out."
    )
    with pytest.raises(TableError, match=re.escape(message)):
        read_question_file(path, unique_ids=True)


def test_ids_of_a_table_repeat_unless_they_must_not(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,question,question_id\na.jpg,What?,7\na.jpg,Who?,7\n")
    assert read_questions(path) == [Question(7, "What?", ("a.jpg",)), Question(7, "Who?", ("a.jpg",))]
    with pytest.raises(TableError, match=r"t.csv: 1 bad row\n  line 3: question_id 7 is already on line 2\nGive each"):
        read_question_file(path, unique_ids=True)
