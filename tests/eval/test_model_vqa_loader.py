"""`model_vqa_loader` answers every line in order, goes on after any interruption, and says what it could not do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llava.eval import model_vqa_loader
from llava.eval.model_vqa_loader import main
from llava.inference.answers import AnswersFile

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [
    {"question_id": 7, "image": "landscape.jpg", "text": "Is there railing?", "kind": "kept out"},
    {"question_id": "b", "text": "hello"},
    {"question_id": 3, "image": ["portrait.png", "square.png"], "text": "Compare"},
    {"question_id": 2, "image": "tiny.png", "text": "What are the  colors of the bikes?"},
    {"question_id": 9, "image": "square.png", "text": "<image> where?"},
]


def write_questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Program:
    """The program on the goldens' model, with files of one test."""

    def __init__(self, goldens, folder):
        self.questions = write_questions(folder / "questions.jsonl", ROWS)
        self.answers = folder / "out" / "answers.jsonl"
        self.flags = {
            "--model-path": goldens / "llava-v1.5-golden",
            "--image-folder": goldens / "images",
            "--question-file": self.questions,
            "--answers-file": self.answers,
            "--max_new_tokens": 5,
            "--batch-size": 2,
            "--device": "cpu",
        }

    def arguments(self, *more, **changed):
        flags = {**self.flags, **{f"--{name.replace('_', '-')}": value for name, value in changed.items()}}
        return [*(str(part) for flag in flags.items() for part in flag), *map(str, more)]

    def __call__(self, *more, **changed):
        return main(self.arguments(*more, **changed))

    @property
    def journal(self):
        return self.answers.with_name(f"{self.answers.name}.journal")

    def records(self):
        return [json.loads(line) for line in self.answers.read_text().splitlines()]


@pytest.fixture
def program(goldens, tmp_path):
    torch.set_num_threads(1)
    return Program(goldens, tmp_path)


def test_one_answer_per_line_in_order(program, capsys):
    assert program() == 0
    records = program.records()
    assert [record["question_id"] for record in records] == [row["question_id"] for row in ROWS]
    assert [record["prompt"] for record in records] == [row["text"] for row in ROWS]
    assert {tuple(record) for record in records} == {
        ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
    }
    assert {record["model_id"] for record in records} == {"llava-v1.5-golden"}
    assert all(record["text"] and record["metadata"] == {} for record in records)
    assert capsys.readouterr().out == f"wrote {program.answers}: 5 of 5 questions answered\n"


def test_a_batch_of_any_size_gives_the_same_file(program):
    program()
    whole = program.answers.read_bytes()
    for size in (1, 4, 100):
        program("--overwrite", batch_size=size)
        assert program.answers.read_bytes() == whole


@pytest.mark.parametrize("kept", range(5))
def test_interrupted_and_continued_is_uninterrupted(program, monkeypatch, capsys, kept):
    program()
    whole = program.answers.read_bytes()
    write = AnswersFile.write

    def interrupted(self, answer, model_id):
        if self.done == kept:
            raise KeyboardInterrupt
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "write", interrupted)
    assert program("--overwrite") == 130
    monkeypatch.undo()
    message = f"stopped: {program.journal} holds {kept} of 5 answers; run the same command without --overwrite to go on"
    assert message in capsys.readouterr().err
    with program.journal.open("ab") as stream:
        stream.write(whole[:20])
    assert program() == 0
    assert program.answers.read_bytes() == whole


def test_nothing_to_do_reads_no_weights(program, monkeypatch, capsys):
    program()
    monkeypatch.setattr(model_vqa_loader, "load_session", None)
    assert program() == 0
    assert "5 of 5 answers are there already" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_written(program, monkeypatch, capsys):
    program()
    whole = program.answers.read_bytes()
    write = AnswersFile.write

    def full(self, answer, model_id):
        if self.done == 3:
            raise OSError(28, "No space left on device")
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "write", full)
    capsys.readouterr()
    assert program("--overwrite") == 2
    monkeypatch.undo()
    message = (
        f"error: {program.answers} can't be written (No space left on device); its 3 answers are intact: make room, "
        "then run the same command without --overwrite to go on from there"
    )
    assert message in capsys.readouterr().err
    assert program() == 0
    assert program.answers.read_bytes() == whole


def test_too_large_a_batch_says_so(program, monkeypatch, capsys):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(AnswersFile, "write", too_large)
    assert program() == 2
    message = "out of memory (CUDA out of memory); pass a smaller --batch-size; run the same command again to go on"
    assert message in capsys.readouterr().err


def test_bad_rows_become_records_and_the_exit_code_says_so(program, capsys):
    program()
    good = {record["question_id"]: record["text"] for record in program.records()}
    bad = [
        {"question_id": 100, "image": "none.jpg", "text": "gone"},
        {"question_id": 101, "image": "none2.jpg", "text": "gone too"},
        {"question_id": 102, "image": "../images/tiny.png", "text": "outside"},
        {"question_id": 103, "image": "tiny.png", "text": ""},
        {"question_id": 104, "text": "long " * 600},
    ]
    write_questions(program.questions, [row for pair in zip(bad, ROWS, strict=True) for row in pair])
    capsys.readouterr()
    assert program("--overwrite") == 1
    records = program.records()
    assert {record["question_id"]: record["text"] for record in records if "error" not in record} == good
    codes = {record["question_id"]: record["error"] for record in records if "error" in record}
    assert codes == {
        100: "image_missing",
        101: "image_missing",
        102: "path_outside_folder",
        103: "question_empty",
        104: "prompt_too_long",
    }
    assert records[0]["text"] == ""
    assert records[0]["metadata"]["error"] == "image_missing"
    assert "none.jpg not found" in records[0]["metadata"]["message"]
    counts = "(image_missing 2, path_outside_folder 1, prompt_too_long 1, question_empty 1)"
    assert f"error: 5 rows have no answer {counts}" in capsys.readouterr().err
    assert program() == 1  # all done before, the errors still count


def test_chunks_join_to_the_whole(program):
    program()
    whole = program.records()
    for num_chunks in (2, 7):
        joined = []
        for index in range(num_chunks):
            program("--overwrite", num_chunks=num_chunks, chunk_idx=index)
            joined += program.records()
        assert joined == whole


def test_an_adapter_on_its_base_answers_differently(program, goldens):
    program()
    base = [record["text"] for record in program.records()]
    lora = {"model_path": goldens / "llava-v1.5-golden-task-lora", "model_base": goldens / "llava-v1.5-golden"}
    assert program("--overwrite", **lora) == 0
    assert [record["text"] for record in program.records()] != base
    assert {record["model_id"] for record in program.records()} == {"llava-v1.5-golden-task-lora"}


def test_an_output_that_may_not_be_written(program, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert program(answers_file=tmp_path / "file" / "answers.jsonl") == 2
    assert f"error: {tmp_path / 'file'}" in capsys.readouterr().err


def test_limit_takes_the_first(program):
    assert program(limit=2) == 0
    assert [record["question_id"] for record in program.records()] == [7, "b"]


def test_no_questions_no_answers(program):
    program.questions.write_text("")
    assert program() == 0
    assert program.records() == []


@pytest.mark.parametrize(
    "changed, difference",
    [
        ({"max_new_tokens": 6}, "max_new_tokens was 5, is 6"),
        ({"conv_mode": "llava_v0"}, "conv_mode was None, is 'llava_v0'"),
        ({"limit": 2}, "questions was"),
    ],
)
def test_another_run_on_the_same_file_is_refused(program, capsys, changed, difference):
    program()
    before = program.answers.read_bytes()
    program.flags.pop("--max_new_tokens")
    assert program(**{"max_new_tokens": 5, **changed}) == 2
    message = capsys.readouterr().err
    assert f"error: {program.answers} belongs to another run ({difference}" in message
    assert "pass --overwrite to start anew, or choose another --answers-file" in message
    assert program.answers.read_bytes() == before


def test_bad_question_files_are_refused_before_any_work(program, monkeypatch, capsys):
    monkeypatch.setattr(model_vqa_loader, "load_session", None)
    program.questions.write_text('{"question_id": 1, "text": "a"}\n{"question_id": 1, "text": "b"}\nnot json\n')
    assert program() == 2
    message = capsys.readouterr().err
    assert (
        f"error: {program.questions}: 2 bad rows\n  line 2: question_id 1 is already on line 1\n  line 3: no valid"
        in message
    )
    assert not program.answers.exists()


def test_a_missing_image_folder_is_refused(program, tmp_path, capsys):
    assert program(image_folder=tmp_path / "none") == 2
    assert f"error: --image-folder {tmp_path / 'none'} is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-chunks", "2", "--chunk-idx", "2"], "--chunk-idx 2 of --num-chunks 2: chunks are counted from 0"),
        (["--batch-size", "0"], "--batch-size is 0; choose 1 or more"),
        (["--limit", "-1"], "--limit is -1; choose 1 or more"),
        (["--temperature", "-1"], "--temperature is -1.0; choose 0 (the likeliest answer) or a positive number"),
        (["--top_p", "2"], "--top_p is 2.0; choose a probability above 0, at most 1"),
        (["--conv-mode", "v7"], "argument --conv-mode: invalid choice: 'v7'"),
        (["--device", "tpu9"], "argument --device: 'tpu9' is no device; choose cuda, cuda:1, mps or cpu"),
        (["--load-8bit", "--load-4bit"], "argument --load-4bit: not allowed with argument --load-8bit"),
    ],
)
def test_wrong_usage(program, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        program(*flags)
    assert message in capsys.readouterr().err


def test_ctrl_c_in_a_real_process(program):
    rows = [{"question_id": index, "image": "landscape.jpg", "text": f"What is {index}?"} for index in range(3000)]
    write_questions(program.questions, rows)
    arguments = program.arguments(batch_size=1, max_new_tokens=16)
    process = subprocess.Popen(
        [sys.executable, "-m", "llava.eval.model_vqa_loader", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run behind "&" ignore it
    )
    deadline = time.monotonic() + 60
    while not (program.journal.exists() and program.journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    done = len(program.journal.read_text().splitlines())
    assert process.returncode == 130
    assert f"stopped: {program.journal} holds {done} of 3000 answers; run the same command again to go on" in errors
    assert "Traceback" not in errors
    assert 0 < done < 3000


def test_the_script_runs_from_anywhere(program, goldens, tmp_path):
    (tmp_path / "images").symlink_to(goldens / "images")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": str(goldens / "llava-v1.5-golden"),
        "DATA": str(tmp_path),
    }
    command = ["bash", str(REPOSITORY / "inference.sh"), "--max_new_tokens", "3", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "finetuned_llava_answers.jsonl").read_text().splitlines()) == 5
