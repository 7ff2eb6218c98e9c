"""TextVQA's accuracy against its definition, the forms of its prompts, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, read_answer_lines, read_question_lines
from llava.eval.benchmarks.textvqa import (
    EvalAIAnswerProcessor,
    TextVQAAccuracyEvaluator,
    prompt_processor,
    read_textvqa_annotations,
    score_text,
    score_textvqa,
)
from llava.eval.eval_textvqa import main

INSTRUCTION = "Answer the question using a single word or phrase."


def annotate(image, question, *answers, **more):
    """One annotation, the last answer as often as ten are missing."""
    return {"image_id": image, "question": question, "answers": [*answers, *answers[-1:] * (10 - len(answers))], **more}


def reply(image, question, text, error=None):
    return AnswerLine(image, f"{question}\nReference OCR token: A, B\n{INSTRUCTION}", text, error, {})


ENTRIES = [
    annotate("a1", "What is the Brand?", "Dakota", question_id=1),
    annotate("a1", "What YEAR?", *["2008"] * 2, "twenty", question_id=2),
    annotate("b2", "What is the brand?", "Nous les Gosses", "x", question_id=3),
]
ANSWERS = [
    reply("b2", "What is the brand?", "nous les gosses"),
    reply("a1", "What is the brand?", "DAKOTA."),
    reply("a1", "what year?", "2008"),
]


def test_answers_are_joined_by_image_and_question(write_document):
    annotations = read_textvqa_annotations(write_document({"data": ENTRIES}))
    result = score_textvqa(annotations, ANSWERS, "answers")
    assert [(one.key, one.group, one.score) for one in result.questions] == [
        ("1", "a1", 1),
        ("2", "a1", 0.6),
        ("3", "b2", 0.3),
    ]
    assert (result.figures[0].name, round(result.figures[0].value, 2)) == ("accuracy", 63.33)
    assert score_textvqa(annotations, ANSWERS[::-1], "answers") == result


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["red", "Red!", "blue", "none", "0"]), min_size=10, max_size=10),
    st.sampled_from(["red", "0"]),
)
def test_accuracy_is_the_mean_over_leaving_one_person_out(truths, text):
    normal = [EvalAIAnswerProcessor()(truth) for truth in truths]
    left = [normal[:index] + normal[index + 1 :] for index in range(10)]
    mean = sum(min(Fraction(1), Fraction(others.count(text), 3)) for others in left) / 10
    assert score_text(text, truths) == pytest.approx(float(mean))
    assert TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": text, "gt_answers": truths}]) == score_text(
        text, truths
    )


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"What YEAR?\n{INSTRUCTION}", "what year?"),
        (f"What year?\nReference OCR token: A, B\n{INSTRUCTION}", "what year?"),
        (f"Reference OCR token: A, B\nWhat year?\n{INSTRUCTION}", "what year?"),
        ("OCR tokens: A, B. Question: What\nyear? Short answer:", "what\nyear?"),
    ],
)
def test_forms_of_prompts(prompt, question):
    assert prompt_processor(prompt) == question


@pytest.mark.parametrize("prompt", ["What year?", "a\nb\nc", "a\nb\nc\nd", "OCR tokens: A. Question: What year?"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(
        ValueError, match=r"^prompt '.*' (is not a question, its Reference OCR token: line|has no question)"
    ):
        prompt_processor(prompt)
    with pytest.raises(BenchmarkError, match=r"^answers: 1 bad row\n  answer 1: prompt "):
        score_textvqa([], [AnswerLine("a1", prompt, "x", None, {})], "answers")


def test_questions_of_the_original_are_found_in_its_prompts(shared_path):
    """Annotations are made of the questions here: the true answers are the model's own, so that all are right."""
    folder = shared_path("eval/textvqa")
    questions = read_question_lines(folder / "llava_textvqa_val_v051_ocr.jsonl")
    answers = read_answer_lines(folder / "answers/llava-v1.5-13b.jsonl")
    annotations = [
        question._replace(text=prompt_processor(question.text), record={"answers": [answer.text] * 10})
        for question, answer in zip(questions, answers, strict=True)
    ]
    result = score_textvqa(annotations, answers[::-1], "answers")
    assert (len(result.questions), result.figures[0].value) == (800, 100)


def test_a_question_asked_twice_has_two_answers(write_document):
    twice = [annotate("a1", "What?", "red"), annotate("a1", "What?", "blue")]
    annotations = read_textvqa_annotations(write_document({"data": twice}))
    answers = [reply("a1", "What?", "red"), reply("a1", "What?", "blue")]
    assert score_textvqa(annotations, answers, "answers").figures[0].value == 100
    with pytest.raises(BenchmarkError, match=r"^answers is not the answers to these 2 questions: 1 \(a1\) without an"):
        score_textvqa(annotations, answers[:1], "answers")


def test_missing_repeated_and_failed_answers(write_document):
    annotations = read_textvqa_annotations(write_document({"data": ENTRIES}))
    with pytest.raises(
        BenchmarkError, match=r"3 questions: 1 \(a1\) without an answer, 0 of other questions or repeated"
    ):
        score_textvqa(annotations, ANSWERS[:2], "answers")
    with pytest.raises(BenchmarkError, match=r"0 without an answer, 1 \(b2\) of other questions or repeated"):
        score_textvqa(annotations, [*ANSWERS, ANSWERS[0]], "answers")
    failed = [ANSWERS[0], ANSWERS[1]._replace(text="", error="image_missing"), ANSWERS[2]]
    result = score_textvqa(annotations, failed, "answers")
    assert [one.score for one in result.questions] == [0, 0.6, 0.3]
    assert result.notes == ("1 of 3 answers are errors and count as wrong (image_missing 1)",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "has no list 'data'; name TextVQA_0.5.1_val.json"),
        ('{"data": []}', "has no list 'data'"),
        ("{", "is not JSON"),
        ({"data": [1]}, r"annotation 1: not an object \{…\}"),
        ({"data": [{"image_id": 1.5, "question": "a"}]}, "annotation 1: no 'image_id' and 'question'"),
        (
            {"data": [{"image_id": "a", "question": "a"}]},
            "no list of texts 'answers'; the test split's answers are not",
        ),
        ({"data": [{"image_id": "a", "question": "a", "answers": ["a"]}]}, "annotation 1: 1 answers; TextVQA has 10"),
    ],
)
def test_annotations_that_can_not_be_used(content, message, write_document):
    with pytest.raises(BenchmarkError, match=message):
        read_textvqa_annotations(write_document(content))


def test_a_folder_of_answers_is_scored_file_by_file(write_document, write_lines, tmp_path, capsys):
    annotations = str(write_document({"data": ENTRIES}))
    records = [{"question_id": one.question_id, "prompt": one.prompt, "text": one.text} for one in ANSWERS]
    write_lines("answers/a.jsonl", records)
    write_lines("answers/b.jsonl", records[1:])
    (tmp_path / "answers/c.txt").touch()
    assert main(["--annotation-file", annotations, "--result-dir", str(tmp_path / "answers")]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Skipping c.txt",
        "a",
        "Samples: 3",
        "Accuracy: 63.33%",
        "",
        "            value  95 % interval  LLaVA-1.5 7B",
        "accuracy  63.33 %   19.0 to 92.7          58.2",
        "b",
    ]
    assert err.startswith(
        f"error: {tmp_path / 'answers/b.jsonl'} is not the answers to these 3 questions: 1 (b2) without"
    )
    assert main(["--annotation-file", annotations, "--result-file", str(tmp_path / "answers/a.jsonl")]) == 0


def test_nothing_to_score(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--annotation-file", "a.json"])
    assert "nothing to score; give --result-file or --result-dir" in capsys.readouterr().err
    assert main(["--annotation-file", "a.json", "--result-dir", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} holds no .jsonl file; name the folder of the answer files with --result-dir\n"
    )
    assert main(["--annotation-file", "a.json", "--result-dir", str(tmp_path / "no")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
