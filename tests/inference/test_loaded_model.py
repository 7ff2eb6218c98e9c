"""`llava.load` answers as the batch engine does, and returns rows of the kind that it got."""

import importlib
import inspect
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava
from llava.image_files.decode import open_image
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.chat.chat import Chat
from llava.inference.loaded_model import LoadedModel, _Options
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
    loaded = llava.load(goldens / "llava-v1.5-golden", device="cpu", dtype="float32")
    name = repr(str(goldens / "llava-v1.5-golden"))
    assert repr(loaded) == f"LoadedModel({name}, device='cpu', dtype=torch.float32)"
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
    assert model.ask(path.read_bytes(), QUESTIONS[0], max_new_tokens=6) == reply
    assert model.ask({"bytes": path.read_bytes(), "path": None}, QUESTIONS[0], max_new_tokens=6) == reply
    with pytest.raises(TypeError, match="the question is of type int, not a text"):
        model.ask(path, 3)
    with pytest.raises(ValueError, match="not found"):
        model.ask(folder / "none.jpg", "why?")
    with pytest.raises(ValueError, match=r"image given as bytes can't be decoded .it holds text"):
        model.ask(b"abc", "why?")
    with pytest.raises(TypeError, match=r"image is of type ndarray, not a file name.*convert an array with PIL.Image"):
        model.ask(np.zeros((4, 4, 3)), "why?")


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
    frame = importlib.import_module(library).DataFrame(rows)
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


def answers(rows):
    return [(row["answer"], row["probability"], row["error"]) for row in rows]


def ask(model, rows, *arguments, **options):
    return model.ask_many(rows, *arguments, max_new_tokens=6, progress=False, **options)


def in_memory(rows, folder, convert):
    return [{**row, "image": convert(folder / row["image"])} for row in rows]


@pytest.mark.parametrize(
    "convert",
    [
        Path.read_bytes,
        open_image,
        Image.open,
        lambda path: {"bytes": path.read_bytes(), "path": "a.jpg"},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: [path.read_bytes()],
        lambda path: path,
    ],
    ids=["bytes", "image", "opened", "bytes of datasets", "path of datasets", "list", "path"],
)
def test_rows_may_hold_their_images(model, folder, rows, convert):
    held = in_memory(rows, folder, convert)
    found = ask(model, held)
    assert answers(found) == answers(ask(model, rows, folder))
    assert [row["image"] for row in found] == [row["image"] for row in held]


def test_files_and_images_in_memory_go_together_and_draws_are_repeated(model, folder, rows):
    """A draw depends on the seed and the row, not on where its image is kept."""
    mixed = [*in_memory(rows[:2], folder, Path.read_bytes), *rows[2:]]
    first, again = (ask(model, mixed, folder, temperature=2.0, seed=5) for _ in range(2))
    assert answers(first) == answers(again)
    assert answers(ask(model, mixed, folder)) == answers(ask(model, rows, folder))


def test_an_image_in_memory_that_is_damaged_is_an_error_of_its_row_alone(model, folder, rows, tmp_path):
    (tmp_path / "torn.jpg").write_bytes((folder / NAMES[0]).read_bytes()[:3000])
    bad = [{**rows[0], "image": cell} for cell in (b"abc", Image.open(tmp_path / "torn.jpg"))]
    found = ask(model, [*bad, *in_memory(rows[:1], folder, Path.read_bytes)])
    assert "image of row 0 can't be decoded (it holds text" in found[0]["error"]
    assert "image of row 1 can't be decoded" in found[1]["error"]
    assert answers(found[2:]) == answers(ask(model, rows[:1], folder))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_data_frame_may_hold_its_images(model, folder, rows, library):
    frame = importlib.import_module(library).DataFrame(in_memory(rows, folder, Path.read_bytes))
    found = ask(model, frame)
    assert list(found["answer"]) == [row["answer"] for row in ask(model, rows, folder)]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_images_inside_a_table_are_extracted_only_meanwhile(model, folder, rows, tmp_path, monkeypatch, ending):
    pyarrow = importlib.import_module("pyarrow")
    importlib.import_module("pyarrow.parquet")
    path, place = tmp_path / f"table{ending}", tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    content = pyarrow.Table.from_pylist(in_memory(rows, folder, Path.read_bytes))
    if ending == ".parquet":
        pyarrow.parquet.write_table(content, path)
    else:
        with pyarrow.ipc.new_file(path, content.schema) as writer:
            writer.write_table(content)
    found = ask(model, path)
    assert answers(found) == answers(ask(model, rows, folder))
    assert [len(row["image"]) for row in found] == [1] * 4
    assert list(place.iterdir()) == []


def test_a_table_is_read_with_the_options_of_the_command_line(model, folder, rows, tmp_path):
    path, expected = tmp_path / "t.txt", answers(ask(model, rows, folder))
    lines = ["номер|фото|вопрос", *(f"n{i}|{Path(r['image'])}|{r['question']}" for i, r in enumerate(rows))]
    path.write_text("\n".join(lines), encoding="cp1251")
    names = {"image_column": "фото", "question_column": "вопрос", "question_id_column": "номер"}
    found = ask(model, path, folder, **names, delimiter="pipe", encoding="cp1251")
    assert answers(found) == expected
    assert [row["question_id"] for row in found] == ["n0", "n1", "n2", "n3"]
    sheets = tmp_path / "t.xlsx"
    pandas = importlib.import_module("pandas")
    with pandas.ExcelWriter(sheets) as writer:
        pandas.DataFrame([{"x": 1}]).to_excel(writer, sheet_name="first", index=False)
        pandas.DataFrame(rows).to_excel(writer, sheet_name="second", index=False)
    assert answers(ask(model, sheets, folder, sheet="second")) == expected
    with pytest.raises(ValueError, match=r"--delimiter has no effect for rows .*t.xlsx"):
        ask(model, sheets, folder, delimiter=";")
    with pytest.raises(ValueError, match="--delimiter: 'ab' is not a character between columns"):
        ask(model, path, folder, delimiter="ab")
    with pytest.raises(ValueError, match="sheet has no effect on rows from Python"):
        ask(model, rows, folder, sheet="second")


def test_any_iterable_of_mappings_is_read(model, folder, rows):
    """Datasets of `datasets` are such: each row is a dictionary with decoded images."""
    decoded = ({**row, "image": Image.open(folder / row["image"])} for row in rows)
    assert answers(ask(model, decoded)) == answers(ask(model, rows, folder))


def test_type_checkers_know_every_option_of_ask_many():
    parameters = inspect.signature(LoadedModel.ask_many).parameters.values()
    options = {one.name: one.annotation for one in parameters if one.kind is one.KEYWORD_ONLY}
    written = {name: hint.__forward_arg__ for name, hint in _Options.__annotations__.items()}
    assert options == written
    page = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in options if f"`{name}`" not in page] == ["progress"]


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
        ([{"question": "a", "image": object()}], ValueError, "row 0: 'image' is of type object, not a file name"),
        ([{"question": "a", "image": np.zeros((2, 2))}], ValueError, "ndarray.*convert an array with PIL.Image"),
        (["a.jpg"], TypeError, "row 0 is of type str; give a dictionary for each question"),
        ({"question": ["a"]}, TypeError, "rows are of type dict; give a list of dictionaries"),
        ([{"question": "a", "answer": "b"}], ValueError, "a column 'answer' already"),
        (7, TypeError, "rows are of type int; give a list of dictionaries, a DataFrame or a file's path"),
        ("none.jsonl", ValueError, "none.jsonl"),
    ],
)
def test_rows_that_cannot_be_asked(model, rows, error, message):
    with pytest.raises(error, match=message):
        model.ask_many(rows)


def test_a_folder_that_is_none_is_reported_once(model, folder):
    with pytest.raises(NotADirectoryError, match="none is not a directory; give the one that holds the images"):
        model.ask_many([{"image": "a.png", "question": "What?"}], folder / "none")


def test_a_folder_for_rows_without_images_is_a_mistake(model, folder):
    with pytest.raises(ValueError, match="image_folder is given, but no row has an image; name their column"):
        model.ask_many([{"photo": "landscape.jpg", "question": "why?"}], folder)
