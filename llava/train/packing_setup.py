"""Set up training over packs: group rows by image prefix, order and pad them, choose how the LLM's layers run."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Sampler

from llava.clip_image_processor import CLIPPixels
from llava.constants import FP8, MASK_BLOCK
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.packed_dataset import PackCollator, PackedDataset
from llava.data.packing import padded_length
from llava.data.prefix_sampler import Sharing, waiting_share
from llava.data.records import EncodedRecord, spliced_length
from llava.model.capabilities import Capabilities, capabilities_of, feature
from llava.model.fp8.linear import find_product_problem
from llava.model.packed.forward import PackedLlavaForCausalLM
from llava.model.planner.workload import Packs, PaddedRows, Workload
from llava.train.flags.arguments import zero_stage
from llava.train.flags.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)

MAX_LENGTHS = 4
"""Padded lengths of a run's packs: `torch.compile` keeps eight versions of a function, and each takes a while."""
FLEX_WIDTHS = (16, 32, 64, 128)
"""Widths of a head that FlexAttention's kernels take on every GPU: wider ones exceed the shared memory of some."""
LONG_PACK_MULTIPLE = 1024
"""Packs of a later epoch that are longer than all of the first epoch are padded to multiples of this many positions."""


class BatchPlan(NamedTuple):
    """The training rows, their order, and how large their batches become.

    Attributes:
        records: the training data.
        patches: positions of one image.
        sampler: order of the rows; None = the trainer's own.
        costs: upper bound of the positions of each batch of the first epoch; empty if rows are not packed.
        workload: the same rows for the memory planner.
    """

    records: Sequence[EncodedRecord]
    patches: int
    sampler: Sampler | None
    costs: list[int]
    workload: Workload


class Loader(NamedTuple):
    """What the trainer's DataLoader is made of.

    Attributes:
        dataset: the rows.
        collator: makes batches of them.
        sampler: their order; None = the trainer's own.
        positions: of the largest batch, padding included.
    """

    dataset: SupervisedDataset
    collator: Callable[[Sequence[Any]], dict[str, Any]]
    sampler: Sampler | None
    positions: int


class LayerExecution(NamedTuple):
    """How the LLM's layers run over packs: with FlexAttention or a dense mask, compiled or not."""

    in_blocks: bool
    compiled: bool


def choose_execution(can: Capabilities, head_width: int, training_args: TrainingArguments) -> LayerExecution:
    """Choose how the LLM's layers run over packs, from the device, the width of a head and the flags."""
    if not training_args.share_image_prefix:
        return LayerExecution(in_blocks=False, compiled=False)
    in_blocks = can.has_triton and head_width in FLEX_WIDTHS
    works = in_blocks and training_args.bits == 16 and holds_all_weights(training_args)
    compiles = training_args.compile_layers == "on" or (training_args.compile_layers == "auto" and works)
    return LayerExecution(in_blocks, compiles)


def describe_execution(can: Capabilities, head_width: int, training_args: TrainingArguments) -> str:
    """Return the line about the device that training starts with."""
    in_blocks, compiles = choose_execution(can, head_width, training_args)
    scaling = ["loss scaling"] if training_args.fp16 else []
    packs = [f"{'FlexAttention' if in_blocks else 'dense'} packs"] if training_args.share_image_prefix else []
    kernels = feature("Triton kernels", compiles and can.has_triton and training_args.fuse_lora != "off")
    return can.describe(training_args.weight_dtype, *scaling, *packs, feature("compilation", compiles), kernels)


def prepare_model(model: nn.Module, training_args: TrainingArguments) -> LayerExecution:
    """Set up the layers as `choose_execution` says: FlexAttention or a dense mask, `torch.compile`, fused LoRA.

    Args:
        model: a `PackedLlavaForCausalLM`, or one with adapters.
        training_args: flags.

    Raises:
        ValueError: if `--fuse_lora on` or `--base_dtype fp8` can't be done with this model.
    """
    llava = inner_llava(model)
    can = capabilities_of(training_args.device)
    execution = choose_execution(can, llava.config.head_dim, training_args)
    if not training_args.share_image_prefix:
        return execution
    if execution.in_blocks:
        llava.use_flex_attention()
    fp8 = training_args.base_dtype == FP8
    if fp8 and (problem := find_product_problem(training_args.device)):
        raise ValueError(f"--base_dtype fp8: {problem}; leave it out")
    if fp8 or training_args.fuse_lora == "on" or (training_args.fuse_lora == "auto" and execution.compiled):
        is_whole = holds_all_weights(training_args)
        reason = llava.fuse_lora(compiled=execution.compiled, fp8=fp8) if is_whole else "the weights are partitioned"
        if reason and (fp8 or training_args.fuse_lora == "on"):
            raise ValueError(f"{'--base_dtype fp8' if fp8 else '--fuse_lora on'}: {reason}; leave it out")
        if training_args.device.type == "cuda":  # else the separate weights, 9 GB of 7B, stay in the allocator as used
            torch.cuda.empty_cache()
    if execution.compiled and llava.fused_lora is None:
        llava.compile_layers()
    if execution.compiled:
        logger.info("the LLM's layers are compiled; the first steps take longer")
    return execution


def holds_all_weights(training_args: TrainingArguments) -> bool:
    """Whether each process holds all weights: not under ZeRO-3, not under FSDP."""
    return zero_stage(training_args.deepspeed) != 3 and not training_args.fsdp


def inner_llava(model: nn.Module) -> PackedLlavaForCausalLM:
    """Return the LLaVA in a model that may be wrapped."""
    return next(module for module in model.modules() if isinstance(module, PackedLlavaForCausalLM))


def plan_batches(records: Sequence[EncodedRecord], patches: int, training_args: TrainingArguments) -> BatchPlan:
    """Group rows by shared image prefix, log what sharing saves, and order them so that a group comes in one batch.

    An image takes `patches` positions.
    """
    lengths = [spliced_length(record.input_ids, patches) for record in records]
    if not training_args.share_image_prefix:
        rows = PaddedRows(max(lengths), len(set(lengths)) > 1, sum(lengths) / len(lengths))
        return BatchPlan(records, patches, None, [], rows)
    packs = Packs.of_records(records, lengths, training_args.seed)
    batch_size, world_size = training_args.train_batch_size, training_args.world_size
    costs = packs.costs(batch_size, world_size)
    logger.info(describe_sharing(packs.sharing, lengths, costs, world_size))
    return BatchPlan(records, patches, packs.sampler(batch_size, world_size), costs, packs)


def build_loader(
    plan: BatchPlan,
    image_processor: CLIPPixels,
    image_settings: ImageSettings,
    pad_token_id: int,
    training_args: TrainingArguments,
    execution: LayerExecution,
) -> Loader:
    """Return dataset, collator and sampler: of packs, or of padded rows if image prefixes are not shared.

    Args:
        plan: from `plan_batches`.
        image_settings: how an image becomes square.
        pad_token_id: fills padded rows.
        execution: from `prepare_model`; compiled layers need packs of few lengths.
    """
    size = image_processor.crop_size["height"]
    dataset_args = (plan.records, image_processor, image_settings, plan.patches)
    if not plan.costs:
        rows = SupervisedDataset(*dataset_args)
        positions = max(rows.lengths) * training_args.train_batch_size
        return Loader(rows, SupervisedCollator(pad_token_id, size), None, positions)
    budget = None if execution.in_blocks else training_args.model_max_length
    costs = plan.costs if budget is None else [min(cost, budget) for cost in plan.costs]
    lengths = few_lengths(costs) if execution.compiled else []
    multiple = LONG_PACK_MULTIPLE if execution.compiled else MASK_BLOCK if execution.in_blocks else 1
    collator = PackCollator(plan.patches, size, budget=budget, multiple=multiple, lengths=lengths)
    positions = padded_length(max(plan.costs), multiple, lengths)
    return Loader(PackedDataset(*dataset_args), collator, plan.sampler, positions)


def few_lengths(costs: Sequence[int]) -> list[int]:
    """Return the at most `MAX_LENGTHS` padded lengths, in whole blocks, that need least padding for these packs."""
    counts = collections.Counter(-(-cost // MASK_BLOCK) * MASK_BLOCK for cost in costs)
    sizes = sorted(counts)
    packs = list(itertools.accumulate((counts[size] for size in sizes), initial=0))
    # Dynamic program: number of smallest sizes covered -> (positions with padding, lengths); a round adds one length.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(min(MAX_LENGTHS, len(sizes))):
        best = {
            stop: min(
                (positions + (packs[stop] - packs[start]) * size, [*lengths, size])
                for start, (positions, lengths) in best.items()
                if start < stop
            )
            for stop, size in enumerate(sizes, start=1)
            if stop > min(best)
        }
    return best[len(sizes)][1]


def describe_sharing(sharing: Sharing, lengths: Sequence[int], costs: Sequence[int], world_size: int) -> str:
    """Return the log line about shared image prefixes: rows, prefixes, positions saved.

    Args:
        lengths: positions of each row.
        costs: positions of each batch of the first epoch.
    """
    if not sharing.saves:
        return f"image prefix: no two of {len(lengths):,} rows share one; {sum(lengths):,} positions an epoch"
    members = sum(len(rows) for rows, shared in zip(sharing.groups, sharing.prefixes, strict=True) if shared)
    prefixes = sum(shared > 0 for shared in sharing.prefixes)
    text = (
        f"image prefix: {members:,} of {len(lengths):,} rows share {prefixes:,} prefixes; {sum(costs):,} positions an "
        f"epoch instead of {sum(lengths):,}, {sum(lengths) / sum(costs):.2f} times fewer"
    )
    if world_size > 1:
        text += f"; {100 * waiting_share(costs, world_size):.1f} % of the processes' time spent waiting for the largest"
    return text
