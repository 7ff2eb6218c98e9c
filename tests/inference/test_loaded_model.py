"""`llava.load` answers as the batch engine does, and returns rows of the kind that it got."""

import math

import pytest
from PIL import Image

import llava
from llava.image_files.decode import open_image
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.chat.chat import Chat
from llava.inference.loaded_model import LoadedModel
from llava.inference.sampler import Sampling

NAMES = ("landscape.jpg", "portrait.png")
QUESTIONS = ("Is there railing?", "What color is the sky?")


@pytest.fixture
def model(session):
    return LoadedModel(session)


@pytest.fixture
def folder(goldens):
    return goldens / "images"


@pytest.fixture
def rows():
    return [{"image": name, "question": text, "kind": "k"} for name in NAMES for text in QUESTIONS]


def engine_answers(session, rows, folder):
    """(text, probability) of each row, by the batch engine."""
    questions = [Question(row, entry["question"], (entry["image"],)) for row, entry in enumerate(rows)]
    sampling = Sampling(max_new_tokens=6)
    found = {a.question.question_id: a for a in answer_batch(session, questions, folder, sampling, with_scores=True)}
    return [(found[row].text, math.exp(found[row].scores["logprob"])) for row in range(len(rows))]


def test_load_reads_a_checkpoint(goldens, model, folder):
    loaded = llava.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")
    images = [folder / name for name in NAMES]
    assert loaded.ask(images, "same?", max_new_tokens=6) == model.ask(images, "same?", max_new_tokens=6)


def test_one_question_is_answered_as_by_the_engine(model, session, folder, rows):
    for row, (text, probability) in zip(rows, engine_answers(session, rows, folder), strict=True):
        reply = model.ask(folder / row["image"], row["question"], max_new_tokens=6)
        assert (str(reply), reply.text) == (text, text)
        assert reply.probability == pytest.approx(probability, rel=1e-3)  # the engine's are rounded
        assert 0 < reply.runner_up_probability < 1


def test_images_are_given_as_paths_or_objects_or_not_at_all(model, folder):
    path = folder / NAMES[0]
    reply = model.ask(path, QUESTIONS[0], max_new_tokens=6)
    assert model.ask(str(path), QUESTIONS[0], max_new_tokens=6) == reply
    assert model.ask(open_image(path), QUESTIONS[0], max_new_tokens=6) == reply
    assert model.ask([Image.open(path)], QUESTIONS[0], max_new_tokens=6) == reply
    assert model.ask(None, "hello", max_new_tokens=2).text == model.ask([], "hello", max_new_tokens=2).text
    with pytest.raises(ValueError, match="not found"):
        model.ask(folder / "none.jpg", "why?")


def test_a_chat_is_the_chat_of_the_terminal(model, session, folder):
    images = [open_image(folder / NAMES[0])]
    expected = Chat(session, Sampling(max_new_tokens=6))
    chat = model.chat(folder / NAMES[0], max_new_tokens=6)
    with pytest.raises(ValueError, match="call ask or stream first"):
        chat.latest()
    for turn, question in enumerate(QUESTIONS):
        text = "".join(expected.reply(question, images if turn == 0 else []))
        assert "".join(chat.stream(question)) == text == chat.latest().text
    assert chat.turns == expected.turns
    chat.reset()
    assert chat.ask(QUESTIONS[0]).text == expected.turns[0][1]


def test_probabilities_of_a_chat_are_those_of_its_tokens_alone(session, folder):
    chat = Chat(session, Sampling(max_new_tokens=6), with_scores=True)
    images = [open_image(folder / NAMES[0])]
    first = "".join(chat.reply(QUESTIONS[0], images)), list(chat.scores)
    assert len(chat.scores) == 6
    list(chat.reply(QUESTIONS[1]))
    assert len(chat.scores) == 6  # of the latest turn
    chat.reset()
    assert chat.scores == []
    chat.is_pipelined = not chat.is_pipelined
    assert ("".join(chat.reply(QUESTIONS[0], images)), chat.scores) == first


def test_dictionaries_come_back_with_answers(model, session, folder, rows):
    before = [dict(row) for row in rows]
    found = model.ask_many(rows, folder, max_new_tokens=6, progress=False)
    assert rows == before
    assert [{key: row[key] for key in before[0]} for row in found] == before
    expected = engine_answers(session, rows, folder)
    assert [(row["answer"], row["probability"], row["error"]) for row in found] == [(*one, None) for one in expected]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_comes_back_as_one(model, folder, rows, library):
    frame = pytest.importorskip(library).DataFrame(rows)
    found = model.ask_many(frame, folder, max_new_tokens=6, progress=False)
    assert type(found) is type(frame)
    assert list(found.columns) == [*rows[0], "answer", "probability", "error"]
    plain = model.ask_many(rows, folder, max_new_tokens=6, progress=False)
    assert list(found["answer"]) == [row["answer"] for row in plain]
    assert list(frame.columns) == list(rows[0])


def test_a_question_file_is_read(model, folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": "a", "image": "landscape.jpg", "text": "Is there railing?"}\n')
    [row] = model.ask_many(path, folder, max_new_tokens=6, progress=False)
    assert row["question_id"] == "a"
    assert row["answer"] == model.ask(folder / "landscape.jpg", "Is there railing?", max_new_tokens=6).text


def test_a_missing_image_is_an_error_of_its_row_alone(model, folder, rows):
    found = model.ask_many([{**rows[0], "image": "none.jpg"}, rows[0]], folder, max_new_tokens=6, progress=False)
    assert (found[0]["answer"], found[0]["probability"]) == ("", None)
    assert "none.jpg not found" in found[0]["error"]
    assert found[1] == model.ask_many(rows[:1], folder, max_new_tokens=6, progress=False)[0]


def test_progress_is_shown_unless_it_is_not_wanted(model, folder, rows, capsys):
    model.ask_many(rows, folder, max_new_tokens=1)
    assert "question" in capsys.readouterr().err
    model.ask_many(rows, folder, max_new_tokens=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"image": "a.jpg"}], ValueError, "row 0: 'question' is None, not a question; it has 'image'"),
        ([{"question": "a"}, {"question": " "}], ValueError, "row 1: 'question' is ' '"),
        ([{"question": "a", "image": 3}], ValueError, "row 0: 'image' is of type int, not a file name"),
        ([{"question": "a", "answer": "b"}], ValueError, "a column 'answer' already"),
        (7, TypeError, "rows are int; give a list of dictionaries, a DataFrame or a file's path"),
        ("none.jsonl", ValueError, "none.jsonl"),
    ],
)
def test_rows_that_cannot_be_asked(model, rows, error, message):
    with pytest.raises(error, match=message):
        model.ask_many(rows)
