"""Flags of validation and stages that don't fit each other, each with the way out."""

from __future__ import annotations

import json

import pytest

from llava.train.command_line import parse_arguments

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True", "--report_to", "none"]
STEPS = ["--eval_strategy", "steps", "--eval_steps", "5"]
SHARE = ["--val_share", "0.1", *STEPS]
BEST = ["--load_best_model_at_end", "True", "--save_steps", "5"]
LORA = ["--lora_enable", "True"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SHARE, "--eval_data_path", "x"], "--eval_data_path and --val_share exclude each other; pass one"),
        (["--val_share", "2", *STEPS], "--val_share 2.0: choose a share between 0 and 1, for example 0.02"),
        ([*SHARE, "--eval_image_folder", "x"], "--eval_image_folder needs --eval_data_path"),
        (STEPS, "--eval_strategy needs data to validate on; pass --val_share 0.02 or --eval_data_path"),
        (
            ["--val_share", "0.1"],
            "--eval_data_path and --val_share need --eval_strategy steps, with --eval_steps, or epoch",
        ),
        ([*SHARE, "--eval_max_questions", "-1"], "--eval_max_questions -1: choose 0 (loss alone) or more"),
        ([*SHARE, "--eval_max_new_tokens", "0"], "--eval_max_new_tokens 0: choose 1 or more"),
        (
            [*SHARE, *BEST, "--metric_for_best_model", "bleu"],
            "--metric_for_best_model bleu: choose eval_loss or eval_accuracy",
        ),
        (
            [*SHARE, *BEST, "--metric_for_best_model", "eval_accuracy", "--eval_max_questions", "0"],
            "--metric_for_best_model eval_accuracy is not measured with --eval_max_questions 0",
        ),
        (
            [*SHARE, *BEST, "--save_steps", "10"],
            "--load_best_model_at_end needs every validated step saved: give --save_steps 10 the value of "
            "--eval_steps 5, or pass --save_strategy best",
        ),
        ([*SHARE, *BEST, "--early_stopping_patience", "0"], "--early_stopping_patience 0: choose 1 or more"),
        ([*SHARE, "--early_stopping_patience", "2"], "--early_stopping_patience needs --load_best_model_at_end True"),
        (["--mm_vision_tower_lr", "1e-6"], "--mm_vision_tower_lr needs --unfreeze_mm_vision_tower True"),
        (
            ["--tune_mm_mlp_adapter", "True", "--unfreeze_mm_vision_tower", "True"],
            "--tune_mm_mlp_adapter trains the projector alone; leave --unfreeze_mm_vision_tower out",
        ),
        (["--use_dora", "True"], "--use_dora and --use_rslora need --lora_enable True"),
        (["--use_rslora", "True"], "--use_dora and --use_rslora need --lora_enable True"),
        (["--lora_target_modules", "q_proj"], "--lora_target_modules needs --lora_enable True"),
        (
            [*LORA, "--lora_weight_path", "x", "--use_dora", "True"],
            "--lora_weight_path brings its own layers and scale; leave --use_dora, --use_rslora and",
        ),
        (
            ["--fsdp", "full_shard"],
            "--fsdp shards over GPUs; on the CPU accelerate leaves it out without a word, so leave it out",
        ),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError) as caught:
        parse_arguments([*NEEDED, *words])
    assert message in str(caught.value)


def test_the_first_version_of_fsdp(tmp_path):
    (tmp_path / "fsdp.json").write_text(json.dumps({"version": 1}))
    words = ["--fsdp", "full_shard", "--fsdp_config", str(tmp_path / "fsdp.json")]
    with pytest.raises(ValueError, match=r"--fsdp_config with version 1 is not supported; leave the version out, 2 is"):
        parse_arguments([*NEEDED, *words])


def test_what_fits_is_accepted():
    _, data, training = parse_arguments([*NEEDED, *SHARE, *BEST, "--early_stopping_patience", "3"])
    assert (data.val_share, data.val_seed, data.eval_max_questions, data.eval_max_new_tokens) == (0.1, 0, 1000, 64)
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)
    training = parse_arguments([*NEEDED, *SHARE, *BEST, "--metric_for_best_model", "eval_accuracy"])[2]
    assert training.greater_is_better is True
    data = parse_arguments([*NEEDED, *STEPS, "--eval_data_path", "v.json", "--eval_image_folder", "pictures"])[1]
    assert (data.eval_data_path, data.eval_image_folder) == ("v.json", "pictures")
