"""TextVQA's and MME's files, whose `question_id` is the image's: answered, resumed, shared out, scored and shown.

Every image is one that the tests have; the questions, ids and the original's answers are the real ones.
"""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

import llava
from llava.eval import model_vqa_loader, vqa_score
from llava.eval.report import __main__ as report_program
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.questions import read_questions, split_chunk
from llava.inference.sampling import Sampling
from llava.inference.session import Session

FILES = {"textvqa": "llava_textvqa_val_v051_ocr.jsonl", "MME": "llava_mme.jsonl"}
FEW = 150  # of the 800 lines, for what is run several times


class Benchmark:
    """A question file, its image folder, and the original's answers."""

    def __init__(self, folder, stand_in, images):
        self.questions, self.images = folder / FILES[folder.name], images
        self.rows = read_lines(self.questions)
        self.given = folder / "answers" / "llava-v1.5-13b.jsonl"
        for name in {row["image"] for row in self.rows}:
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stand_in, images / name)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", params=FILES)
def benchmark(request, shared_path, goldens, tmp_path_factory):
    folder = shared_path(f"eval/{request.param}")
    return Benchmark(folder, goldens / "images" / "tiny.png", tmp_path_factory.mktemp("images"))


@pytest.fixture
def answer(benchmark, goldens, tmp_path):
    """Return the function (name of the answers file, flags) -> exit code of batch inference, and the file's path."""
    arguments = [
        *("--model-path", str(goldens / "llava-v1.5-golden"), "--image-folder", str(benchmark.images)),
        *("--question-file", str(benchmark.questions), "--device", "cpu", "--max_new_tokens", "2", "--workers", "0"),
    ]

    def run(name, *flags):
        path = tmp_path / name
        return model_vqa_loader.main([*arguments, "--answers-file", str(path), *flags]), path

    return run


def test_an_answer_per_line_in_order(benchmark, answer):
    code, path = answer("answers.jsonl")
    records = read_lines(path)
    assert code == 0
    assert [(record["question_id"], record["prompt"]) for record in records] == [
        (row["question_id"], row["text"]) for row in benchmark.rows
    ]
    ids = {record["question_id"] for record in records}
    assert len(ids) < len({record["answer_id"] for record in records}) == len(records) == 800
    assert not any("error" in record for record in records)


@pytest.mark.parametrize("kept", [1, 77])
def test_a_resumed_run_equals_a_whole_one(answer, monkeypatch, kept):
    few = ("--limit", str(FEW))
    code, path = answer("whole.jsonl", *few)
    assert code == 0
    whole = path.read_bytes()
    write = AnswersFile.write

    def interrupted(self, found, model_id):
        if self.done == kept:
            raise KeyboardInterrupt
        write(self, found, model_id)

    with monkeypatch.context() as patch:
        patch.setattr(AnswersFile, "write", interrupted)
        assert answer("resumed.jsonl", *few)[0] == 130
    code, path = answer("resumed.jsonl", *few)
    assert (code, path.read_bytes()) == (0, whole)


def test_ranks_and_chunks_equal_a_whole_run(benchmark, answer, goldens, tmp_path):
    session = Session.load(str(goldens / "llava-v1.5-golden"), device="cpu")
    questions = read_questions(benchmark.questions)[:FEW]
    sampling, model_id = Sampling(max_new_tokens=2), "llava-v1.5-golden"
    whole = answer("whole.jsonl", "--limit", str(FEW))[1].read_bytes()
    path = tmp_path / "ranks.jsonl"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(AnswersFile(path, questions, {}, rank=rank, world_size=3)) for rank in range(3)]
        for rank, file in enumerate(files):
            file.begin()
            for found in answer_batch(session, questions, benchmark.images, sampling, rank=rank, world_size=3):
                file.write(found, model_id)
        assert all(file.done for file in files)
        files[0].finish()
    assert path.read_bytes() == whole
    joined = b""
    for index in range(3):
        chunk, path = split_chunk(questions, 3, index), tmp_path / f"chunk{index}.jsonl"
        with AnswersFile(path, chunk, {}) as file:
            file.begin()
            for found in answer_batch(session, chunk, benchmark.images, sampling):
                file.write(found, model_id)
            file.finish()
        joined += path.read_bytes()
    assert joined == whole


def test_ask_many_takes_the_file(benchmark, goldens, tmp_path, answer):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(benchmark.questions.read_text().splitlines(keepends=True)[:FEW]))
    rows = llava.load(str(goldens / "llava-v1.5-golden"), device="cpu").ask_many(
        str(few), benchmark.images, max_new_tokens=2, progress=False
    )
    records = read_lines(answer("whole.jsonl", "--limit", str(FEW))[1])
    assert [(row["question_id"], row["text"], row["answer"]) for row in rows] == [
        (record["question_id"], record["prompt"], record["text"]) for record in records
    ]


@pytest.fixture
def three_of_four(benchmark, tmp_path):
    """Write annotations of which the original answers three of four right, in another order; return their path."""
    given = read_lines(benchmark.given)
    lines = [
        {"question_id": row["question_id"], "question": row["text"].split("\n")[0], "answer": record["text"] or "empty"}
        for row, record in zip(benchmark.rows, given, strict=True)
    ]
    for line in lines[::4]:
        line["answer"] = "none of these"
    return write_lines(tmp_path / "true.jsonl", lines[::-1])


def score(tmp_path, answers, annotations, *flags):
    out = tmp_path / "scores.json"
    code = vqa_score.main(["--answers-file", answers, "--annotations", annotations, "--json", str(out), *flags])
    return json.loads(out.read_text())["files"][0]["overall"] if code == 0 else None


def test_the_originals_answers_are_scored_question_by_question(benchmark, three_of_four, tmp_path):
    given = read_lines(benchmark.given)
    for name, lines in (("same.jsonl", given), ("other.jsonl", given[400:] + given[399::-1])):
        overall = score(tmp_path, write_lines(tmp_path / name, lines), three_of_four)
        assert (overall["questions"], overall["accuracy"]) == (800, 0.75)


def test_answers_missing_and_twice_are_counted(benchmark, three_of_four, tmp_path, capsys):
    given = read_lines(benchmark.given)
    answers = write_lines(tmp_path / "answers.jsonl", [*given[3:], given[10], given[11]])
    assert score(tmp_path, answers, three_of_four) is None
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("error: answers: questions without an answer: 3 of 800 (")
    assert second.startswith("answers: answers without a question left under their id: 2 (")
    assert last == "Complete the answers, or score the rest with --allow-missing."
    overall = score(tmp_path, answers, three_of_four, "--allow-missing")
    assert overall["questions"] == 797
    assert overall["accuracy"] == pytest.approx(598 / 797)  # of the first three, one was wrong


def test_unique_ids_refuses_the_files(benchmark, three_of_four, tmp_path, answer, capsys):
    code, path = answer("answers.jsonl", "--unique-ids")
    assert code == 2
    assert not path.exists()
    ids = [row["question_id"] for row in benchmark.rows]
    second = next(place for place, key in enumerate(ids) if key in ids[:place])
    line = f"  line {second + 1}: question_id {ids[second]!r} is already on line {ids.index(ids[second]) + 1}\n"
    repeats = len(ids) - len(set(ids))
    error = capsys.readouterr().err
    assert f"error: {benchmark.questions}: {repeats} bad rows\n{line}" in error
    assert "Give each question an id of its own, or leave --unique-ids out." in error
    assert score(tmp_path, str(benchmark.given), three_of_four, "--unique-ids") is None
    assert f"error: {three_of_four}: {repeats} bad rows\n" in capsys.readouterr().err
    command = ["--answers", str(benchmark.given), "--questions", str(benchmark.questions), "--unique-ids"]
    assert report_program.main([*command, "--images", str(benchmark.images), "-o", str(tmp_path / "a.html")]) == 1
    assert f"error: {benchmark.questions}: {repeats} bad rows\n{line}" in capsys.readouterr().err
