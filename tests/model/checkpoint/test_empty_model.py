"""A model without weights, and threads that load at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import torch
from torch import nn

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import empty_model as module
from llava.model.checkpoint.empty_model import empty_model
from llava.model.configuration import LlavaConfig
from llava.model.llava_llama import LlavaLlamaForCausalLM

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(**changes):
    vision = {**TOWER, "image_size": 28, "patch_size": 14}
    return LlavaConfig(**SIZES, mm_vision_config=vision, mm_hidden_size=8, **changes)


def test_parameters_are_empty_and_buffers_are_filled():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    model, whole = (build(config(rope_parameters=rope)) for build in (empty_model, LlavaLlamaForCausalLM))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers, expected = dict(model.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    assert len(buffers) == 3
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name
    assert model.state_dict().keys() == whole.state_dict().keys()


def test_other_threads_keep_their_weights_meanwhile(monkeypatch):
    inside, done = threading.Event(), threading.Event()

    class Slow(LlavaLlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            inside.set()
            assert done.wait(60)

    monkeypatch.setattr(module, "LlavaLlamaForCausalLM", Slow)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(empty_model, config())
        assert inside.wait(60)
        layer = nn.Linear(2, 2)
        done.set()
        model = building.result()
    assert layer.weight.device.type == "cpu"
    assert model.device.type == "meta"


def test_nothing_here_patches_torch_for_the_process(monkeypatch, goldens):
    """`init_empty_weights` would: a thread that sets a weight meanwhile would lose it."""
    monkeypatch.setattr(accelerate, "init_empty_weights", None)
    monkeypatch.setattr("accelerate.big_modeling.init_empty_weights", None)
    load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device="cpu")


def test_threads_load_at_once(goldens, golden_model):
    path = str(goldens / "llava-v1.5-golden")
    start = threading.Barrier(4)

    def load(_):
        start.wait()
        return load_pretrained_model(path, None, "x", device="cpu", dtype="float32")[1]

    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load, range(4)))
    expected = dict(golden_model[1].named_parameters())
    for model in models:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
