"""Submission files of VizWiz, VQAv2 and MM-Vet: equal to the original's, and what bad input says."""

import json
import random
import re

import pytest

from llava.eval.benchmarks.lines import AnswerLine, BenchmarkError, QuestionLine, read_answer_lines, read_question_lines
from llava.eval.benchmarks.mmvet import convert_mmvet
from llava.eval.benchmarks.vizwiz import convert_vizwiz, read_vizwiz_annotations, score_vizwiz
from llava.eval.benchmarks.vqav2 import convert_vqav2

VIZWIZ, MMVET, VQAV2 = (
    "convert_vizwiz_for_submission.py",
    "convert_mmvet_for_eval.py",
    "convert_vqav2_for_submission.py",
)


def ask(question_id, text="What?", image="a.jpg"):
    return {"question_id": question_id, "text": text, "image": image}


def reply(question_id, text, prompt="What?", **more):
    return {"question_id": question_id, "prompt": prompt, "text": text, **more}


def question_lines(*records):
    return [QuestionLine(record["question_id"], record["text"], record["image"], record) for record in records]


def answer_lines(*records):
    return [
        AnswerLine(record["question_id"], record["prompt"], record["text"], record.get("error"), record)
        for record in records
    ]


def test_vizwiz_gives_what_the_original_published(shared_path, converter, tmp_path):
    folder, upload = shared_path("eval/vizwiz"), tmp_path / "new/upload.json"
    answers = folder / "answers/llava-v1.5-13b.jsonl"
    questions = folder / "llava_test.jsonl"
    assert converter(VIZWIZ, annotation_file=questions, result_file=answers, result_upload_file=upload) == 0
    expected = json.loads((folder / "answers_upload/llava-v1.5-13b.json").read_text())
    assert json.loads(upload.read_text()) == expected
    shuffled = random.Random(0).sample(read_answer_lines(answers), len(expected))
    assert convert_vizwiz(read_question_lines(questions), shuffled, "answers")[0] == expected


def test_mmvet_gives_what_the_original_published(shared_path, converter, tmp_path):
    folder, results = shared_path("eval/mm-vet"), tmp_path / "results.json"
    answers = folder / "answers/llava-v1.5-7b.jsonl"
    assert converter(MMVET, src=answers, dst=results, question_file=folder / "llava-mm-vet.jsonl") == 0
    expected = json.loads((folder / "results/llava-v1.5-7b.json").read_text())
    assert json.loads(results.read_text()) == expected
    assert convert_mmvet(read_answer_lines(answers)[::-1], "answers")[0] == expected


def test_an_error_is_submitted_empty_and_said():
    answers = answer_lines(reply(1, "The Red car."), reply(0, "", error="image_missing"))
    entries, notes = convert_vizwiz(question_lines(ask(0), ask(1, image="b.jpg")), answers, "answers")
    assert entries == [{"image": "a.jpg", "answer": ""}, {"image": "b.jpg", "answer": "red car"}]
    assert notes == ("1 of 2 answers are errors and are submitted empty (image_missing 1)",)
    assert convert_mmvet(answers, "answers") == ({"v1_1": "The Red car.", "v1_0": ""}, notes)


def test_vizwiz_accuracy_by_hand(tmp_path, converter, write_lines, capsys):
    people = {"a.jpg": ["red"] * 2 + ["blue"] * 8, "b.jpg": ["Unanswerable."] * 10, "c.jpg": ["dog"] * 10}
    entries = [
        {"image": image, "answers": [{"answer": text, "answer_confidence": "yes"} for text in texts]}
        for image, texts in people.items()
    ]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    questions = write_lines("q.jsonl", [ask(number, image=image) for number, image in enumerate(people)])
    answers = write_lines("a.jsonl", [reply(1, "unanswerable"), reply(0, "Red"), reply(2, "", error="image_missing")])
    flags = {"annotation_file": questions, "result_file": answers, "result_upload_file": tmp_path / "up.json"}
    assert converter(VIZWIZ, **flags, ground_truth=tmp_path / "val.json") == 0
    assert re.search(r"accuracy\s+53\.33 %", capsys.readouterr().out)  # (0.6 + 1 + 0) / 3
    result = score_vizwiz(
        read_question_lines(questions), read_answer_lines(answers), read_vizwiz_annotations(tmp_path / "val.json"), "a"
    )
    assert [score.score for score in result.questions] == [0.6, 1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "a.jpg"}], r"1 \(a\.jpg\) of 1 images have not ten answers, 0 are repeated"),
        ({"annotations": []}, "is not a list of annotations; give VizWiz's val.json"),
        ([], "is not a list of annotations"),
        (
            [{"image": "b.jpg", "answers": [{"answer": "x"}] * 10}],
            r"1 \(a\.jpg\) of 1 questions have no annotation, 1 \(b\.jpg\) of 1 annotations no question",
        ),
    ],
)
def test_vizwiz_annotations_of_another_split(tmp_path, content, message):
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(BenchmarkError, match=message):
        truths = read_vizwiz_annotations(tmp_path / "val.json")
        score_vizwiz(question_lines(ask(0)), answer_lines(reply(0, "x")), truths, "answers")


def test_vizwiz_questions_without_images():
    with pytest.raises(BenchmarkError, match="1 of 1 questions have no image, the first question_id 0"):
        convert_vizwiz(question_lines(ask(0, image=None)), answer_lines(reply(0, "x")), "answers")


def test_vqav2_fills_the_test_set(converter, write_lines, tmp_path, capsys):
    split = "llava_vqav2_mscoco_test-dev2015"
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [ask(n, text=f"What {n}?") for n in (262000, 1, 2, 3)])
    write_lines(f"{split}.jsonl", [ask(n, text=f"What {n}?") for n in (1, 3)])
    answers = [reply(3, "Two dogs", prompt="What 3?"), reply(1, "Yes.", prompt="What 1?")]
    write_lines(f"answers/{split}/7b/merge.jsonl", answers)
    assert converter(VQAV2, dir=tmp_path, split=split, ckpt="7b") == 0
    upload = tmp_path / f"answers_upload/{split}/7b.json"
    assert json.loads(upload.read_text()) == [
        {"question_id": 262000, "answer": ""},
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": ""},
        {"question_id": 3, "answer": "2 dogs"},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "2 of the test set's 4 questions are answered",
        "2 outside the split are submitted empty, as the server wants them",
        f"wrote {upload}: 4 answers",
    ]
    write_lines(f"{split}.jsonl", [ask(n, text=f"What {n}?") for n in (1, 2, 3)])
    assert converter(VQAV2, dir=tmp_path, split=split, ckpt="7b") == 2
    assert "merge.jsonl is not the answers to these 3 questions: 1 (2) without an answer, 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [reply(1, "a"), reply("1", "b")],
            r"answers has 2 lines and 1 different question ids; .* have 1 \(1\): answer",
        ),
        ([reply(9, "a")], r"1 \(9\) of 1 answers are of questions that the test set of 2 does not have"),
        ([reply(1, "a", prompt="Another?")], r"1 \(1\) without an answer, 1 \(1\) of other questions"),
    ],
)
def test_vqav2_refuses_answers_of_other_questions(answers, message):
    with pytest.raises(BenchmarkError, match=message):
        convert_vqav2(question_lines(ask(1), ask(2)), answer_lines(*answers), "answers")


def test_vqav2_refuses_a_test_set_with_repeated_ids():
    with pytest.raises(BenchmarkError, match="1 question ids of the test set are repeated"):
        convert_vqav2(question_lines(ask(1), ask("1")), answer_lines(reply(1, "a")), "answers")


def test_vqav2_without_the_splits_questions_says_so(converter, write_lines, tmp_path, capsys):
    write_lines("llava_vqav2_mscoco_test2015.jsonl", [ask(1)])
    write_lines("answers/dev/7b/merge.jsonl", [reply(1, "a")])
    assert converter(VQAV2, dir=tmp_path, split="dev", ckpt="7b") == 0
    assert "whether the whole split is answered is not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; make the file again"),
        ("[1]\n", "1 bad row"),
        ('{"question_id": 1, "text": "a"}\n' * 2, "more than one answer have 1 (1)"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": "1", "text": "a"}\n', "1 different question ids"),
    ],
)
def test_mmvet_bad_answers_are_one_message_and_code_2(converter, tmp_path, capsys, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    assert converter(MMVET, src=tmp_path / "a.jsonl", dst=tmp_path / "results.json") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert not (tmp_path / "results.json").exists()
