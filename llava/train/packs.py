"""Training on packs: which rows share what, in which order they come, and how the LLM's layers run over them."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Sampler

from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.packed_dataset import PackCollator, PackedDataset
from llava.data.packing import BLOCK, padded_length
from llava.data.records import EncodedRecord, spliced_length
from llava.data.sharing import SharedPrefixSampler, Sharing, batch_costs, find_sharing, waiting_share
from llava.image_processing import CLIPPixels
from llava.model.fused_layers import FusedLayers, why_not_fused
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.pack import attend_in_blocks, compile_layers
from llava.train.arguments import TrainingArguments, zero_stage

logger = logging.getLogger(__name__)

MOST_LENGTHS = 4
"""Padded lengths of a run's packs: `torch.compile` keeps eight versions of a function, and each takes a while."""
BEYOND = 1024
"""Packs of a later epoch that are longer than all of the first one's are padded to multiples of so many positions."""


class Feed(NamedTuple):
    """What a trainer reads.

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


class Order(NamedTuple):
    """Rows, and which of them come together.

    Attributes:
        records: of the training data.
        patches: positions of a picture.
        sampler: order of the rows; None = the trainer's own.
        costs: positions of each batch of the first epoch, at most; empty if rows don't become packs.
    """

    records: Sequence[EncodedRecord]
    patches: int
    sampler: Sampler | None
    costs: list[int]

    def planned_lengths(self, batch_size: int) -> list[int]:
        """Return positions of rows for a plan of memory: each row's own, or the largest pack's share for one row."""
        if self.costs:
            return [-(-max(self.costs) // batch_size)]
        return [spliced_length(record.input_ids, self.patches) for record in self.records]


class LayersRun(NamedTuple):
    """How the LLM's layers run over packs: attention by FlexAttention or with a dense mask, compiled or not."""

    in_blocks: bool
    compiled: bool


def prepare_model(model: nn.Module, training_args: TrainingArguments) -> LayersRun:
    """Choose how the LLM's layers run over packs.

    Args:
        model: a `LlavaLlamaForCausalLM`, or one with adapters.
        training_args: flags.

    Raises:
        ValueError: if `--fuse_lora on` can't be done with this model.
    """
    if not training_args.share_image_prefix:
        return LayersRun(in_blocks=False, compiled=False)
    llava = inner_llava(model)
    on_cuda = training_args.device.type == "cuda"
    width = llava.config.head_dim
    in_blocks = on_cuda and width >= 16 and width.bit_count() == 1  # others FlexAttention's kernels don't take
    if in_blocks:
        attend_in_blocks(llava)
    is_whole = holds_all_weights(training_args)
    works = in_blocks and training_args.bits == 16 and is_whole
    compiles = training_args.compile_layers == "on" or (training_args.compile_layers == "auto" and works)
    if training_args.fuse_lora == "on" or (training_args.fuse_lora == "auto" and compiles):
        reason = fuse_model(llava, compiled=compiles) if is_whole else "the weights are partitioned"
        if reason and training_args.fuse_lora == "on":
            raise ValueError(f"--fuse_lora on: {reason}; leave it out")
    if compiles and llava.fused_layers is None:
        compile_layers(llava)
    if compiles:
        logger.info("the LLM's layers are compiled; the first steps take longer")
    return LayersRun(in_blocks, compiles)


def holds_all_weights(training_args: TrainingArguments) -> bool:
    """Tell whether each process has all weights, not a part of them."""
    return zero_stage(training_args.deepspeed) != 3 and not training_args.fsdp


def fuse_model(model: nn.Module, *, compiled: bool) -> str | None:
    """Let packs run through `FusedLayers` if the model's layers can; return why not, None if they do.

    Args:
        model: a `LlavaLlamaForCausalLM`, or one with adapters.
        compiled: compile them.
    """
    llava = inner_llava(model)
    reason = why_not_fused(llava)
    if reason is None:
        llava.fused_layers = FusedLayers(llava, compiled=compiled)
    return reason


def inner_llava(model: nn.Module) -> LlavaLlamaForCausalLM:
    """Return the LLaVA in a model that may be wrapped."""
    return next(module for module in model.modules() if isinstance(module, LlavaLlamaForCausalLM))


def choose_order(records: Sequence[EncodedRecord], patches: int, training_args: TrainingArguments) -> Order:
    """Find what rows share, log what it saves, and choose the order that keeps rows of one image together.

    Args:
        records: of the training data.
        patches: positions of a picture.
        training_args: flags.
    """
    if not training_args.share_image_prefix:
        return Order(records, patches, None, [])
    lengths = [spliced_length(record.input_ids, patches) for record in records]
    sharing = find_sharing(records, lengths)
    batch_size, processes = training_args.train_batch_size, training_args.world_size
    sampler = SharedPrefixSampler(sharing, batch_size, processes, training_args.seed) if sharing.saves else None
    costs = sampler.costs() if sampler else batch_costs(range(len(records)), batch_size, sharing)
    logger.info(describe_sharing(sharing, lengths, costs, processes))
    return Order(records, patches, sampler, costs)


def choose_feed(
    order: Order,
    image_processor: CLIPPixels,
    image_settings: ImageSettings,
    pad_token_id: int,
    training_args: TrainingArguments,
    layers_run: LayersRun,
) -> Feed:
    """Return packs, or padded rows if prefixes are not shared.

    Args:
        order: from `choose_order`.
        image_processor: of the model.
        image_settings: how a picture is brought to a square.
        pad_token_id: of padded rows.
        training_args: flags.
        layers_run: from `prepare_model`; compiled layers want packs of few lengths.
    """
    size = image_processor.crop_size["height"]
    parts = (order.records, image_processor, image_settings, order.patches)
    if not order.costs:
        rows = SupervisedDataset(*parts)
        positions = max(rows.lengths) * training_args.train_batch_size
        return Feed(rows, SupervisedCollator(pad_token_id, size), None, positions)
    budget = None if layers_run.in_blocks else training_args.model_max_length
    rows = order.costs if budget is None else [min(cost, budget) for cost in order.costs]
    lengths = few_lengths(rows) if layers_run.compiled else []
    multiple = BEYOND if layers_run.compiled else BLOCK if layers_run.in_blocks else 1
    collator = PackCollator(order.patches, size, budget=budget, multiple=multiple, lengths=lengths)
    positions = padded_length(max(order.costs), multiple, lengths)
    return Feed(PackedDataset(*parts), collator, order.sampler, positions)


def few_lengths(costs: Sequence[int]) -> list[int]:
    """Return at most `MOST_LENGTHS` lengths, of whole blocks, to which packs of these positions are padded least."""
    counts = collections.Counter(-(-cost // BLOCK) * BLOCK for cost in costs)
    sizes = sorted(counts)
    packs = list(itertools.accumulate((counts[size] for size in sizes), initial=0))
    # For the smallest sizes, so many of them: positions with padding, and the lengths, of which each round adds one.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(min(MOST_LENGTHS, len(sizes))):
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


def describe_sharing(sharing: Sharing, lengths: Sequence[int], costs: Sequence[int], processes: int) -> str:
    """Return what sharing saves, in words.

    Args:
        sharing: of the data.
        lengths: positions of each row.
        costs: positions of each batch of the first epoch.
        processes: that share the batches.
    """
    if not sharing.saves:
        return f"image prefix: no two of {len(lengths):,} rows share one; {sum(lengths):,} positions an epoch"
    behind = sum(len(rows) for rows, shared in zip(sharing.groups, sharing.prefixes, strict=True) if shared)
    prefixes = sum(shared > 0 for shared in sharing.prefixes)
    text = (
        f"image prefix: {behind:,} of {len(lengths):,} rows share {prefixes:,} prefixes; {sum(costs):,} positions an "
        f"epoch instead of {sum(lengths):,}, {sum(lengths) / sum(costs):.2f} times fewer"
    )
    if processes > 1:
        text += f"; {100 * waiting_share(costs, processes):.1f} % of the processes' time spent waiting for the largest"
    return text
