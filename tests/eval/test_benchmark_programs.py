"""Programs that answer ScienceQA and MMBench: the original's prompts and records, resumed runs, bad input."""

import base64
import json
import random
from types import SimpleNamespace

import pytest
import torch

from llava.eval import model_vqa_mmbench, model_vqa_science
from llava.eval.benchmarks.lines import BenchmarkError, read_answer_lines
from llava.eval.benchmarks.mmbench.score import score_mmbench
from llava.eval.benchmarks.mmbench.table import read_mmbench_table
from llava.eval.benchmarks.scienceqa.questions import read_science_questions
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.questions import Question

LETTER = "Answer with the option's letter from the given choices directly."
RECORDS = [
    {"id": "4", "conversations": [{"from": "human", "value": "Which?\nA. a\nB. b"}, {"from": "gpt", "value": "B"}]},
    {"id": "5", "image": "square.png", "conversations": [{"from": "human", "value": "<image>\nWhere?\nA. a\nB. b"}]},
    {"id": "6", "image": "tiny.png", "conversations": [{"from": "human", "value": "What?\n<image>"}]},
]


@pytest.fixture
def science(goldens, tmp_path):
    torch.set_num_threads(1)
    (tmp_path / "questions.json").write_text(json.dumps(RECORDS))
    words = ["--model-path", goldens / "llava-v1.5-golden", "--image-folder", goldens / "images", "--max_new_tokens", 4]
    words += ["--question-file", tmp_path / "questions.json", "--answers-file", tmp_path / "out/a.jsonl"]
    return lambda *more: model_vqa_science.main([*map(str, (*words, *more)), "--device", "cpu"])


@pytest.fixture
def mmbench(goldens, tmp_path):
    torch.set_num_threads(1)
    images = [
        base64.b64encode((goldens / "images" / name).read_bytes()).decode() for name in ("square.png", "tiny.png")
    ]
    rows = [
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"],
        ["0", "Where?", "In a room.", "here", "there", "", "", "A", "place", images[0]],
        ["1", "What?", "", "dog", "cat", "cow", "", "C", "animal", images[1]],
        ["1000000", "Where?", "In a room.", "there", "here", "", "", "B", "place", images[0]],
    ]
    (tmp_path / "dev.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    words = ["--model-path", goldens / "llava-v1.5-golden", "--question-file", tmp_path / "dev.tsv"]
    words += ["--answers-file", tmp_path / "out/a.jsonl", "--max_new_tokens", 4]
    return lambda *more: model_vqa_mmbench.main([*map(str, (*words, *more)), "--device", "cpu"])


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text().splitlines()]


def test_science_records_are_the_originals(science, tmp_path, capsys):
    assert science("--single-pred-prompt") == 0
    found = records(tmp_path)
    assert [record["prompt"] for record in found] == [
        f"Which?\nA. a\nB. b\n{LETTER}",
        f"<image>\nWhere?\nA. a\nB. b\n{LETTER}",
        f"<image>\nWhat?\n{LETTER}",
    ]
    assert [record["question_id"] for record in found] == ["4", "5", "6"]
    assert all(record["text"] for record in found)
    assert list(found[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert "3 of 3 questions answered" in capsys.readouterr().out


def test_science_without_the_instruction(science, tmp_path):
    assert science("--limit", 1) == 0
    assert [record["prompt"] for record in records(tmp_path)] == ["Which?\nA. a\nB. b"]


def test_science_prompts_are_those_of_the_published_answers(shared_path):
    """They were written before the original noted the image's mark in the prompt."""
    folder = shared_path("eval/scienceqa")
    questions = read_science_questions(folder / "llava_test_CQM-A.json", single_pred_prompt=True)
    lines = (folder / "answers/llava-v1.5-13b.jsonl").read_text().splitlines()
    published = [(record["question_id"], record["prompt"]) for record in map(json.loads, lines)]
    assert [(question.question_id, question.text.removeprefix("<image>\n")) for question in questions] == published
    assert sum(bool(question.images) for question in questions) == 593


def test_mmbench_records_are_the_originals(mmbench, tmp_path, capsys):
    assert mmbench("--single-pred-prompt", "--all-rounds") == 0
    found = records(tmp_path)
    assert [(record["question_id"], record["round_id"]) for record in found] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1000000, 0), (1000000, 1),
    ]  # fmt: skip
    assert {name: found[1][name] for name in ("prompt", "options", "option_char")} == {
        "prompt": "In a room.\nWhere?\nA. there\nB. here",
        "options": ["there", "here"],
        "option_char": ["B", "A"],
    }
    assert found[2]["prompt"] == "What?\nA. dog\nB. cat\nC. cow"
    assert len(list((tmp_path / "dev_images").iterdir())) == 2
    assert len({record["answer_id"] for record in found}) == 7
    said = capsys.readouterr()
    assert "7 of 7 questions answered" in said.out
    assert f"wrote 2 images into {tmp_path / 'dev_images'}" in said.err
    score_mmbench(read_mmbench_table(tmp_path / "dev.tsv"), read_answer_lines(tmp_path / "out/a.jsonl"), "a")


def test_mmbench_asks_in_chinese_and_writes_images_where_told(mmbench, tmp_path):
    assert mmbench("--single-pred-prompt", "--lang", "cn", "--image-folder", tmp_path / "there") == 0
    assert len(records(tmp_path)) == 3
    assert len(list((tmp_path / "there").iterdir())) == 2
    assert not (tmp_path / "dev_images").exists()


def test_chunks_are_all_rows(mmbench, tmp_path):
    found = []
    for chunk in range(2):
        assert mmbench("--num-chunks", 2, "--chunk-idx", chunk, "--overwrite") == 0
        found += records(tmp_path)
    assert [record["question_id"] for record in found] == [0, 1, 1000000]


def test_an_interrupted_run_resumes_with_the_same_records(mmbench, tmp_path, monkeypatch, capsys):
    assert mmbench("--all-rounds") == 0
    whole = (tmp_path / "out/a.jsonl").read_bytes()
    write = AnswersFile.write

    def write_two(self, answer, model_id):
        write(self, answer, model_id)
        if self.done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswersFile, "write", write_two)
        assert mmbench("--all-rounds", "--overwrite") == 130
    capsys.readouterr()
    assert mmbench("--all-rounds") == 0
    assert "2 of 7 answers exist already" in capsys.readouterr().err
    assert (tmp_path / "out/a.jsonl").read_bytes() == whole
    assert mmbench("--all-rounds", "--single-pred-prompt") == 2  # another prompt is another run
    assert "belongs to another run (questions was" in capsys.readouterr().err


def test_keys_of_a_record_are_kept_by_every_question(tmp_path):
    """Also where two questions have the same id and text: the second is another question."""
    from llava.inference.batch.answers_file import Answer
    from llava.inference.batch.questions import number_repeats

    questions = number_repeats([Question(1, "What?"), Question(1, "What?")])
    keys = {question: {"round_id": place} for place, question in enumerate(questions)}
    with AnswersFile(tmp_path / "a.jsonl", questions, {}, record_keys=keys) as answers:
        answers.begin()
        for question in random.Random(0).sample(questions, 2):
            answers.write(Answer(question, "x"), "m")
        answers.finish()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["round_id"] for row in rows] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a list of records; give ScienceQA's"),
        ("[]", "is not a list of records"),
        ("nope", "is not JSON"),
        ('[1, {"id": true}, {"id": 1}, {"id": 1, "image": 3, "conversations": []}]', "4 bad rows\n  record 1: not an"),
        ('[{"id": 1, "conversations": [{"value": null}]}]', "record 1: no question in 'conversations'"),
    ],
)
def test_science_files_that_are_something_else(tmp_path, content, message):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_science_questions(tmp_path / "q.json")


def test_bad_input_is_one_message_and_code_2(science, mmbench, tmp_path, capsys):
    (tmp_path / "questions.json").write_text("[]")
    (tmp_path / "dev.tsv").write_text("index\tquestion\n")
    assert [science(), mmbench()] == [2, 2]
    said = capsys.readouterr().err
    assert "error: " in said
    assert "dev.tsv has no column A, B, image" in said
    for program in (science, mmbench):
        with pytest.raises(SystemExit) as end:
            program("--answers-file", tmp_path / ("questions.json" if program is science else "dev.tsv"))
        assert end.value.code == 2
        assert "would write over --question-file" in capsys.readouterr().err


def test_the_originals_functions(goldens, tmp_path, science, mmbench):
    arguments = SimpleNamespace(
        model_path=str(goldens / "llava-v1.5-golden"), model_base=None, image_folder=str(goldens / "images"),
        question_file=str(tmp_path / "questions.json"), answers_file=str(tmp_path / "out/a.jsonl"), temperature=0,
        conv_mode="vicuna_v1", num_chunks=1, chunk_idx=0, max_new_tokens=2, single_pred_prompt=True,
    )  # fmt: skip
    model_vqa_science.eval_model(arguments)
    assert records(tmp_path)[0]["prompt"].endswith(LETTER)
    arguments.question_file, arguments.answers_file = str(tmp_path / "dev.tsv"), str(tmp_path / "out/b.jsonl")
    arguments.image_folder, arguments.all_rounds, arguments.lang = "", False, "cn"
    model_vqa_mmbench.eval_model(arguments)
    assert len((tmp_path / "out/b.jsonl").read_text().splitlines()) == 3
