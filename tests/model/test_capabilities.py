"""What every GPU generation computes with, and what this machine is found to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llava.model import capabilities
from llava.model.capabilities import (
    CAPABILITY_VARIABLE,
    COMPILER,
    GENERATIONS,
    TRITON,
    Machine,
    capabilities_of,
    choose,
    feature,
    forced_capability,
    generation_of,
    inspect_machine,
)
from llava.model.devices import default_dtype, parse_dtype

BOTH = frozenset({TRITON, COMPILER})
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def gpu(capability, installed=BOTH, name="GPU"):
    return Machine("cuda", name, capability, installed=installed)


@pytest.mark.parametrize(
    ("machine", "dtype", "has_bf16", "has_triton", "has_cuda_graphs", "has_flash_attention", "has_int8", "has_fp8"),
    [
        (gpu((5, 2)), FP16, False, False, True, False, False, False),
        (gpu((6, 1)), FP16, False, False, True, False, False, False),
        (gpu((7, 0)), FP16, False, False, True, False, False, False),
        (gpu((7, 5)), FP16, False, False, True, False, True, False),
        *((gpu(each), BF16, True, True, True, True, True, False) for each in [(8, 0), (8, 6)]),
        *(
            (gpu(each), BF16, True, True, True, True, True, True)
            for each in [(8, 9), (9, 0), (10, 0), (12, 0), (13, 0)]
        ),
        (gpu(None), BF16, True, True, True, True, True, False),
        (Machine("mps"), FP16, True, False, False, False, False, False),
        (Machine("cpu"), FP32, True, False, False, False, True, True),
        (Machine("meta"), FP32, True, False, False, False, False, False),
    ],
    ids=str,
)
def test_the_choice(machine, dtype, has_bf16, has_triton, has_cuda_graphs, has_flash_attention, has_int8, has_fp8):
    can = choose(machine)
    assert can.dtype is dtype
    assert (can.has_bf16, can.has_triton, can.has_cuda_graphs) == (has_bf16, has_triton, has_cuda_graphs)
    assert (can.has_flash_attention, can.has_int8, can.has_fp8) == (has_flash_attention, has_int8, has_fp8)
    assert (can.refuse_compilation() is None) is (has_triton or machine.device_type != "cuda")


@pytest.mark.parametrize(
    ("installed", "lacks"),
    [
        ({TRITON, COMPILER}, ""),
        ({TRITON}, "a C compiler is not installed"),
        ({COMPILER}, "Triton is not installed"),
        ((), "Triton and a C compiler are not installed"),
    ],
)
def test_software_that_is_not_installed(installed, lacks):
    can = choose(gpu((8, 6), frozenset(installed)))
    assert (can.lacks, can.has_triton) == (lacks, not lacks)
    assert can.dtype is BF16
    assert choose(gpu((7, 5), frozenset(installed))).lacks == "Triton needs compute capability 8.0"


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(((5, 0), "Pascal"), ((6, 0), "Pascal"), ((7, 0), "Volta"), ((7, 2), "Volta"), ((7, 5), "Turing")),
        *(((8, 0), "Ampere"), ((8, 6), "Ampere"), ((8, 7), "Ampere"), ((8, 9), "Ada"), ((9, 0), "Hopper")),
        *(((10, 0), "Blackwell"), ((10, 3), "Blackwell"), ((12, 0), "Blackwell"), ((12, 1), "Blackwell")),
    ],
)
def test_generations(capability, name):
    assert generation_of(capability).name == name


def test_generations_are_in_order():
    assert [each.since for each in GENERATIONS] == sorted({each.since for each in GENERATIONS})


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (
            gpu((7, 5), name="Tesla T4"),
            "Tesla T4 (compute capability 7.5, Turing): fp16, SDPA, no spam (Triton needs compute capability 8.0)",
        ),
        (gpu((9, 0), name="H100"), "H100 (compute capability 9.0, Hopper): bf16, SDPA, no spam"),
        (
            gpu((9, 0), name="H100")._replace(capability=(7, 5), is_forced=True),
            "H100 (compute capability 7.5, Turing, set by LLAVA_COMPUTE_CAPABILITY): fp16, SDPA, no spam (Triton needs "
            "compute capability 8.0)",
        ),
        (gpu(None, frozenset({COMPILER}), "MI300X"), "MI300X: bf16, SDPA, no spam (Triton is not installed)"),
        (Machine("mps"), "MPS: fp16, SDPA, no spam"),
        (Machine("cpu"), "CPU: fp32, SDPA, no spam"),
    ],
)
def test_the_line_at_the_start(machine, line):
    can = choose(machine)
    assert can.describe(can.dtype, feature("spam", False)) == line
    assert can.describe(torch.float64, feature("spam", True)).partition(": ")[2].startswith("torch.float64, SDPA, spam")


class TestThisMachine:
    @pytest.fixture
    def gpus(self, monkeypatch):
        """Return the function (capabilities of the GPUs, ROCm's version) that this machine then has."""

        def have(*found, hip=None):
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
            index = lambda device: device if isinstance(device, int) else device.index or 0  # noqa: E731
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[index(device)])
            monkeypatch.setattr(torch.version, "hip", hip)
            monkeypatch.delenv(CAPABILITY_VARIABLE, raising=False)
            monkeypatch.delenv("WORLD_SIZE", raising=False)
            monkeypatch.setattr(capabilities, "_SOFTWARE", {TRITON: lambda: True, COMPILER: lambda: False})

        return have

    def test_a_gpu(self, gpus):
        gpus((9, 0), (7, 5))
        assert inspect_machine(torch.device("cuda")) == gpu((9, 0), frozenset({TRITON}))
        assert inspect_machine(torch.device("cuda:1")) == gpu((7, 5), frozenset({TRITON}))
        assert default_dtype("cuda:1") is FP16

    def test_ranks_on_unlike_gpus_agree_on_the_least_capable(self, gpus, monkeypatch):
        gpus((9, 0), (7, 5))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert capabilities_of("cuda:0").dtype is capabilities_of("cuda:1").dtype is FP16

    def test_rocm_has_capabilities_of_another_kind(self, gpus):
        gpus((9, 4), hip="6.4")
        assert inspect_machine(torch.device("cuda")) == gpu(None, frozenset({TRITON}))

    @pytest.mark.parametrize("kind", ["cpu", "mps"])
    def test_no_gpu_is_asked_for_other_devices(self, kind):
        assert inspect_machine(torch.device(kind)) == Machine(kind)

    def test_an_older_gpu_can_be_tried(self, gpus, monkeypatch):
        gpus((9, 0))
        monkeypatch.setenv(CAPABILITY_VARIABLE, "7.5")
        machine = inspect_machine(torch.device("cuda"))
        assert (machine.capability, machine.is_forced) == ((7, 5), True)
        assert not capabilities_of("cuda").has_triton

    def test_what_is_installed_here(self):
        assert all(isinstance(is_there(), bool) for is_there in capabilities._SOFTWARE.values())


@pytest.mark.parametrize(("text", "expected"), [("", None), ("7.5", (7, 5)), ("9.0", (9, 0)), ("10.0", (10, 0))])
def test_the_variable(text, expected):
    assert forced_capability({CAPABILITY_VARIABLE: text}, (10, 3)) == expected
    assert forced_capability({}, (10, 3)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (each, f"is {each!r}; give a compute capability such as 7.5, or unset it")
            for each in ("75", "T4", "7.", "7.x")
        ),
        ("9.0", "is 9.0, above the GPU's 7.5; unset it"),
    ],
)
def test_a_variable_that_makes_no_sense(text, message):
    with pytest.raises(ValueError, match=f"^{CAPABILITY_VARIABLE} {re.escape(message)}$"):
        forced_capability({CAPABILITY_VARIABLE: text}, (7, 5))


def test_bf16_that_would_be_emulated_is_refused(pretend_gpu):
    pretend_gpu((7, 5))
    for asked in ("bfloat16", BF16):
        with pytest.raises(
            ValueError, match=r"^dtype bfloat16: GPU \(compute capability 7.5, Turing\) does not compute"
        ):
            parse_dtype(asked, "cuda")
    assert parse_dtype("auto", "cuda") is parse_dtype(None, "cuda") is parse_dtype("float16", "cuda") is FP16
    assert parse_dtype("bfloat16", "cpu") is BF16


def test_the_document_has_the_table():
    text = (Path(__file__).parents[2] / "docs/machines.md").read_text(encoding="utf-8")
    for each in GENERATIONS:
        dtype, packs = ("bf16" if each.has_bf16 else "fp16"), ("FlexAttention" if each.has_triton else "dense")
        flags = (
            "yes" if has else "no" for has in (each.has_triton, each.has_int8, each.has_fp8, each.has_flash_attention)
        )
        row = (each.name, "{}.{}".format(*each.since), each.examples, dtype, packs, *flags)
        assert f"| {' | '.join(row)} |" in text
    assert CAPABILITY_VARIABLE in text
