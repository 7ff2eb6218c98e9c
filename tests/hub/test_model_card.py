"""The model card: valid for the hub, right for each layout, and no text of a user acts in it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from llava.hub.licences import LLAMA2_NOTICE, Licence, find_licence
from llava.hub.model_card import CardScores, Example, PartScore, build_card, is_untouched
from llava.hub.model_facts import ModelFacts, Training, read_facts
from llava.model.checkpoint.checkpoint import Layout

TRAINING = Training(
    kind="lora",
    rows=1234,
    rows_per_step=16,
    data_digest="d" * 64,
    recipe={"learning_rate": 2e-4, "lora_r": 128},
    versions={"torch": "2.13.0", "python": "3.11", "peft": "0.20.0"},
)
FACTS = ModelFacts(
    layout=Layout.FULL,
    base="liuhaotian/llava-v1.5-7b",
    base_revision="4481d270cc22fd5c4d1bb5df129622006ccd9234",
    base_fingerprint="0123456789abcdef",
    template="vicuna_v1",
    dtype="bfloat16",
    bits=16,
    is_merged=True,
    training=TRAINING,
    has_loss_curve=True,
    licence=Licence("llama2", "the model card of the base"),
)
OVERALL = PartScore("all", 200, 0.6543, 0.5812, 0.7211)
SCORES = CardScores("held-out questions", OVERALL, [PartScore("what | is", 120, 0.5, 0.4, 0.6), OVERALL], 3)


def test_the_whole_card():
    card = build_card(FACTS, "me/llava-vqa", scores=SCORES, examples=[Example(b"", "What is it?", "a cat", "a dog")])
    assert card.text.strip().splitlines()[:3] == [
        "# llava-vqa",
        "",
        "LLaVA-1.5 model, made from [liuhaotian/llava-v1.5-7b](https://huggingface.co/liuhaotian/llava-v1.5-7b) with a "
        "LoRA adapter merged into it. It answers questions about images.",
    ]
    for line in (
        "| revision of the base | `4481d270cc22fd5c4d1bb5df129622006ccd9234` |",
        "| fingerprint of the base's weights | `0123456789abcdef` |",
        "| rows | 1,234, 16 a step |",
        f"| digest of the data (tokens, labels, image names) | `{'d' * 64}` |",
        "| `learning_rate` | 0.0002 |",
        "| libraries | torch 2.13.0, peft 0.20.0 |",
        "![Loss over the steps](loss.png)",
        "| what &#124; is | 120 | 50.00 | 40.0 to 60.0 |",
        "| all | 200 | 65.43 | 58.1 to 72.1 |",
        "| ![](images/example_1.jpg) | What is it? | a dog | a cat |",
        'model = llava.load("me/llava-vqa")',
        "python -m llava convert --from me/llava-vqa --to llava-vqa_hf --layout hf",
        "vllm serve llava-vqa_hf",
    ):
        assert line in card.text.splitlines(), line
    assert LLAMA2_NOTICE in card.text
    assert "3 had no answer" in card.text


def test_the_hub_reads_the_metadata(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(build_card(FACTS, "me/llava-vqa", scores=SCORES).content, encoding="utf-8")
    data = ModelCard.load(path).data
    assert data.base_model == "liuhaotian/llava-v1.5-7b"
    assert (data.license, data.pipeline_tag, data.base_model_relation) == ("llama2", "image-text-to-text", "finetune")
    (result,) = data.eval_results
    assert data.model_name == "llava-vqa"
    assert (result.task_type, result.dataset_name) == ("visual-question-answering", "held-out questions")
    assert (result.metric_type, result.metric_value) == ("accuracy", 65.43)
    assert result.metric_name == "VQAv2 accuracy, % (95 % interval 58.1 to 72.1, 200 questions)"


@pytest.mark.parametrize(
    ("changes", "relation", "expected", "absent"),
    [
        ({"layout": Layout.HF}, "finetune", 'from_pretrained("me/m", device_map="auto")', "llava convert"),
        ({"layout": Layout.LORA}, "adapter", "The adapter is merged on the way.", "model_base"),
        ({"layout": Layout.LORA, "base": "/home/us/base"}, None, 'model_base="PATH_OF_THE_BASE"', "/home/us"),
        ({"layout": Layout.PROJECTOR}, "finetune", "Projector for", "merged on the way"),
        ({"bits": 4}, "quantized", "do not load this file of 4 bit", "vllm serve"),
        ({"base": None, "licence": None}, None, "Not recorded. That of the base applies", "license:"),
        ({"licence": Licence("apache-2.0", "its model card")}, "finetune", "license: apache-2.0", "Llama 2"),
        ({"training": None, "has_loss_curve": False}, "finetune", "## Use", "## Training"),
    ],
)
def test_what_a_layout_changes(changes, relation, expected, absent):
    card = build_card(dataclasses.replace(FACTS, **changes), "me/m")
    assert card.data.get("base_model_relation") == relation
    assert expected in card.content
    assert absent not in card.content


@pytest.mark.parametrize("change", [lambda text: text + "x", lambda text: text.replace("LLaVA", "Llava", 1)])
def test_a_changed_card_is_known(change):
    text = build_card(FACTS, "me/m").content
    assert is_untouched(text)
    assert is_untouched(text.replace("\n", "\r\n"))
    assert not is_untouched(change(text))
    assert not is_untouched("# Mine\n")


def test_hostile_names_break_no_block():
    card = build_card(FACTS, 'me/a"); import os; ("b')
    assert r'llava.load("me/a\"); import os; (\"b")' in card.text
    assert "--model-path 'me/a\"); import os; (\"b' " in card.text


def test_licences_come_from_facts(tmp_path):
    assert find_licence("liuhaotian/llava-v1.5-7b").identifier == "llama2"
    assert find_licence("somebody/llava-v1.5-7b") is None
    assert find_licence(None) is None
    assert find_licence(str(tmp_path)) is None
    for text, expected in (("---\nlicense: mit\n---\n", "mit"), ("---\nlicense: [a\n---\n", None), ("no data", None)):
        (tmp_path / "README.md").write_text(text)
        found = find_licence(str(tmp_path))
        assert (found and found.identifier) == expected


def test_facts_of_directories(goldens, tmp_path, caplog):
    adapter = shutil.copytree(goldens / "llava-v1.5-golden-task-lora", tmp_path / "adapter")
    flags = {
        "lora_enable": True,
        "lora_r": 4,
        "hub_token": "<HF_TOKEN>",
        "learning_rate": 1e-4,
        "mm_projector_lr": None,
    }
    run = {"kind": "lora", "rows": 8, "rows_per_step": 2, "data_digest": "abc"}
    manifest = {"run": run, "TrainingArguments": flags, "DataArguments": {"data_path": "/home/us/data.json"}}
    (adapter / "training.json").write_text(json.dumps(manifest))
    facts = read_facts(adapter)
    assert (facts.layout, facts.base, facts.bits, facts.is_merged) == (Layout.LORA, "llava-v1.5-golden", 16, False)
    assert facts.training == Training("lora", 8, 2, "abc", {"learning_rate": 1e-4, "lora_r": 4}, {})
    assert not facts.has_loss_curve
    for text in ('{"run": {}}', "[]", "{", '{"run": [], "TrainingArguments": {}}', ""):
        caplog.clear()
        (adapter / "training.json").write_text(text)
        assert read_facts(adapter).training is None
        assert "training.json is not a run manifest" in caplog.text
