"""Runs of `model_vqa_loader` that are killed, fill the disk or meet each other end with the file of a whole run."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llava.eval import answer_program, model_vqa_loader
from llava.eval.model_vqa_loader import main
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.answers_file import AnswersFile
from llava.inference.batch.journal import Journal
from llava.inference.batch.questions import read_questions
from llava.inference.distributed import DistributedRank
from llava.inference.engine.limits import Limits

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("landscape.jpg", "tiny.png", "none.png", "square.png")


class Run:
    """The program on the goldens' model, with a file of questions of its own."""

    def __init__(self, goldens, folder, count):
        rows = [{"question_id": key, "image": NAMES[key % 4], "text": f"What is {key}?"} for key in range(count)]
        self.questions = folder / "questions.jsonl"
        self.questions.write_text("\r\n".join(map(json.dumps, rows)))  # without a line end at the end
        self.answers = folder / "answers.jsonl"
        self.journal = folder / "answers.jsonl.journal"
        self.arguments = [
            *("--model-path", str(goldens / "llava-v1.5-golden"), "--image-folder", str(goldens / "images")),
            *("--question-file", str(self.questions), "--device", "cpu", "--max_new_tokens", "4"),
        ]

    def __call__(self, *more):
        return main([*self.arguments, "--answers-file", str(self.answers), *more])

    def whole(self, *more):
        """Return the file of a run without interruption."""
        path = self.answers.with_name("whole.jsonl")
        main([*self.arguments, "--answers-file", str(path), *more])
        return path.read_bytes()

    def records(self):
        return [json.loads(line) for line in self.answers.read_text().splitlines()]


@pytest.fixture
def run(goldens, tmp_path):
    torch.set_num_threads(1)
    return Run(goldens, tmp_path, 12)


@pytest.mark.parametrize("kept", range(12))
def test_a_disk_that_is_full_at_any_answer(run, monkeypatch, capsys, kept):
    whole = run.whole()
    write, done = os.write, itertools.count()

    def full(descriptor, data):
        if next(done) < kept:
            return write(descriptor, data)
        if next(done) == kept + 1:
            return write(descriptor, bytes(data)[:9])  # what still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert run() == 2
    monkeypatch.undo()
    way_on = "free disk space, then run the same command again to resume"
    message = f"{run.answers} can't be written (No space left on device); its {kept} answers are intact: {way_on}"
    assert message in capsys.readouterr().err
    assert not run.answers.exists()
    assert len(lines(run.journal)) == kept
    assert run() == 1
    assert run.answers.read_bytes() == whole


def test_a_disk_that_is_full_when_all_is_answered(run, monkeypatch, capsys):
    whole = run.whole()
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor):
        if next(calls) > 1:  # the first two are the file of the run's settings and its directory
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run() == 2
    monkeypatch.undo()
    assert "its 12 answers are intact: free disk space" in capsys.readouterr().err
    assert not run.answers.exists()
    assert run() == 1
    assert run.answers.read_bytes() == whole


def test_two_runs_on_one_file(run, capsys):
    with AnswersFile(run.answers, read_questions(run.questions), {}):
        assert run() == 2
    assert f"error: {run.journal} is being written by another process; wait for it" in capsys.readouterr().err
    assert run() == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_may_change_in_between(run, monkeypatch, batch_size):
    whole = run.whole()
    write = AnswersFile.write

    def interrupted(self, answer, model_id):
        if self.done == 6:
            raise KeyboardInterrupt
        write(self, answer, model_id)

    with monkeypatch.context() as patch:
        patch.setattr(AnswersFile, "write", interrupted)
        assert run("--batch-size", str(batch_size)) == 130
    assert run() == 1
    assert run.answers.read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 5, 11])
@pytest.mark.parametrize("size", [1, 3])
def test_windows_of_any_size_write_the_same_file_through_any_interruption(run, monkeypatch, size, kept):
    whole = run.whole()
    limits = dataclasses.replace(Limits.suiting(torch.device("cpu"), 4), window=size, planned_groups=2)
    monkeypatch.setattr(
        "llava.inference.batch.answer_batch.answer_batch", functools.partial(answer_batch, limits=limits)
    )
    write = AnswersFile.write

    def interrupted(self, answer, model_id):
        if self.done == kept:
            raise KeyboardInterrupt
        write(self, answer, model_id)

    with monkeypatch.context() as patch:
        patch.setattr(AnswersFile, "write", interrupted)
        assert run() == 130
    assert len(lines(run.journal)) == kept
    assert run() == 1
    assert run.answers.read_bytes() == whole


def test_scores_are_in_the_metadata(run):
    assert run("--with-scores") == 1
    for record in run.records():
        keys = {"error", "message"} if "error" in record else {
            "logprob", "first_token_logprob", "runner_up", "runner_up_logprob"
        }  # fmt: skip
        assert set(record["metadata"]) == keys


def test_a_list_of_answers_from_the_command_line_and_from_a_file(run, tmp_path, capsys):
    assert run("--choices", "yes, no") == 1
    records = run.records()
    answered = [record for record in records if "error" not in record]
    assert {record["text"] for record in answered} <= {"yes", "no"}
    for record in answered:
        assert max(record["metadata"]["choices"], key=record["metadata"]["choices"].get) == record["text"]
    (tmp_path / "list.txt").write_text("yes\nno\n", encoding="utf-8-sig")
    assert run("--choices", str(tmp_path / "list.txt")) == 1  # the same run
    assert run.records() == records
    capsys.readouterr()
    assert run("--choices", "yes,maybe") == 2
    assert "belongs to another run (choices was ['yes', 'no'], is ['yes', 'maybe'])" in capsys.readouterr().err
    assert run() == 2
    assert "belongs to another run (choices was ['yes', 'no'], is None)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--choices", "a,,b"], "argument --choices: 'a,,b' has empty or repeated answers; give each once"),
        (["--choices", "a,a"], "argument --choices: 'a,a' has empty or repeated answers; give each once"),
        (["--workers", "-1"], "--workers is -1; choose 0 or more"),
        (["--compile", "maybe"], "argument --compile: invalid choice: 'maybe'"),
        (
            ["--num_beams", "2", "--with-scores"],
            "--num_beams does not go with --choices and --with-scores",
        ),
        (["--temperature", "1", "--choices", "a,b"], "--temperature does not go with --choices, which are scored"),
    ],
)
def test_wrong_usage(run, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        run(*flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("is_first_slow", [False, True])
def test_no_process_answers_before_all_have_begun(run, monkeypatch, is_first_slow):
    """Killed at any moment, no answer stands beside the settings of another run, or beside none."""
    whole = run.whole()
    run("--temperature", "1")
    run.answers.with_name(f"{run.journal.name}.1").write_bytes(run.answers.read_bytes())  # as if broken off
    begin, write, runs = AnswersFile.begin, AnswersFile.write, []

    def slow_begin(self):
        if ("journal.1" in self.journal_path.name) != is_first_slow:
            time.sleep(0.5)  # as one that loads the weights longer
        begin(self)
        if self.run_path.exists() and json.loads(self.run_path.read_text())["temperature"] == 0:
            runs.append([place for place in self.answer_files() if place.stat().st_size])

    def watching_write(self, answer, model_id):
        assert json.loads(self.run_path.read_text())["temperature"] == 0
        write(self, answer, model_id)

    monkeypatch.setattr(AnswersFile, "begin", slow_begin)
    monkeypatch.setattr(AnswersFile, "write", watching_write)
    gate = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(answer_program, "process_group", lambda ranks: contextlib.nullcontext(gate.wait))
    ranks = [iter([DistributedRank(rank, 2, rank)]) for rank in range(2)]
    lock = threading.Lock()

    def read_rank():
        with lock:
            return next(ranks.pop())

    session = answer_program.load_session(
        model_vqa_loader.build_parser().parse_args([*run.arguments, "--answers-file", ""])
    )
    monkeypatch.setattr(answer_program, "load_session", lambda args, **_: session)
    monkeypatch.setattr(answer_program, "read_rank", read_rank)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: run("--overwrite"), range(2)))
    assert sorted(codes) == [0, 1]
    assert runs == [[]]
    assert run.answers.read_bytes() == whole


def test_a_list_of_answers_longer_than_a_file_name():
    choices = [f"answer {number}" for number in range(100)]
    assert model_vqa_loader.read_choices(",".join(choices)) == choices


def test_killed_twice_and_run_again(goldens, tmp_path, fork):
    """With another batch size and by chance: what was drawn before and after the kills is what a whole run draws."""
    run = Run(goldens, tmp_path, 200)
    whole = run.whole("--temperature", "1")

    def until_killed():
        append, appended = Journal.append, itertools.count(1)

        def append_and_die(journal, line):
            append(journal, line)
            if next(appended) == 37:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = append_and_die
        return run("--temperature", "1", "--batch-size", "4")

    for kept in (37, 74):
        process = fork(until_killed)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(lines(run.journal)) == kept
        assert not run.answers.exists()
    assert run("--temperature", "1") == 1
    assert run.answers.read_bytes() == whole


def lines(path):
    return path.read_bytes().splitlines() if path.exists() else []
