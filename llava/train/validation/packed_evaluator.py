"""Validation over packs and by the batch engine, for rows that share an image prefix."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX
from llava.conversation import get_template
from llava.data.dataset import ImageSettings, SupervisedCollator, SupervisedDataset
from llava.data.packed_dataset import PackCollator, PackedDataset
from llava.data.records import EncodedRecord
from llava.data.worker_processes import RestartingLoader
from llava.inference.engine.engine import Engine
from llava.inference.engine.limits import Limits
from llava.inference.engine.prefix_groups import common_system_prefix, group_length, group_requests, split_work
from llava.inference.engine.ragged_llama import supports_ragged
from llava.inference.engine.sequence import PrefixGroup, Request
from llava.inference.session import Sampling, Session
from llava.model.checkpoint.checkpoint import Checkpoint
from llava.model.configuration import context_length, features_per_image
from llava.train.fault_tolerance.data_workers import FEWER_WORKERS
from llava.train.flags.arguments import DataArguments
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.packing_setup import holds_all_weights, inner_llava
from llava.train.validation.evaluator import Evaluator, choose_questions, find_questions, to_device


def build_evaluator(
    records: Sequence[EncodedRecord],
    checkpoint: Checkpoint,
    model: nn.Module,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Evaluator | None:
    """Return the evaluator on held-out records; None without records.

    `model` is not yet wrapped by the trainer; `checkpoint` is the start of training.

    Raises:
        ValueError: if accuracy chooses the best checkpoint and no true answer is short enough.
    """
    if not records:
        return None
    config, processor = checkpoint.config, checkpoint.image_processor
    template = get_template(config.conversation_template)
    session = Session(checkpoint.tokenizer, model, processor, template, context_length(config))
    longest = data_args.eval_max_new_tokens
    questions = choose_questions(find_questions(records, session), data_args.eval_max_questions, longest)
    if not questions and training_args.metric_for_best_model in ("accuracy", "eval_accuracy"):
        raise ValueError(
            f"no validation answer has at most --eval_max_new_tokens {longest} tokens, so there is no accuracy; raise "
            "it or pass --metric_for_best_model eval_loss"
        )
    settings = ImageSettings(config.image_aspect_ratio, config.image_grid_pinpoints)
    patches, size = features_per_image(config, config.mm_vision_config), processor.crop_size["height"]
    parts = (records, processor, settings, patches)
    if training_args.share_image_prefix and holds_all_weights(training_args):
        kind, rows = PackedEvaluator, PackedDataset(*parts)
        collator = PackCollator(patches, size, budget=training_args.model_max_length, multiple=1)
    else:
        kind, rows = Evaluator, SupervisedDataset(*parts)
        collator = SupervisedCollator(checkpoint.tokenizer.pad_token_id or 0, size)
    return kind(
        rows=rows,
        collator=collator,
        questions=questions,
        prompts=SupervisedDataset([question.prompt for question in questions], processor, settings, patches),
        session=session,
        max_new_tokens=longest,
        batch_size=training_args.eval_batch_size,
        workers=training_args.dataloader_num_workers,
    )


@dataclass(frozen=True)
class PackedEvaluator(Evaluator):
    """`Evaluator` that computes each image prefix once, several times faster if images have several questions.

    `rows` is a `PackedDataset`, `collator` a `PackCollator`; every process must hold all weights.
    """

    def _loss(self, model: nn.Module, device: torch.device, rank: int, world_size: int) -> tuple[float, int]:
        llava = inner_llava(model)
        total, tokens = 0.0, 0
        with llava.uncompiled_packs():
            for batch in self._batches(self.rows, rows_by_image(self.rows, rank, world_size), self.collator):
                inputs = {name: to_device(value, device) for name, value in batch.items()}
                total += llava(**inputs, num_items_in_batch=1).loss.item()
                tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        return total, tokens

    def _answers(self, rank: int, processes: int) -> Iterator[tuple[int, str]]:
        session, records = self.session, self.prompts.records
        if not supports_ragged(session.model) or not _computes_as_stored(session.model):
            yield from super()._answers(rank, processes)
            return
        requests = [
            Request(number, record.input_ids, tuple(map(os.fspath, record.images)))
            for number, record in enumerate(records)
        ]
        patches = self.prompts.patches_per_image
        system_prefix = common_system_prefix(requests)
        limits = Limits.suiting(session.model.device, self.max_new_tokens)
        groups = group_requests(requests, system_prefix, patches, group_size=limits.group_size)
        groups = split_work(groups, lambda group: group_length(group, patches), processes)[rank]
        limits = replace(limits, group_size=max((len(group.sequences) for group in groups), default=1))
        engine = Engine(session, Sampling(max_new_tokens=self.max_new_tokens), system_prefix, limits=limits)
        images = RestartingLoader(
            _GroupImages(self.prompts, groups),
            range(len(groups)),
            way_out=FEWER_WORKERS,
            is_batched=False,
            num_workers=self.workers,
            generator=torch.Generator(),  # of its own: a loader draws from it
        )
        for sequence in engine.run(groups, iter(images)):
            # A prompt that leaves nothing of the context has no answer.
            yield sequence.request.key, "" if sequence.error else session.decode(sequence.token_ids)


class _GroupImages(Dataset):
    """Pixels of each group's images."""

    def __init__(self, prompts: SupervisedDataset, groups: Sequence[PrefixGroup]) -> None:
        self.prompts = prompts
        self.images = [prompts.records[group.sequences[0].request.key].images for group in groups]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [self.prompts.read_image(path) for path in self.images[index]]


def rows_by_image(rows: SupervisedDataset, rank: int, world_size: int) -> list[int]:
    """Return one rank's part of the rows, sorted by image."""
    ordered = sorted(range(len(rows)), key=lambda row: (list(map(os.fspath, rows.records[row].images)), row))
    return ordered[len(ordered) * rank // world_size : len(ordered) * (rank + 1) // world_size]


def _computes_as_stored(model: nn.Module) -> bool:
    """Whether the LLM computes in the dtype of its weights, as the engine's KV cache needs."""
    weight = model.get_input_embeddings().weight
    kind = weight.device.type
    return not torch.is_autocast_enabled(kind) or weight.dtype == torch.get_autocast_dtype(kind)
