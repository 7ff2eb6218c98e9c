"""Every flag of the original and of transformers parses; impossible values are refused with what to do."""

from __future__ import annotations

import dataclasses
import enum
import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from llava.train.flags.arguments import as_json, zero_stage
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.recipe import warn_of_idle_gpus

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True", "--report_to", "none"]

ORIGINAL = [  # flag, a value, and what becomes of it
    ("model_name_or_path", "a/b", "a/b"),
    ("version", "v1", "v1"),
    ("freeze_backbone", "True", True),
    ("tune_mm_mlp_adapter", "True", True),
    ("vision_tower", "openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
    ("mm_vision_select_layer", "-2", -2),
    ("mm_vision_select_feature", "patch", "patch"),
    ("pretrain_mm_mlp_adapter", "x/mm_projector.bin", "x/mm_projector.bin"),
    ("mm_projector_type", "mlp2x_gelu", "mlp2x_gelu"),
    ("mm_patch_merge_type", "flat", "flat"),
    ("mm_use_im_start_end", "False", False),
    ("mm_use_im_patch_token", "False", False),
    ("data_path", "x.json", "x.json"),
    ("lazy_preprocess", "True", True),
    ("is_multimodal", "True", True),
    ("image_folder", "images", "images"),
    ("image_aspect_ratio", "pad", "pad"),
    ("cache_dir", "cache", "cache"),
    ("optim", "adamw_torch", "adamw_torch"),
    ("remove_unused_columns", "False", False),
    ("freeze_mm_mlp_adapter", "True", True),
    ("model_max_length", "2048", 2048),
    ("double_quant", "True", True),
    ("quant_type", "nf4", "nf4"),
    ("bits", "16", 16),
    ("lora_enable", "True", True),
    ("lora_r", "128", 128),
    ("lora_alpha", "256", 256),
    ("lora_dropout", "0.1", 0.1),
    ("lora_weight_path", "", ""),
    ("lora_bias", "none", "none"),
    ("mm_projector_lr", "2e-5", 2e-5),
    ("group_by_modality_length", "True", True),
    # of transformers, as the original's scripts pass them
    ("bf16", "True", True),
    ("num_train_epochs", "1", 1.0),
    ("per_device_train_batch_size", "16", 16),
    ("per_device_eval_batch_size", "4", 4),
    ("gradient_accumulation_steps", "1", 1),
    ("save_strategy", "steps", "steps"),
    ("save_steps", "50000", 50000),
    ("save_total_limit", "1", 1),
    ("learning_rate", "2e-4", 2e-4),
    ("weight_decay", "0.", 0.0),
    ("lr_scheduler_type", "cosine", "cosine"),
    ("logging_steps", "1", 1),
    ("dataloader_num_workers", "4", 4),
]


def parse(*words):
    return parse_arguments([*NEEDED, *words])


def value_of(groups, name):
    return next(getattr(group, name) for group in groups if hasattr(group, name))


FP8 = ["--lora_enable", "True", "--base_dtype", "fp8"]


@pytest.mark.parametrize(("name", "text", "value"), ORIGINAL)
def test_flags_of_the_original(name, text, value):
    groups = parse(f"--{name}", text)
    found = value_of(groups, name)
    assert (found.value if isinstance(found, enum.Enum) else found) == value


def test_every_field_of_transformers_parses():
    skipped = {"output_dir", "remove_unused_columns", "debug", "use_cpu", "report_to"}
    words, expected = [], {}
    for field in dataclasses.fields(transformers.TrainingArguments):
        default = field.default
        default = default.value if isinstance(default, enum.Enum) else default
        if field.name not in skipped and isinstance(default, (bool, int, float, str)):
            words += [f"--{field.name}", str(default)]
            expected[field.name] = default
    assert len(expected) > 50
    training = parse(*words)[2]
    assert all(hasattr(training, name) for name in expected)
    for name in ("learning_rate", "max_grad_norm", "seed", "adam_beta2", "logging_steps", "ddp_timeout"):
        assert getattr(training, name) == expected[name]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--evaluation_strategy", "no"], "eval_strategy", "no"),
        (["--evaluation_strategy=no"], "eval_strategy", "no"),
        (["--no_cuda", "True"], "use_cpu", True),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
    ],
)
def test_renamed_flags(words, name, value):
    assert getattr(parse(*words)[2], name) == value


def test_gradient_checkpointing_under_either_name():
    training = parse("--gradient_checkpointing", "True")[2]
    names = {"gradient_checkpointing", "activation_checkpointing"} & {
        field.name for field in dataclasses.fields(transformers.TrainingArguments)
    }
    assert any(getattr(training, name) is True for name in names)
    kwargs = [getattr(training, f"{name}_kwargs") for name in names]
    assert {"use_reentrant": False} in kwargs


def test_defaults():
    model, data, training = parse()
    assert (model.version, model.mm_projector_type, model.mm_vision_select_layer) == (None, None, None)
    assert (data.image_aspect_ratio, data.on_bad_row) == (None, "error")
    assert (training.model_max_length, training.lora_r, training.lora_alpha) == (2048, 64, 16)
    assert (training.bf16, training.fp16, training.weight_dtype) == (False, False, torch.float32)
    assert parse("--bf16", "True")[2].weight_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--lora_alhpa", "; did you mean --lora_alpha?"),
        ("--modle_name_or_path", "; did you mean --model_name_or_path?"),
        ("--zzz", "; see --help"),
    ],
)
def test_unknown_flags_name_the_nearest(word, near):
    with pytest.raises(ValueError) as caught:
        parse(word, "3")
    assert str(caught.value) == f"unknown flag {word}{near}"


def write_zero(tmp_path, stage):
    path = tmp_path / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--version", "v9"], "unknown conversation template 'v9'; choose one of"),
        (["--mm_patch_merge_type", "spatial"], "--mm_patch_merge_type spatial: only flat is supported"),
        (["--is_multimodal", "False"], "--is_multimodal False: rows without image need no flag; leave it out"),
        (["--lazy_preprocess", "False"], "--lazy_preprocess False: images are read when needed; leave it out"),
        (["--image_aspect_ratio", "padd"], "--image_aspect_ratio padd: choose pad, square or anyres"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha can't be computed on rows with images; leave it out"),
        (["--on_bad_row", "ignore"], "--on_bad_row ignore: choose error or skip"),
        (["--compile_layers", "yes"], "--compile_layers yes: choose auto, on or off"),
        (
            ["--compile_layers", "on", "--share_image_prefix", "False"],
            "--compile_layers on needs rows of few lengths; leave --share_image_prefix False out",
        ),
        (
            ["--compile_layers", "on", "--deepspeed", "scripts/zero3.json"],
            "--compile_layers on can't trace layers that ZeRO-3 partitions; use scripts/zero2.json",
        ),
        (["--fuse_lora", "yes"], "--fuse_lora yes: choose auto, on or off"),
        (["--checkpoint_layers", "-1"], "--checkpoint_layers -1: choose auto, all or a number"),
        (["--bits", "3"], "--bits 3: choose 4, 8 or 16"),
        (["--base_dtype", "fp4"], "--base_dtype fp4: choose auto or fp8"),
        (["--base_dtype", "fp8"], "--base_dtype fp8 holds the LLM frozen; add --lora_enable True"),
        ([*FP8, "--bits", "4"], "--base_dtype fp8 and --bits 4 exclude each other"),
        ([*FP8, "--fuse_lora", "off"], "--base_dtype fp8 is computed by fused layers over packs; leave --fuse_lora"),
        ([*FP8, "--share_image_prefix", "False"], "--base_dtype fp8 is computed by fused layers over packs; leave"),
        ([*FP8, "--use_dora", "True"], "--base_dtype fp8 goes with plain LoRA; leave --use_dora out"),
        (
            [*FP8, "--deepspeed", "scripts/zero3.json"],
            "--base_dtype fp8 needs all weights in each process; leave ZeRO-3 and --fsdp out",
        ),
        (["--lora_bias", "some"], "--lora_bias some: choose none, lora_only or all"),
        (["--double_quant", "False"], "--double_quant False and --quant_type other than nf4 are not supported"),
        (["--quant_type", "fp4"], "--double_quant False and --quant_type other than nf4 are not supported"),
        (["--bits", "4"], "--bits 4 holds the LLM frozen; add --lora_enable True"),
        (
            ["--bits", "4", "--tune_mm_mlp_adapter", "True"],
            "--bits 4 and --tune_mm_mlp_adapter exclude each other; leave",
        ),
        (["--lora_weight_path", "x"], "--lora_weight_path needs --lora_enable True"),
        (
            ["--tune_mm_mlp_adapter", "True", "--lora_enable", "True"],
            "--tune_mm_mlp_adapter trains the projector alone; leave --lora_enable out",
        ),
        (
            ["--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True"],
            "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter exclude each other; leave one out",
        ),
        (
            ["--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True"],
            "--freeze_backbone and --freeze_mm_mlp_adapter leave nothing to train; leave one out",
        ),
        (["--remove_unused_columns", "True"], "--remove_unused_columns True would remove the images; leave it out"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor can't be computed on images' patches; leave"),
        (["--deepspeed", "no-such.json"], "--deepspeed no-such.json can't be read"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError) as caught:
        parse(*words)
    assert message in str(caught.value)


def test_both_half_precisions_are_refused():
    with pytest.raises(ValueError, match=r"(?i)bf16.*fp16|fp16.*bf16"):
        parse("--bf16", "True", "--fp16", "True")


def test_all_reasons_are_given_at_once():
    with pytest.raises(ValueError, match=r"^--is_multimodal False: .*; --bits 3: choose"):
        parse("--is_multimodal", "False", "--bits", "3")


def test_missing_output_and_data():
    with pytest.raises(ValueError, match=r"^--output_dir is missing; say where checkpoints and the result go$"):
        parse_arguments(["--data_path", "x"])
    with pytest.raises(
        ValueError, match=r"^--data_path is missing; name a table, or data.json of task_data_preprocessing.py$"
    ):
        parse_arguments(["--output_dir", "x", "--report_to", "none"])


def test_zero_stage(tmp_path):
    assert [zero_stage(None), zero_stage(""), zero_stage({}), zero_stage({"zero_optimization": {"stage": 1}})] == [
        *(0, 0, 0, 1)
    ]
    assert zero_stage(write_zero(tmp_path, 3)) == 3
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"^--deepspeed .*broken.json can't be read \(.*\); use scripts/zero2.json$"):
        zero_stage(str(tmp_path / "broken.json"))


def test_quantized_weights_cannot_be_partitioned(tmp_path):
    pytest.importorskip("deepspeed")
    words = ["--bits", "4", "--lora_enable", "True", "--deepspeed", write_zero(tmp_path, 3)]
    with pytest.raises(ValueError, match=r"^--bits 4 can't be partitioned by ZeRO-3; use scripts/zero2.json$"):
        parse(*words)


def test_as_json_is_the_record_of_a_run():
    record = json.loads(as_json(*parse("--lora_r", "8")))
    assert sorted(record) == ["DataArguments", "ModelArguments", "TrainingArguments"]
    assert record["TrainingArguments"]["lora_r"] == 8
    assert record["DataArguments"]["data_path"] == "data.json"


def test_the_command_line_is_read_when_nothing_is_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_mem.py", *NEEDED, "--lora_r", "3"])
    assert parse_arguments(None)[2].lora_r == 3


def test_a_subclass_of_transformers_arguments():
    assert issubclass(TrainingArguments, transformers.TrainingArguments)


@pytest.mark.parametrize("learns", [["--lora_enable", "True"], ["--unfreeze_mm_vision_tower", "True"]])
def test_frozen_parts_leave_something_to_train(learns):
    model, _, training = parse("--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True", *learns)
    assert model.freeze_backbone
    assert training.freeze_mm_mlp_adapter


def test_one_process_takes_one_gpu_and_says_so(monkeypatch, caplog):
    training = parse()[2]
    training._n_gpu = 4  # what transformers notes where four are visible
    assert training.n_gpu == 1
    assert training.train_batch_size == training.per_device_train_batch_size
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device, processes, warns in (("cuda", 1, True), ("cuda", 4, False), ("cpu", 1, False)):
        caplog.clear()
        warn_of_idle_gpus(SimpleNamespace(device=torch.device(device), world_size=processes))
        assert ("one GPU, and 4 are visible" in caplog.text) is warns
