"""Question files are checked as a whole, and split exactly."""

import re

import pytest

from llava.data.table import TableError
from llava.inference.questions import Question, digest_questions, read_questions, split_chunk


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


def test_an_empty_file_has_no_questions(tmp_path):
    assert read_questions(write(tmp_path, "")) == []


@pytest.mark.parametrize(
    "line, problem",
    [
        (
            '{"question_id": 1, "text": "a"',
            "line 2: no valid JSON (Expecting ',' delimiter: line 1 column 31 (char 30))",
        ),
        ("[1]", "line 2: no JSON object with question_id, image and text"),
        ('{"image": "a"}', "line 2: question_id and text missing"),
        ('{"question_id": true, "text": "a"}', "line 2: question_id is True, not a whole number or a text"),
        ('{"question_id": 1.5, "text": "a"}', "line 2: question_id is 1.5, not a whole number or a text"),
        ('{"question_id": 1, "text": 7}', "line 2: text is 7, not a text"),
        ('{"question_id": 1, "text": "\\ud800"}', "line 2: text holds half of a surrogate pair, which is no character"),
        (
            '{"question_id": 1, "text": "a", "image": [1]}',
            "line 2: image is [1], not a file name or a list of file names",
        ),
        ('{"question_id": 9, "text": "a"}', "line 2: question_id 9 is already on line 1"),
        (b'{"question_id": 1, "text": "\xff"}', "line 2: the text is not UTF-8"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, b'{"question_id": 9, "text": "good"}\n' + line + b"\n")
    with pytest.raises(TableError, match=re.escape(f"{path}: 1 bad row\n  {problem}\nCorrect or remove these lines")):
        read_questions(path)


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
