"""The README example of the original: `eval_model(args)` prints the answer, returns it, and loads the weights once."""

import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llava.eval import run_llava
from llava.eval.run_llava import eval_model, main
from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.inference.batch.fingerprint import ModelSources
from llava.inference.prompts import PromptError
from llava.inference.session import Sampling, Session
from llava.mm_utils import get_model_name_from_path

SAMPLING = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def session(goldens):
    torch.set_num_threads(1)
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture
def loads(monkeypatch, session):
    """Paths of the models that were loaded; loading gives the same tiny model."""
    run_llava._load_session.cache_clear()
    paths = []

    def load(model_path, model_base=None, **options):
        paths.append(model_path)
        return session

    monkeypatch.setattr(Session, "load", load)
    yield paths
    run_llava._load_session.cache_clear()


def readme_args(goldens, **changed):
    """The object of the README's example."""
    model_path = str(goldens / "llava-v1.5-golden")
    attributes = {
        "model_path": model_path,
        "model_base": None,
        "model_name": get_model_name_from_path(model_path),
        "query": "Is there railing?",
        "conv_mode": None,
        "image_file": str(goldens / "images" / "landscape.jpg"),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 5,
    }
    return type("Args", (), {**attributes, **changed})()


def ask(session, goldens, question, *names):
    images = [open_image(goldens / "images" / name) for name in names]
    return session.answer_prompts([session.prepare(question, images)], SAMPLING)[0]


def test_the_readme_example_prints_and_returns_the_answer(goldens, session, capsys):
    run_llava._load_session.cache_clear()
    answer = eval_model(readme_args(goldens))
    assert capsys.readouterr().out == f"{answer}\n"
    assert answer == ask(session, goldens, "Is there railing?", "landscape.jpg")
    run_llava._load_session.cache_clear()


def test_two_calls_load_once(goldens, loads):
    first = eval_model(readme_args(goldens))
    assert eval_model(readme_args(goldens, query="What else?")) != first
    assert eval_model(readme_args(goldens, conv_mode="llava_v0")) != first  # another template, the same weights
    assert eval_model(readme_args(goldens)) == first
    assert loads == [str(goldens / "llava-v1.5-golden")]


def test_changed_files_and_other_models_are_loaded_anew(goldens, loads, tmp_path):
    copy = shutil.copytree(goldens / "llava-v1.5-golden", tmp_path / "copy")
    for path in (goldens / "llava-v1.5-golden", copy):
        eval_model(readme_args(goldens, model_path=str(path)))
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    eval_model(readme_args(goldens, model_path=str(copy)))
    assert loads == [str(goldens / "llava-v1.5-golden"), str(copy), str(copy)]
    assert run_llava._load_session.cache_info().currsize == 1


def test_a_changed_base_or_vision_tower_is_loaded_anew(loads, goldens, tmp_path):
    """Though neither is named in the call: the adapter records its base, the base its vision tower."""
    base = shutil.copytree(goldens / "llava-v1.5-golden", tmp_path / "base")
    adapter = shutil.copytree(goldens / "llava-v1.5-golden-task-lora", tmp_path / "adapter")
    tower = shutil.copytree(goldens / "clip-vit-tiny-patch14-56", tmp_path / "clip-vit-tiny-patch14-56")
    config = adapter / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    shard = base / "pytorch_model-00001-of-00003.bin"
    for path in (shard, tower / "pytorch_model.bin"):
        eval_model(readme_args(goldens, model_path=str(adapter)))
        state, found = torch.load(path, weights_only=True), path.stat()
        torch.save({name: tensor + 1 for name, tensor in state.items()}, path)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a copy that keeps times leaves it
    eval_model(readme_args(goldens, model_path=str(adapter)))
    eval_model(readme_args(goldens, model_path=str(adapter)))
    assert len(loads) == 3


def test_files_are_not_read_again_for_each_question(goldens, loads, monkeypatch):
    eval_model(readme_args(goldens))
    monkeypatch.setattr(ModelSources, "fingerprints", None)
    eval_model(readme_args(goldens))


def test_options_that_came_later_are_passed_on(goldens, monkeypatch, session):
    run_llava._load_session.cache_clear()
    options = {}
    monkeypatch.setattr(Session, "load", lambda *paths, **given: options.update(given) or session)
    eval_model(readme_args(goldens, load_4bit=True, device="cpu", dtype="float32"))
    assert options == {"bits": 4, "device": "cpu", "dtype": "float32", "vision_tower": None}
    run_llava._load_session.cache_clear()


@pytest.mark.parametrize(
    "query, equal",
    [
        ("What <image-placeholder> is it?", "What <image> is it?"),
        ("What is it?", "<image>\nWhat is it?"),
    ],
)
def test_the_image_stands_where_the_query_says_else_in_front(goldens, loads, session, query, equal):
    assert eval_model(readme_args(goldens, query=query)) == ask(session, goldens, equal, "landscape.jpg")


def test_several_images(goldens, loads, session):
    names = ("landscape.jpg", "portrait.png")
    files = ";".join(str(goldens / "images" / name) for name in names)
    answer = eval_model(readme_args(goldens, image_file=files, sep=";", query="Compare"))
    assert answer == ask(session, goldens, "<image>\n<image>\nCompare", *names)


def test_no_image(goldens, loads, session):
    assert eval_model(readme_args(goldens, image_file=None)) == ask(session, goldens, "Is there railing?")


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (
            {"image_file": "none.jpg"},
            ImageError,
            "image none.jpg not found, its folder has no images; check the image folder and the file's name",
        ),
        ({"query": ""}, PromptError, "the question is empty; write one"),
        ({"conv_mode": "v7"}, ValueError, "unknown conversation template 'v7'"),
        ({"num_beams": 0}, ValueError, "num_beams is 0; choose 1 (no beam search) or more"),
        ({"model_path": "/none"}, FileNotFoundError, "/none is neither a directory nor complete in the hub's cache"),
    ],
)
def test_errors_say_what_is_wrong(goldens, loads, changed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        eval_model(readme_args(goldens, **changed))


def test_the_command_line(goldens, loads, session, capsys):
    image = str(goldens / "images" / "landscape.jpg")
    arguments = [
        "--model-path",
        str(goldens / "llava-v1.5-golden"),
        "--image-file",
        image,
        "--query",
        "Is there railing?",
    ]
    assert main([*arguments, "--temperature", "0", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == ask(session, goldens, "Is there railing?", "landscape.jpg") + "\n"
    assert main([*arguments, "--image-file", "none.jpg"]) == 2
    assert (
        capsys.readouterr().err
        == "error: image none.jpg not found, its folder has no images; check the image folder and the file's name\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--max_new_tokens", "0"])
    assert "--max_new_tokens is 0; choose 1 or more" in capsys.readouterr().err


def test_cold_threads_load_once(goldens, session, monkeypatch):
    """Each gets the answer that it gets alone."""
    run_llava._load_session.cache_clear()
    start, loads = threading.Barrier(6), []

    def load(model_path, model_base=None, **options):
        loads.append(model_path)
        time.sleep(0.2)  # long enough for the others to ask meanwhile
        return session

    monkeypatch.setattr(Session, "load", load)
    questions = ["Is there railing?", "What colour?", "How many?"] * 2

    def ask_at_once(question):
        start.wait()
        return eval_model(readme_args(goldens, query=question))

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask_at_once, questions))
    assert loads == [str(goldens / "llava-v1.5-golden")]
    assert answers == [ask(session, goldens, question, "landscape.jpg") for question in questions]
    run_llava._load_session.cache_clear()
