"""Fit the micro-batch to the GPU before the weights are loaded (`--fit auto`), and print the memory estimate.

The rows of an optimizer step stay what the flags ask for: a smaller micro-batch is made up for by more of them. The
loss is the mean over a step's supervised tokens, so that the gradient is the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava.files.terminal_text import print_text
from llava.model.capabilities import capabilities_of
from llava.model.configuration import LlavaConfig
from llava.model.devices import free_memory
from llava.model.memory import ModelSizes
from llava.model.planner.estimate import (
    checkpointed_layers,
    describe_lost_sharing,
    describe_plan,
    fits,
    fitting_training,
    format_gigabytes,
    needed_bytes,
    smaller_batches,
    smaller_training,
)
from llava.model.planner.setups import Training
from llava.train.distributed import gather_objects
from llava.train.fault_tolerance.resume import former_settings
from llava.train.flags.arguments import (
    ModelArguments,
    is_first_process,
    is_offloaded,
    output_kind,
    zero_stage,
)
from llava.train.flags.training_arguments import TrainingArguments, set_batch
from llava.train.model_setup import adapter_rank
from llava.train.packing_setup import FLEX_WIDTHS, BatchPlan, plan_batches

logger = logging.getLogger(__name__)


class FittedRun(NamedTuple):
    """A training run as the planner sees it.

    Attributes:
        sizes: of the model.
        run: with the micro-batch that is trained with.
        available: bytes free on the fullest of the GPUs before the model is loaded; None = not a GPU.
    """

    sizes: ModelSizes
    run: Training
    available: int | None


def fit_batches(
    plan: BatchPlan, config: LlavaConfig, model_args: ModelArguments, training_args: TrainingArguments
) -> tuple[BatchPlan, FittedRun]:
    """Print the memory estimate of a GPU and, under `--fit auto`, set the micro-batch that fits; on all ranks.

    Args:
        plan: for the micro-batch that the flags ask for.
        config: of the base.
        model_args, training_args: flags; batch and accumulation of the latter may change.

    Returns:
        the plan for the micro-batch that is trained with, and the run for later estimates.

    Raises:
        ValueError: if under `--fit auto` not even a micro-batch of one row fits; the message names a setup that does.
    """
    sizes, asked = ModelSizes.of(config), describe_run_setup(plan, config, model_args, training_args)
    available = available_memory(training_args)
    if available is None:
        return plan, FittedRun(sizes, asked, None)
    if is_first_process():
        print_text(f"memory on each GPU, estimated\n{describe_plan(sizes, asked, available)}", flush=True)
    if training_args.fit == "off":
        return plan, FittedRun(sizes, asked, available)
    former = gather_objects(former_division(former_settings(training_args), asked))[0]
    chosen = choose_batch(sizes, asked, available, former)
    if chosen.batch != asked.batch:
        if is_first_process():
            print_text(describe_choice(sizes, asked, chosen, available, is_former=chosen.batch == former), flush=True)
        set_batch(training_args, chosen.batch, chosen.accumulation)
        plan = plan_batches(plan.records, plan.patches, training_args)
    return plan, FittedRun(sizes, chosen, available)


def available_memory(training_args: TrainingArguments) -> int | None:
    """Return the bytes free on the fullest GPU of the run; None on other devices. Every rank must call it."""
    if training_args.device.type != "cuda":
        return None
    return min(gather_objects(free_memory(training_args.device)))


def describe_run_setup(
    plan: BatchPlan, config: LlavaConfig, model_args: ModelArguments, training_args: TrainingArguments
) -> Training:
    """Return the planner's setup of a run from its flags and data."""
    can = capabilities_of(training_args.device)
    return Training(
        plan.workload,
        kind=output_kind(model_args, training_args),
        batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        rank=adapter_rank(training_args),
        dropout=training_args.lora_dropout,
        bits=training_args.bits,
        checkpointing=training_args.checkpoints_activations,
        checkpoint_layers=training_args.checkpoint_layers,
        zero=zero_stage(training_args.deepspeed),
        offload=is_offloaded(training_args.deepspeed),
        gpus=training_args.world_size,
        trains_tower=model_args.unfreeze_mm_vision_tower,
        has_flex=can.has_triton and config.head_dim in FLEX_WIDTHS,
        compiles=training_args.compile_layers != "off" and not training_args.fsdp,
        max_length=training_args.model_max_length,
    )


def former_division(settings: Mapping[str, Any], asked: Training) -> int | None:
    """Return the micro-batch of the run that is resumed, None if it can't be kept.

    It is kept if the rows per step are the same and it is not larger than the one asked for: the order of rows depends
    on it, so that a resumed run is the uninterrupted one only with the same division.
    """
    flags, processes = settings.get("TrainingArguments", {}), settings.get("run", {}).get("processes")
    batch, accumulation = flags.get("per_device_train_batch_size"), flags.get("gradient_accumulation_steps")
    if not isinstance(batch, int) or not isinstance(accumulation, int):
        return None
    is_same = processes == asked.gpus and batch * accumulation * asked.gpus == asked.rows_per_step
    return batch if is_same and batch <= asked.batch else None


def choose_batch(sizes: ModelSizes, asked: Training, available: int, former: int | None = None) -> Training:
    """Return the run with the micro-batch to train with, and the rows per step that were asked for.

    Args:
        sizes: of the model.
        asked: the run as the flags say.
        available: bytes free on each GPU.
        former: micro-batch of the run that is resumed, tried first.

    Raises:
        ValueError: if no micro-batch fits; the message names a setup that does.
    """
    runs = list(smaller_batches(asked))
    runs.sort(key=lambda run: run.batch != former)  # stable: the former one first
    for run in runs:
        if fits(sizes, run, available):
            return run
    smallest = min(runs, key=lambda run: run.batch)
    nearest = fitting_training(sizes, asked, available)
    way_out = (
        f"pass {nearest.flags()}, which needs {format_gigabytes(needed_bytes(sizes, nearest, available))}"
        if nearest
        else "nothing smaller fits either: use a larger GPU"
    )
    raise ValueError(
        f"--fit auto: even batches of {smallest.batch} need {format_gigabytes(needed_bytes(sizes, smallest))} on each "
        f"GPU, and {format_gigabytes(available)} are free; {way_out}; --fit off trains as the flags say"
    )


def describe_choice(sizes: ModelSizes, asked: Training, chosen: Training, available: int, *, is_former: bool) -> str:
    """Return the line that says which micro-batch was chosen, and what it costs."""
    size = format_gigabytes(needed_bytes(sizes, chosen, available))
    text = (
        f"--fit auto: batches of {chosen.batch}, accumulated {chosen.accumulation} times, instead of {asked.batch} x "
        f"{asked.accumulation}; {asked.rows_per_step} rows a step as asked; {size} of {format_gigabytes(available)}"
    )
    if is_former:
        text += "; as before the interruption"
    return "\n".join([text, *describe_lost_sharing(asked, chosen)])


def describe_way_out(fitted: FittedRun) -> str:
    """Return the planner's line for a run that is out of memory all the same, and the flags of the next smaller one."""
    sizes, run, available = fitted
    needed = needed_bytes(sizes, run, available)
    estimate = f"estimated were {format_gigabytes(needed)} on each GPU"
    estimate += f" of {format_gigabytes(available)} free at the start" if available is not None else ""
    others = [other for other in smaller_training(run) if other != run]
    if run.chooses_layers and checkpointed_layers(sizes, run, available) < sizes.layers:
        others.insert(0, dataclasses.replace(run, checkpoint_layers="all"))
    smaller = next((other for other in others if needed_bytes(sizes, other) < needed), None)
    if smaller is None:
        return f"{estimate}; nothing smaller is known: use a larger GPU"
    less = format_gigabytes(needed_bytes(sizes, smaller))
    return f"{estimate}; pass {smaller.flags()}, estimated at {less}"
