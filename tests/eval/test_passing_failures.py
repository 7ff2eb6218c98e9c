"""A disk that goes away for a moment: its images are asked again, and a folder that is gone stops the run."""

import errno
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from llava.eval.model_vqa_loader import main
from llava.inference.engine.image_loader import ImageLoader

COUNT = 12


class Run:
    """The program on the goldens' model, with a folder of distinct images of its own."""

    def __init__(self, goldens, folder):
        self.images, self.answers = folder / "images", folder / "answers.jsonl"
        self.images.mkdir()
        for number in range(COUNT):
            shutil.copy(goldens / "images" / "tiny.png", self.images / f"{number}.png")
        (self.images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        names = [*(f"{number}.png" for number in range(COUNT)), "broken.png", None]
        rows = [{"question_id": key, "image": name, "text": f"What is {key}?"} for key, name in enumerate(names)]
        self.questions = folder / "questions.jsonl"
        self.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.arguments = [
            *("--model-path", str(goldens / "llava-v1.5-golden"), "--image-folder", str(self.images)),
            *("--question-file", str(self.questions), "--device", "cpu", "--max_new_tokens", "3", "--workers", "0"),
        ]

    def __call__(self, *more):
        return main([*self.arguments, "--answers-file", str(self.answers), *more])

    def whole(self, *more):
        """Return the file of a run in which nothing fails."""
        path = self.answers.with_name("whole.jsonl")
        assert main([*self.arguments, "--answers-file", str(path), *more]) == 1  # the broken image
        return path.read_bytes()

    def errors(self):
        records = [json.loads(line) for line in self.answers.read_text().splitlines()]
        return {record["question_id"]: record["error"] for record in records if "error" in record}


@pytest.fixture
def run(goldens, tmp_path):
    torch.set_num_threads(1)
    return Run(goldens, tmp_path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOENT, errno.EMFILE])
@pytest.mark.parametrize("flags", [(), ("--num_beams", "2")], ids=["engine", "beams"])
def test_images_that_could_not_be_read_are_asked_again(run, monkeypatch, capsys, code, flags):
    whole = run.whole(*flags)
    opened, gone = Path.open, {f"{number}.png" for number in (0, 5, 11)}

    def fail(self, *args, **options):
        if self.name in gone:
            raise OSError(code, os.strerror(code), str(self))
        return opened(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert run(*flags) == 1
    assert run.errors() == {0: "image_missing", 5: "image_missing", 11: "image_missing", 12: "image_corrupt"}
    capsys.readouterr()
    assert run(*flags) == 1
    assert "11 of 14 answers exist already\n3 questions whose images could not be read" in capsys.readouterr().err
    assert run.answers.read_bytes() == whole
    assert sorted(path.name for path in run.answers.parent.glob("answers*")) == [
        "answers.jsonl",
        "answers.jsonl.run.json",
    ]


def wait_for_a_line(path):
    """Wait until a file has a line, at most a minute."""
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.exists() and path.read_bytes().endswith(b"\n")):
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["renamed", "empty"])
def test_a_folder_that_goes_away_during_the_run_stops_it(run, monkeypatch, capsys, how):
    whole = run.whole()
    load, calls, away = ImageLoader.load, itertools.count(), run.images.with_name("away")
    journal = run.answers.with_name("answers.jsonl.journal")

    def load_and_lose(self, names):
        if next(calls) == 10:
            wait_for_a_line(journal)  # the loader reads ahead of the answers
            run.images.rename(away)
            if how == "empty":  # as the place of a disk that is not mounted any more
                run.images.mkdir()
        return load(self, names)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ImageLoader, "load", load_and_lose)
        assert run("--batch-size", "2") == 2
    errors = capsys.readouterr().err
    reason = "is empty" if how == "empty" else "is not a directory"
    kept = len(journal.read_bytes().splitlines())
    assert errors.count("error: ") == 1
    message = f"error: --image-folder {run.images} {reason}; {kept} of 14 answers are kept: restore it, then run the"
    assert message in errors
    assert 0 < kept < 14
    assert not run.answers.exists()
    if how == "empty":
        assert run() == 2
        assert f"error: --image-folder {run.images} is empty; give the one" in capsys.readouterr().err
        run.images.rmdir()
    assert run() == 2
    assert f"error: --image-folder {run.images} is not a directory; give the one" in capsys.readouterr().err
    away.rename(run.images)
    assert run() == 1
    assert run.answers.read_bytes() == whole


def test_a_folder_that_cannot_be_listed_stops_the_run(run, monkeypatch, capsys):
    def fail(path="."):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "scandir", fail)
    assert run() == 2
    assert f"error: --image-folder {run.images} can't be read (Stale file handle)" in capsys.readouterr().err
    assert not run.answers.exists()


def test_a_link_that_leads_back_to_itself(run, capsys):
    loop = run.images.with_name("loop")
    loop.symlink_to(loop)
    arguments = [str(loop) if part == str(run.images) else part for part in run.arguments]
    assert main([*arguments, "--answers-file", str(run.answers)]) == 2
    assert f"error: --image-folder {loop} can't be read (Too many levels of symbolic" in capsys.readouterr().err


def test_values_of_questions_are_printed_without_control_characters(run, capsys):
    title = "\x1b]0;title\x07"
    rows = [
        {"question_id": title, "text": f"<image> {title}</s>", "image": f"{title}.png"},
        {"question_id": [title, "x" * 10**6], "text": "a"},
        {"question_id": 3, "text": {title: "y" * 10**6}},
        {title: 4},
        {"question_id": 5, "text": "a", "image": {title: 1}},
    ]
    run.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run() == 2
    shown = "".join(capsys.readouterr())
    run.questions.write_text(json.dumps(rows[0]) + "\n")
    assert run() == 1
    shown += "".join(capsys.readouterr()).split("\r")[0] + run.answers.read_text()
    assert "\\x1b]0;title\\x07" in shown
    assert all(character.isprintable() or character in "\n" for character in shown)
    assert len(shown) < 20_000
