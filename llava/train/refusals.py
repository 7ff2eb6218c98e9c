"""Flags of validation and of the stages that don't fit each other, by the message that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments


_METRICS = ("loss", "accuracy")


def validation_refusals(data: DataArguments, training: TrainingArguments) -> dict[str, bool]:
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


def stage_refusals(model: ModelArguments, training: TrainingArguments) -> dict[str, bool]:
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
