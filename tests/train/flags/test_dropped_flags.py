"""Flags of transformers 4.37 that version 5 dropped: harmless values are accepted, others refused with a reason."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import transformers

from llava.train.flags.arguments import renamed_flags
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.dropped_flags import DROPPED_FLAGS, settle_dropped_flags
from llava.train.flags.training_arguments import TrainingArguments

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True"]

DROPPED_BY_5 = [
    "adafactor", "dispatch_batches", "fp16_backend", "fp16_opt_level", "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap", "group_by_length", "half_precision_backend",
    "include_inputs_for_metrics", "include_tokens_per_second", "jit_mode_eval", "logging_dir", "mp_parameters",
    "overwrite_output_dir", "past_index", "per_gpu_eval_batch_size", "per_gpu_train_batch_size",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "ray_scope", "save_safetensors",
    "split_batches", "torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex",
    "use_legacy_prediction_loop", "use_mps_device",
]  # fmt: skip
"""Of TrainingArguments, 4.37.2 against 5.24; evaluation_strategy, no_cuda and warmup_ratio always were accepted."""

REFUSED = [
    (
        ["--overwrite_output_dir"],
        "--overwrite_output_dir (dropped by transformers 5): a run resumes from the checkpoints in --output_dir; to "
        "start over, which moves them to earlier-1, pass --resume_from_checkpoint none",
    ),
    (["--overwrite_output_dir", "True"], "--overwrite_output_dir True (dropped by transformers 5): a run resumes from"),
    (
        ["--save_safetensors", "False"],
        "--save_safetensors False (dropped by transformers 5): weights and adapters are always written as safetensors; "
        "leave it out",
    ),
    (["--no_save_safetensors"], "--save_safetensors False (dropped by transformers 5): weights and adapters"),
    (["--jit_mode_eval", "1"], "validation runs the model as it is trained, never traced; leave it out"),
    (
        ["--use-ipex=yes"],
        "--use_ipex yes (dropped by transformers 5): Intel's extension for PyTorch is not used; leave",
    ),
    (["--fp16_opt_level", "O2"], "Apex is not used, mixed precision is always PyTorch's own; leave it out and choose"),
    (
        ["--half_precision_backend", "apex"],
        "mixed precision is always PyTorch's own; leave it out and choose with --bf16",
    ),
    (["--fp16_backend=apex"], "--fp16_backend apex (dropped by transformers 5): mixed precision is always"),
    (["--tpu_num_cores", "8"], "TPUs are not supported; leave it out"),
    (["--tpu_metrics_debug"], "TPUs are not supported; leave it out"),
    (["--past_index", "0"], "Llama keeps no state from one batch to the next; leave it out"),
    (
        ["--fsdp_min_num_params", "2000"],
        """pass it as --fsdp_config '{"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 2000}'""",
    ),
    (
        ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"],
        """pass it as --fsdp_config '{"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'""",
    ),
    (["--adafactor", "True"], "--adafactor True (dropped by transformers 5): pass --optim adafactor"),
    (["--group_by_length", "True"], "pass --group_by_modality_length True, which groups rows of similar length"),
    (["--use_legacy_prediction_loop", "True"], "there is one validation loop; leave it out"),
    (["--include_inputs_for_metrics", "True"], "validation measures loss and accuracy from the rows alone"),
    (
        ["--push_to_hub_organization", "us"],
        "pass --repo ORGANIZATION/NAME to scripts/push_to_hub.py, after the training",
    ),
    (["--mp_parameters", "x=1"], "SageMaker's model parallelism is not supported; leave it out"),
    (["--torchdynamo", "inductor"], "pass --compile_layers on, which compiles the LLM's layers"),
    (["--ray_scope", "all"], "there is no hyperparameter search; leave it out"),
    (["--dispatch_batches", "True"], "each process reads its own rows; leave it out"),
    (["--split_batches", "True"], "--per_device_train_batch_size is the batch of one process; divide it by the number"),
    (["--include_tokens_per_second", "True"], "pass --include_num_input_tokens_seen True, which logs the tokens"),
]

ACCEPTED = [
    ["--overwrite_output_dir", "False"],
    ["--overwrite_output_dir=false"],
    ["--save_safetensors", "True"],
    ["--save_safetensors"],
    ["--use_mps_device", "True"],
    ["--use_mps_device", "False"],
    ["--jit_mode_eval", "False"],
    ["--half_precision_backend", "auto"],
    ["--past_index", "-1"],
    ["--mp_parameters", ""],
    ["--ray_scope", "last"],
    ["--mpt_attn_impl", "triton"],
]


def parse(*words):
    return parse_arguments([*NEEDED, *words])


def test_every_dropped_flag_has_one_home():
    """Each is in the table, has another name, or is ours; the installed transformers has none of the table's."""
    assert len(DROPPED_BY_5) == 29
    ours = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed = renamed_flags(ours)
    homes = [(name in DROPPED_FLAGS) + (name in renamed) + (name in ours) for name in DROPPED_BY_5]
    assert homes == [1] * 29
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert not theirs & set(DROPPED_FLAGS)
    assert set(renamed.values()) <= ours


def test_every_dropped_flag_of_the_table_is_refused_with_its_sentence():
    assert {words[0].lstrip("-").partition("=")[0].replace("-", "_").removeprefix("no_") for words, _ in REFUSED} == (
        set(DROPPED_FLAGS) - {"use_mps_device", "mpt_attn_impl"}
    )


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_is_refused_says_what_to_do(words, message):
    with pytest.raises(ValueError) as caught:
        parse(*words, "--lora_enable", "True")
    assert message in str(caught.value)


@pytest.mark.parametrize("words", ACCEPTED, ids=" ".join)
def test_harmless_values_are_accepted_and_logged(words, caplog):
    with caplog.at_level(logging.INFO, "llava"):
        assert parse(*words, "--lora_enable", "True")[2].lora_enable
    assert f"{words[0].partition('=')[0]}" in caplog.text
    assert "changes nothing: " in caplog.text


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
        (["--per_gpu_eval_batch_size=3"], "per_device_eval_batch_size", 3),
        (["--evaluation-strategy", "no"], "eval_strategy", "no"),
        (["--logging_dir", "logs"], "logging_dir", "logs"),
        (["--activation_checkpointing", "True"], "checkpoints_activations", True),
        (["--gradient_checkpointing", "True"], "checkpoints_activations", True),
    ],
)
def test_renamed_flags_are_honoured(words, name, value):
    assert getattr(parse(*words)[2], name) == value


@pytest.mark.parametrize("words", [["--push_to_hub_model_id", "us/model"], ["--push_to_hub_token", "secret"]])
def test_renamed_flags_of_the_hub_are_refused_as_the_new_ones(words):
    with pytest.raises(ValueError, match=r"^--hub_(model_id|token): a training does not upload") as refused:
        parse(*words)
    assert "secret" not in str(refused.value)


def test_other_words_stay_and_all_reasons_come_at_once():
    words = ["--past_index", "-1", "--lora_r", "8", "--overwrite_output_dir", "--bf16", "True", "plain"]
    with pytest.raises(ValueError, match=r"^--overwrite_output_dir \(dropped"):
        settle_dropped_flags(words)
    kept, notes = settle_dropped_flags([word for word in words if word != "--overwrite_output_dir"])
    assert kept == ["--lora_r", "8", "--bf16", "True", "plain"]
    assert notes == ["--past_index -1 changes nothing: it is what happens anyway"]
    with pytest.raises(ValueError, match=r"^--adafactor True .* --optim adafactor; --use_ipex True \(dropped"):
        settle_dropped_flags(["--adafactor", "True", "--use_ipex", "True"])


def test_a_word_without_flag_and_a_flag_of_newer_versions(monkeypatch):
    with pytest.raises(ValueError, match=r"^wandb follows no flag that takes it; see --help$"):
        parse("--seed", "1", "wandb")
    from llava.train.flags import command_line

    monkeypatch.setattr(command_line, "NEWER_FLAGS", ("of_tomorrow",))
    with pytest.raises(ValueError, match=r"^--of_tomorrow is not known to transformers [\d.]+; pip install --upgrade"):
        parse("--of_tomorrow", "1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--optim", "adamw_hf"],
            "--optim adamw_hf (dropped by transformers 5): pass --optim adamw_torch, the same method",
        ),
        (
            ["--optim=adamw_apex_fused"],
            "Apex is not used; pass --optim adamw_torch_fused, the same method in one kernel",
        ),
    ],
)
def test_dropped_optimizers(words, sentence):
    with pytest.raises(ValueError) as caught:
        parse_arguments([*NEEDED, *words])
    assert sentence in str(caught.value)
    assert settle_dropped_flags(["--optim", "adamw_torch", "--optim"]) == (["--optim", "adamw_torch", "--optim"], [])
