"""Estimates grow with what a setup asks for; what fits keeps the rows per step."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.model.planner.estimate import (
    checkpointed_layers,
    describe_plan,
    fits,
    fitting_inference,
    fitting_training,
    needed_bytes,
    smaller_batches,
    smaller_training,
)
from llava.model.planner.setups import Inference, Training
from llava.model.planner.workload import Packs, PaddedRows
from tests.model.test_memory import LLAVA_7B

GB = 10**9
TABLE = Packs.of_mean(4.25, patches=576)
ROWS = PaddedRows(640)
ZERO2 = "--deepspeed scripts/zero2.json"


def need(run):
    return needed_bytes(LLAVA_7B, run)


def test_the_task_script_on_80_gb():
    assert describe_plan(LLAVA_7B, Training(TABLE), 80 * GB).splitlines() == [
        "  largest of its batches of 16: 3,328 positions, 4.1 questions per image; activation checkpointing: no layer",
        "  frozen weights                           14.1 GB",
        "  trained weights, gradients, optimizer     5.5 GB",
        "  activations                              19.3 GB",
        "  gradients in fp32 at the update           1.4 GB",
        "  CUDA itself                               0.8 GB",
        "  needed on each GPU                       41.0 GB",
        "  available                                80.0 GB",
        "it fits",
    ]


def test_the_task_script_on_24_gb():
    lines = describe_plan(LLAVA_7B, Training(TABLE), 24 * GB).splitlines()
    assert lines[0].endswith("activation checkpointing: 32 of 32 layers")
    assert (lines[-3].split()[-2], lines[-1]) == ("23.6", "it fits")


def test_without_a_gpu_only_the_needed_memory_is_printed():
    assert describe_plan(LLAVA_7B, Inference(), None).splitlines()[-1].split() == [
        "needed", "on", "each", "GPU", "15.3", "GB",
    ]  # fmt: skip


def flags(batch, accumulation, rest=""):
    return (
        f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation} "
        f"--gradient_checkpointing True {rest}{ZERO2}"
    )


@pytest.mark.parametrize(
    ("run", "available", "expected"),
    [
        (Training(TABLE, checkpointing=False), 36, flags(16, 1)),
        (Training(TABLE), 24, flags(16, 1)),
        (Training(TABLE, batch=64), 24, flags(16, 4)),
        (Training(TABLE), 23, flags(4, 4)),
        (Training(TABLE), 16, flags(16, 1, "--bits 4 ")),
        (Training(TABLE), 13.2, flags(4, 4, "--bits 4 ")),
        (Training(ROWS), 16, flags(4, 4, "--bits 4 ")),
        (Training(TABLE, kind="full", gpus=8), 80, flags(16, 1)),
        (Inference(batch=32), 24, "--batch-size 16"),
        (Inference(batch=32), 16, "--batch-size 2"),
        (Inference(), 12, "--batch-size 1 --load-8bit"),
        (Inference(), 8, "--batch-size 1 --load-4bit"),
    ],
)
def test_the_nearest_setup_that_fits(run, available, expected):
    fitting = fitting_training if isinstance(run, Training) else fitting_inference
    available = round(available * GB)
    found = fitting(LLAVA_7B, run, available)
    assert found.flags() == expected
    assert need(found) <= available
    text = describe_plan(LLAVA_7B, run, available)
    if found == run:
        assert text.endswith("it fits")
    else:
        assert text.partition("it does not fit; this does, with ")[2].splitlines()[0].endswith(f" GB: {expected}")


def test_lost_sharing_is_reported():
    text = describe_plan(LLAVA_7B, Training(TABLE), 23 * GB).splitlines()[-1]
    assert text == ("smaller batches share fewer images: 307 positions a question instead of 162, 1.9 times the work")
    assert "share" not in describe_plan(LLAVA_7B, Training(TABLE), 16 * GB).splitlines()[-1]
    assert "share" not in describe_plan(LLAVA_7B, Training(ROWS), 23 * GB).splitlines()[-1]


@pytest.mark.parametrize("run", [Training(TABLE), Training(TABLE, kind="full"), Inference()])
def test_nothing_fits(run):
    message = "it does not fit, nor does anything smaller on such a GPU; use a larger one"
    assert describe_plan(LLAVA_7B, run, 2 * GB).endswith(message)


SETUPS = st.builds(
    Training,
    st.sampled_from([TABLE, ROWS, Packs.of_mean(1, patches=576)]),
    kind=st.sampled_from(["lora", "full", "projector"]),
    batch=st.integers(1, 24),
    accumulation=st.integers(1, 3),
    rank=st.sampled_from([8, 64, 128]),
    bits=st.sampled_from([16, 4]),
    checkpointing=st.booleans(),
    zero=st.sampled_from([0, 2, 3]),
    gpus=st.sampled_from([1, 2]),
    has_flex=st.booleans(),
)


def fitting_batch(run, available):
    """The run with the largest micro-batch that fits and the same rows per step; None if 1 does not."""
    return next((other for other in smaller_batches(run) if fits(LLAVA_7B, other, available)), None)


@settings(max_examples=30, deadline=None)
@given(SETUPS, st.floats(4, 100))
def test_rows_per_step_are_those_asked_for(run, memory):
    available = round(memory * GB)
    assert {other.rows_per_step for other in smaller_training(run)} == {run.rows_per_step}
    found = fitting_batch(run, available)
    if found is not None:
        assert found.rows_per_step == run.rows_per_step
        assert need(found) <= available
        assert found == dataclasses.replace(run, batch=found.batch, accumulation=found.accumulation)
    if fits(LLAVA_7B, run, available):
        assert found == run


@settings(max_examples=30, deadline=None)
@given(SETUPS, st.floats(4, 100), st.floats(1, 2))
def test_more_memory_never_means_smaller_batches_or_more_checkpointed_layers(run, memory, factor):
    less, more = round(memory * GB), round(factor * memory * GB)
    small, large = (fitting_batch(run, available) for available in (less, more))
    assert (small.batch if small else 0) <= (large.batch if large else 0)
    assert checkpointed_layers(LLAVA_7B, run, more) <= checkpointed_layers(LLAVA_7B, run, less)


@settings(max_examples=30, deadline=None)
@given(SETUPS)
def test_more_needs_more(run):
    # Rows of packs with dense masks may be fuller in larger batches.
    assert need(dataclasses.replace(run, batch=2 * run.batch)) >= need(run) * (1.0 if run.has_flex else 0.97)
    assert need(dataclasses.replace(run, rank=2 * run.rank)) >= need(run)
    assert need(dataclasses.replace(run, checkpointing=True)) <= need(dataclasses.replace(run, checkpointing=False))
    assert need(dataclasses.replace(run, trains_tower=True)) > need(run)


def test_layers_are_checkpointed_as_the_flags_say():
    run = Training(TABLE)
    assert checkpointed_layers(LLAVA_7B, run, 80 * GB) == 0
    assert checkpointed_layers(LLAVA_7B, run, 24 * GB) == 32
    assert 0 < checkpointed_layers(LLAVA_7B, run, 36 * GB) < 32
    assert checkpointed_layers(LLAVA_7B, run, None) == 32
    for changes, layers in (
        ({"checkpoint_layers": "all"}, 32),
        ({"checkpoint_layers": "5"}, 5),
        ({"checkpointing": False}, 0),
        ({"bits": 4}, 32),
        ({"workload": ROWS}, 32),
    ):
        assert checkpointed_layers(LLAVA_7B, dataclasses.replace(run, **changes), 80 * GB) == layers


def test_what_is_partitioned_shrinks_with_gpus():
    one, four = (need(Training(ROWS, kind="full", zero=3, gpus=gpus)) for gpus in (1, 4))
    trained = LLAVA_7B.llm_parameters + LLAVA_7B.projector_parameters
    assert one - four == pytest.approx(0.75 * 20 * trained, rel=0.02)
