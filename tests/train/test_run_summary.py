"""The run summary and the memory estimate."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from llava.data.records import EncodedRecord
from llava.data.supervision import encode_example
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.train.flags.command_line import parse_arguments
from llava.train.run_summary import describe_memory, describe_run, mark_supervised

ROOT = Path(__file__).parents[2]


def record(tokenizer, *texts, image=None):
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    ids, labels = encode_example(turns, "v1", tokenizer)
    return EncodedRecord(ids, labels, [Path(image)] if image else [])


def test_supervised_spans_are_marked(tokenizer):
    text = mark_supervised(record(tokenizer, "<image>\nIs it?", "yes", "Sure?", "no"), tokenizer)
    assert text.startswith("<s> A chat between a curious user")
    assert text[text.index("USER") :] == "USER: <image>\nIs it? ASSISTANT:[[yes</s>]]USER: Sure? ASSISTANT:[[no</s>]]"


def test_marks_at_the_edges(tokenizer):
    answer = tokenizer.encode_text("yes")
    assert mark_supervised(EncodedRecord(answer, answer, []), tokenizer) == "[[yes]]"
    assert mark_supervised(EncodedRecord([-200, *answer, -200], [-100] * 3, []), tokenizer) == "<image>yes<image>"


def test_the_table(tokenizer):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    records = [record(tokenizer, "<image>\nIs it?", "yes", image="a.jpg"), record(tokenizer, "Where?", "here")]
    assert describe_run(model, records, tokenizer, [("template", "vicuna_v1")]).splitlines()[:-1] == [
        "  template              vicuna_v1",
        "  trainable parameters  100 of 210 (47.62 %)",
        "  rows                  2, 1 images",
        "  supervised tokens     4, 2.0 a row",
    ]
    last = describe_run(model, records, tokenizer, []).splitlines()[-1]
    assert last.startswith('  first row             "<s> A chat')  # a repr, of one line
    assert last.endswith('USER: <image>\\nIs it? ASSISTANT:[[yes</s>]]"')


def test_memory_is_planned_from_the_flags(tmp_path):
    config = open_checkpoint(ROOT / "playground/llava-tiny").config
    flags = ["--output_dir", str(tmp_path), "--data_path", "x", "--per_device_train_batch_size", "8"]
    flags += ["--deepspeed", str(ROOT / "scripts/zero2.json"), "--lora_enable", "True", "--bits", "4"]
    training_args = parse_arguments([*flags, "--gradient_checkpointing", "True"])[2]
    text = describe_memory(config, training_args, "lora", 8, [90, 99], 850_000_000)
    lines = text.splitlines()
    assert lines[0] == "memory on each GPU, estimated"
    assert [line[2:40].strip() for line in lines[1:-1]] == [
        "frozen weights",
        "trained weights, gradients, optimizer",
        "activations",
        "unpacked weights",
        "CUDA itself",
        "needed on each GPU",
        "available",
    ]
    assert lines[-1] == "it fits"
    smaller = describe_memory(config, training_args, "lora", 8, [90, 99], 815_000_000).splitlines()[-1]
    assert smaller.startswith("it does not fit; this does, with 0.8 GB: --per_device_train_batch_size ")
    assert smaller.endswith(" --gradient_checkpointing True --bits 4 --deepspeed scripts/zero2.json")
