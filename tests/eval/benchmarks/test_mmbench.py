"""MMBench: the table as pandas reads it, the original's prompts, circular accuracy by hand, the submission file."""

import base64
import io
import sys

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.eval.benchmarks import submission
from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError
from llava.eval.benchmarks.mmbench.score import convert_mmbench, pair_mmbench, read_option, score_mmbench
from llava.eval.benchmarks.mmbench.table import (
    ROTATION,
    MmbenchRow,
    build_mmbench_requests,
    extract_mmbench_images,
    read_mmbench_table,
)

SCRIPT = "convert_mmbench_for_submission.py"
LETTER = "Answer with the option's letter from the given choices directly."


def image(color):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


RED, BLUE = image("red"), image("blue")
TABLE = pandas.DataFrame(
    [
        (0, "What is it?", "A hint\nof two lines", "dog", "cat", None, None, "A", "animal", RED, "x", "FP-S",
         None, "dev"),
        (1, 'Which "one"?', "nan", "up", "down", "left", "=1+1", "D", "place", BLUE, "x", "CP", None, "dev"),
        (ROTATION, "What is it?", "A hint\nof two lines", "cat", "dog", None, None, "B", "animal", "0", "x", "FP-S",
         None, "dev"),
    ],
    columns=["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
             "comment", "split"],
)  # fmt: skip


def write_table(path, table=TABLE):
    table.to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture
def rows(tmp_path):
    return read_mmbench_table(write_table(tmp_path / "mmbench.tsv"))


def build(rows, **options):
    return build_mmbench_requests(rows, {row.index: f"{row.index}.png" for row in rows}, **options)


def replies(rows, texts, **options):
    """One answer for each request, in the form in which the model program writes it."""
    requests = build(rows, **options)
    records = [
        {"question_id": question.question_id, "text": text, **keys}
        for (question, keys), text in zip(requests, texts, strict=True)
    ]
    return [AnswerLine(row["question_id"], row["prompt"], row["text"], None, row) for row in records]


cells = st.text(st.sampled_from('ab"\n é你'), max_size=6).map(lambda text: f"x{text}")


@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=4))
def test_a_table_is_read_as_pandas_reads_it(tmp_path_factory, values):
    table = pandas.DataFrame(values, columns=["question", "A", "B"])
    table.insert(0, "index", range(len(values)))
    table["image"] = "0"
    path = write_table(tmp_path_factory.mktemp("tables") / "t.tsv", table)
    rows = read_mmbench_table(path)
    expected = pandas.read_table(path)
    assert [(row.index, row.cells["question"], *row.options) for row in rows] == list(
        expected[["index", "question", "A", "B"]].itertuples(index=False, name=None)
    )


def test_prompts_are_the_originals(rows):
    requests = build(rows, single_pred_prompt=True)
    assert [request.question.text for request in requests] == [
        f"A hint\nof two lines\nWhat is it?\nA. dog\nB. cat\n{LETTER}",
        f'Which "one"?\nA. up\nB. down\nC. left\nD. =1+1\n{LETTER}',
        f"A hint\nof two lines\nWhat is it?\nA. cat\nB. dog\n{LETTER}",
    ]
    assert requests[1].question.images == ("1.png",)
    assert requests[0].keys == {
        "round_id": 0,
        "prompt": "A hint\nof two lines\nWhat is it?\nA. dog\nB. cat",
        "options": ["dog", "cat"],
        "option_char": ["A", "B"],
    }
    assert build(rows)[1].question.text == 'Which "one"?\nA. up\nB. down\nC. left\nD. =1+1'
    chinese = build(rows, single_pred_prompt=True, lang="cn")
    assert chinese[0].question.text.endswith("\n请直接回答选项字母。")


def test_all_rounds_rotate_the_options(rows):
    requests = build(rows, all_rounds=True)
    assert [
        (r.question.question_id, r.keys["round_id"], r.keys["options"], r.keys["option_char"]) for r in requests
    ] == [
        (0, 0, ["dog", "cat"], ["A", "B"]),
        (0, 1, ["cat", "dog"], ["B", "A"]),
        (1, 0, ["up", "down", "left", "=1+1"], ["A", "B", "C", "D"]),
        (1, 1, ["down", "left", "=1+1", "up"], ["B", "C", "D", "A"]),
        (1, 2, ["left", "=1+1", "up", "down"], ["C", "D", "A", "B"]),
        (1, 3, ["=1+1", "up", "down", "left"], ["D", "A", "B", "C"]),
        (ROTATION, 0, ["cat", "dog"], ["A", "B"]),
        (ROTATION, 1, ["dog", "cat"], ["B", "A"]),
    ]


def test_images_are_written_once(tmp_path, rows):
    folder = tmp_path / "images"
    names, notes = extract_mmbench_images("mmbench.tsv", rows, folder)
    assert names[0] == names[ROTATION] != names[1]
    assert notes == [f"wrote 2 images into {folder}"]
    colors = {index: Image.open(folder / name).getpixel((0, 0)) for index, name in names.items()}
    assert colors == {0: (255, 0, 0), 1: (0, 0, 255), ROTATION: (255, 0, 0)}
    assert extract_mmbench_images("mmbench.tsv", rows, folder) == (
        names,
        [f"wrote 0 images into {folder}, which had 2 of them"],
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [("B", 1), (" B.", 1), ("B. a cat", 1), ("(B)", 1), ("(B) cat", 1), ("cat", 1), ("A Cat.", None), ("E", None),
     ("C", None), ("A dog", None), ("Dog.", 0), ("", None)],
)  # fmt: skip
def test_an_option_is_read(text, place):
    assert read_option(text, ["dog", "cat"]) == place


def test_an_option_that_is_there_twice_is_not_read_by_its_text():
    assert read_option("same", ["same", "Same"]) is None


def figures(result):
    return {figure.name: pytest.approx(figure.value) for figure in result.figures}


def test_circular_accuracy_by_hand(rows):
    """Question 0 is asked twice, as two rows: both must be right."""
    right = score_mmbench(rows, replies(rows, ["A", "D", "B"]), "a")
    assert figures(right)["circular accuracy"] == 100
    result = score_mmbench(rows, replies(rows, ["A", "D", "A"]), "a")
    assert figures(result) == {"circular accuracy": 50, "accuracy without rotations": 100, "FP-S": 0, "CP": 100}
    assert [(score.key, score.kind, score.score) for score in result.questions] == [("0", "FP-S", 0), ("1", "CP", 1)]
    alone = score_mmbench(rows[:2], replies(rows[:2], ["dog", "none of these"]), "a")
    assert figures(alone) == {"accuracy": 50, "FP-S": 100, "CP": 0}
    assert alone.notes == ("1 of 2 answers name no option and count as wrong; MMBench's server asks GPT-4 for these",)


def test_circular_accuracy_of_all_rounds_by_hand(rows):
    """The letters that are right in each round: A then B for the dog; D, C, B, A for the fourth of four."""
    answers = replies(rows[:2], ["A", "B", "D", "C", "B", "A"], all_rounds=True)
    assert figures(score_mmbench(rows[:2], answers, "a"))["circular accuracy"] == 100
    answers[1] = answers[1]._replace(text="A")
    result = score_mmbench(rows[:2], answers[::-1], "a")
    assert figures(result) == {"circular accuracy": 50, "accuracy without rotations": 100, "FP-S": 0, "CP": 100}


@given(st.randoms())
def test_the_order_of_answers_does_not_matter(shuffle):
    rows = [
        MmbenchRow(index, {"index": str(index), "question": f"Q{index}?", "answer": "B", "image": ""}, ("x", "y", "z"))
        for index in (0, 1, 2, ROTATION, ROTATION + 2)
    ]
    answers = replies(rows, "BABAB")
    expected = score_mmbench(rows, answers, "a"), convert_mmbench(rows, answers, "a")
    shuffle.shuffle(answers)
    assert (score_mmbench(rows, answers, "a"), convert_mmbench(rows, answers, "a")) == expected


@pytest.fixture
def files(tmp_path, rows, write_lines):
    answers = replies(rows, ["A", "=D\x07", "B"])
    write_lines("answers/7b.jsonl", [{**answer.record} for answer in answers])
    return {
        "annotation_file": tmp_path / "mmbench.tsv",
        "result_dir": tmp_path / "answers",
        "upload_dir": tmp_path / "upload",
        "experiment": "7b",
    }


def test_the_submission_is_what_pandas_writes_for_the_original(converter, files, tmp_path, capsys):
    assert converter(SCRIPT, **files) == 0
    read = pandas.read_excel(tmp_path / "upload/7b.xlsx", engine="openpyxl")
    expected = TABLE.drop(columns=["hint", "category", "source", "image", "comment", "l2-category"])
    expected.insert(6, "prediction", ["A", "=D ", "B"])
    pandas.testing.assert_frame_equal(read, expected, check_dtype=False)
    said = capsys.readouterr().out
    assert "1 cells were too long for .xlsx, or had control characters, and are changed" in said
    assert "circular accuracy" in said


def test_a_test_split_is_not_scored(converter, files, rows, tmp_path, capsys):
    write_table(files["annotation_file"], TABLE.drop(columns="answer"))
    assert converter(SCRIPT, **files) == 0
    assert "has no true answers: MMBench's server scores this split" in capsys.readouterr().out
    unknown = [row._replace(cells={**row.cells, "answer": ""}) for row in rows]
    with pytest.raises(BenchmarkError, match="the table has no true answers"):
        score_mmbench(unknown, [], "a")
    with pytest.raises(BenchmarkError, match=r"1 \(0\) of 3 rows have no answer of A to D"):
        score_mmbench([unknown[0], *rows[1:]], [], "a")


def test_without_openpyxl_the_message_says_what_to_install(converter, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert converter(SCRIPT, **files) == 2
    assert 'need openpyxl; run: pip install "llava[tables]"' in capsys.readouterr().err


def test_a_long_cell_is_said(tmp_path):
    assert submission.write_xlsx(tmp_path / "a.xlsx", [["x" * 40_000, 1, None]])[0].startswith("1 cells were too long")
    assert submission.write_xlsx(tmp_path / "a.xlsx", [["x"]]) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: answers[1:], r"these 3 rows: 1 \(0\) without an answer, 0 of other"),
        (lambda answers: [*answers, answers[0]], r"0 without an answer, 1 \(0\) of other questions or repeated"),
        (lambda answers: [answers[0]._replace(prompt="Who?"), *answers[1:]], r"1 \(0\) without an answer, 1 \(0\) of"),
        (lambda answers: [*answers[:2], answers[0]._replace(record={"round_id": 1})],
         r"these 3 rows in all rotations: 5 .* without an answer, 0 of other"),
    ],
)  # fmt: skip
def test_answers_missing_twice_and_of_other_questions(rows, change, message):
    with pytest.raises(BenchmarkError, match=message):
        pair_mmbench(rows, change(replies(rows, "ADB")), "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column index, question, A, B, image; give MMBench's table"),
        ("index\tquestion\tA\tB\timage\n", "has no questions; download it again"),
        ("index\tquestion\tA\tB\timage\n1\tq\ta\tb\n", "line 2: 4 cells where the header has 5"),
        ("index\tquestion\tA\tB\timage\nx\tq\ta\tb\t\n1\tq\ta\t\t\n", "2 bad rows\n  line 2: index is not a number"),
        ("index\tquestion\tA\tB\timage\n1\tq\ta\tb\t\n1\tq\ta\tb\t\n", "line 3: index 1 is there twice"),
        ('index\tquestion\tA\tB\timage\n1\t"q\na\tb\t\n', "line 2: a quoted cell is not closed"),
        ('index\tquestion\tA\tB\timage\n1\t"q"r\ta\tb\t\n', "line 2: a quoted cell is not closed"),
    ],
)
def test_tables_that_are_broken(tmp_path, text, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(BenchmarkError, match=message):
        read_mmbench_table(tmp_path / "t.tsv")


def test_images_that_cannot_be_written(tmp_path, rows):
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match=r"can't be written into .*file \(.*\); pass --image-folder"):
        extract_mmbench_images("mmbench.tsv", rows, tmp_path / "file")
    names, _ = extract_mmbench_images("mmbench.tsv", rows, tmp_path / "images")
    (tmp_path / "images" / names[0]).write_bytes(b"another")
    with pytest.raises(BenchmarkError, match=r"image .* of the table is another file than the one there"):
        extract_mmbench_images("mmbench.tsv", rows, tmp_path / "images")


def test_images_that_are_none(tmp_path):
    (tmp_path / "t.tsv").write_text("index\tquestion\tA\tB\timage\n7\tq\ta\tb\tno base64!\n8\tq\ta\tb\t9\n")
    with pytest.raises(BenchmarkError, match=r"t\.tsv: 2 bad rows\n  index 7: image holds .*\n  index 8: image holds"):
        extract_mmbench_images(tmp_path / "t.tsv", read_mmbench_table(tmp_path / "t.tsv"), tmp_path / "images")
    (tmp_path / "t.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchmarkError, match="is not UTF-8 at byte 0"):
        read_mmbench_table(tmp_path / "t.tsv")
    with pytest.raises(BenchmarkError, match=r"none\.tsv can't be read"):
        read_mmbench_table(tmp_path / "none.tsv")
