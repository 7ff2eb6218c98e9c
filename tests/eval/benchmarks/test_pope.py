"""POPE's scores: the original's answers give the published figures, joined by image and question."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, QuestionLine, read_answer_lines, read_question_lines
from llava.eval.benchmarks.pope import Confusion, count_confusion, judge, read_pope_labels, read_yes_no, score_pope
from llava.eval.eval_pope import eval_pope, main

IMAGES = ("a.jpg", "b.jpg")
OBJECTS = ("dog", "cat", "car", "bus", "cup")
INSTRUCTION = "\nAnswer the question using a single word or phrase."


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def make_case(splits=("random",), said="Yes"):
    """Questions about ten objects a split, of which every second is there, and one answer to all."""
    questions, answers, labels = [], [], {}
    for split in splits:
        labels[split] = {}
        for image in IMAGES:
            for number, name in enumerate(OBJECTS):
                text = f"Is there a {name} in the image?"
                question_id = len(questions)
                questions.append(QuestionLine(question_id, text + INSTRUCTION, image, {"category": split}))
                answers.append(AnswerLine(str(question_id), text + INSTRUCTION, said, None, {}))
                labels[split][image, text] = "yes" if number % 2 == 0 else "no"
    return questions, answers, labels


def figures(result):
    return {figure.name: round(figure.value, 2) for figure in result.figures}


@pytest.fixture
def shared(shared_path):
    folder = shared_path("eval/pope")
    questions = read_question_lines(folder / "llava_pope_test.jsonl")
    return questions, read_answer_lines(folder / "answers/llava-v1.5-13b.jsonl"), read_pope_labels(folder / "coco")


def test_answers_of_the_original_give_its_figures(shared):
    result = score_pope(*shared, "answers")
    found = figures(result)
    assert (found["F1 score, random"], found["accuracy, random"]) == (87.32, 87.92)
    assert len(result.questions) == 2766
    assert result.notes[0].startswith("random: 144 (10000011, 10000023, 10000060, …) of 2910 questions have no")
    assert result.notes[1] == "random: 234 of 3000 annotations are not asked in the question file"
    by_split, _ = judge(*shared, "answers")
    assert count_confusion(by_split["random"]) == Confusion(1150, 28, 1282, 306)


def test_the_order_of_lines_does_not_matter(shared):
    questions, answers, labels = shared
    shuffled = random.Random(0).sample(answers, len(answers))
    assert score_pope(questions, shuffled, labels, "answers") == score_pope(questions, answers, labels, "answers")


def test_the_program_prints_the_originals_lines(shared_path, capsys):
    folder = shared_path("eval/pope")
    files = [str(folder / name) for name in ("coco", "llava_pope_test.jsonl", "answers/llava-v1.5-13b.jsonl")]
    assert main(["--annotation-dir", files[0], "--question-file", files[1], "--result-file", files[2]]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["Category: random, # samples: 2766", "TP\tFP\tTN\tFN\t", "1150\t28\t1282\t306"]
    assert [line.partition(":")[0] for line in out[3:8]] == ["Accuracy", "Precision", "Recall", "F1 score", "Yes ratio"]
    assert out[8:10] == ["0.873, 0.879, 0.976, 0.790, 0.426", "=" * 36]
    assert "F1 score, random   87.32 %   85.5 to 88.9" in out


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No", "no"), ("no", "no"), ("No, there is not.", "no"), ("There is not one", "no"), ("Yes", "yes"),
        ("Yes. No", "yes"), ("NO", "yes"), ("Nothing", "yes"), ("", "yes"), ("No.", "no"), ("no\n", "yes"),
    ],
)  # fmt: skip
def test_reading_of_an_answer(text, read):
    assert read_yes_no(text) == read


def test_means_of_three_splits():
    result = score_pope(*make_case(("adversarial", "random", "popular")), "answers")
    found = figures(result)
    assert list(found)[:2] == ["F1 score, mean of 3 splits", "accuracy, mean of 3 splits"]
    assert list(found)[5:11:5] == ["F1 score, random", "F1 score, popular"]
    assert found["F1 score, mean of 3 splits"] == 75.0  # 6 right of 10 yes: 12 / (12 + 4)
    assert (found["precision, random"], found["recall, random"], found["yes ratio, random"]) == (60, 100, 100)
    assert (len(result.questions), result.notes) == (30, ())
    assert len({question.key for question in result.questions}) == 30


def test_no_yes_at_all_has_no_precision():
    found = figures(score_pope(*make_case(said="No"), "answers"))
    assert found.pop("accuracy, random") == 40
    assert set(found.values()) == {0}


def test_an_error_counts_as_wrong_and_not_as_a_yes():
    questions, answers, labels = make_case()
    answers[1] = answers[1]._replace(text="", error="image_missing")  # the true answer is no
    answers[0] = answers[0]._replace(text="", error="image_missing")  # yes
    result = score_pope(questions, answers, labels, "answers")
    by_split, _ = judge(questions, answers, labels, "answers")
    assert count_confusion(by_split["random"]) == Confusion(5, 4, 0, 1)
    assert figures(result)["accuracy, random"] == 50
    assert figures(result)["yes ratio, random"] == 80
    assert result.notes == ("2 of 10 answers are errors and count as wrong (image_missing 2)",)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["Yes", "No", "Maybe not", ""]), min_size=10, max_size=10), st.permutations(range(10)))
def test_figures_are_percentages_in_any_order(said, order):
    questions, answers, labels = make_case()
    answers = [answer._replace(text=text) for answer, text in zip(answers, said, strict=True)]
    result = score_pope(questions, [answers[index] for index in order], labels, "answers")
    assert result == score_pope(questions, answers, labels, "answers")
    for figure in result.figures:
        assert 0 <= figure.value <= 100
        assert figure.interval is None or 0 <= figure.interval.low <= figure.value + 1e-9 <= figure.interval.high + 2e-9


def test_files_that_do_not_belong_together():
    questions, answers, labels = make_case()
    with pytest.raises(BenchmarkError, match=r"^a is not the answers to these 10 questions: 1 \(9\) without an answer"):
        score_pope(questions, answers[:-1], labels, "a")
    with pytest.raises(BenchmarkError, match=r"1 \(9\) of other questions or repeated"):
        score_pope(questions, [*answers, answers[-1]], labels, "a")
    with pytest.raises(BenchmarkError, match=r"^1 of 10 questions stand in the question file more than once"):
        again = [question._replace(question_id=question.question_id % 9, text=questions[0].text, image="a.jpg")
                 if question.question_id == 9 else question for question in questions]  # fmt: skip
        score_pope(again, [*answers[:-1], answers[0]], labels, "a")
    with pytest.raises(BenchmarkError, match=r"^10 questions are of category 'random', and the annotations have no"):
        score_pope(questions, answers, {"popular": labels["random"]}, "a")
    others = dict(list(labels["random"].items())[:8])
    with pytest.raises(BenchmarkError, match=r"^2 of 10 questions of category random are not in coco_pope_ran"):
        score_pope(questions, answers, {"random": others}, "a")


def test_splits_that_are_not_asked_are_said():
    questions, answers, labels = make_case()
    result = score_pope(questions, answers, {**labels, "popular": labels["random"]}, "a")
    assert result.notes == ("popular: none of its 10 annotations is asked in the question file",)


def test_annotations_that_can_not_be_used(tmp_path, capsys):
    with pytest.raises(BenchmarkError, match=r"holds no coco_pope_<split>\.json; name the folder output/coco"):
        read_pope_labels(tmp_path)
    line = {"image": "a.jpg", "text": "Is it?", "label": "yes"}
    path = tmp_path / "coco_pope_random.json"
    write_lines(path, [line, line, {**line, "label": "maybe"}, {"image": 1}])
    with pytest.raises(
        BenchmarkError, match=r"2 bad rows\n  line 3: label is 'maybe', not yes or no\n.* 4: no 'image'"
    ):
        read_pope_labels(tmp_path)
    write_lines(path, [line, line])
    with pytest.raises(BenchmarkError, match=r"annotation 2: 'Is it\?' about 'a\.jpg' is there already"):
        read_pope_labels(tmp_path)
    assert main(["--annotation-dir", str(tmp_path), "--question-file", "no.jsonl", "--result-file", "no.jsonl"]) == 2
    assert capsys.readouterr().err == "error: no.jsonl can't be read (No such file or directory)\n"


def test_the_originals_function(tmp_path, capsys):
    _, answers, labels = make_case()
    path = write_lines(
        tmp_path / "labels.json",
        [{"image": image, "text": text, "label": label} for (image, text), label in labels["random"].items()],
    )
    given_answers = [{"prompt": answer.prompt, "text": answer.text} for answer in answers]
    eval_pope(given_answers, path)
    assert capsys.readouterr().out.splitlines()[1:3] == ["6\t4\t0\t0", "Accuracy: 0.6"]
    with pytest.raises(BenchmarkError, match=r"10 annotations, 9 answers, 9 of other questions; join them by image"):
        eval_pope(given_answers[1:], path)
