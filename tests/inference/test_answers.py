"""An answers file grows by whole lines, goes on where it was, and refuses what does not belong to it."""

import contextlib
import itertools
import json
import os
import re
import signal

import pytest

from llava.inference.answers import Answer, AnswersFile
from llava.inference.questions import Question

QUESTIONS = [Question(index, f"question {index}", ("a.jpg",)) for index in range(5)]
resource = pytest.importorskip("resource")  # not on Windows

ANSWER_ID = "521a8aa3527fb266d4352f"  # the same on every machine, in every run
RUN = {"model": "m", "temperature": 0.0}


def fill(path, count, run=RUN, **options):
    """Answer up to `count` questions, the last ones first, and return the file if it is complete, else the journal."""
    with AnswersFile(path, QUESTIONS, run, **options) as answers:
        answers.begin()
        for question in [question for question in reversed(QUESTIONS) if question.question_id not in answers.done_ids]:
            if answers.done < count:
                answers.write(Answer(question, f"ä {question.question_id}"), "model")
        if answers.done == len(QUESTIONS):
            answers.finish()
            return path.read_bytes()
        return answers.journal_path.read_bytes()


def journal(path):
    return path.with_name(f"{path.name}.journal")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_scores_go_into_the_metadata():
    assert Answer(QUESTIONS[0], "yes", scores={"logprob": -0.5}).to_record("model")["metadata"] == {"logprob": -0.5}


TORN = [b"", b'{"question_id": 2, "pro', b'{"question_id": 2}', b"\xff\x00"]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("kept", range(5))
def test_continued_equals_uninterrupted(tmp_path, kept, torn):
    whole = fill(tmp_path / "whole.jsonl", 5)
    path = tmp_path / "answers.jsonl"
    fill(path, kept)
    with journal(path).open("ab") as stream:
        stream.write(torn)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.done_ids == set(range(5 - kept, 5))
    assert fill(path, 5) == whole
    assert names(tmp_path) == ["answers.jsonl", "answers.jsonl.run.json", "whole.jsonl", "whole.jsonl.run.json"]


def test_the_file_is_in_the_questions_order(tmp_path):
    lines = fill(tmp_path / "answers.jsonl", 5).splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("kept", range(6))
def test_a_file_that_grew_in_order_is_taken_over(tmp_path, kept, torn):
    path = tmp_path / "answers.jsonl"
    whole = fill(path, 5)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:kept]) + torn)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.done_ids == set(range(kept))
    assert fill(path, 5) == whole


def test_a_file_is_finished_when_every_answer_is_there(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path, 3)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        message = f"{path}: 2 answers are missing, the first that of question_id 0; run the same command again"
        with pytest.raises(ValueError, match=re.escape(message)):
            answers.finish()
    assert not path.exists()


def test_killed_between_the_file_and_its_journals(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    fill(path, 4)
    before = journal(path).read_bytes()
    whole = fill(path, 5)
    journal(path).write_bytes(before)
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.done == 5
        answers.begin()
        answers.finish()
    assert path.read_bytes() == whole
    assert names(tmp_path) == ["answers.jsonl", "answers.jsonl.run.json"]


def fill_and_die(path, alive):
    """Fill a file in a process that kills itself at a call to the operating system; return whether it came so far."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = itertools.count(alive, -1)

    def dying(real, is_write):
        def call(*args, **options):
            if next(left) == 0:
                if is_write:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])  # torn
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("write", "ftruncate", "unlink", "replace", "fsync", "open"):
        setattr(os, name, dying(getattr(os, name), name == "write"))
    try:
        fill(path, 5)
    finally:
        os._exit(0)


def test_killed_at_any_call_again_and_again(tmp_path):
    whole = fill(tmp_path / "whole.jsonl", 5)
    for alive in itertools.count():
        path = tmp_path / f"{alive}.jsonl"
        has_died = fill_and_die(path, alive)
        fill_and_die(path, alive // 2)
        assert fill(path, 5) == whole
        assert not journal(path).exists()
        if not has_died:
            break
    assert alive > 12  # opening, five answers, the file and its clean-up


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_processes_share_a_run(tmp_path, n_ranks):
    whole = fill(tmp_path / "whole.jsonl", 5)
    path = tmp_path / "answers.jsonl"
    fill(path, 2)
    with contextlib.ExitStack() as stack:
        options = {"n_ranks": n_ranks}
        files = [
            stack.enter_context(AnswersFile(path, QUESTIONS, RUN, rank=rank, **options)) for rank in range(n_ranks)
        ]
        for answers in files:
            assert answers.done_ids == {3, 4}
            answers.begin()
        for question in QUESTIONS[:3]:
            files[question.question_id % n_ranks].write(Answer(question, f"ä {question.question_id}"), "model")
        files[0].finish()
        assert files[0].done == 5
    assert path.read_bytes() == whole
    assert fill(path, 5) == whole  # and the journals of the others are of no further use


def test_a_process_without_answers_may_leave_while_the_first_joins(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    whole = fill(tmp_path / "whole.jsonl", 5)
    with AnswersFile(path, QUESTIONS, RUN) as first, contextlib.ExitStack() as others:
        second = others.enter_context(AnswersFile(path, QUESTIONS, RUN, rank=1, n_ranks=2))
        for answers in (first, second):
            answers.begin()
        for question in QUESTIONS:
            first.write(Answer(question, f"ä {question.question_id}"), "model")
        find_places = first._places

        def places_before_it_left():
            found = find_places()
            others.close()
            return found

        monkeypatch.setattr(first, "_places", places_before_it_left)
        first.finish()
    assert path.read_bytes() == whole


def break_off_two(path, text):
    """Leave the journals of two processes, of which the second has answered question 3."""
    with AnswersFile(path, QUESTIONS, RUN) as first, AnswersFile(path, QUESTIONS, RUN, rank=1, n_ranks=2) as second:
        first.begin()
        second.begin()
        second.write(Answer(QUESTIONS[3], text), "model")


def test_a_smaller_number_of_processes_goes_on(tmp_path):
    path = tmp_path / "answers.jsonl"
    break_off_two(path, "ä 3")
    whole = fill(tmp_path / "whole.jsonl", 5)
    assert fill(path, 5) == whole
    assert not list(tmp_path.glob("*.journal*"))


def test_starting_anew_forgets_the_journals_of_all(tmp_path):
    path = tmp_path / "answers.jsonl"
    break_off_two(path, "old")
    with AnswersFile(path, QUESTIONS, RUN, overwrite=True) as answers:
        answers.begin()
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.done == 0


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    message = f"{journal(path)} is being written by another process; wait for it, or choose another --answers-file"
    with AnswersFile(path, QUESTIONS, RUN), pytest.raises(ValueError, match=re.escape(message)):
        AnswersFile(path, QUESTIONS, RUN)
    fill(path, 5)


def test_opening_alone_changes_nothing(tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    before = fill(path, 3) + b"torn"
    journal(path).write_bytes(before)
    for overwrite in (True, False):
        with AnswersFile(path, QUESTIONS, RUN, overwrite=overwrite):
            pass
        assert journal(path).read_bytes() == before


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
    assert journal(path).read_bytes() == before
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
        (b'{"question_id": 7}\n', "line 1 answers question_id 7, which is not among the questions; pass --overwrite"),
        (b'{"question_id": []}\n', "line 1 is no answer (TypeError("),
    ],
)
def test_lines_that_are_not_this_runs_answers(tmp_path, lines, message):
    path = tmp_path / "answers.jsonl"
    for place in (path, journal(path)):
        fill(path, 0)
        place.write_bytes(lines)
        with pytest.raises(ValueError, match=re.escape(message)):
            AnswersFile(path, QUESTIONS, RUN)
        place.unlink()


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
        assert answers.done == len(journal(path).read_bytes().splitlines()) == room // (len(whole) // 5)
        assert whole.startswith(journal(path).read_bytes())
    assert fill(path, 5) == whole


def test_each_answer_is_readable_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        answers.begin()
        answers.write(Answer(QUESTIONS[0], "yes"), "model")
        assert json.loads(journal(path).read_text())["text"] == "yes"
