"""Refuse flags whose values are not supported or contradict each other: tables of (condition, message)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.constants import FP8, SWITCH
from llava.conversation import get_template
from llava.data.data_files import find_unused_flags, split_paths
from llava.data.table.options import given_table_flags
from llava.train.flags.arguments import DATA_FILES, DataArguments, ModelArguments, zero_stage
from llava.train.flags.json_flags import read_json_flag

if TYPE_CHECKING:  # for annotations: it imports torch
    from llava.train.flags.training_arguments import TrainingArguments

Rule = tuple[bool, str]
"""Whether a combination of flags is refused, and the message: the flag, its value, what to do."""

_METRICS = ("", "loss", "accuracy")
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "model_max_length": 1,
    "lora_r": 1,
}
_HUB_FLAGS = ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision")


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuse flags that are not supported or contradict each other, all of them in one message.

    Args:
        model: flags.
        data: flags.
        training: flags, or `early_training_arguments`: as they were given, before transformers works on them.

    Raises:
        ValueError: naming the flag, the value and what to do.
    """
    if model.version is not None:
        get_template(model.version)
    data.table_options()
    zero = zero_stage(training.deepspeed)
    rules = [
        *_data_rules(data, training),
        *_trainable_rules(model, training),
        *_lora_rules(training),
        *_quantization_rules(model, training, zero),
        *_step_rules(training),
        *_layer_rules(training, zero),
        *_distributed_rules(training, zero),
        *_validation_rules(data, training),
        *_best_checkpoint_rules(data, training),
        _push_rule(training),
    ]
    refuse(rules)


def refuse(rules: Sequence[Rule]) -> None:
    """Raise the messages of the rules that refuse a combination, in one.

    Raises:
        ValueError: naming each flag, its value and what to do.
    """
    if reasons := [message for is_refused, message in rules if is_refused]:
        raise ValueError("; ".join(reasons))


def _push_rule(training: TrainingArguments) -> Rule:
    given = [name for name in _HUB_FLAGS if getattr(training, name)]
    target = f"--path {training.output_dir} --repo {training.hub_model_id or 'OWNER/NAME'}"
    private = " --private" if training.hub_private_repo else ""
    return (
        bool(given),
        f"--{(given or _HUB_FLAGS)[0]}: a training does not upload, so that a failed upload can't end it; leave it "
        f"out, and run afterwards: python scripts/push_to_hub.py {target}{private}",
    )


def _data_rules(data: DataArguments, training: TrainingArguments) -> list[Rule]:
    aspect, on_bad_row = data.image_aspect_ratio, data.on_bad_row
    return [
        (data.data_path is None, "--data_path is missing; name a table, or data.json of task_data_preprocessing.py"),
        _unused_table_flags(data),
        (Path(training.output_dir).is_file(), f"--output_dir {training.output_dir} is a file; name a directory"),
        (not data.is_multimodal, "--is_multimodal False: rows without image need no flag; leave it out"),
        (not data.lazy_preprocess, "--lazy_preprocess False: images are read when needed; leave it out"),
        (
            aspect not in (None, "pad", "square", "anyres"),
            f"--image_aspect_ratio {aspect}: choose pad, square or anyres",
        ),
        (on_bad_row not in ("error", "skip"), f"--on_bad_row {on_bad_row}: choose error or skip"),
        (training.remove_unused_columns, "--remove_unused_columns True would remove the images; leave it out"),
    ]


def _unused_table_flags(data: DataArguments) -> Rule:
    files = {f"--{name}": split_paths(path) for name in DATA_FILES if (path := getattr(data, name))}
    message = find_unused_flags(given_table_flags(data), files)
    return message is not None, message or ""


def _trainable_rules(model: ModelArguments, training: TrainingArguments) -> list[Rule]:
    projector_only, frozen_projector = model.tune_mm_mlp_adapter, training.freeze_mm_mlp_adapter
    trains_something = training.lora_enable or model.unfreeze_mm_vision_tower
    return [
        (
            model.mm_patch_merge_type not in (None, "flat"),
            f"--mm_patch_merge_type {model.mm_patch_merge_type}: only flat is supported",
        ),
        (
            projector_only and training.lora_enable,
            "--tune_mm_mlp_adapter trains the projector alone; leave --lora_enable out",
        ),
        (
            projector_only and model.unfreeze_mm_vision_tower,
            "--tune_mm_mlp_adapter trains the projector alone; leave --unfreeze_mm_vision_tower out",
        ),
        (
            projector_only and frozen_projector,
            "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter exclude each other; leave one out",
        ),
        (
            model.freeze_backbone and frozen_projector and not trains_something,
            "--freeze_backbone and --freeze_mm_mlp_adapter leave nothing to train; leave one out",
        ),
        (
            training.mm_vision_tower_lr is not None and not model.unfreeze_mm_vision_tower,
            "--mm_vision_tower_lr needs --unfreeze_mm_vision_tower True",
        ),
    ]


def _lora_rules(training: TrainingArguments) -> list[Rule]:
    is_off = not training.lora_enable
    is_variant, targets = training.use_dora or training.use_rslora, training.lora_target_modules
    return [
        (
            training.lora_bias not in ("none", "lora_only", "all"),
            f"--lora_bias {training.lora_bias}: choose none, lora_only or all",
        ),
        (
            not 0 <= training.lora_dropout < 1,
            f"--lora_dropout {training.lora_dropout:g}: choose a share from 0 to below 1",
        ),
        (is_off and bool(training.lora_weight_path), "--lora_weight_path needs --lora_enable True"),
        (is_off and is_variant, "--use_dora and --use_rslora need --lora_enable True"),
        (is_off and targets is not None, "--lora_target_modules needs --lora_enable True"),
        (
            bool(training.lora_weight_path) and (is_variant or targets is not None),
            "--lora_weight_path brings its own layers and scale; leave --use_dora, --use_rslora and "
            "--lora_target_modules out",
        ),
    ]


def _quantization_rules(model: ModelArguments, training: TrainingArguments, zero: int) -> list[Rule]:
    bits, is_quantized = training.bits, training.bits != 16
    return [
        (bits not in (4, 8, 16), f"--bits {bits}: choose 4, 8 or 16"),
        (
            not training.double_quant or training.quant_type != "nf4",
            "--double_quant False and --quant_type other than nf4 are not supported; leave them out",
        ),
        (
            is_quantized and not training.lora_enable and not model.tune_mm_mlp_adapter,
            f"--bits {bits} holds the LLM frozen; add --lora_enable True",
        ),
        (
            is_quantized and model.tune_mm_mlp_adapter,
            f"--bits {bits} and --tune_mm_mlp_adapter exclude each other; leave --bits out",
        ),
        *_fp8_rules(training, zero),
        (is_quantized and bool(training.fsdp), f"--bits {bits} can't be sharded by --fsdp; leave --fsdp out"),
        (is_quantized and zero == 3, f"--bits {bits} can't be partitioned by ZeRO-3; use scripts/zero2.json"),
    ]


def _fp8_rules(training: TrainingArguments, zero: int) -> list[Rule]:
    is_fp8 = training.base_dtype == FP8
    return [
        (training.base_dtype not in ("auto", FP8), f"--base_dtype {training.base_dtype}: choose auto or {FP8}"),
        (is_fp8 and not training.lora_enable, "--base_dtype fp8 holds the LLM frozen; add --lora_enable True"),
        (is_fp8 and training.bits != 16, f"--base_dtype fp8 and --bits {training.bits} exclude each other"),
        (
            is_fp8 and (zero == 3 or bool(training.fsdp)),
            "--base_dtype fp8 needs all weights in each process; leave ZeRO-3 and --fsdp out",
        ),
        (
            is_fp8 and (training.fuse_lora == "off" or not training.share_image_prefix),
            "--base_dtype fp8 is computed by fused layers over packs; leave --fuse_lora off and --share_image_prefix "
            "False out",
        ),
        (is_fp8 and training.use_dora, "--base_dtype fp8 goes with plain LoRA; leave --use_dora out"),
    ]


def _step_rules(training: TrainingArguments) -> list[Rule]:
    values = {name: getattr(training, name) for name in _AT_LEAST}
    return [
        *(
            (value < _AT_LEAST[name], f"--{name} {value}: choose {_AT_LEAST[name]} or more")
            for name, value in values.items()
        ),
        (
            training.num_train_epochs <= 0 and training.max_steps < 1,
            f"--num_train_epochs {training.num_train_epochs:g}: choose more than 0",
        ),
        (training.max_steps == 0, "--max_steps 0 trains nothing; leave it out, or pass the number of steps"),
        (
            training.save_strategy == "steps" and training.save_steps <= 0,
            f"--save_steps {training.save_steps:g}: choose more than 0, or pass --save_strategy no",
        ),
        (training.bf16 and training.fp16, "--bf16 and --fp16 exclude each other"),
        (
            bool(training.neftune_noise_alpha),
            "--neftune_noise_alpha can't be computed on rows with images; leave it out",
        ),
        (
            bool(training.label_smoothing_factor),
            "--label_smoothing_factor can't be computed on images' patches; leave it out",
        ),
        (training.fit not in ("auto", "off"), f"--fit {training.fit}: choose auto or off"),
        (
            training.fit == "auto" and training.auto_find_batch_size,
            "--auto_find_batch_size True and --fit auto both choose the batch; pass --fit off",
        ),
        (training.sanity_check < 0, f"--sanity_check {training.sanity_check}: pass the number of steps, or 0"),
    ]


def _layer_rules(training: TrainingArguments, zero: int) -> list[Rule]:
    compiles, fuses, checkpointed = training.compile_layers, training.fuse_lora, training.checkpoint_layers
    return [
        (compiles not in SWITCH, f"--compile_layers {compiles}: choose auto, on or off"),
        (fuses not in SWITCH, f"--fuse_lora {fuses}: choose auto, on or off"),
        (
            checkpointed not in ("auto", "all") and not checkpointed.isdecimal(),
            f"--checkpoint_layers {checkpointed}: choose auto, all or a number",
        ),
        (
            compiles == "on" and not training.share_image_prefix,
            "--compile_layers on needs rows of few lengths; leave --share_image_prefix False out",
        ),
        (
            compiles == "on" and zero == 3,
            "--compile_layers on can't trace layers that ZeRO-3 partitions; use scripts/zero2.json",
        ),
        (
            training.use_liger_kernel,
            "--use_liger_kernel True: Liger has no kernels for this model; leave it out, or pass --compile_layers on",
        ),
    ]


def _distributed_rules(training: TrainingArguments, zero: int) -> list[Rule]:
    is_fsdp, config = bool(training.fsdp), read_json_flag("fsdp_config", training.fsdp_config)
    return [
        (
            training.sanity_check > 0 and (is_fsdp or zero == 3),
            "--sanity_check needs the whole model on each device; leave it out with --fsdp and ZeRO-3",
        ),
        (
            is_fsdp and config.get("version", 2) != 2,
            "--fsdp_config with version 1 is not supported; leave the version out, 2 is the default",
        ),
        (
            is_fsdp and "FULL" not in str(config.get("state_dict_type", "FULL_STATE_DICT")).upper(),
            "--fsdp_config with state_dict_type SHARDED_STATE_DICT is not supported: PyTorch would resume from a "
            "pickle that can run code; leave it out, FULL_STATE_DICT is the default",
        ),
    ]


def _validation_rules(data: DataArguments, training: TrainingArguments) -> list[Rule]:
    has_file, has_share = data.eval_data_path is not None, data.val_share is not None
    has_data, validates = has_file or has_share, training.eval_strategy != "no"
    return [
        (has_file and has_share, "--eval_data_path and --val_share exclude each other; pass one"),
        (
            has_share and not 0 < data.val_share < 1,
            f"--val_share {data.val_share}: choose a share between 0 and 1, for example 0.02",
        ),
        (data.eval_image_folder is not None and not has_file, "--eval_image_folder needs --eval_data_path"),
        (
            validates and not has_data,
            "--eval_strategy needs data to validate on; pass --val_share 0.02 or --eval_data_path",
        ),
        (
            training.eval_on_start and not has_data,
            "--eval_on_start True needs data to validate on; pass --val_share 0.02 or --eval_data_path",
        ),
        (
            has_data and not validates,
            "--eval_data_path and --val_share need --eval_strategy steps, with --eval_steps, or epoch",
        ),
        (data.eval_max_questions < 0, f"--eval_max_questions {data.eval_max_questions}: choose 0 (loss alone) or more"),
        (data.eval_max_new_tokens < 1, f"--eval_max_new_tokens {data.eval_max_new_tokens}: choose 1 or more"),
    ]


def _best_checkpoint_rules(data: DataArguments, training: TrainingArguments) -> list[Rule]:
    given, patience = training.metric_for_best_model, training.early_stopping_patience
    metric = (given or "").removeprefix("eval_")
    validated = training.eval_steps or training.logging_steps  # as transformers fills it in
    both_by_steps = (training.eval_strategy, training.save_strategy) == ("steps", "steps")
    return [
        (metric not in _METRICS, f"--metric_for_best_model {given}: choose eval_loss or eval_accuracy"),
        (
            metric == "accuracy" and data.eval_max_questions == 0,
            f"--metric_for_best_model {given} is not measured with --eval_max_questions 0",
        ),
        (
            training.load_best_model_at_end and both_by_steps and validated != training.save_steps,
            f"--load_best_model_at_end needs every validated step saved: give --save_steps {training.save_steps:g} "
            f"the value of --eval_steps {validated:g}, or pass --save_strategy best",
        ),
        (patience is not None and patience < 1, f"--early_stopping_patience {patience}: choose 1 or more"),
        (
            patience is not None and not training.load_best_model_at_end,
            "--early_stopping_patience needs --load_best_model_at_end True",
        ),
    ]
