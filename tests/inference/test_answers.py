"""An answers file grows by whole lines, goes on where it was, and refuses what does not belong to it."""

import json
import re

import pytest

from llava.inference.answers import Answer, AnswersFile
from llava.inference.questions import Question

QUESTIONS = [Question(index, f"question {index}", ("a.jpg",)) for index in range(5)]
resource = pytest.importorskip("resource")  # not on Windows

ANSWER_ID = "521a8aa3527fb266d4352f"  # the same on every machine, in every run
RUN = {"model": "m", "temperature": 0.0}


def fill(path, count, run=RUN, **options):
    with AnswersFile(path, QUESTIONS, run, **options) as answers:
        answers.begin()
        for question in QUESTIONS[answers.done : count]:
            answers.write(Answer(question, f"ä {question.question_id}"), "model")
    return path.read_bytes()


def test_a_record_has_the_originals_keys():
    assert Answer(QUESTIONS[3], "yes").to_record("model") == {
        "question_id": 3,
        "prompt": "question 3",
        "text": "yes",
        "answer_id": ANSWER_ID,
        "model_id": "model",
        "metadata": {},
    }


def test_answer_ids_differ_by_question_and_model():
    ids = [Answer(question, "").to_record(model)["answer_id"] for question in QUESTIONS for model in ("a", "b")]
    assert len(set(ids)) == 10
    assert all(re.fullmatch("[0-9a-f]{22}", answer_id) for answer_id in ids)


def test_an_error_record_says_what_and_why():
    record = Answer(QUESTIONS[0], "", "image_missing", "image a.jpg not found").to_record("model")
    assert record["text"] == ""
    assert record["error"] == "image_missing"
    assert record["metadata"] == {"error": "image_missing", "message": "image a.jpg not found"}


@pytest.mark.parametrize("torn", [b"", b'{"question_id": 2, "pro', b'{"question_id": 2}', b"\xff\x00"])
@pytest.mark.parametrize("kept", range(6))
def test_continued_equals_uninterrupted(tmp_path, kept, torn):
    whole = fill(tmp_path / "whole.jsonl", 5)
    path = tmp_path / "answers.jsonl"
    fill(path, kept)
    with path.open("ab") as stream:
        stream.write(torn)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.done == kept
    assert fill(path, 5) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl",
        "answers.jsonl.run.json",
        "whole.jsonl",
        "whole.jsonl.run.json",
    ]


def test_opening_alone_changes_nothing(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    path.parent.mkdir()
    before = fill(path, 3) + b"torn"
    path.write_bytes(before)
    with AnswersFile(path, QUESTIONS, RUN, overwrite=True), AnswersFile(path, QUESTIONS, RUN):
        pass
    assert path.read_bytes() == before


def test_errors_of_earlier_answers_are_counted(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        answers.begin()
        answers.write(Answer(QUESTIONS[0], "", "image_missing", "no"), "model")
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.errors == {"image_missing": 1}


def test_another_run_is_refused_and_says_what_differs(tmp_path):
    path = tmp_path / "answers.jsonl"
    before = fill(path, 3)
    message = f"{path} belongs to another run (temperature was 0.0, is 1.0; beams was None, is 2); pass --overwrite to"
    with pytest.raises(ValueError, match=re.escape(message)):
        fill(path, 5, {"model": "m", "temperature": 1.0, "beams": 2})
    assert path.read_bytes() == before
    assert fill(path, 5, {"model": "n"}, overwrite=True) == fill(tmp_path / "other.jsonl", 5)


def test_answers_of_unknown_origin_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": 0}\n')
    with pytest.raises(ValueError, match=re.escape("answers.jsonl.run.json is not beside it; pass --overwrite")):
        AnswersFile(path, QUESTIONS, RUN)


def test_a_damaged_run_file_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path, 1)
    (tmp_path / "answers.jsonl.run.json").write_text("{")
    with pytest.raises(ValueError, match=r"answers.jsonl.run.json is damaged .*; pass --overwrite"):
        AnswersFile(path, QUESTIONS, RUN)


@pytest.mark.parametrize(
    "lines, message",
    [
        (b"{}\n", "line 1 is no answer (KeyError('question_id')); pass --overwrite"),
        (b"7\n", "line 1 is no answer (TypeError("),
        (b"x\n", "line 1 is no answer (JSONDecodeError("),
        (b'{"question_id": 1}\n', "line 1 answers question_id 1, where the questions have 0; pass --overwrite"),
        (
            b"".join(b'{"question_id": %d}\n' % i for i in range(6)),
            "line 6 answers question_id 5, where the questions have None",
        ),
    ],
)
def test_lines_that_are_not_this_runs_answers(tmp_path, lines, message):
    path = tmp_path / "answers.jsonl"
    fill(path, 0)
    path.write_bytes(lines)
    with pytest.raises(ValueError, match=re.escape(message)):
        AnswersFile(path, QUESTIONS, RUN)


def test_a_directory_in_the_place_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is no file; choose another --answers-file")):
        AnswersFile(tmp_path, QUESTIONS, RUN)


@pytest.mark.parametrize("room", [0, 1, 100, 300])
def test_a_write_that_fails_leaves_whole_lines(tmp_path, room):
    whole = fill(tmp_path / "whole.jsonl", 5)
    path = tmp_path / "answers.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        answers.begin()
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (room, limits[1])
        )  # what is beyond can't be written, as on a full disk
        try:
            with pytest.raises(OSError):
                for question in QUESTIONS:
                    answers.write(Answer(question, f"ä {question.question_id}"), "model")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert answers.done == len(path.read_bytes().splitlines()) == room // (len(whole) // 5)
    assert whole.startswith(path.read_bytes())
    assert fill(path, 5) == whole


def test_each_answer_is_readable_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        answers.begin()
        answers.write(Answer(QUESTIONS[0], "yes"), "model")
        assert json.loads(path.read_text())["text"] == "yes"
