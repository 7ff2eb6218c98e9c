"""Flags that don't fit each other or have values that are not supported, by the message that says so."""

from __future__ import annotations

from llava.conversation import get_template
from llava.model.quantization import DEVICES
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, zero_stage

_METRICS = ("loss", "accuracy")


def check_arguments(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """Refuse values that are not supported or contradict each other.

    Raises:
        ValueError: naming the flag, the value and the way out.
    """
    if model.version is not None:
        get_template(model.version)
    zero = zero_stage(training.deepspeed)
    refuse = {
        "--data_path is missing; make data.json with task_data_preprocessing.py": data.data_path is None,
        **_choice_refusals(model, data, training),
        **_quantisation_refusals(model, training, zero),
        **_layer_refusals(training, zero),
        **_learning_refusals(model, training),
        **_trainer_refusals(training, zero),
        **_validation_refusals(data, training),
        **_stage_refusals(model, training),
    }
    reasons = [message for message, applies in refuse.items() if applies]
    if reasons:
        raise ValueError("; ".join(reasons))


def _choice_refusals(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> dict[str, bool]:
    """Return each message about a value that is none of the possible ones, with whether it applies."""
    return {
        "--mm_use_im_start_end True: LLaVA-1.5 has no such tokens; pass False": model.mm_use_im_start_end,
        "--mm_use_im_patch_token True: LLaVA-1.5 has no such token; pass False": model.mm_use_im_patch_token,
        f"--mm_patch_merge_type {model.mm_patch_merge_type}: only flat is supported": model.mm_patch_merge_type
        not in (None, "flat"),
        "--is_multimodal False: rows without image need no flag; leave it out": not data.is_multimodal,
        "--lazy_preprocess False: images are read when needed; leave it out": not data.lazy_preprocess,
        f"--image_aspect_ratio {data.image_aspect_ratio}: choose pad, square or anyres": data.image_aspect_ratio
        not in (None, "pad", "square", "anyres"),
        f"--on_bad_row {data.on_bad_row}: choose error or skip": data.on_bad_row not in ("error", "skip"),
        f"--bits {training.bits}: choose 4, 8 or 16": training.bits not in (4, 8, 16),
        f"--lora_bias {training.lora_bias}: choose none, lora_only or all": training.lora_bias
        not in ("none", "lora_only", "all"),
        "--double_quant False and --quant_type other than nf4 are not supported; leave them out": (
            not training.double_quant or training.quant_type != "nf4"
        ),
    }


def _quantisation_refusals(model: ModelArguments, training: TrainingArguments, zero: int) -> dict[str, bool]:
    """Return each message about 4 and 8 bit with whether it applies, `zero` being the ZeRO stage."""
    return {
        f"--bits {training.bits} holds the LLM frozen; add --lora_enable True": training.bits != 16
        and not training.lora_enable
        and not model.tune_mm_mlp_adapter,
        f"--bits {training.bits} and --tune_mm_mlp_adapter exclude each other; leave --bits out": training.bits != 16
        and model.tune_mm_mlp_adapter,
        f"--bits {training.bits} runs on CUDA and the CPU, not on {training.device.type}; leave it out": (
            training.bits != 16 and training.device.type not in DEVICES
        ),
        f"--bits {training.bits} can't be sharded by --fsdp; leave --fsdp out": training.bits != 16
        and bool(training.fsdp),
        f"--bits {training.bits} can't be partitioned by ZeRO-3; use scripts/zero2.json": training.bits != 16
        and zero == 3,
    }


def _layer_refusals(training: TrainingArguments, zero: int) -> dict[str, bool]:
    """Return each message about how layers are run with whether it applies, `zero` being the ZeRO stage."""
    return {
        f"--compile_layers {training.compile_layers}: choose auto, on or off": training.compile_layers
        not in ("auto", "on", "off"),
        f"--fuse_lora {training.fuse_lora}: choose auto, on or off": training.fuse_lora not in ("auto", "on", "off"),
        f"--checkpoint_layers {training.checkpoint_layers}: choose auto, all or a number": (
            training.checkpoint_layers not in ("auto", "all") and not training.checkpoint_layers.isdecimal()
        ),
        "--fuse_lora on runs compiled on CUDA; leave --compile_layers off out": (
            training.fuse_lora == "on" and training.compile_layers == "off" and training.device.type == "cuda"
        ),
        "--compile_layers on needs rows of few lengths; leave --share_image_prefix False out": (
            training.compile_layers == "on" and not training.share_image_prefix
        ),
        "--compile_layers on can't trace layers that ZeRO-3 partitions; use scripts/zero2.json": (
            training.compile_layers == "on" and zero == 3
        ),
    }


def _learning_refusals(model: ModelArguments, training: TrainingArguments) -> dict[str, bool]:
    """Return each message about what learns with whether it applies."""
    return {
        "--lora_weight_path needs --lora_enable True": bool(training.lora_weight_path) and not training.lora_enable,
        "--tune_mm_mlp_adapter trains the projector alone; leave --lora_enable out": model.tune_mm_mlp_adapter
        and training.lora_enable,
        "--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter exclude each other; leave one out": model.tune_mm_mlp_adapter
        and training.freeze_mm_mlp_adapter,
        "--freeze_backbone and --freeze_mm_mlp_adapter leave nothing to train; leave one out": model.freeze_backbone
        and training.freeze_mm_mlp_adapter
        and not training.lora_enable
        and not model.unfreeze_mm_vision_tower,
    }


def _trainer_refusals(training: TrainingArguments, zero: int) -> dict[str, bool]:
    """Return each message about the trainer's own flags with whether it applies, `zero` being the ZeRO stage."""
    return {
        "--bf16 and --fp16 exclude each other": training.bf16 and training.fp16,
        f"--sanity_check {training.sanity_check}: pass the number of steps, or 0": training.sanity_check < 0,
        "--sanity_check needs the whole model on each device; leave it out with --fsdp and ZeRO-3": (
            training.sanity_check > 0 and (bool(training.fsdp) or zero == 3)
        ),
        "--neftune_noise_alpha can't be computed on rows with images; leave it out": bool(training.neftune_noise_alpha),
        "--label_smoothing_factor can't be computed on images' patches; leave it out": bool(
            training.label_smoothing_factor
        ),
        "--remove_unused_columns True would remove the images; leave it out": training.remove_unused_columns,
    }


def _validation_refusals(data: DataArguments, training: TrainingArguments) -> dict[str, bool]:
    """Return each message with whether it applies."""
    has_data = data.eval_data_path is not None or data.val_share is not None
    validates = training.eval_strategy != "no"
    metric = (training.metric_for_best_model or "").removeprefix("eval_")
    return {
        "--eval_data_path and --val_share exclude each other; pass one": data.eval_data_path is not None
        and data.val_share is not None,
        f"--val_share {data.val_share}: choose a share between 0 and 1, for example 0.02": data.val_share is not None
        and not 0 < data.val_share < 1,
        "--eval_image_folder needs --eval_data_path": data.eval_image_folder is not None
        and data.eval_data_path is None,
        "--eval_strategy needs data to validate on; pass --val_share 0.02 or --eval_data_path": validates
        and not has_data,
        "--eval_data_path and --val_share need --eval_strategy steps, with --eval_steps, or epoch": has_data
        and not validates,
        f"--eval_max_questions {data.eval_max_questions}: choose 0 (loss alone) or more": data.eval_max_questions < 0,
        f"--eval_max_new_tokens {data.eval_max_new_tokens}: choose 1 or more": data.eval_max_new_tokens < 1,
        f"--metric_for_best_model {training.metric_for_best_model}: choose eval_loss or eval_accuracy": bool(metric)
        and metric not in _METRICS,
        f"--metric_for_best_model {training.metric_for_best_model} is not measured with --eval_max_questions 0": (
            metric == "accuracy" and data.eval_max_questions == 0
        ),
        f"--load_best_model_at_end needs every validated step saved: give --save_steps {training.save_steps:g} the "
        f"value of --eval_steps {training.eval_steps or 0:g}, or pass --save_strategy best": (
            training.load_best_model_at_end
            and (training.eval_strategy, training.save_strategy) == ("steps", "steps")
            and training.eval_steps != training.save_steps
        ),
        f"--early_stopping_patience {training.early_stopping_patience}: choose 1 or more": (
            training.early_stopping_patience is not None and training.early_stopping_patience < 1
        ),
        "--early_stopping_patience needs --load_best_model_at_end True": training.early_stopping_patience is not None
        and not training.load_best_model_at_end,
    }


def _stage_refusals(model: ModelArguments, training: TrainingArguments) -> dict[str, bool]:
    """Return each message with whether it applies."""
    return {
        "--mm_vision_tower_lr needs --unfreeze_mm_vision_tower True": training.mm_vision_tower_lr is not None
        and not model.unfreeze_mm_vision_tower,
        "--tune_mm_mlp_adapter trains the projector alone; leave --unfreeze_mm_vision_tower out": (
            model.tune_mm_mlp_adapter and model.unfreeze_mm_vision_tower
        ),
        "--fsdp shards over GPUs; on the CPU accelerate leaves it out without a word, so leave it out": (
            bool(training.fsdp) and training.device.type == "cpu"
        ),
        "--fsdp_config with version 1 is not supported; leave the version out, 2 is the default": bool(training.fsdp)
        and (training.fsdp_config or {}).get("version", 2) != 2,
        "--use_dora and --use_rslora need --lora_enable True": (training.use_dora or training.use_rslora)
        and not training.lora_enable,
        "--lora_target_modules needs --lora_enable True": training.lora_target_modules is not None
        and not training.lora_enable,
        "--lora_weight_path brings its own layers and scale; leave --use_dora, --use_rslora and --lora_target_modules "
        "out": bool(training.lora_weight_path)
        and (training.use_dora or training.use_rslora or training.lora_target_modules is not None),
    }
