"""Wrong answers reach the trackers that show images, from rank 0 alone."""

from __future__ import annotations

import inspect
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import TrainerState
from transformers.integrations import INTEGRATION_TO_CALLBACK

from llava.train.trackers import wrong_answers
from llava.train.trackers.tolerance import tolerate_failures
from llava.train.trackers.wrong_answers import LOGS, WrongAnswers, markdown_table
from llava.train.validation.mistakes import ShownMistake

RED, BLUE = (Image.new("RGB", (256, 256), colour) for colour in ("red", "blue"))
SHOWN = [ShownMistake(RED, "What | is\n<b>it?", "yes", ""), ShownMistake(BLUE, "Why?", "so", "no")]
TABLE = """\
| image | question | true answer | given answer |
| --- | --- | --- | --- |
| 01 | What &#124; is &#60;b&#62;it? | yes | (empty) |
| 02 | Why? | so | no |"""


def test_the_table_shows_texts_as_they_are():
    assert markdown_table(SHOWN) == TABLE


# Signatures of wandb 0.31, mlflow 3.17 and trackio 0.43.


def wandb_image(data_or_path, mode=None, caption=None, grouping=None, classes=None, boxes=None, masks=None):
    return data_or_path, caption


def wandb_log(data, step=None, commit=None): ...


def mlflow_log_image(image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=False): ...


def mlflow_log_text(text, artifact_file, run_id=None): ...


def trackio_image(value, caption=None):
    return value


def trackio_table(columns=None, data=None, dataframe=None, rows=None):
    return columns, data


def trackio_log(metrics, step=None): ...


@pytest.fixture
def recorded(monkeypatch):
    """The calls of stand-ins for the trackers' functions, their arguments bound to the real names."""
    calls = []

    def recording(function):
        def call(*arguments, **named):
            bound = inspect.signature(function).bind(*arguments, **named).arguments
            calls.append((function.__name__, bound))

        return call

    modules = {
        "wandb": SimpleNamespace(Image=wandb_image, log=recording(wandb_log)),
        "mlflow": SimpleNamespace(log_image=recording(mlflow_log_image), log_text=recording(mlflow_log_text)),
        "trackio": SimpleNamespace(Image=trackio_image, Table=trackio_table, log=recording(trackio_log)),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_wandb_gets_captioned_images_beside_the_step(recorded):
    LOGS["wandb"](None, SHOWN, 40)
    images = [(RED, "What | is\n<b>it? | true: yes | given: "), (BLUE, "Why? | true: so | given: no")]
    assert recorded == [("wandb_log", {"data": {"eval/wrong_answers": images, "train/global_step": 40}})]


def test_trackio_gets_a_table_of_images(recorded):
    LOGS["trackio"](None, SHOWN, 40)
    table = ["image", "question", "true answer", "given answer"], [list(mistake) for mistake in SHOWN]
    assert recorded == [("trackio_log", {"metrics": {"eval/wrong_answers": table, "train/global_step": 40}})]


def test_mlflow_gets_images_by_number_and_a_file(recorded):
    LOGS["mlflow"](None, SHOWN, 40)
    assert recorded == [
        ("mlflow_log_image", {"image": RED, "key": "wrong_answer_01", "step": 40}),
        ("mlflow_log_image", {"image": BLUE, "key": "wrong_answer_02", "step": 40}),
        ("mlflow_log_text", {"text": TABLE, "artifact_file": "wrong_answers/step_00000040.md"}),
    ]


@pytest.fixture
def gallery(monkeypatch):
    """Return the function (mistakes, rank 0?) -> calls of a tracker's function after a validation at step 7."""

    class Tracker:
        pass

    def run(mistakes, is_first):
        calls = []
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mine", Tracker)
        monkeypatch.setitem(LOGS, "mine", lambda _, shown, step: calls.append((shown, step)))
        monkeypatch.setattr(wrong_answers, "choose_mistakes", lambda found: found)
        monkeypatch.setattr(wrong_answers, "show_mistakes", lambda chosen, session: chosen)
        callbacks = [Tracker()]
        evaluator = SimpleNamespace(mistakes=mistakes, session=None)
        callback = WrongAnswers(evaluator, callbacks, tolerate_failures(callbacks))
        callback.on_evaluate(None, TrainerState(global_step=7, is_world_process_zero=is_first), None)
        return calls

    return run


def test_rank_0_alone_sends_and_only_mistakes(gallery):
    assert gallery(SHOWN, True) == [(SHOWN, 7)]
    assert gallery(SHOWN, False) == gallery([], True) == []


# TensorBoard itself


def row(image, answer):
    turns = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": answer}]
    return {"id": answer, "image": image, "conversations": turns}


@pytest.fixture
def run(train_tiny, tmp_path):
    """Return the function flags -> exit code of a run of two steps with a validation on three questions after each."""

    def train(*flags):
        rows = [row("landscape.jpg", "yellow"), row("portrait.png", "green"), row("square.png", "red")]
        held_out = tmp_path / "held_out.json"
        held_out.write_text(json.dumps(rows))
        words = ["--eval_data_path", held_out, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2"]
        words += ["--lora_enable", "True", "--lora_r", "4", "--per_device_train_batch_size", "2"]
        return train_tiny(tmp_path / "out", rows, *words, "--dataloader_num_workers", "0", *flags)

    return train


def test_tensorboard_holds_accuracy_images_and_texts(run, tmp_path, caplog):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run("--report_to", "tensorboard", "--logging_dir", tmp_path / "board") == 0
    assert not [message for message in caplog.messages if message.startswith("--report_to")]
    events = accumulator.EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    accuracy = {event.step: event.value for event in events.Scalars("eval/accuracy")}
    assert sorted(accuracy) == [1, 2]
    for step in accuracy:
        images = [
            event
            for tag in events.Tags()["images"]
            if tag.startswith("eval/wrong_answers/")
            for event in events.Images(tag)
            if event.step == step
        ]
        assert len(images) == round(3 * (1 - accuracy[step])) > 0
        assert {(event.width, event.height) for event in images} == {(256, 256)}
        assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in images)
    (table, _) = (
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/wrong_answers/text_summary")
    )
    assert table.count("What color is it?") == round(3 * (1 - accuracy[1]))


def test_a_full_disk_under_the_tracker_ends_no_training(run, tmp_path, monkeypatch, caplog):
    board = pytest.importorskip("torch.utils.tensorboard")

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(board.SummaryWriter, "add_scalar", fail)
    monkeypatch.setattr(board.SummaryWriter, "add_image", fail)
    assert run("--report_to", "tensorboard", "--logging_dir", tmp_path / "board") == 0
    warnings = [message for message in caplog.messages if message.startswith("--report_to tensorboard")]
    assert len(warnings) == 3
    assert "is given up after 3 failures (OSError: No space left on device)" in warnings[-1]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
