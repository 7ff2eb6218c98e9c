"""The run summary and the memory estimate."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from llava.data.records import EncodedRecord
from llava.data.supervision import encode_example
from llava.train.run_summary import describe_run, mark_supervised


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
