"""A leading `~` is the home directory wherever a path comes in: flags of programs and of training, Python functions."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.data.data_files import read_files, split_paths
from llava.data.doctor import __main__ as doctor
from llava.data.records import read_records
from llava.data.table.read import read_table
from llava.eval import model_vqa_loader, vqa_score
from llava.eval.report import __main__ as report
from llava.eval.run_llava import eval_model
from llava.files.atomic_files import atomic_directory, atomic_write
from llava.files.home_directory import expand_home, expand_homes
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question, read_questions
from llava.inference.session import Session
from llava.model import plan
from llava.model.checkpoint.command_line import parse_options
from llava.train.flags.command_line import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "~/goldens/llava-v1.5-golden"
QUESTION = {"question_id": 1, "image": "tiny.png", "text": "What?", "answer": "a"}
ROW = {
    "image": "tiny.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}],
}


@pytest.fixture
def home(tmp_path, monkeypatch, goldens):
    """A home directory with a model, images, a table, questions and data; the working directory is elsewhere."""
    torch.set_num_threads(1)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (folder / "goldens").symlink_to(goldens)
    (folder / "images").symlink_to(goldens / "images")
    (folder / "table.csv").write_text("image_id,question,question_id,answer\n1,What?,1,a\n")
    (folder / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (folder / "data.json").write_text(json.dumps([ROW]))
    yield folder
    assert not list(Path.cwd().iterdir())  # nothing was written into a folder called "~"


def script(name):
    """A program that lies outside the package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, REPOSITORY / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_functions(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expand_home("~") == str(tmp_path)
    assert expand_home(Path("~/a")) == os.path.join(tmp_path, "a")  # noqa: PTH118
    for text in ("a/~", "~nobody-of-this-name/a", "~a.jpg", ""):
        assert expand_home(text) == text
    parsed = SimpleNamespace(one="~/a", two=Path("~/b"), three=["~/c", "d"], four=None, text="~/e")
    assert expand_homes(parsed, "one", "two", "three", "four") is parsed
    assert (parsed.one, parsed.two) == (f"{tmp_path}/a", tmp_path / "b")
    assert (parsed.three, parsed.four, parsed.text) == ([f"{tmp_path}/c", "d"], None, "~/e")


def test_flags_of_training(home):
    names = {
        "model_name_or_path": "base", "vision_tower": "tower", "pretrain_mm_mlp_adapter": "projector.bin",
        "image_folder": "images", "eval_image_folder": "others", "output_dir": "out", "cache_dir": "cache",
        "lora_weight_path": "adapter", "resume_from_checkpoint": "out/checkpoint-1", "deepspeed": "zero.json",
    }  # fmt: skip
    (home / "zero.json").write_text("{}")
    flags = [word for name, value in names.items() if name != "deepspeed" for word in (f"--{name}", f"~/{value}")]
    flags += [
        "--data_path",
        "~/a.json,~/b.jsonl",
        "--eval_data_path",
        "~/c.json",
        "--eval_strategy",
        "epoch",
        "--lora_enable",
        "True",
    ]
    groups = parse_arguments([*flags, "--use_cpu", "True", "--report_to", "none"])
    values = {name: value for group in groups for name, value in vars(group).items()}
    for name, value in names.items():
        assert values[name] == (None if name == "deepspeed" else f"{home}/{value}"), name
    assert split_paths(values["data_path"]) == [f"{home}/a.json", f"{home}/b.jsonl"]
    assert split_paths(values["eval_data_path"]) == [f"{home}/c.json"]


def test_preparing_and_examining_data(home):
    preprocess = script("task_data_preprocessing.py").main
    (home / "numbered").mkdir()
    (home / "numbered" / "1.png").touch()
    words = ["--input", "~/table.csv", "--output", "~/new/data.json", "--image_name", "{id}.png"]
    assert preprocess([*words, "--check_images", "~/numbered"]) == 0
    assert (home / "new" / "data.json").is_file()
    data = ["--data_path", "~/data.json", "--image_folder", "~/images", "--model_name_or_path", MODEL]
    assert doctor.main([*data, "--json", "~/report.json"]) == 0
    assert json.loads((home / "report.json").read_text())["statistics"]["usable_rows"] == 1


def test_answers_scores_and_reports(home):
    words = ["--model-path", MODEL, "--question-file", "~/questions.jsonl", "--image-folder", "~/images"]
    words += ["--answers-file", "~/out/answers.jsonl", "--max_new_tokens", "2", "--device", "cpu"]
    assert model_vqa_loader.main(words) == 0
    answers = ["--answers-file", "~/out/answers.jsonl"]
    assert vqa_score.main([*answers, "--annotations", "~/questions.jsonl", "--json", "~/out/scores.json"]) == 0
    shared = [*answers, "--question-file", "~/questions.jsonl", "--annotations", "~/questions.jsonl"]
    assert report.main([*shared, "--images", "~/images", "--output", "~/out/report.html", "--workers", "0"]) == 0
    written = {path.name for path in (home / "out").iterdir()}
    assert written == {"answers.jsonl", "answers.jsonl.run.json", "scores.json", "report.html"}


def test_checkpoints(home):
    assert plan.main(["--model-path", MODEL, "--infer", "--json", "~/plan.json"]) == 0
    words = ["--from", MODEL, "--to", "~/hf", "--layout", "hf"]
    assert script("scripts/convert_checkpoint.py").main(words) == 0
    assert (home / "plan.json").is_file()
    assert (home / "hf" / "config.json").is_file()


def test_flags_of_the_programs_that_write_checkpoints(home):
    flags = ["--model-path", "--save-path", "--model-base", "--vision-tower", "--mm-projector"]
    words = [word for flag in flags for word in (flag, f"~/{flag}")]
    options = parse_options(argparse.ArgumentParser(), words, source=flags[0], target=flags[1], dtype="")
    found = (options.source, options.target, options.model_base, options.vision_tower, options.mm_projector)
    assert [str(path) for path in found] == [f"{home}/{flag}" for flag in flags]


def test_python_functions(home, goldens, capsys):
    assert read_table("~/table.csv").rows[0].question == "What?"
    assert read_questions("~/questions.jsonl") == [Question(1, "What?", ("tiny.png",))]
    assert read_records("~/data.json") == [ROW]
    assert [file.path for file in read_files(split_paths("~/data.json"))] == [str(home / "data.json")]
    with atomic_write("~/new/a.txt") as stream:
        stream.write("a")
    with atomic_directory("~/made") as directory:
        (directory / "b.txt").touch()
    assert (home / "new" / "a.txt").read_text() == "a"
    assert (home / "made" / "b.txt").exists()
    session = Session.load(MODEL, device="cpu", dtype="float32")
    [answer] = answer_batch(session, read_questions("~/questions.jsonl"), "~/images")
    assert answer.error is None
    args = SimpleNamespace(
        model_path=MODEL, model_base=None, query="What?", conv_mode=None, image_file="~/images/tiny.png", sep=",",
        temperature=0, top_p=None, num_beams=1, max_new_tokens=2, device="cpu",
    )  # fmt: skip
    assert eval_model(args) + "\n" == capsys.readouterr().out


def test_a_list_of_files_longer_than_a_file_name():
    paths = [f"some_folder/part_{number}.json" for number in range(40)]
    assert split_paths(",".join(paths)) == paths
