"""Batches looked at ahead are those that come, errors included; images encoded ahead are those of their batch."""

from __future__ import annotations

import json

import pytest
import torch

import llava.train.trainer
from llava.model.vision_tower import CLIPVisionTower
from llava.model.weights import open_tensor_file
from llava.train.lookahead import Lookahead
from llava.train.train import main
from llava.train.trainer import LlavaTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


def batches(count, error_at=None):
    for index in range(count):
        if index == error_at:
            raise OSError("no such picture")
        yield {"index": index}


@pytest.mark.parametrize("peeks", [0, 1, 2])
def test_what_is_seen_ahead_comes_next(peeks):
    ahead, found = Lookahead(batches(3)), []
    for batch in ahead:
        found.append(batch["index"])
        seen = [ahead.peek() for _ in range(peeks)]
        assert seen == [{"index": batch["index"] + 1} if batch["index"] < 2 else None] * peeks
    assert found == [0, 1, 2]


def test_an_error_ahead_waits_for_its_batch():
    ahead = Lookahead(batches(3, error_at=1))
    assert next(ahead) == {"index": 0}
    assert ahead.peek() is None
    with pytest.raises(OSError, match="no such picture"):
        next(ahead)


def test_what_is_put_into_a_batch_ahead_stays_there():
    ahead = Lookahead(batches(1))
    ahead.peek()["features"] = 3
    assert next(ahead) == {"index": 0, "features": 3}


FLAGS = {
    "lora": ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8"],
    "apart": ["--lora_enable", "True", "--lora_r", "4", "--share_image_prefix", "False"],
    "accumulated": ["--lora_enable", "True", "--lora_r", "4", "--gradient_accumulation_steps", "2"],
    "learning encoder": ["--unfreeze_mm_vision_tower", "True"],
}


@pytest.fixture
def train(goldens, tmp_path):
    """Return the function (name of the output directory, flags) -> losses of a run on the golden model."""
    images = ["portrait.png", "square.png", "gray.jpg", "portrait.png", "square.png", "gray.jpg"]
    turns = [{"from": "human", "value": "<image>\nWhat number?"}, {"from": "gpt", "value": "3"}]
    rows = [{"id": index, "image": image, "conversations": turns} for index, image in enumerate(images)]
    rows.append({"id": 6, "conversations": [turns[0] | {"value": "Say 3."}, turns[1]]})
    (tmp_path / "data.json").write_text(json.dumps(rows))

    def run(name, flags):
        words = ["--model_name_or_path", goldens / "llava-v1.5-golden", "--data_path", tmp_path / "data.json"]
        words += ["--image_folder", goldens / "images", "--use_cpu", "True", "--report_to", "none"]
        words += ["--output_dir", tmp_path / name, "--disable_tqdm", "True", "--logging_steps", "1"]
        words += ["--model_max_length", "256", "--per_device_train_batch_size", "2", "--num_train_epochs", "2"]
        words += ["--learning_rate", "1e-3", "--save_strategy", "no", *flags]
        assert main([str(word) for word in words]) == 0
        lines = (tmp_path / name / "train_log.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    return run


@pytest.mark.parametrize("kind", list(FLAGS))
def test_encoding_ahead_changes_nothing(train, tmp_path, monkeypatch, kind):
    given = []
    forward = llava.train.trainer.LlavaTrainer.compute_loss

    def watch(self, model, inputs, *args, **kwargs):
        given.append("tower_features" in inputs)
        return forward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "compute_loss", watch)
    losses = train("ahead", FLAGS[kind])
    assert any(given) == (kind != "learning encoder")
    monkeypatch.setattr(llava.train.trainer, "frozen_tower", lambda model: None)
    assert train("when due", FLAGS[kind]) == losses
    files = [path.name for path in (tmp_path / "ahead").glob("*.safetensors")]
    assert files
    for name in files:
        one, two = (open_tensor_file(tmp_path / directory / name) for directory in ("ahead", "when due"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_images_are_encoded_once_and_before_the_device_is_waited_for(train, monkeypatch):
    events = []
    encode, read = CLIPVisionTower.forward, torch.Tensor.tolist

    def encoded(self, pixel_values):
        events.append("encode")
        return encode(self, pixel_values)

    def waited(self):
        if self.shape == (2,) and self.dtype == torch.float32:
            events.append("wait")
        return read(self)

    monkeypatch.setattr(CLIPVisionTower, "forward", encoded)
    monkeypatch.setattr(torch.Tensor, "tolist", waited)
    train("out", FLAGS["lora"])
    # An epoch's first batch is encoded when it is due, each other one before the wait of the step in front of it.
    assert events == ["encode", "encode", "wait", "encode", "wait", "encode", "wait", "wait"] * 2
