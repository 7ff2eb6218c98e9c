"""Every form of `device_map` that callers of the original pass selects the intended devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.model import devices, placement
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.empty_model import empty_model
from llava.model.devices import available_devices, parse_device
from llava.model.placement import first_device, spread_model

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[2] / "playground/llava-tiny"
TWO_GPUS = ["cpu", "cuda:0", "cuda:1"]


@pytest.fixture
def two_gpus(monkeypatch):
    """Names of devices as on a machine with two GPUs."""
    monkeypatch.setattr(devices, "available_devices", lambda: TWO_GPUS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "best_device", lambda: torch.device("cuda"))


@pytest.mark.parametrize("device_map", ["cpu", CPU, None, {"": "cpu"}, {"model": "cpu", "lm_head": CPU}])
def test_every_form_that_means_the_cpu(goldens, device_map, golden_model):
    path = str(goldens / "llava-v1.5-golden")
    model = load_pretrained_model(path, None, "x", device_map=device_map, dtype="float32")[1]
    assert {parameter.device for parameter in model.parameters()} == {CPU}
    assert torch.equal(model.lm_head.weight, golden_model[1].lm_head.weight)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_strategies_take_the_best_device(goldens, device_map, monkeypatch):
    monkeypatch.setattr(placement, "best_device", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    model = load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device_map=device_map)[1]
    assert model.device == CPU


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (1, "cuda:1"),
        (torch.device("cuda", 0), "cuda:0"),
        ({"model": 1, "lm_head": 0}, "cuda:1"),
        ("balanced", "cuda"),
        ({}, "cuda"),
        ("", "cuda"),
        (None, "cpu"),
    ],
)
def test_devices_of_a_machine_with_gpus(two_gpus, device_map, expected):
    assert first_device(device_map) == torch.device(expected)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("cuda:2", r"^device 'cuda:2' is not available.*; this machine has cpu, cuda:0, cuda:1$"),
        (7, r"^device '7' is not available; this machine has cpu, cuda:0, cuda:1$"),
        ("mps", r"^device 'mps' is not available; this machine has cpu, cuda:0, cuda:1$"),
        ({"model": "cpu", "lm_head": "cuda:5"}, r"^device 'cuda:5' is not available"),
        (
            "balancd",
            r"^device 'balancd' is unknown; pass a device, a map from module to device, or auto, balanced, bal",
        ),
        ({"": "disk"}, r"^device_map leaves the model on disk; load 4 bit, or use more or larger GPUs$"),
    ],
)
def test_a_device_that_this_machine_lacks_is_named(two_gpus, goldens, device_map, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_gpus():
    assert available_devices()[0] == "cpu"
    for value in ("cuda", "cuda:0", torch.device("cuda:0")):
        with pytest.raises(ValueError, match=r"^device 'cuda.*is not available.*; this machine has cpu"):
            parse_device(value)
    with pytest.raises(ValueError, match=r"^device 'tpu9' is unknown; choose cpu"):
        parse_device("tpu9")


def test_cuda_as_device_leaves_the_choice_to_the_map_as_in_the_original(goldens):
    path = str(goldens / "llava-v1.5-golden")
    assert load_pretrained_model(path, None, "x", False, False, "cpu", "cuda")[1].device == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^device 'cuda' is not available"):
            load_pretrained_model(path, None, "x", device="cuda")


@pytest.mark.parametrize("device_map", ["cpu", None])
def test_what_is_loaded_on_the_cpu_to_be_moved_has_the_dtype_of_the_gpu(goldens, monkeypatch, device_map):
    from llava.model import builder

    monkeypatch.setattr(builder, "default_dtype", lambda device: torch.float16)
    path = str(goldens / "llava-v1.5-golden")
    assert load_pretrained_model(path, None, "x", device_map=device_map)[1].dtype is torch.float16
    assert load_pretrained_model(path, None, "x", device="cpu")[1].dtype is torch.float32
    assert load_pretrained_model(path, None, "x", device_map=device_map, dtype="float32")[1].dtype is torch.float32


@pytest.mark.parametrize(
    ("device_map", "used"), [("auto", {0}), ("sequential", {0}), ("balanced", {0, 1}), ("balanced_low_0", {1})]
)
def test_strategies_choose_among_gpus(two_gpus, device_map, used):
    """Each GPU could hold the whole model."""
    model = empty_model(open_checkpoint(TINY).config)
    try:
        spread = spread_model(model, device_map, torch.float32, 16, max_memory={0: 30_000_000, 1: 30_000_000})
    except RuntimeError as error:
        if "Cannot access accelerator device" not in str(error):
            raise
        pytest.skip("this version of accelerate looks for the GPUs themselves")
    assert set(spread.values()) == used


def test_what_no_gpu_can_hold_is_spread(two_gpus):
    model = empty_model(open_checkpoint(TINY).config)
    spread = spread_model(model, "auto", torch.float32, 16, max_memory={0: 12_000_000, 1: 12_000_000})
    assert (spread["model.embed_tokens"], spread["lm_head"]) == (0, 1)
    with pytest.raises(ValueError, match=r"on disk; load 4 bit, or use more or larger GPUs$"):
        spread_model(model, "auto", torch.float32, 16, max_memory={0: 8_000_000, 1: 1_000})
