"""Flags that contradict each other or have unsupported values are refused, with what to do."""

from __future__ import annotations

import argparse
import json

import pytest

from llava.data.table.options import TableOptions, add_table_flags, table_options
from llava.train.flags.check_arguments import check_arguments
from llava.train.flags.command_line import parse_arguments

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
        (
            ["--push_to_hub", "True", "--hub_model_id", "us/model", "--hub_private_repo", "True"],
            "--push_to_hub: a training does not upload, so that a failed upload can't end it; leave it out, and run "
            "afterwards: python scripts/push_to_hub.py --path out --repo us/model --private",
        ),
        (["--push_to_hub", "True"], "scripts/push_to_hub.py --path out --repo OWNER/NAME"),
        (["--sheet", "Лист1"], "--sheet has no effect for --data_path data.json, which is not a table; leave"),
        (["--data_path", "t.csv", "--delimiter", "abc"], "--delimiter: 'abc' is not a character between columns"),
        (["--data_path", "t.csv", "--encoding", "windows"], "--encoding: 'windows' is not an encoding"),
        (["--data_path", "t.csv", "--image_name", "a.jpg"], "--image_name: 'a.jpg' gives every image one name"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: choose 1 or more"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0: choose 1 or more"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: choose 1 or more"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers -1: choose 0 or more"),
        (["--model_max_length", "0"], "--model_max_length 0: choose 1 or more"),
        (["--lora_r", "0"], "--lora_r 0: choose 1 or more"),
        (["--lora_dropout", "1"], "--lora_dropout 1: choose a share from 0 to below 1"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0: choose more than 0"),
        (["--max_steps", "0"], "--max_steps 0 trains nothing; leave it out, or pass the number of steps"),
        (["--save_steps", "0"], "--save_steps 0: choose more than 0, or pass --save_strategy no"),
        (["--output_dir", __file__], "is a file; name a directory"),
        (["--use_liger_kernel", "True"], "--use_liger_kernel True: Liger has no kernels for this model; leave it out"),
        (["--eval_on_start", "True"], "--eval_on_start True needs data to validate on; pass --val_share 0.02 or"),
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
            ["--fsdp"],
            "--fsdp shards over GPUs; on the CPU accelerate leaves it out without a word, so leave it out",
        ),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError) as caught:
        parse_arguments([*NEEDED, *words])
    assert message in str(caught.value)


def test_version_1_of_fsdp(tmp_path, transformers_log):
    (tmp_path / "fsdp.json").write_text(json.dumps({"version": 1}))
    words = ["--fsdp", "--fsdp_config", str(tmp_path / "fsdp.json")]
    with pytest.raises(ValueError, match=r"--fsdp_config with version 1 is not supported; leave the version out, 2 is"):
        parse_arguments([*NEEDED, *words])
    transformers_log.clear()  # it says that version 1 is deprecated, before we refuse it


def test_what_fits_is_accepted():
    _, data, training = parse_arguments([*NEEDED, *SHARE, *BEST, "--early_stopping_patience", "3"])
    assert (data.val_share, data.val_seed, data.eval_max_questions, data.eval_max_new_tokens) == (0.1, 0, 1000, 64)
    assert (training.metric_for_best_model, training.greater_is_better) == ("loss", False)
    training = parse_arguments([*NEEDED, *SHARE, *BEST, "--metric_for_best_model", "eval_accuracy"])[2]
    assert training.greater_is_better is True
    data = parse_arguments([*NEEDED, *STEPS, "--eval_data_path", "v.json", "--eval_image_folder", "more_images"])[1]
    assert (data.eval_data_path, data.eval_image_folder) == ("v.json", "more_images")


def test_a_run_does_not_resume_from_the_pickle_of_a_sharded_state():
    model, data, training = parse_arguments(NEEDED)
    training.fsdp, training.fsdp_config = True, {"state_dict_type": "SHARDED_STATE_DICT"}
    with pytest.raises(ValueError, match=r"^--fsdp_config with state_dict_type SHARDED_STATE_DICT is not supported"):
        check_arguments(model, data, training)
    for config in ({"state_dict_type": "full_state_dict"}, {}, None):
        training.fsdp_config = config
        check_arguments(model, data, training)


def test_training_has_the_flags_of_tables():
    """Every program spells them alike, and reads the same options of them."""
    parser = argparse.ArgumentParser()
    add_table_flags(parser)
    words = ["--image_id_column", "photo", "--question_column", "text", "--question_id_column", "n", "--answer_column"]
    words += ["a", "b", "--image_name", "{id}.png", "--delimiter", "tab", "--encoding", "cp1251", "--sheet", "Лист 1"]
    expected = table_options(parser.parse_args(words))
    _, data, _ = parse_arguments([*NEEDED, "--data_path", "t.csv,t.xlsx", *words])
    assert data.table_options() == expected
    given = {action.dest for action in parser._actions} - {"help"}
    assert all(getattr(data, name) is not None for name in given)
    assert parse_arguments([*NEEDED, "--data_path", "t.csv"])[1].table_options() == TableOptions()
