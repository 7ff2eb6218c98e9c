"""Answers files are written atomically, resume after any interruption, and reject the answers of other runs."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import threading
import tracemalloc

import pytest

from llava.inference.batch import question_index
from llava.inference.batch.answers_file import Answer, AnswersFile
from llava.inference.batch.questions import Question, number_repeats

QUESTIONS = [Question(index, f"question {index}", ("a.jpg",)) for index in range(5)]
resource = pytest.importorskip("resource")  # not on Windows

ANSWER_ID = "521a8aa3527fb266d4352f"  # the same on every machine, in every run
RUN = {"model": "m", "temperature": 0.0}


def fill(path, count, run=RUN, **options):
    """Answer up to `count` questions, the last ones first, and return the file if it is complete, else the journal."""
    with AnswersFile(path, QUESTIONS, run, **options) as answers:
        answers.begin()
        for question in [question for question in reversed(QUESTIONS) if question not in answers.done_questions]:
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


def test_an_error_record_has_no_memory_address():
    texts = [f"can't be decoded (cannot identify image file {io.BytesIO()!r}); fetch it again" for _ in range(2)]
    first, second = (Answer(QUESTIONS[0], "", "image_corrupt", text).to_record("model") for text in texts)
    assert first == second
    message = "can't be decoded (cannot identify image file <_io.BytesIO object>); fetch it again"
    assert first["metadata"]["message"] == message


REPEATED = number_repeats(
    Question(key, text, images)
    for key, text, images in [
        ("a.jpg", "what?", ("a.jpg",)),
        ("b.jpg", "what?", ("b.jpg",)),
        ("a.jpg", "who?", ("a.jpg",)),
        ("a.jpg", "what?", ("a.jpg",)),  # the first line again
        ("a.jpg", "what?", ()),
        (1, "what?", ()),
        ("1", "what?", ()),
    ]
)


def test_a_question_is_its_place_in_the_file_whatever_its_id(tmp_path):
    """Ids that repeat, and whole lines that do, each keep their own answer through any interruption."""
    assert len({Answer(question, "").to_record("m")["answer_id"] for question in REPEATED}) == len(REPEATED)
    whole = [f"answer {place}" for place in range(len(REPEATED))]
    for first in itertools.permutations(range(len(REPEATED)), 2):
        path = tmp_path / "answers.jsonl"
        for places in (first, set(range(len(REPEATED))) - set(first)):
            with AnswersFile(path, REPEATED, RUN) as answers:
                assert answers.done_questions == {REPEATED[place] for place in first if places != first}
                answers.begin()
                for place in places:
                    answers.write(Answer(REPEATED[place], whole[place]), "model")
                if answers.done == len(REPEATED):
                    answers.finish()
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["text"] for record in records] == whole
        assert [record["question_id"] for record in records] == [question.question_id for question in REPEATED]
        with AnswersFile(path, REPEATED, RUN) as answers:  # the finished file alone says it too
            assert answers.done_questions == set(REPEATED)
        path.unlink()


def test_an_answer_to_none_of_the_questions_with_its_id_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, REPEATED, RUN) as answers:
        answers.begin()
        answers.write(Answer(Question("a.jpg", "where?", ()), "x"), "model")
    with pytest.raises(ValueError, match=r"line 1 answers question_id 'a.jpg', which is not among the questions"):
        AnswersFile(path, REPEATED, RUN)


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
        assert answers.done_questions == set(QUESTIONS[5 - kept :])
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
        assert answers.done_questions == set(QUESTIONS[:kept])
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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_a_run(tmp_path, world_size):
    whole = fill(tmp_path / "whole.jsonl", 5)
    path = tmp_path / "answers.jsonl"
    fill(path, 2)
    with contextlib.ExitStack() as stack:
        options = {"world_size": world_size}
        files = [
            stack.enter_context(AnswersFile(path, QUESTIONS, RUN, rank=rank, **options)) for rank in range(world_size)
        ]
        for answers in files:
            assert answers.done_questions == set(QUESTIONS[3:])
            answers.begin()
        for question in QUESTIONS[:3]:
            files[question.question_id % world_size].write(Answer(question, f"ä {question.question_id}"), "model")
        files[0].finish()
        assert files[0].done == 5
    assert path.read_bytes() == whole
    assert fill(path, 5) == whole  # and the journals of the others are of no further use


def test_a_process_without_answers_may_leave_while_the_first_joins(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    whole = fill(tmp_path / "whole.jsonl", 5)
    with AnswersFile(path, QUESTIONS, RUN) as first, contextlib.ExitStack() as others:
        second = others.enter_context(AnswersFile(path, QUESTIONS, RUN, rank=1, world_size=2))
        for answers in (first, second):
            answers.begin()
        for question in QUESTIONS:
            first.write(Answer(question, f"ä {question.question_id}"), "model")
        find_files = first.answer_files

        def files_before_it_left():
            found = find_files()
            others.close()
            return found

        monkeypatch.setattr(first, "answer_files", files_before_it_left)
        first.finish()
    assert path.read_bytes() == whole


def break_off_two(path, text):
    """Leave the journals of two processes, of which the second has answered question 3."""
    with AnswersFile(path, QUESTIONS, RUN) as first, AnswersFile(path, QUESTIONS, RUN, rank=1, world_size=2) as second:
        first.begin()
        second.begin()
        second.write(Answer(QUESTIONS[3], text), "model")


def test_a_smaller_number_of_processes_goes_on(tmp_path):
    path = tmp_path / "answers.jsonl"
    break_off_two(path, "ä 3")
    whole = fill(tmp_path / "whole.jsonl", 5)
    assert fill(path, 5) == whole
    assert not list(tmp_path.glob("*.journal*"))


def test_overwriting_drops_the_journals_of_all_ranks(tmp_path):
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
        answers.write(Answer(QUESTIONS[0], "", "image_corrupt", "no"), "model")
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert answers.errors == {"image_corrupt": 1}
        assert answers.unread == 0


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("second", [None, "image_missing", "image_corrupt"], ids=["read", "still missing", "corrupt"])
def test_an_image_that_could_not_be_read_is_asked_again(tmp_path, is_finished, second):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        answers.begin()
        for question in QUESTIONS if is_finished else QUESTIONS[:2]:
            is_bad = question is QUESTIONS[0]
            error = ("image_missing", "the disk is away") if is_bad else ()
            answers.write(Answer(question, "" if is_bad else f"ä {question.question_id}", *error), "model")
        assert answers.errors == {"image_missing": 1}
        if is_finished:
            answers.finish()
            assert answers.errors == {"image_missing": 1}
    with AnswersFile(path, QUESTIONS, RUN) as answers:
        assert QUESTIONS[0] not in answers.done_questions
        assert QUESTIONS[1] in answers.done_questions
        assert (answers.unread, answers.errors) == (1, {})
        answers.begin()
        for question in QUESTIONS:
            if question not in answers.done_questions:
                is_bad = question is QUESTIONS[0] and second
                error = (second, "again") if is_bad else ()
                answers.write(Answer(question, "" if is_bad else f"ä {question.question_id}", *error), "model")
        answers.finish()
        assert answers.errors == ({second: 1} if second else {})
    if second is None:
        assert path.read_bytes() == fill(tmp_path / "whole.jsonl", len(QUESTIONS))
    assert len(path.read_bytes().splitlines()) == len(QUESTIONS)
    assert not journal(path).exists()


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
    with pytest.raises(ValueError, match=re.escape("but its answers.jsonl.run.json does not; pass --overwrite")):
        AnswersFile(path, QUESTIONS, RUN)


def test_a_damaged_run_file_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path, 1)
    (tmp_path / "answers.jsonl.run.json").write_text("{")
    with pytest.raises(ValueError, match=r"answers.jsonl.run.json is damaged .*; pass --overwrite"):
        AnswersFile(path, QUESTIONS, RUN)


@pytest.mark.parametrize("content", ["[]", "7", "[" * 100_000])
def test_a_run_file_of_another_type_is_refused(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    fill(path, 1)
    (tmp_path / "answers.jsonl.run.json").write_text(content)
    with pytest.raises(ValueError, match=r"answers.jsonl.run.json is damaged .*; pass --overwrite"):
        AnswersFile(path, QUESTIONS, RUN)


RECORD = b'{"question_id": 1, "prompt": "a", "text": "b", "answer_id": "c", "model_id": "model", %s}\n'


@pytest.mark.parametrize(
    "lines, message",
    [
        (b"{}\n", "line 1 is not an answer (no question_id); pass --overwrite"),
        (b"7\n", "line 1 is not an answer (not a JSON object: 7); pass --overwrite"),
        (b"x\n", "line 1 is not an answer (not JSON: Expecting value"),
        (b"\xff\n", "line 1 is not an answer (not JSON: "),
        (b"[" * 100_000 + b"\n", "line 1 is not an answer (not JSON: nested too deep"),
        (b"9" * 5_000 + b"\n", "line 1 is not an answer (not JSON: "),
        (b'{"question_id": 7}\n', "line 1 answers question_id 7, which is not among the questions; pass --overwrite"),
        (b'{"question_id": []}\n', "line 1 is not an answer (question_id is [])"),
        (b'{"question_id": true}\n', "line 1 is not an answer (question_id is True)"),
        (b'{"question_id": 1.0}\n', "line 1 is not an answer (question_id is 1.0)"),
        (b'{"question_id": 1, "prompt": 5}\n', "line 1 is not an answer (prompt is 5)"),
        (b'{"question_id": 1, "prompt": "a"}\n', "line 1 is not an answer (no text)"),
        (RECORD % b'"metadata": []', "line 1 is not an answer (metadata is [])"),
        (RECORD % b'"metadata": {}, "error": {"a": 1}', "line 1 is not an answer (error is {'a': 1})"),
        (RECORD % b'"metadata": {}, "error": null', "line 1 is not an answer (error is None)"),
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
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is not a file; choose another --answers-file")):
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


def test_the_answers_of_many_questions_with_one_id_are_found_in_one_pass(tmp_path, monkeypatch):
    questions = number_repeats(Question("same", f"question {key // 2}") for key in range(1000))
    path, computed = tmp_path / "answers.jsonl", []
    with AnswersFile(path, questions, RUN) as answers:
        answers.begin()
        for question in reversed(questions):
            answers.write(Answer(question, f"{question.text} {question.repeat}"), "model")
    real = question_index.answer_id
    monkeypatch.setattr(question_index, "answer_id", lambda *args: computed.append(args) or real(*args))
    with AnswersFile(path, questions, RUN) as answers:
        assert answers.done_questions == set(questions)
        assert len(computed) == len(questions)
        answers.finish()
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts == [f"{question.text} {question.repeat}" for question in questions]


def test_opening_and_finishing_take_less_than_a_kilobyte_a_question(tmp_path):
    count = 20_000
    questions = [Question(key, f"Is it {key} {'x' * 40}?", ("a.jpg",)) for key in range(count)]
    path = tmp_path / "answers.jsonl"
    records = [json.dumps(Answer(question, "yes").to_record("model")) for question in questions]
    with AnswersFile(path, questions, RUN) as answers:
        answers.begin()
    journal(path).write_text("".join(f"{record}\n" for record in reversed(records)))
    tracemalloc.start()
    try:
        with AnswersFile(path, questions, RUN) as answers:
            assert answers.done == count
            assert tracemalloc.get_traced_memory()[1] <= 500 * count
            answers.begin()
            answers.finish()
        assert tracemalloc.get_traced_memory()[1] <= 1_000 * count
    finally:
        tracemalloc.stop()
    assert path.read_text().splitlines() == records


def test_writing_keeps_no_answer_in_memory(tmp_path):
    questions = [Question(key, "?") for key in range(2000)]
    with AnswersFile(tmp_path / "answers.jsonl", questions, RUN) as answers:
        answers.begin()
        tracemalloc.start()
        try:
            for question in questions:
                answers.write(Answer(question, "x" * 1000), "model")
            assert tracemalloc.get_traced_memory()[0] <= 200 * len(questions)
        finally:
            tracemalloc.stop()


def interrupt_this_thread():
    signal.raise_signal(signal.SIGINT)


def interrupt_another_thread():
    """Deliver Ctrl-C to a thread beside the main one, as the system may where several run."""
    thread = threading.Thread(target=lambda: signal.raise_signal(signal.SIGINT))
    thread.start()
    thread.join()


@pytest.mark.parametrize("interrupt", [interrupt_this_thread, interrupt_another_thread])
def test_ctrl_c_at_any_moment_of_writing_counts_what_is_written(tmp_path, monkeypatch, interrupt):
    write = os.write

    def interrupted(descriptor, data):
        done = write(descriptor, data)
        interrupt()
        return done

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with AnswersFile(tmp_path / "answers.jsonl", QUESTIONS, RUN) as answers:
            answers.begin()
            monkeypatch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                answers.write(Answer(QUESTIONS[0], "a"), "model")
            monkeypatch.undo()
            assert answers.done == len(journal(answers.path).read_bytes().splitlines()) == 1
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_answers_are_written_from_any_thread(tmp_path):
    with AnswersFile(tmp_path / "answers.jsonl", QUESTIONS, RUN) as answers:
        answers.begin()
        thread = threading.Thread(target=answers.write, args=(Answer(QUESTIONS[0], "a"), "model"))
        thread.start()
        thread.join()
        assert answers.done == 1
