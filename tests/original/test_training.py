"""The original's training data and trainer, for training loops of others."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from llava.train.llava_trainer import LengthGroupedSampler, LLaVATrainer, get_length_grouped_indices
from torch import nn
from transformers import TrainingArguments as HFArguments

from llava import conversation as conversation_lib
from llava.clip_image_processor import CLIPPixels
from llava.constants import IGNORE_INDEX
from llava.image_files.decode import open_image
from llava.mm_utils import process_images
from llava.train import train as train_module
from llava.train.train import (
    DataCollatorForSupervisedDataset,
    LazySupervisedDataset,
    find_all_linear_names,
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    make_supervised_data_module,
    preprocess,
    preprocess_multimodal,
    safe_save_model_for_hf_trainer,
    smart_tokenizer_and_embedding_resize,
    train,
)

RECORDS = [
    {"id": "0", "image": "portrait.png", "conversations": [("human", "<image>\nIs there railing?"), ("gpt", "yes")]},
    {"id": "1", "conversations": [("human", "What is two and two, my dear friend?"), ("gpt", "four, of course")]},
    {"id": "2", "image": "square.png", "conversations": [("human", "Which colour? <image>"), ("gpt", "red")]},
]


@pytest.fixture
def use_template(monkeypatch):
    def use(name):
        monkeypatch.setattr(conversation_lib, "default_conversation", conversation_lib.conv_templates[name])

    return use


@pytest.fixture
def data_args(goldens, tmp_path):
    records = [
        {**record, "conversations": [{"from": role, "value": text} for role, text in record["conversations"]]}
        for record in RECORDS
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return SimpleNamespace(
        data_path=str(tmp_path / "data.json"), image_folder=str(goldens / "images"), image_processor=CLIPPixels(56),
        image_aspect_ratio="pad", is_multimodal=True, mm_use_im_start_end=False,
    )  # fmt: skip


def test_ids_and_labels_of_every_golden(golden_json, tokenizers, use_template):
    arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    for case in golden_json("supervision"):
        use_template(case["version"])
        sources = preprocess_multimodal([copy.deepcopy(case["conversations"])], arguments)
        found = preprocess(sources, tokenizers[case["legacy"]], has_image=True)
        assert found["input_ids"][0].tolist() == case["input_ids"], case
        assert found["labels"][0].tolist() == case["labels"], case


def test_several_dialogues_are_padded(tokenizer):
    sources = [[{"from": "human", "value": text}, {"from": "gpt", "value": "b"}] for text in ("a", "a a a a")]
    found = preprocess(sources, tokenizer)
    assert found["input_ids"].shape == found["labels"].shape
    assert found["labels"][0, -1] == IGNORE_INDEX
    assert found["input_ids"][0, -1] == tokenizer.pad_token_id


def test_what_preprocess_refuses(tokenizer):
    use = r"use llava\.tokenization\.llama_tokenizer\.load_tokenizer\(directory\)"
    with pytest.raises(TypeError, match=f"^tokenizer is a str; {use}"):
        preprocess([], "tokenizer")
    with pytest.raises(ValueError, match=r"^turn 2 is from 'human'; human and gpt take turns$"):
        preprocess([[{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]], tokenizer)


def test_rows_of_a_file(data_args, tokenizer, goldens):
    dataset = LazySupervisedDataset(data_args.data_path, tokenizer, data_args)
    assert len(dataset) == 3
    assert dataset.lengths == [5 + 128, 11, 4 + 128]
    assert dataset.modality_lengths == [5, -11, 4]
    first, text, _ = (dataset[index] for index in range(3))
    image = open_image(goldens / "images/portrait.png")
    assert torch.equal(first["image"], process_images([image], data_args.image_processor, data_args)[0])
    assert (first["input_ids"] == -200).sum() == 1
    assert not text["image"].any()
    assert dataset.list_data_dict[2]["conversations"][0]["value"] == "Which colour? <image>"  # rows stay as they are


def test_a_batch(data_args, tokenizer, caplog):
    module = make_supervised_data_module(tokenizer, data_args)
    assert module["eval_dataset"] is None
    rows = [module["train_dataset"][index] for index in range(3)]
    batch = module["data_collator"](rows)
    length = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, length)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["images"].shape == (3, 3, 56, 56)
    short = SimpleNamespace(pad_token_id=None, model_max_length=9)
    with caplog.at_level(logging.WARNING):
        assert DataCollatorForSupervisedDataset(short)(rows)["input_ids"].shape == (3, 9)
    assert f"a row of {length} tokens is cut to model_max_length 9" in caplog.text


def test_an_order_by_modality_and_length():
    lengths = [5, -4, 7, -1, 3, -9, 8, -2]
    sampler = LengthGroupedSampler(2, 1, lengths, torch.Generator().manual_seed(0), group_by_modality=True)
    order = list(sampler)
    assert sorted(order) == list(range(8))
    assert all(lengths[first] * lengths[second] > 0 for first, second in zip(order[::2], order[1::2], strict=True))
    assert len(sampler) == 8
    assert sorted(get_length_grouped_indices([1, 2, 3], 2, 1)) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^lengths is None; pass the length of each row$"):
        LengthGroupedSampler(1, 1)


def test_a_training_loop_of_others(data_args, tokenizer, golden_model, tmp_path):
    model = copy.deepcopy(golden_model[1]).train()
    model.get_vision_tower().requires_grad_(False)
    arguments = HFArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, remove_unused_columns=False, report_to=[],
        save_strategy="no", use_cpu=True, learning_rate=0.0, disable_tqdm=True,
    )  # fmt: skip
    arguments.mm_projector_lr, arguments.group_by_modality_length = 0.5, True
    module = make_supervised_data_module(tokenizer, data_args)
    trainer = LLaVATrainer(model=model, tokenizer=tokenizer, args=arguments, **module)
    trainer.train()
    before = dict(golden_model[1].named_parameters())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    safe_save_model_for_hf_trainer(trainer, str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_states_of_an_adapter():
    names = ("q.lora_A.weight", "q.bias", "k.bias", "mm_projector.weight")
    params = {name: nn.Parameter(torch.ones(1), requires_grad=name != "k.bias") for name in names}
    assert get_peft_state_maybe_zero_3(params.items(), "none").keys() == {names[0]}
    assert get_peft_state_maybe_zero_3(params.items(), "lora_only").keys() == {names[0], "q.bias"}
    assert get_peft_state_maybe_zero_3(params.items(), "all").keys() == {names[0], "q.bias", "k.bias"}
    with pytest.raises(ValueError, match=r"^bias is 'x'; choose none, all or lora_only$"):
        get_peft_state_maybe_zero_3(params.items(), "x")
    assert get_peft_state_non_lora_maybe_zero_3(params.items()).keys() == {"q.bias", "mm_projector.weight"}
    assert get_peft_state_non_lora_maybe_zero_3(params.items(), False).keys() == set(names[1:])
    found = get_mm_adapter_state_maybe_zero_3(params.items(), ["mm_projector"])
    assert found.keys() == {"mm_projector.weight"}
    assert found["mm_projector.weight"] is not params["mm_projector.weight"]


def test_new_tokens_have_the_mean_of_the_others(golden_model):
    model, tokenizer = copy.deepcopy(golden_model[1]), copy.deepcopy(golden_model[0])
    mean = model.get_input_embeddings().weight.mean(dim=0)
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    assert len(tokenizer) == 32001
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], mean)
    assert sorted(find_all_linear_names(model))[0] == "down_proj"


def test_train_without_arguments_reads_the_command_line(monkeypatch, caplog):
    codes = [0, 2]
    monkeypatch.setattr(train_module, "main", lambda: codes.pop(0))
    train(attn_implementation="flash_attention_2")
    assert "attn_implementation flash_attention_2 is not used" in caplog.text
    with pytest.raises(SystemExit, match="2"):
        train()
