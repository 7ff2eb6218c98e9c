"""`--fit auto`: the micro-batch that fits, the same rows per step, the same training."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.supervision import encode_example
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.read_tensors import open_tensor_file
from llava.model.memory import ModelSizes
from llava.model.planner.estimate import needed_bytes
from llava.model.planner.setups import Training
from llava.model.planner.workload import Packs
from llava.train import batch_fit
from llava.train.batch_fit import FittedRun, choose_batch, describe_choice, describe_way_out, former_division
from llava.train.distributed import gather_objects
from llava.train.flags.command_line import parse_arguments
from llava.train.flags.training_arguments import set_batch
from tests.model.test_memory import LLAVA_7B

ROOT = Path(__file__).parents[2]
GB = 10**9
TABLE = Packs.of_mean(4.25, patches=576)
LORA = ["--lora_enable", "True", "--lora_r", "2", "--lora_alpha", "4", "--lora_dropout", "0"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 32), st.integers(1, 4), st.sampled_from([1, 2, 8]), st.floats(10, 60))
def test_rows_per_step_do_not_depend_on_batch_accumulation_gpus_and_memory(batch, accumulation, gpus, memory):
    asked = Training(TABLE, batch=batch, accumulation=accumulation, gpus=gpus)
    try:
        chosen = choose_batch(LLAVA_7B, asked, round(memory * GB))
    except ValueError:
        assert needed_bytes(LLAVA_7B, dataclasses.replace(asked, batch=1, accumulation=1)) > memory * GB
        return
    assert chosen.batch * chosen.accumulation * chosen.gpus == batch * accumulation * gpus
    assert needed_bytes(LLAVA_7B, chosen) <= memory * GB
    if needed_bytes(LLAVA_7B, asked) <= memory * GB:
        assert chosen == asked


def test_the_line_that_says_what_was_chosen():
    asked = Training(TABLE)
    chosen = choose_batch(LLAVA_7B, asked, 23 * GB)
    assert describe_choice(LLAVA_7B, asked, chosen, 23 * GB, is_former=False).splitlines() == [
        "--fit auto: batches of 4, accumulated 4 times, instead of 16 x 1; 16 rows a step as asked; 22.4 GB of 23.0 GB",
        "smaller batches share fewer images: 307 positions a question instead of 162, 1.9 times the work",
    ]


def test_nothing_fits_without_other_flags():
    message = (
        "--fit auto: even batches of 1 need 22.0 GB on each GPU, and 16.0 GB are free; pass "
        "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --gradient_checkpointing True --bits 4 "
        "--deepspeed scripts/zero2.json, which needs 14.4 GB; --fit off trains as the flags say"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose_batch(LLAVA_7B, Training(TABLE), 16 * GB)
    with pytest.raises(ValueError, match="nothing smaller fits either: use a larger GPU; --fit off"):
        choose_batch(LLAVA_7B, Training(TABLE), 2 * GB)


def former(batch, accumulation, processes=1):
    flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return {"TrainingArguments": flags, "run": {"processes": processes}}


def test_a_resumed_run_keeps_its_division_where_it_fits():
    asked = Training(TABLE)
    assert former_division(former(4, 4), asked) == 4
    assert choose_batch(LLAVA_7B, asked, 80 * GB, 4).batch == 4
    assert choose_batch(LLAVA_7B, asked, round(22.1 * GB), 4).batch == 1
    for other in (former(4, 2), former(4, 2, 2), former(16, 1, 2), {}, former("4", 4)):
        assert former_division(other, asked) is None
    assert former_division(former(16, 1), Training(TABLE, batch=4, accumulation=4)) is None  # asked for less memory


def test_the_way_out_needs_less():
    run = Training(TABLE, batch=4, accumulation=4, zero=0)
    assert describe_way_out(FittedRun(LLAVA_7B, run, 22 * GB)) == (
        "estimated were 21.7 GB on each GPU of 22.0 GB free at the start; pass --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 16 --gradient_checkpointing True, estimated at 21.4 GB"
    )
    with_choice = describe_way_out(FittedRun(LLAVA_7B, Training(TABLE), 40 * GB))
    assert "--per_device_train_batch_size 16 " in with_choice
    assert "--checkpoint_layers all" in with_choice
    smallest = Training(TABLE, batch=1, bits=4, zero=0)
    assert describe_way_out(FittedRun(LLAVA_7B, smallest, None)) == (
        "estimated were 12.0 GB on each GPU; nothing smaller is known: use a larger GPU"
    )


def parse(tmp_path, *flags):
    words = [
        "--output_dir",
        str(tmp_path),
        "--data_path",
        "x",
        "--use_cpu",
        "True",
        "--per_device_train_batch_size",
        "8",
    ]
    return parse_arguments([*words, *flags])[2]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_config_follows(tmp_path, stage):
    pytest.importorskip("deepspeed")
    training_args = parse(tmp_path, "--deepspeed", str(ROOT / f"scripts/zero{stage}.json"))
    set_batch(training_args, 2, 4)
    config = training_args.hf_deepspeed_config.config
    assert (training_args.train_batch_size, training_args.gradient_accumulation_steps) == (2, 4)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 8
    assert training_args.deepspeed_plugin.hf_ds_config is training_args.hf_deepspeed_config


def test_a_deepspeed_config_with_numbers_of_its_own_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    config = json.loads((ROOT / "scripts/zero2.json").read_text()) | {"train_micro_batch_size_per_gpu": 8}
    (tmp_path / "own.json").write_text(json.dumps(config))
    training_args = parse(tmp_path, "--deepspeed", str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r'own.json sets train_micro_batch_size_per_gpu to 8, and .*write "auto"'):
        set_batch(training_args, 2, 4)
    assert training_args.per_device_train_batch_size == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fit", "best"], "--fit best: choose auto or off"),
        (["--fit", "auto", "--auto_find_batch_size", "True"], "both choose the batch; pass --fit off"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, *flags)


def rows(count=8):
    return [
        {
            "id": str(index),
            "image": ["landscape.jpg", "portrait.png"][index // 4 % 2],
            "conversations": [
                {"from": "human", "value": f"<image>\nQuestion {index}?"},
                {"from": "gpt", "value": ["red", "a dog on a bench", "no"][index % 3]},
            ],
        }
        for index in range(count)
    ]


@pytest.fixture
def memory_for(monkeypatch, tiny_base):
    """Return the function batch -> None: from now on there is memory for such batches and no larger ones."""
    sizes = ModelSizes.of(open_checkpoint(tiny_base).config)

    def limit(batch):
        def between(training_args):
            run = limit.describe()
            needs = [needed_bytes(sizes, dataclasses.replace(run, batch=size)) for size in (batch, 2 * batch)]
            assert needs[0] < needs[1]
            return sum(needs) // 2

        monkeypatch.setattr(batch_fit, "available_memory", between)

    original = batch_fit.describe_run_setup

    def describe(*args):
        run = original(*args)
        limit.describe = lambda: run
        return run

    monkeypatch.setattr(batch_fit, "describe_run_setup", describe)
    return limit


def adapters(output):
    tensors = open_tensor_file(output / "adapter_model.safetensors")
    return {name: tensors[name] for name in tensors}


SHARED = ["--num_train_epochs", "3", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]


def test_a_fitted_run_learns_what_the_asked_one_does(train_tiny, read_log, memory_for, tmp_path, capsys):
    """All rows are in each step: the loss is the mean over the step's supervised tokens, however it is divided."""
    flags = [*LORA, *SHARED, "--share_image_prefix", "False"]
    assert train_tiny(tmp_path / "asked", rows(), *flags) == 0
    memory_for(2)
    assert train_tiny(tmp_path / "fitted", rows(), *flags, "--fit", "auto") == 0
    assert "--fit auto: batches of 2, accumulated 4 times, instead of 8 x 1; 8 rows a step" in capsys.readouterr().out
    saved = json.loads((tmp_path / "fitted/training.json").read_text())
    assert saved["run"]["rows_per_step"] == 8
    assert saved["TrainingArguments"]["per_device_train_batch_size"] == 2
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-4)):
        found, expected = (read_log(tmp_path / name, key) for name in ("fitted", "asked"))
        assert len(found) >= 3
        assert found == pytest.approx(expected, rel=tolerance)
    one, two = adapters(tmp_path / "fitted"), adapters(tmp_path / "asked")
    assert max((one[name] - two[name]).abs().max().item() for name in two) < 1e-5


def test_what_fits_is_not_changed(train_tiny, memory_for, tmp_path, capsys):
    flags = [*LORA, *SHARED, "--max_steps", "2"]
    assert train_tiny(tmp_path / "off", rows(), *flags, "--fit", "off") == 0
    memory_for(64)
    assert train_tiny(tmp_path / "auto", rows(), *flags, "--fit", "auto") == 0
    output = capsys.readouterr().out
    assert "it fits" in output
    assert "--fit auto" not in output
    one, two = adapters(tmp_path / "auto"), adapters(tmp_path / "off")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_fit_off_keeps_a_batch_that_does_not_fit(train_tiny, memory_for, tmp_path, capsys):
    memory_for(2)
    assert (
        train_tiny(tmp_path / "out", rows(), *LORA, *SHARED, "--max_steps", "1", "--share_image_prefix", "False") == 0
    )
    assert "it does not fit; this does, with" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out/training.json").read_text())
    assert saved["TrainingArguments"]["per_device_train_batch_size"] == 8


def test_a_resumed_fitted_run_is_the_uninterrupted_one_bit_for_bit(train_tiny, memory_for, tmp_path, capsys):
    """On more memory too: the division of the checkpoint is kept, since the order of rows depends on it."""
    flags = [*LORA, *SHARED, "--lora_dropout", "0.1", "--share_image_prefix", "False", "--fit", "auto"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "4"]
    memory_for(2)
    assert train_tiny(tmp_path / "whole", rows(), *flags) == 0
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint-3").rename(tmp_path / "again/checkpoint-3")
    memory_for(64)
    capsys.readouterr()
    assert train_tiny(tmp_path / "again", rows(), *flags) == 0
    assert "batches of 2, accumulated 2 times, instead of 4 x 1; 4 rows a step as asked" in (
        out := capsys.readouterr().out
    )
    assert "as before the interruption" in out
    one, two = adapters(tmp_path / "whole"), adapters(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradients_of_micro_batches_add_up_to_the_whole_batchs_in_fp64(tiny_packed_model, tokenizer):
    """With answers of different lengths: each micro-batch's loss is divided by the supervised tokens of the step."""
    model = tiny_packed_model().double().train()
    texts = ["red", "a dog on a wooden bench", "no", "two of them"]
    encoded = [
        encode_example([{"from": "human", "value": f"Q {number}?"}, {"from": "gpt", "value": text}], "v1", tokenizer)
        for number, text in enumerate(texts)
    ]
    supervised = sum(label >= 0 for _, labels in encoded for label in labels)

    def gradients(division):
        model.zero_grad()
        for start in range(0, len(encoded), division):
            part = encoded[start : start + division]
            longest = max(len(ids) for ids, _ in part)
            ids, labels, seen = (
                torch.tensor([[*values, *[filler] * (longest - len(values))] for values in columns])
                for columns, filler in (
                    ([ids for ids, _ in part], 0),
                    ([labels for _, labels in part], -100),
                    ([[1] * len(ids) for ids, _ in part], 0),
                )
            )
            inputs = {"input_ids": ids % model.config.vocab_size, "attention_mask": seen}
            labels = labels.where(labels < 0, labels % model.config.vocab_size)
            model(**inputs, labels=labels, num_items_in_batch=supervised).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients(4)
    for division in (1, 2):
        for one, two in zip(gradients(division), whole, strict=True):
            assert torch.allclose(one, two, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "ZeRO-2"])
def test_several_processes_fit_the_same_batch(train_forked, read_log, tmp_path, engine):
    """The fullest GPU decides for all of them; the losses are those of the run that was not divided."""
    if engine == "ZeRO-2":
        pytest.importorskip("deepspeed")
    flags = [*LORA, "--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--share_image_prefix", "False"]
    flags += ["--save_strategy", "no", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"]
    flags += ["--deepspeed", str(ROOT / "scripts/zero2.json")] if engine == "ZeRO-2" else []

    def quiet():  # a call of DeepSpeed's own to a function that torch renames
        warnings.filterwarnings("ignore", category=FutureWarning)

    def before():
        quiet()

        def between(training_args):
            sizes, run = seen[0]
            batch = 2 + training_args.process_index  # rank 0 has memory for 2 rows, rank 1 for 3
            needs = [needed_bytes(sizes, dataclasses.replace(run, batch=size)) for size in (batch, batch + 1)]
            return min(gather_objects(sum(needs) // 2))

        def describe(plan, config, *args):
            seen.append((ModelSizes.of(config), original(plan, config, *args)))
            return seen[0][1]

        seen, original = [], batch_fit.describe_run_setup
        batch_fit.describe_run_setup, batch_fit.available_memory = describe, between

    asked = train_forked("asked", rows(16), *flags, before=quiet)
    fitted = train_forked("fitted", rows(16), *flags, "--fit", "auto", before=before)
    log = (tmp_path / "fitted.0.log").read_text()
    assert "batches of 2, accumulated 2 times, instead of 4 x 1; 8 rows a step" in log
    saved = json.loads((fitted / "training.json").read_text())
    assert (saved["TrainingArguments"]["per_device_train_batch_size"], saved["run"]["rows_per_step"]) == (2, 8)
    found, expected = (read_log(output, "loss") for output in (fitted, asked))
    assert len(found) == 4
    # All rows of a step are the same, whichever rank computes them.
    assert found == pytest.approx(expected, rel=1e-4)
