"""bf16, fp16 or fp32 on every GPU generation, and flags that the device can't follow."""

from __future__ import annotations

import pytest

from llava.model.capabilities import Machine, choose
from llava.train.flags import training_arguments
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.precision import choose_precision

OLD, NEW = [(6, 0), (7, 0), (7, 5)], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
BF16, FP16, FP32 = (True, False), (False, True), (False, False)


def gpu(capability):
    return choose(Machine("cuda", "GPU", capability))


MPS, CPU = choose(Machine("mps")), choose(Machine("cpu"))


@pytest.mark.parametrize(
    ("can", "expected"),
    [*((gpu(each), FP16) for each in OLD), *((gpu(each), BF16) for each in NEW), (MPS, FP16), (CPU, FP32)],
)
def test_the_default(can, expected):
    assert choose_precision(can, None, None) == expected
    assert choose_precision(can, False, False) == choose_precision(can, False, None) == FP32


@pytest.mark.parametrize("capability", [*OLD, *NEW])
def test_fp16_can_be_asked_for_on_every_gpu(capability):
    assert choose_precision(gpu(capability), None, True) == choose_precision(gpu(capability), False, True) == FP16


@pytest.mark.parametrize("can", [*map(gpu, NEW), MPS, CPU])
def test_bf16_can_be_asked_for(can):
    assert choose_precision(can, True, None) == BF16


@pytest.mark.parametrize("can", [*map(gpu, NEW)])
def test_tf32_can_be_asked_for(can):
    assert choose_precision(can, None, None, True) == choose_precision(can, None, None, False) == BF16


@pytest.mark.parametrize(
    ("can", "flags", "message"),
    [
        (
            gpu((7, 5)),
            (True, None, None),
            "--bf16 True: GPU (compute capability 7.5, Turing) does not compute in bf16; leave it out for fp16 with "
            "loss scaling",
        ),
        (CPU, (None, True, None), "--fp16 True: the CPU trains in fp32 or bf16; leave it out, or pass --bf16 True"),
        (
            gpu((7, 0)),
            (None, None, True),
            "--tf32 True: GPU (compute capability 7.0, Volta) does not compute in TF32; leave it out",
        ),
        (CPU, (None, None, True), "--tf32 True: CPU does not compute in TF32; leave it out"),
        (MPS, (None, None, True), "--tf32 True: MPS does not compute in TF32; leave it out"),
    ],
)
def test_what_the_device_does_not_compute_is_refused(can, flags, message):
    with pytest.raises(ValueError) as caught:
        choose_precision(can, *flags)
    assert str(caught.value) == message


NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--report_to", "none"]


def test_the_program_refuses_before_it_starts(pretend_gpu, monkeypatch):
    """PyTorch says of a T4 that it supports bf16."""
    pretend_gpu((7, 5))
    monkeypatch.setattr(training_arguments, "best_device", lambda: training_arguments.torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"^--bf16 True: GPU \(compute capability 7.5, Turing\) does not compute in bf"
    ):
        parse_arguments([*NEEDED, "--bf16", "True"])


def test_the_shipped_flags_train_in_fp16_on_a_t4(pretend_gpu, monkeypatch):
    pretend_gpu((7, 5))
    monkeypatch.setattr(training_arguments, "best_device", lambda: training_arguments.torch.device("cuda"))
    _, _, training = parse_arguments([*NEEDED, "--lora_enable", "True", "--gradient_checkpointing", "True"])
    assert (training.bf16, training.fp16, training.weight_dtype) == (False, True, training_arguments.torch.float16)


@pytest.mark.parametrize(
    ("capability", "words", "message"),
    [
        (
            (7, 5),
            "--compile_layers on",
            "--compile_layers on: GPU (compute capability 7.5, Turing) has no compilation (",
        ),
        (
            (7, 5),
            "--lora_enable True --fuse_lora on",
            "--fuse_lora on: GPU (compute capability 7.5, Turing) has no comp",
        ),
        (
            (7, 5),
            "--torch_compile True",
            "--torch_compile True: GPU (compute capability 7.5, Turing) has no compilation",
        ),
        (
            (7, 0),
            "--lora_enable True --base_dtype fp8",
            "--base_dtype fp8: GPU (compute capability 7.0, Volta) has no FP8 products; leave it out",
        ),
        (
            (7, 0),
            "--lora_enable True --bits 8",
            "--bits 8: GPU (compute capability 7.0, Volta) has no kernels for LLM.int8; pass --bits 4",
        ),
    ],
)
def test_kernels_that_an_old_gpu_lacks_are_refused_by_flag(pretend_gpu, monkeypatch, capability, words, message):
    pretend_gpu(capability)
    monkeypatch.setattr(training_arguments, "best_device", lambda: training_arguments.torch.device("cuda"))
    monkeypatch.setattr(
        training_arguments.TrainingArguments, "device", property(lambda self: training_arguments.torch.device("cuda"))
    )
    with pytest.raises(ValueError) as caught:
        parse_arguments([*NEEDED, *words.split()])
    assert str(caught.value).startswith(message)
