"""MME: points by hand, the official program's files, and answers that don't belong to the benchmark."""

import json
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, read_answer_lines
from llava.eval.benchmarks.mme import Truth, format_mme_files, read_mme_truths, read_yes_no, score_mme

SCRIPT = "convert_answer_to_mme.py"
WORD = "\nAnswer the question using a single word or phrase."
TREE = {
    "existence/1.txt": "Is there a dog?  Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n",
    "existence/2.txt": "Is there a car? Please answer yes or no.\tYes\nIs it red? Please answer yes or no.\tNo\n\n",
    "artwork/questions_answers_YN/3.txt": "Is it old? Please answer yes or no.\tYes\nIs it new? Please answer yes or "
    "no.\tNo",
    "code_reasoning/4.txt": "Is it C? Please answer yes or no.\tYes\nIs it Java? Please answer yes or no.\tNo\n",
}
GIVEN = [  # image, question, answer
    ("existence/1.jpg", "Is there a dog?", "Yes"),
    ("existence/1.jpg", "Is there a cat?", "no, there is not"),
    ("artwork/images/3.jpg", "Is it old?", "I am not sure"),
    ("existence/2.jpg", "Is there a car?", "Yes\tof course\nit is"),
    ("existence/2.jpg", "Is it red?", "Yes"),
    ("artwork/images/3.jpg", "Is it new?", "Not"),
    ("code_reasoning/4.png", "Is it C?", "YES"),
    ("code_reasoning/4.png", "Is it Java?", "nope"),
]


def reply(image, question, text, **more):
    return {"question_id": image, "prompt": question + WORD, "text": text, **more}


def lines(records):
    return [AnswerLine(row["question_id"], row["prompt"], row["text"], row.get("error"), row) for row in records]


@pytest.fixture
def folder(tmp_path):
    for name, text in TREE.items():
        path = tmp_path / "MME_Benchmark_release_version" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def truths(folder):
    return read_mme_truths(folder / "MME_Benchmark_release_version")


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), (" yes.", "yes"), ("NO", "no"), ("Not sure", "no"), ("none", "no"), ("I no", "no"), ("", "other"),
     ("The answer is yes", "other"), ("y", "other"), ("unknown", "other")],
)  # fmt: skip
def test_an_answer_is_read_from_its_first_four_letters(text, read):
    assert read_yes_no(text) == read


def test_points_by_hand(truths):
    result = score_mme(lines(reply(*row) for row in GIVEN), truths, "answers")
    figures = {figure.name: figure.value for figure in result.figures}
    assert list(figures)[:2] == ["perception", "cognition"]
    assert figures["existence"] == 75 + 50  # three of four right, one image of two
    assert figures["artwork"] == 50 + 0
    assert figures["code_reasoning"] == figures["cognition"] == 200
    assert figures["perception"] == 125 + 50
    assert (figures["existence accuracy"], figures["existence accuracy+"]) == (75, 50)
    assert [score.score for score in result.questions] == [1, 1, 1, 0, 0, 1, 1, 1]
    assert {score.group for score in result.questions} == {
        "existence/1",
        "existence/2",
        "artwork/3",
        "code_reasoning/4",
    }
    assert result.notes[-1] == "1 of 8 answers are neither yes nor no and count as wrong"
    assert result.notes[0].startswith("8 of the 10 tasks of perception are not there: count, position")


def test_files_of_the_official_program(folder, converter, write_lines, capsys):
    write_lines("answers/7b.jsonl", [reply(*row) for row in GIVEN])
    assert converter(SCRIPT, experiment="7b", dir=folder) == 0
    written = {path.name: path.read_text() for path in (folder / "eval_tool/answers/7b").iterdir()}
    assert written == {
        "existence.txt": "1.txt\tIs there a dog?  Please answer yes or no.\tYes\tYes\n"
        "1.txt\tIs there a cat? Please answer yes or no.\tNo\tno, there is not\n"
        "2.txt\tIs there a car? Please answer yes or no.\tYes\tYes of course it is\n"
        "2.txt\tIs it red? Please answer yes or no.\tNo\tYes\n",
        "artwork.txt": "3.txt\tIs it old? Please answer yes or no.\tYes\tI am not sure\n"
        "3.txt\tIs it new? Please answer yes or no.\tNo\tNot\n",
        "code_reasoning.txt": "4.txt\tIs it C? Please answer yes or no.\tYes\tYES\n"
        "4.txt\tIs it Java? Please answer yes or no.\tNo\tnope\n",
    }
    assert "perception" in capsys.readouterr().out


@given(st.randoms())
def test_the_order_of_answers_does_not_matter(shuffle):
    truths = [Truth("count", f"{image}.txt", f"Are there {count}?", "Yes" if count == image else "No")
              for image in range(5) for count in (image, image + 1)]  # fmt: skip
    records = [reply(f"count/{image}.jpg", f"Are there {count}?", "Yes" if (image + count) % 3 else "No")
               for image in range(5) for count in (image, image + 1)]  # fmt: skip
    expected = score_mme(lines(records), truths, "answers")
    shuffle.shuffle(records)
    assert score_mme(lines(records), truths, "answers") == expected
    files = [line.split("\t")[0] for line in format_mme_files(lines(records), truths, "a")["count.txt"].splitlines()]
    assert files[::2] == files[1::2]


def test_an_error_counts_as_wrong_and_is_said(truths):
    records = [reply(*row) for row in GIVEN]
    records[0] |= {"text": "", "error": "image_missing"}
    result = score_mme(lines(records), truths, "answers")
    assert result.questions[0].score == 0
    assert result.notes[-1] == "1 of 8 answers are errors and count as wrong (image_missing 1)"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (GIVEN[1:], r"MME's 8 questions: 1 \(existence/1\) without an answer, 0 of other questions"),
        ([*GIVEN, GIVEN[0]], r"0 without an answer, 1 \(existence/1\.jpg\) of other questions or repeated"),
        (
            [("existence/1.jpg", "Is there a pig?", "No"), *GIVEN[1:]],
            r"1 \(existence/1\) without .* 1 \(existence/1\.jp",
        ),
        ([(7, "Is there a dog?", "Yes"), *GIVEN[1:]], r"1 \(existence/1\) without an answer, 1 \(7\) of other"),
    ],
)
def test_answers_missing_twice_and_of_other_questions(truths, rows, message):
    with pytest.raises(BenchmarkError, match=message):
        score_mme(lines(reply(*row) for row in rows), truths, "answers")


def test_a_folder_without_the_benchmark(folder, tmp_path):
    with pytest.raises(BenchmarkError, match=r"holds none of MME's tasks \(existence/<image>\.txt and so on\)"):
        read_mme_truths(tmp_path / "answers")
    broken = folder / "MME_Benchmark_release_version/count/9.txt"
    broken.parent.mkdir()
    broken.write_text("Is it one?\tYes\nIs it two?\tmaybe\n")
    with pytest.raises(BenchmarkError, match=r"9\.txt: 1 bad row\n  line 2: not a question, a tab, and Yes or No"):
        read_mme_truths(broken.parents[1])
    broken.write_text("Is it one?\tYes\n")
    with pytest.raises(BenchmarkError, match=r"1 \(count/9\.txt\) of 5 images have not two questions"):
        read_mme_truths(broken.parents[1])


def test_every_pair_of_the_originals_answers_is_found(shared_path, tmp_path):
    """The benchmark itself is not published with them: its questions without answers, each a yes and a no."""
    folder = shared_path("eval/MME")
    images = defaultdict(list)
    for line in (folder / "llava_mme.jsonl").read_text().splitlines():
        record = json.loads(line)
        images[record["image"]].append(record["text"].partition("\n")[0])
    for image, questions in images.items():
        path = tmp_path / image
        path = path.parent.with_name("questions_answers_YN") / path.name if "/images/" in image else path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{q} Please answer yes or no.\t{a}\n" for q, a in zip(questions, ("Yes", "No"), strict=True))
        path.with_suffix(".txt").write_text(text)
    answers = read_answer_lines(folder / "answers/llava-v1.5-13b.jsonl")
    truths = read_mme_truths(tmp_path)
    result = score_mme(answers, truths, "answers")
    assert (len(result.questions), len({score.group for score in result.questions})) == (800, 400)
    assert result == score_mme(random.Random(1).sample(answers, 800), truths, "answers")
    written = format_mme_files(answers, truths, "answers")
    given = [row.text for row in answers if str(row.question_id).startswith("artwork/")]
    assert [line.rpartition("\t")[2] for line in written["artwork.txt"].splitlines()] == given
